"""One table of charts: each is drawn on the page and is a panel, and no page loads anything or runs what a run wrote."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from rlalign.diagnose.attribution import report as attribution
from rlalign.report import charts, write_report
from rlalign.report.dashboard import spec
from rlalign.tracking.run_directory import Run
from rlalign.tracking.timeline import Span
from tests.test_attribution_command import result
from tests.test_report import Page
from tests.test_report_sections import ATTRIBUTION

SCRIPT = "<script>alert('run')</script>"
TABLED = {
    "Whole step, s",
    "Seconds",
    "Bytes",
    "Repaired tensors",
    "Head rebuilds",
    "Worst tokens",
    "Alerts since the start",
}


# wandb-workspaces is written for an older pydantic.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style:DeprecationWarning")


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """A run that logged every metric of the table, its name and those of its reward models hostile."""
    root = tmp_path_factory.mktemp("full")
    written = [key for chart in charts.every() for key in chart.lines if key != charts.FLOOR]
    plain = [key.replace("*", name) for key in written if "(" not in key for name in ("rm", "b<i>")]
    plain += [f"time/{phase}_s" for phase in ("rollout", "train")]
    config = {"name": SCRIPT, "mismatch": {"k3_limit": 1e-3}}
    with Run(root / "run", config=config, wandb_mode="disabled", project="p", name=SCRIPT) as run:
        for step in range(5):
            run.log(step, dict.fromkeys(plain, 0.5 / (step + 2)) | {"publish/version": step + 1})
            run.log_timeline(
                [Span("rollout", step, step + 0.5, step), Span(f"odd{SCRIPT}", step + 0.5, step + 1, step)]
            )
        run.event("alert/warn" + SCRIPT, SCRIPT)
        run.log_head_status([{"mode": SCRIPT}])
        run.finish({})
    (root / "run" / "attribution.json").write_text(json.dumps(ATTRIBUTION))
    return root / "run"


@pytest.fixture(scope="module")
def pages(full, tmp_path_factory) -> dict[str, str]:
    """Every kind of page: one run, two runs, an attribution."""
    out = tmp_path_factory.mktemp("pages")
    hostile = replace(result(layers_1_q_rope=50.0), model=SCRIPT)
    written = {
        "run": write_report([full], out / "run.html"),
        "runs": write_report([full, full], out / "runs.html"),
        "attribution": attribution.write(hostile, [SCRIPT], out / "attribution.html"),
    }
    return {name: path.read_text(encoding="utf-8") for name, path in written.items()}


@pytest.mark.slow
@pytest.mark.parametrize("page", ["run", "runs"])
def test_every_chart_of_the_table_is_drawn_with_its_note_and_legend(pages, page):
    found = re.findall(r"<figure><figcaption><b>(.*?)</b>(.*?)</figcaption>", pages[page], re.DOTALL)
    captions = [tuple(Page(f"<p>{part}</p>").text.strip() for part in caption) for caption in found]
    models = 2
    for chart in charts.every():
        same = [each for each in charts.every() if (each.title, each.note) == (chart.title, chart.note)]
        drawn = [rest for title, rest in captions if title == chart.title and rest.startswith(chart.note)]
        if chart.in_table:
            assert not drawn, f"{chart.title} is drawn although it is said to be in a table"
        elif not (chart.stacked and page == "runs"):  # of two runs, each has its own under its name
            assert len(drawn) == (models if chart in charts.CALIBRATION else len(same)), chart.title
            labels = set(chart.lines.values()) - {"*"}
            assert len(labels) < 2 or all(label in rest for rest in drawn for label in labels), chart.title
    assert "limit 1e-3" in pages[page]


def test_every_chart_of_the_table_is_a_panel_with_its_metrics_and_scale():
    pytest.importorskip("wandb_workspaces")
    sections = spec("p", "", "")["workspace"]["spec"]["section"]["panelBankConfig"]["sections"]
    for declared, section in zip(charts.SECTIONS, sections, strict=True):
        for chart, panel in zip(declared.charts, section["panels"], strict=True):
            if chart.table:
                continue
            config = panel["config"]
            assert config["chartTitle"] == chart.title and config.get("metrics", []) == chart.keys
            assert config.get("yLogScale", False) == chart.log and config.get("metricRegex", "") == chart.regex


@pytest.mark.slow
def test_what_the_dashboard_alone_draws_is_a_table_on_the_page(pages):
    page = Page(pages["run"])
    assert {chart.title for chart in charts.every() if chart.in_table} == TABLED
    for heading in ("seconds", "bytes", "repaired", "head rebuilds", "total s", "kind"):
        assert any(heading in row for row in page.rows), heading


@pytest.mark.slow
@pytest.mark.parametrize("page", ["run", "runs", "attribution"])
def test_pages_load_nothing_and_escape_names(pages, page):
    text, found = pages[page], Page(pages[page])
    assert "script" not in found.tags and "&lt;script&gt;" in text
    assert not re.search(r"https?://|//[a-z]|@import", re.sub(r"<title>.*?</title>", "", text))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert not {"link", "img", "iframe", "object", "embed", "image", "i"} & set(found.tags)
    assert all(value.startswith("#") for key, value in found.attributes if key in ("src", "href", "srcset", "action"))
    assert not [key for key, _ in found.attributes if key.startswith("on")]


def test_the_import_of_the_room_is_light():
    import subprocess
    import sys

    code = "import sys, rlalign.report.dashboard; print([m for m in ('matplotlib', 'jinja2', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    import rlalign.report

    assert rlalign.report.write_report is write_report
    with pytest.raises(AttributeError, match="has no name 'nothing'"):
        _ = rlalign.report.nothing
