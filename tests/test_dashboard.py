"""The dashboard plots only what a run logs, is written without a server, and is saved as wandb's own client saves it."""

import json
import re
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from rlalign.cli import main
from rlalign.config import load
from rlalign.report.charts import SECTIONS, keys, patterns, tables
from rlalign.run.observation import log_step
from rlalign.run.step import train_step
from rlalign.tracking.run_directory import ALERTS, WORST, Run
from tests.fakes import FakeEngine, FakeTrainer, parties
from tests.test_report_reward import make_run as drifting_run

# wandb-workspaces is written for an older pydantic.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style:DeprecationWarning")
# Of held-out prompts and of the heads on shared hidden states, which no step with fakes has. The test of the demo finds them too.
ALONE = ("k3", "abs_mean", "p99", "abs_max", "rollout_error", "trainer_error")
BESIDE_THE_STEP = {"eval/accuracy", *(f"head_isolated/{name}" for name in ALONE)}


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Keys of real steps around fakes, at lag 0 over a noise floor and at lag 3, and of a reward model that is watched."""
    root = tmp_path_factory.mktemp("logged")
    config = load({"model": {"path": "x"}, "task": {"name": "x"}, "rollout": {"prompts_per_step": 4, "group_size": 4}})
    fresh = parties(root, engine=FakeEngine([]), trainer=FakeTrainer([]))
    stale = parties(root, engine=FakeEngine([], stale_stamp=0), trainer=FakeTrainer([], version=3))
    floor = dict.fromkeys(("k1", "k3", "abs_mean", "p99", "abs_max"), 1e-9)
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda ids: [str(i) for i in ids])
    with Run(root / "run", config={}, wandb_mode="disabled", project="p", name="n") as run:
        for step, p in enumerate((replace(fresh, floor=floor), stale)):
            result = train_step(step, p, config)
            log_step(run, step, result.metrics, result, tokenizer, tokens=True)
        run.finish({})
    runs = [root / "run", drifting_run(root / "drifting")]
    return {
        key for run in runs for line in (run / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)
    }


def test_every_key_of_the_dashboard_is_logged(logged):
    assert keys() <= logged | BESIDE_THE_STEP | {ALERTS}
    assert tables() == {WORST}
    for pattern in patterns():
        assert any(re.fullmatch(pattern, key) for key in logged), pattern


def test_the_sections_that_were_asked_for_are_there():
    wanted = (
        "Mismatch",
        "Corrections",
        "Rewards",
        "Reward calibration",
        "Staleness",
        "Alerts",
        "Phases",
        "Publish",
        "Head",
    )
    assert [section.title.partition(":")[0] for section in SECTIONS] == list(wanted)
    assert all(section.charts and section.about.endswith(".") for section in SECTIONS)


@pytest.fixture
def logged_out(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def drawn(spec: dict) -> tuple[set[str], set[str], set[str]]:
    """Metrics, patterns and tables anywhere in what the server would store."""
    nodes, found = [spec], (set(), set(), set())
    while nodes:
        node = nodes.pop()
        nodes += node if isinstance(node, list) else list(node.values()) if isinstance(node, dict) else []
        if isinstance(node, dict) and node.get("viewType") == "Run History Line Plot":
            assert node["config"]["xAxis"] == "step"
            found[0].update(node["config"]["metrics"])
            found[1].update({node["config"]["metricRegex"]} if node["config"].get("useMetricRegex") else ())
        if isinstance(node, dict) and node.get("nodeType") == "const":
            found[2].add(node["val"])
    return found


def test_it_is_written_without_a_login_and_holds_what_was_asked(logged_out, tmp_path, capsys):
    out = tmp_path / "board.json"
    assert main(["dashboard", "--project", "p", "--group", 'a "b"', "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    spec = json.loads(out.read_text())
    for part in ("workspace", "report"):
        assert drawn(spec[part]) == (keys(), patterns(), tables()), part
        text = json.dumps(spec[part])
        assert '"value": "a \\"b\\""' in text and '"name": "group"' in text
    bank = spec["workspace"]["spec"]["section"]["panelBankConfig"]["sections"]
    assert [each["name"] for each in bank] == [section.title for section in SECTIONS]
    headings = [
        block["children"][0]["text"] for block in spec["report"]["spec"]["blocks"] if block["type"] == "heading"
    ]
    assert headings == [section.title for section in SECTIONS]


def test_without_a_login_uploading_says_what_to_do(logged_out, capsys):
    assert main(["dashboard"]) == 2
    assert "wandb login" in (said := capsys.readouterr().err) and "--out FILE.json" in said and "Traceback" not in said


def test_without_the_package_it_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert main(["dashboard"]) == 2
    assert "pip install 'rlalign[dashboard]'" in capsys.readouterr().err


class Wandb(BaseHTTPRequestHandler):
    """As much of wandb's GraphQL as saving a view needs; keeps what was saved, and refuses where told to."""

    def do_POST(self):
        if self.path != "/graphql":
            return self.answer({})
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "upsertView" in asked["query"]:
            if self.server.refuses:
                return self.answer({"errors": [{"message": "permission denied"}]}, 403)
            self.server.saved.append(asked["variables"])
        self.answer({"data": self.data(asked.get("variables") or {})})

    do_GET = do_POST

    def data(self, given: dict) -> dict:
        project = {"id": "1", "name": "p", "entityName": "me"}
        now = "2026-01-01T00:00:00"
        view = {
            "id": "Vmlldzox",
            "name": given.get("name"),
            "displayName": given.get("displayName"),
            "type": given.get("type"),
        }
        view |= {"description": "", "project": project, "spec": given.get("spec"), "createdAt": now, "updatedAt": now}
        view["user"] = {"id": "1", "username": "me", "name": "me", "photoUrl": ""}
        node = project | {"createdAt": now, "isBenchmark": False, "user": None}
        return {
            "viewer": {
                "id": "1",
                "username": "me",
                "entity": "me",
                "flags": "{}",
                "teams": {"edges": []},
                "email": "",
                "admin": False,
            },
            "models": {"edges": [{"node": node, "cursor": ""}], "pageInfo": {"endCursor": "", "hasNextPage": False}},
            "upsertView": {"view": view, "inserted": True},
        }

    def answer(self, body: dict, status: int = 200) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None: ...


@pytest.mark.slow
@pytest.mark.parametrize("refuses", [False, True])
def test_an_upload_saves_both_and_a_refusal_is_one_line(logged_out, monkeypatch, tmp_path, refuses):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Wandb)
    server.saved, server.refuses = [], refuses
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    command = [sys.executable, "-m", "rlalign.cli", "dashboard", "--project", "p"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    server.shutdown()
    if refuses:
        assert done.returncode == 1 and "wandb did not take the dashboard of me/p" in done.stderr
        assert "Traceback" not in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert [(each["entityName"], each["projectName"]) for each in server.saved] == [("me", "p")] * 2
    assert [drawn(json.loads(each["spec"])) for each in server.saved] == [(keys(), patterns(), tables())] * 2
    assert len(re.findall(r"^http://127\.0\.0\.1:\d+/me/p", done.stdout, re.M)) == 2
