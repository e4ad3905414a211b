"""`rlalign families`: options, the table, the exit status."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlalign.diagnose.families.family_table import Cell


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which families, which cells, where the table goes."""
    from rlalign.diagnose.families.family_table import COLUMNS

    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="families (default: all)")
    add("--list", action="store_true", help="print their names and end")
    add(
        "--cells",
        default=",".join(c for c in COLUMNS if c != "TP 2"),
        metavar="A,B",
        help=f"of {', '.join(COLUMNS)} (default: without TP 2)",
    )
    add("--timeout", type=float, default=600.0, metavar="S", help="of one process (default %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the table as JSON; families that it holds already are kept")
    add("--markdown", type=Path, metavar="FILE", help="write the table as Markdown")


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 when a cell failed; one that is refused by name is an answer."""
    from rlalign.diagnose.families import family_table, matrix

    families = family_table.named(arguments.names)
    if arguments.list:
        print("\n".join(families))
        return 0
    columns = arguments.cells.split(",")
    if unknown := set(columns) - set(family_table.COLUMNS):
        raise ValueError(f"--cells: unknown {', '.join(sorted(unknown))}; there are {', '.join(family_table.COLUMNS)}")
    table = family_table.read(arguments.json) if arguments.json else {}

    def done(name: str, cells: dict[str, Cell]) -> None:
        table[name] = table.get(name, {}) | cells
        print(f"{name}: {'; '.join(f'{c} {found.state} {found.found}' for c, found in cells.items())}", flush=True)
        if arguments.json:
            family_table.write(table, arguments.json)

    found = matrix.examine(families, columns, timeout_s=arguments.timeout, say=done)
    ordered = {name: table[name] for name in family_table.RECIPES if name in table}
    if arguments.markdown:
        arguments.markdown.write_text(family_table.as_markdown(ordered) + "\n")
    print(family_table.as_markdown({name: ordered[name] for name in found}))
    return 1 if any(c.state == family_table.FAILED for cells in found.values() for c in cells.values()) else 0
