"""`rlalign dashboard`: the mismatch workspace and a report with the same charts, as code, for any wandb project of rlalign runs."""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlalign.report.charts import SECTIONS, Chart
from rlalign.tracking.files import write_json

if TYPE_CHECKING:
    from wandb_workspaces.expr import And
    from wandb_workspaces.reports.v2.interface import Report
    from wandb_workspaces.workspaces import Workspace

__all__ = ["add_options", "report", "run", "spec", "workspace"]

TITLE, X = "rlalign: mismatch", "step"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command line of `rlalign dashboard`."""
    parser.add_argument("--project", default="rlalign", help="the runs' tracking.project (default %(default)s)")
    parser.add_argument("--entity", default="", help="user or team on wandb (default: yours)")
    parser.add_argument("--group", default="", help="only runs of this tracking.group, such as the two of an A/B")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write both as JSON instead, without a login")


def run(arguments: argparse.Namespace) -> int:
    """Upload workspace and report, or write them. Raises ValueError where the package or the login is missing."""
    if find_spec("wandb_workspaces") is None:
        raise ValueError("rlalign dashboard needs the package wandb-workspaces: pip install 'rlalign[dashboard]'")
    if arguments.out:
        write_json(arguments.out, spec(arguments.project, arguments.entity, arguments.group))
        print(arguments.out)
        return 0
    from rlalign.tracking.wandb_run import has_key

    if not has_key():
        raise ValueError(
            "rlalign dashboard uploads to wandb, and nobody is logged in: run `wandb login` or set WANDB_API_KEY; "
            "--out FILE.json writes it without a login"
        )
    _upload(arguments.project, arguments.entity, arguments.group)
    return 0


def _upload(project: str, entity: str, group: str) -> None:
    """Save both as new views and print where they are. Raises RuntimeError with what the server said when it refuses."""
    import wandb

    try:
        entity = entity or wandb.Api().default_entity or ""
        for board in (workspace(project, entity, group), report(project, entity, group)):
            print(board.save().url)
    except Exception as error:  # wandb's client has several kinds, private ones among them
        whose = f"{entity or 'your account'}/{project}"
        raise RuntimeError(f"wandb did not take the dashboard of {whose}: {error}") from error


def spec(project: str, entity: str, group: str) -> dict[str, Any]:
    """Both as what the server would store."""
    # wandb-workspaces has no public way to serialise; the version is pinned below the next minor one.
    models = {board.__name__: board(project, entity, group)._to_model() for board in (workspace, report)}
    return {name: json.loads(model.model_dump_json(by_alias=True, exclude_none=True)) for name, model in models.items()}


def workspace(project: str, entity: str, group: str) -> Workspace:
    """One section a subject, over the runs of the project."""
    import wandb_workspaces.workspaces as ws

    columns = ["summary:mismatch/lag0/k3.max", "summary:eval/accuracy.max", "config:head_dtype"]
    return ws.Workspace(
        entity=entity, project=project, name=_title(group), auto_generate_panels=False,
        sections=[ws.Section(name=s.title, panels=[_panel(c) for c in s.charts], is_open=not s.shut) for s in SECTIONS],
        settings=ws.WorkspaceSettings(x_axis=X, max_runs=20),
        runset_settings=ws.RunsetSettings(filters=_filter(group), pinned_columns=columns),
    )  # fmt: skip


def report(project: str, entity: str, group: str) -> Report:
    """The same charts with a sentence on how to read them."""
    import wandb_workspaces.reports.v2.interface as wr

    blocks: list[Any] = [wr.TableOfContents()]
    for each in SECTIONS:
        # Over the report's own project: a run set that names another project asks the server for it.
        runs = wr.Runset(name=group or "all runs", filters=_filter(group))
        panels = wr.PanelGrid(runsets=[runs], panels=[_panel(chart) for chart in each.charts])
        blocks += [wr.H2(each.title), wr.P(each.about), panels]
    return wr.Report(
        project=project, entity=entity, title=_title(group), blocks=blocks, width="fluid",
        description="Mismatch between rollout engine and trainer, what corrects it, and what it costs.",
    )  # fmt: skip


def _panel(chart: Chart) -> Any:
    import wandb_workspaces.reports.v2.interface as wr

    if chart.table:
        return wr.WeavePanelSummaryTable(table_name=chart.table)
    return wr.LinePlot(
        title=chart.title, x=X, y=list(chart.keys), metric_regex=chart.regex or None, log_y=chart.log or None,
        plot_type="stacked-area" if chart.stacked else None,
    )  # fmt: skip


def _title(group: str) -> str:
    return TITLE + (f", {group}" if group else "")


def _filter(group: str) -> And | str:
    from wandb_workspaces.expr import And, Metric

    return And(Metric("Group") == group) if group else ""
