"""HTML pages of runs and measurements, and the wandb dashboard: one set of templates, one table of charts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlalign.report.run_page import write_report

__all__ = ["write_report"]


def __getattr__(name: str) -> object:
    """Load matplotlib and jinja2 with the first page, not with the command line, which only needs the dashboard's options."""
    if name == "write_report":
        from rlalign.report.run_page import write_report

        return write_report
    raise AttributeError(f"rlalign.report has no name {name!r}; it has {', '.join(__all__)}")
