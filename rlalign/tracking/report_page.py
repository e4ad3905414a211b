"""HTML pieces of the report: escaping, number formats, tables, the page. No scripts, no fonts, nothing loaded."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from string import Template

# C0 and C1 controls, and the marks that reorder text: all of them can make a page say what it does not.
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufffe\uffff]")
EXPONENT = re.compile(r"e([+-])0*(\d+)")
SIGNS = str.maketrans(
    {" ": "\u2423", "\u0120": "\u2423", "\u2581": "\u2423", "\n": "\u23ce", "\u010a": "\u23ce", "\t": "\u21e5"}
)
LONG = 13  # characters shown of one token
NOTHING = '<span class="none">&ndash;</span>'


def esc(value: object) -> str:
    """Text for HTML: markup escaped, invisible characters spelled out."""
    return html.escape(INVISIBLE.sub(lambda m: ascii(m[0])[1:-1], str(value)))


def token_text(token: str) -> str:
    """A token as a reader can see it: spaces, line breaks and tabs become signs, a long token is cut.

    Byte-level and sentencepiece vocabularies write a space as U+0120 or U+2581 and a line break as U+010A.
    """
    shown = token.translate(SIGNS)
    return esc(shown if len(shown) <= LONG else f"{shown[: LONG - 1]}\u2026") if shown else "(empty)"


def num(value: object, spec: str = ".3g") -> str:
    """A number in `spec`, text as it is, a dash for None, and the word for a number that is not finite."""
    if value is None:
        return NOTHING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return esc(value)
    if not math.isfinite(value):
        return f'<span class="bad">{value!r}</span>'
    return EXPONENT.sub(lambda m: f"e{m[1].rstrip('+')}{m[2]}", format(value, spec))


def short(value: float) -> str:
    """A number in two or three digits, as it is said or stands at an axis: 1e-9, 4.2e-6, 0.05, 1,200."""
    if not math.isfinite(value) or value == 0 or 0.01 <= abs(value) < 1e6:
        return f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.3g}"
    return EXPONENT.sub(lambda m: f"e{m[1].rstrip('+')}{m[2]}", f"{value:.1e}").replace(".0e", "e")


def prose(value: object) -> str:
    """Text for HTML in which no number breaks at its sign or exponent."""
    return re.sub(r"[-+]?\d[\d.,]*e?-\d+|[-+]\d[\d.,]*\d", lambda m: f'<span class="whole">{m[0]}</span>', esc(value))


def chip(color: str) -> str:
    """A small square in the colour of a run or a phase."""
    return f'<span class="chip" style="background:{color}"></span>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, cls: str = "", cap: int = 50) -> str:
    """A table from HTML cells. At most `cap` rows; the rest is counted, never dropped in silence."""
    body = "".join(f"<tr>{''.join(_cell(c, i) for i, c in enumerate(row))}</tr>" for row in rows[:cap])
    more = f'<p class="note">{len(rows) - cap:,} more rows are in the run directory.</p>' if len(rows) > cap else ""
    heads = "".join(f'<th scope="col">{h}</th>' for h in head)
    inner = f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="{cls}">{inner}</table></div>{more}'


def _cell(cell: str, index: int) -> str:
    return f'<th scope="row">{cell}</th>' if index == 0 else f"<td>{cell}</td>"


def figure(svg: str, title: str, note: str = "", *legends: str) -> str:
    """A chart with its caption above it. title, note and legends (a line each) are HTML."""
    note = f'<span class="note">{note}</span>' if note else ""
    lines = "".join(f'<span class="legend">{line}</span>' for line in legends if line)
    return f"<figure><figcaption><b>{title}</b>{note}{lines}</figcaption>{svg}</figure>"


def wide(svg: str) -> str:
    """A chart over the whole width; on a phone it keeps a readable size and scrolls."""
    return f'<div class="scroll wide">{svg}</div>'


def grid(figures: Sequence[str]) -> str:
    """Charts side by side where there is room; those that are empty take none, and nothing at all is empty too."""
    found = "".join(figures)
    return f'<div class="grid">{found}</div>' if found else ""


def section(title: str, body: str, lead: str = "") -> str:
    """A section; empty when there is nothing in it."""
    lead = f'<p class="lead">{lead}</p>' if lead else ""
    return f"<section><h2>{title}</h2>{lead}{body}</section>" if body else ""


def details(summary: str, body: str) -> str:
    """A part that opens on click."""
    return f"<details><summary>{summary}</summary>{body}</details>"


def page(title: str, body: str) -> str:
    """The whole document."""
    return PAGE.substitute(title=esc(title), style=STYLE, body=body)


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title>
<style>$style</style>
</head>
<body><main>
$body
</main></body>
</html>
""")

