"""Formats and templates of every page. No scripts, no fonts, nothing loaded; text of a run never becomes markup."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

__all__ = ["chip", "esc", "figure", "num", "prose", "render", "short", "table", "token_text"]

# C0 and C1 controls, and the marks that reorder text: all of them can make a page say what it does not.
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufffe\uffff]")
EXPONENT = re.compile(r"e([+-])0*(\d+)")
WHOLE = re.compile(r"[-+]?\d[\d.,]*e?-\d+|[-+]\d[\d.,]*\d")
# Byte-level and sentencepiece vocabularies write a space as U+0120 or U+2581 and a line break as U+010A.
SIGNS = str.maketrans(dict(zip(" \u0120\u2581\n\u010a\t", "\u2423\u2423\u2423\u23ce\u23ce\u21e5", strict=True)))
LONG = 13  # characters shown of one token
NOTHING = Markup('<span class="none">&ndash;</span>')


def _visible(text: str) -> str:
    return INVISIBLE.sub(lambda m: ascii(m[0])[1:-1], text)


def esc(value: object) -> Markup:
    """Text for HTML: markup escaped (unless it is Markup already), invisible characters spelled out."""
    return Markup(_visible(escape(value)))


def token_text(token: str) -> Markup:
    """A token as a reader can see it: spaces, line breaks and tabs become signs, a long token is cut."""
    shown = token.translate(SIGNS)
    return esc(shown if len(shown) <= LONG else f"{shown[: LONG - 1]}\u2026") if shown else Markup("(empty)")


def num(value: object, spec: str = ".3g") -> Markup:
    """A number in `spec`, text as it is, a dash for None, and the word for a number that is not finite."""
    if value is None:
        return NOTHING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return esc(value)
    if not math.isfinite(value):
        return Markup(f'<span class="bad">{value!r}</span>')
    return Markup(_plain_exponent(format(value, spec)))


def short(value: float) -> str:
    """A number in two or three digits, as it is said or stands at an axis: 1e-9, 4.2e-6, 0.05, 1,200."""
    if not math.isfinite(value) or value == 0 or 0.01 <= abs(value) < 1e6:
        return f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.3g}"
    return _plain_exponent(f"{value:.1e}").replace(".0e", "e")


def plain(value: float) -> str:
    """A number in four digits, or whole, for text that is pasted elsewhere."""
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"


def _plain_exponent(number: str) -> str:
    return EXPONENT.sub(lambda m: f"e{m[1].rstrip('+')}{m[2]}", number)


def prose(value: object) -> Markup:
    """Text for HTML in which no number breaks at its sign or exponent."""
    return Markup(WHOLE.sub(lambda m: f'<span class="whole">{m[0]}</span>', esc(value)))


ENVIRONMENT = Environment(
    loader=PackageLoader("rlalign.report"),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {"json": json.dumps, "num": num, "plain": plain, "prose": prose, "repr": repr, "short": short}
ENVIRONMENT.filters["token"] = token_text
MACROS = vars(ENVIRONMENT.get_template("parts.html").module)


def render(template: str, **content: object) -> str:
    """The whole document from templates/`template`."""
    return _visible(ENVIRONMENT.get_template(template).render(content))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, cls: str = "", cap: int = 50) -> Markup:
    """A table, a row's first cell as its header. At most `cap` rows; the rest is counted, never dropped in silence."""
    return MACROS["table"](head, rows, cls, cap)


def figure(svg: str, title: str, note: str = "", *legends: str, wide: bool = False) -> Markup:
    """A chart with its caption and legends (a line each) above it. wide: over the whole width; a phone scrolls it."""
    return MACROS["figure"](svg, title, note, legends, wide)


def chip(color: str) -> Markup:
    """A small square in the colour of a run or a phase."""
    return MACROS["chip"](color)
