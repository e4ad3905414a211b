"""mkdocs hook: the README as front page, measured results, and references written from the code. `mkdocs build --strict`.

Every configuration key with its type, default and the comment that explains it is read from `rlalign/config`. Links that lead out
of docs/ become pages of the site, or point to the source on $RLALIGN_REPOSITORY where that is set.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import io
import os
import re
import tokenize
import typing
from pathlib import Path

TREE = Path(__file__).parents[1]
REFERENCE = "reference/configuration.md"
FIXED = {"README.md": "index.md", "AGENTS.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"\[([^\[\]]*)\]\((?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files, config):
    """Add the pages that are not in docs/."""
    from mkdocs.structure.files import File

    pages = {page: TREE / name for name, page in FIXED.items()}
    pages |= {f"results/{path.name}": path for path in sorted((TREE / "benchmarks" / "results").glob("*.md"))}
    for name, path in pages.items():
        if path.exists():
            files.append(File.generated(config, name, content=path.read_text()))
    files.append(File.generated(config, REFERENCE, content=configuration_reference()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links of the repository become links of the site, or of the repository on the web, or plain text."""
    own = page.file.src_uri
    if own.startswith("reference/"):
        return markdown
    home = "benchmarks/results" if own.startswith("results/") else "docs"
    home = "" if own in FIXED.values() else home
    up = "../" * own.count("/")
    repository = os.environ.get("RLALIGN_REPOSITORY")

    def link(match: re.Match[str]) -> str:
        text, address, anchor = match[1], match[2], match[3] or ""
        target = os.path.normpath(os.path.join(home, address))
        inside = _page_of(target)
        if inside is not None and files.get_file_from_path(inside) is not None:
            return f"[{text}]({up}{inside}{anchor})"
        return f"[{text}]({repository}/blob/main/{target})" if repository else text

    return LINK.sub(link, markdown)


def _page_of(target: str) -> str | None:
    if target in FIXED:
        return FIXED[target]
    if target.startswith("docs/"):
        return target[len("docs/") :]
    if target.startswith("benchmarks/results/"):
        return "results/" + target[len("benchmarks/results/") :]
    return None


def configuration_reference() -> str:
    """Every key of a run's configuration, section by section, as Markdown."""
    from rlalign.config import RunConfig

    out = [
        "# Configuration",
        "",
        "Every key of a run, as `rlalign train KEY=VALUE` and the YAML files take it. Written from `rlalign/config`.",
    ]
    for prefix, section in sections(RunConfig):
        out += ["", f"## {prefix or 'the run itself'}", ""]
        if text := _about(section):
            out += [text, ""]
        out += ["| key | type | default | |", "|---|---|---|---|"]
        for key, kind, default, about in keys(section):
            name = f"{prefix}.{key}" if prefix else key
            out.append(f"| `{name}` | {_cell(kind)} | {_cell(default)} | {about.replace('|', chr(92) + '|')} |")
    return "\n".join(out) + "\n"


def sections(section: type, prefix: str = "") -> list[tuple[str, type]]:
    """The section and those nested in it, each with its dotted name."""
    hints = typing.get_type_hints(section)
    found = [(prefix, section)]
    for field in dataclasses.fields(section):
        inner = _section_in(hints[field.name])
        if inner is not None:
            name = f"{prefix}.{field.name}" if prefix else field.name
            found += sections(inner, name if hints[field.name] is inner else f"{name}.NAME")
    return found


def keys(section: type) -> list[tuple[str, str, str, str]]:
    """(key, type, default, comment) of the section's own keys; nested sections are sections of their own."""
    hints = typing.get_type_hints(section)
    about = {}
    for base in reversed(section.__mro__):
        if dataclasses.is_dataclass(base):
            about |= comments(base)
    rows = []
    for field in dataclasses.fields(section):
        if _section_in(hints[field.name]) is None:
            rows.append((field.name, _type(hints[field.name]), _default(field), about.get(field.name, "")))
    return rows


def comments(section: type) -> dict[str, str]:
    """The comment of each field: at the end of its line or lines, or on lines of its own right above it."""
    source = inspect.getsource(section)
    alone = {n for n, line in enumerate(source.splitlines(), 1) if line.lstrip().startswith("#")}
    (parsed,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    said = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            said[token.start[0]] = token.string.lstrip("# ").strip()
    found = {}
    for node in parsed.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in alone:
                first -= 1
            lines = [said[n] for n in range(first, (node.end_lineno or node.lineno) + 1) if n in said]
            found[node.target.id] = " ".join(lines)
    return found


def _section_in(hint: object) -> type | None:
    candidates = [hint, *typing.get_args(hint)]
    return next((c for c in candidates if isinstance(c, type) and dataclasses.is_dataclass(c)), None)


def _about(section: type) -> str:
    text = inspect.getdoc(section) or ""
    if not text or text.startswith(f"{section.__name__}("):
        return (inspect.getdoc(inspect.getmodule(section)) or "").split("\n\n")[0].replace("\n", " ")
    return text.replace("\n", " ")


def _type(hint: object) -> str:
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return " \\| ".join(str(member.value) for member in hint)
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint.__name__
    return str(hint).replace("typing.", "")


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default.value if isinstance(field.default, enum.Enum) else field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    return "required" if value == "???" else repr(value) if value != "" else '""'


def _cell(text: str) -> str:
    escaped = text if "\\|" in text else text.replace("|", "\\|")
    return f"`{escaped}`" if "\\|" not in escaped else escaped