STYLE = """
:root { --ink:#1f2430; --quiet:#5d6675; --line:#dfe2e8; --soft:#f5f6f8;
  --good:#1b7a46; --bad:#b3261e; color-scheme:light }
* { box-sizing:border-box }
html { -webkit-text-size-adjust:100% }
body { margin:0; background:#fff; color:var(--ink);
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",Arial,sans-serif }
main { max-width:1080px; margin:0 auto; padding:40px 24px 72px }
h1 { font-size:30px; line-height:1.2; letter-spacing:-.015em; margin:2px 0 6px; overflow-wrap:anywhere }
h2 { font-size:19px; letter-spacing:-.005em; margin:40px 0 2px; padding-top:16px; border-top:1px solid var(--line) }
p { margin:6px 0 }
.over { color:var(--quiet); font-size:13px; font-weight:600; letter-spacing:.06em; text-transform:uppercase }
.meta, .lead, .note { color:var(--quiet) }
.meta { font-size:14px } .lead { font-size:15px; max-width:72ch; margin-bottom:14px }
.note { font-size:13px; display:block; font-weight:400 }
.badge { display:inline-block; font-size:13px; font-weight:600; line-height:1; padding:5px 9px; border-radius:99px;
  vertical-align:4px; margin-left:6px; letter-spacing:0; color:var(--bad); background:#fbeae8 }
.badge.finished { color:var(--good); background:#e6f4ec } .badge.running { color:#7a5600; background:#fdf3da }
.verdict { margin:22px 0 26px; padding:14px 18px; border-left:4px solid var(--good); background:#f2f9f5;
  border-radius:0 6px 6px 0 }
.verdict.problem { border-color:var(--bad); background:#fdf4f3 }
.verdict ul { margin:6px 0 4px; padding-left:20px } .verdict b:first-child { margin-right:4px }
.verdict, .verdict li { overflow-wrap:anywhere }
.cards { display:grid; grid-template-columns:repeat(auto-fit,minmax(300px,1fr)); gap:12px; margin:0 0 8px }
.card { border:1px solid var(--line); border-radius:8px; padding:13px 16px 12px }
.card h3 { margin:0; font-size:13px; font-weight:600; color:var(--quiet) }
.card .value { font-size:25px; font-weight:600; line-height:1.3; letter-spacing:-.01em;
  font-variant-numeric:tabular-nums }
.card .value small { font-size:16px; font-weight:500; color:var(--good); letter-spacing:0 }
.card .value small.down { color:var(--bad) }
.card p { margin:1px 0 0; font-size:13px; color:var(--quiet) }
.grid > figure { margin-top:0 }
.grid { display:grid; grid-template-columns:repeat(2,minmax(0,1fr)); gap:26px 32px; margin-top:14px }
figure { margin:0; min-width:0 } figcaption { font-size:15px; line-height:1.4; margin-bottom:6px }
figure svg { display:block; width:100%; height:auto } figure svg text { font-family:inherit !important }
.wide svg { min-width:840px } p + figure, figure + figure { margin-top:16px }
.legend { display:block; font-size:13px } .legend span.item { white-space:nowrap; margin-right:14px }
.chip { display:inline-block; width:10px; height:10px; border-radius:2px; margin-right:6px }
.dash { display:inline-block; width:20px; margin-right:6px; vertical-align:4px; border-top:2px solid var(--ink) }
.scroll { overflow-x:auto; margin:10px 0 }
table { border-collapse:collapse; width:100%; font-size:14px; font-variant-numeric:tabular-nums }
th, td { text-align:left; padding:6px 16px 6px 0; border-bottom:1px solid var(--line); vertical-align:baseline;
  white-space:nowrap }
thead th { font-size:13px; color:var(--quiet); font-weight:600; border-bottom-color:#c6cbd4 }
tbody th { font-weight:400 } tr:last-child th, tr:last-child td { border-bottom:0 }
table.numbers td { text-align:right } table.numbers thead th:not(:first-child) { text-align:right }
table.numbers th:last-child, table.numbers td:last-child { padding-right:0 }
.wrap { display:block; white-space:normal; overflow-wrap:anywhere; min-width:15em; max-width:70ch }
.whole { white-space:nowrap }
table.numbers { max-width:860px }
.diff { color:var(--quiet) } .none { color:#9aa1ad } .bad { color:var(--bad); font-weight:600 }
code, pre, .mono { font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace; font-size:.92em }
pre { background:var(--soft); padding:12px 14px; border-radius:6px; overflow-x:auto; font-size:13px; line-height:1.5 }
mark { background:#ffe2a8; border-radius:3px; padding:1px 3px; color:inherit; font-weight:600 }
.context { color:var(--quiet); white-space:pre }
details { border-top:1px solid var(--line); padding:10px 0 } details:last-child { border-bottom:1px solid var(--line) }
summary { cursor:pointer; font-weight:600; font-size:15px } summary .note { display:inline; margin-left:6px }
@media (max-width:760px) {
  main { padding:24px 16px 56px } h1 { font-size:25px } h2 { margin-top:32px }
  .grid { grid-template-columns:minmax(0,1fr) } .cards { grid-template-columns:1fr; gap:8px }
  table.events thead { display:none } table.events tr { display:block; padding:8px 0; border-bottom:1px solid var(--line) }
  table.events th, table.events td { display:inline-block; border:0; padding:0 12px 2px 0 }
  table.events td:last-child { display:block } table.events .wrap { min-width:0 } .note.wrap { min-width:9em }
  table { font-size:13px } th, td { padding-right:12px } table.numbers tbody th { white-space:normal }
}
@media print { main { max-width:none; padding:0 } figure, .card, tr { break-inside:avoid } }
"""
