"""The report shows what was logged, compares runs, loads nothing, and lets no text of a run become markup."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from rlalign.report import write_report
from rlalign.report.html import esc, num, prose, short, table, token_text
from rlalign.report.plots import Line, histogram, line_chart
from rlalign.report.tables import view_tokens
from rlalign.tracking.record import summarize
from rlalign.tracking.run_directory import Run

EVIL = "</td><script>alert(1)</script>\x1b[31m\u202e&"
VOID = {"meta", "br", "img", "input", "link", "hr"}


class Page(HTMLParser):
    """Tags, attributes and visible text; raises on elements closed out of order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.words, self.rows = [], [], [], [], []
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    def row(self, name: str) -> list[str]:
        (found,) = [row for row in self.rows if row and row[0] == name]
        return found


def make_run(directory: Path, *, k3=1e-9, head="float32", steps=20, evil="", ending=None, gain=0.4) -> Path:
    config = {"name": directory.name, "head_dtype": head, "seed": 1, "mismatch": {"k3_limit": 1e-3}, "note": evil}
    generator = np.random.default_rng(0)
    with Run(directory, config=config, wandb_mode="disabled", project="p", name=directory.name + evil) as run:
        run.event("alert" + evil, evil)
        rows = []
        for step in range(steps):
            row = {"reward/mean": 0.3 + gain * step / steps, "mismatch/nonfinite": 0, "publish/version": step + 1}
            row |= {"mismatch/lag0/k3": k3, "head_isolated/k3": k3 / 2, "publish/seconds": 0.05, "publish/repaired": 1}
            row |= {f"mismatch/lag0/{key}": k3**0.5 * f for key, f in (("abs_mean", 1), ("p99", 4), ("abs_max", 9))}
            row |= {f"time/{phase}_s": 0.1 for phase in ("rollout", "reward", "score", "train", "publish")}
            row |= {"time/step_s": 0.5, "rollout/tokens": 100, "eval/accuracy": 0.2 + gain * step / steps}
            run.log(step, row)
            rows.append({"step": step, **row})
        n = 40
        old = -generator.exponential(1, n)
        columns = {
            name: np.arange(n) % 4
            for name in ("token_id", "policy_version", "kv_version", "lag", "prompt_id", "group_id")
        }
        columns |= {"sequence": np.arange(n) // 10, "position": np.arange(n) % 10 + 5, "old_logprob": old}
        columns |= {"reward": np.ones(n), "advantage": np.ones(n), "loss_mask": np.ones(n, bool)}
        ratio = generator.normal(0, k3**0.5, n)
        ratio[17] = 50 * k3**0.5
        columns |= {
            "rollout_logprob": old - ratio,
            "entropy": -old,
            "token": [f"t{i}{evil if i == 17 else ''}" for i in range(n)],
        }
        run.log_tokens(steps - 1, columns)
        if ending:
            raise ending
        run.log_head_status(
            [{"rank": r, "pid": r + 9, "class": "Head", "mode": evil, "calls": 5 + r} for r in range(3)]
        )
        run.finish(summarize(rows) | {"head": {"dtype": head, "mode": "cached", "ranks": 3}})
    return directory


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("runs")
    return make_run(root / "fp32"), make_run(root / "bf16", k3=1e-5, head="model")


@pytest.fixture(scope="module")
def pages(pair, tmp_path_factory) -> dict[str, str]:
    """The page of the first run, and that of both."""
    root = tmp_path_factory.mktemp("pages")
    made = {"one": write_report([pair[0]], root / "r.html"), "both": write_report(list(pair), root / "ab.html")}
    return {name: path.read_text(encoding="utf-8") for name, path in made.items()}


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_one_run_says_its_numbers_and_that_all_is_well(pages):
    page = Page(pages["one"])
    assert "OK. Over 20 steps the mean reward went from 0.310 to 0.670" in page.text
    assert "k3 = 1e-9 nats per token at lag 0" in page.text and "20 publishes verified" in page.text
    assert page.tags.count("svg") == 8
    assert page.row("k3, median over steps") == ["k3, median over steps", "1.00e-9"]
    assert page.row("calls") == ["calls", "5 to 7"] and ["", "rank 0\u20132"] in page.rows


def test_two_runs_show_every_difference(pages):
    page = Page(pages["both"])
    assert "They differ in head_dtype." in page.text
    assert "1e-9 in A fp32 and 1e-5 in B bf16, 10,000 times lower in A fp32" in page.text
    assert page.row("k3, median over steps")[1:] == ["1.00e-9", "1.00e-5", "\u00d7 10,000"]
    assert page.row("|log_ratio|, mean")[-1] == "\u00d7 100"
    assert page.row("Head dtype")[1:] == ["float32", "model", "different"]
    assert page.row("Steps")[1:] == ["20", "20", "same"]
    assert page.row("head_dtype")[1:] == ["float32", "model"]


def test_subtracted_differences_carry_their_sign(tmp_path, undrawn):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", gain=0.2)
    page = read(write_report([a, b], tmp_path / "ab.html"))
    assert page.row("Reward, last 10 %")[1:] == ["0.670", "0.485", "-0.185"]


def test_nothing_is_loaded_and_no_script_runs(pages):
    text = pages["both"]
    page = Page(text)
    assert "http://" not in text and "https://" not in text and "url(" not in re.sub(r"url\(#\w+\)", "", text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "image"} & set(page.tags)
    references = [v for k, v in page.attributes if k in ("src", "href", "xlink:href", "srcset", "action")]
    assert all(v.startswith("#") for v in references)
    assert not [k for k, _ in page.attributes if k.startswith("on")]


def test_ids_in_the_page_are_unique_and_every_reference_has_one(pages):
    page = Page(pages["both"])
    ids = [v for k, v in page.attributes if k == "id"]
    references = [v[1:] for k, v in page.attributes if k == "href"]
    references += [m for k, v in page.attributes if v for m in re.findall(r"url\(#(\w+)\)", v)]
    assert len(ids) == len(set(ids)) and set(references) <= set(ids)


@pytest.mark.slow
def test_text_of_a_run_never_becomes_markup(tmp_path):
    evil = make_run(tmp_path / "run", evil=EVIL)
    for runs in ([evil], [evil, evil]):
        text = write_report(runs, tmp_path / "r.html").read_text(encoding="utf-8")
        assert "script" not in Page(text).tags
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
        assert "alert(1)" in Page(text).text and "\\u202e" in Page(text).text


def test_the_worst_token_stands_in_its_context(pair):
    view = view_tokens(tuple((pair[0] / "tokens").iterdir()))
    worst = view.worst[0]
    assert (worst.token, worst.sequence, worst.position, worst.step) == ("t17", 1, 12, 19)
    assert worst.before == ("t11", "t12", "t13", "t14", "t15", "t16")[-len(worst.before) :] and len(worst.before) == 6
    assert worst.after == ("t18", "t19")
    assert view.abs_log_ratio[-1] == pytest.approx(abs(worst.log_ratio)) == pytest.approx(50 * 1e-9**0.5, rel=1e-2)


def test_tokens_without_a_finite_ratio_come_first_and_are_counted(tmp_path):
    with Run(tmp_path / "r", config={}, wandb_mode="disabled", project="p", name="n") as run:
        columns = {
            n: [0, 1, 2]
            for n in (
                "sequence",
                "position",
                "token_id",
                "policy_version",
                "kv_version",
                "lag",
                "prompt_id",
                "group_id",
            )
        }
        columns |= {
            "old_logprob": [-1.0, -1.0, -1.0],
            "rollout_logprob": [-1.5, float("-inf"), -1.0],
            "entropy": [1.0] * 3,
        }
        columns |= {"reward": [0.0] * 3, "advantage": [0.0] * 3, "token": list("abc"), "loss_mask": [True, True, False]}
        path = run.log_tokens(0, columns)
        run.finish({})
    view = view_tokens((path,))
    assert (view.nonfinite, view.abs_log_ratio.tolist()) == (1, [0.5])
    assert [t.token for t in view.worst] == ["b", "a"]


@pytest.mark.parametrize(("ending", "word"), [(KeyboardInterrupt(), "interrupted"), (RuntimeError("gate"), "failed")])
def test_an_unfinished_run_is_reported_as_what_it_is(tmp_path, undrawn, ending, word):
    with pytest.raises(type(ending)):
        make_run(tmp_path / "run", ending=ending, steps=12)
    page = read(write_report([tmp_path / "run"], tmp_path / "r.html"))
    assert "problem" in page.text and f"The run {'was ' * (word == 'interrupted')}{word}" in page.text
    assert "OK." not in page.text and "Over 12 steps" in page.text


def test_a_run_without_a_single_step_has_a_page(tmp_path):
    with pytest.raises(RuntimeError), Run(tmp_path / "r", config={}, wandb_mode="disabled", project="p", name="n"):
        raise RuntimeError("vLLM did not start")
    page = read(write_report([tmp_path / "r"], tmp_path / "r.html"))
    assert "vLLM did not start" in page.text and "never measured" in page.text


def test_problems_in_the_numbers_are_said(tmp_path, undrawn):
    over = read(write_report([make_run(tmp_path / "over", k3=0.5)], tmp_path / "1.html"))
    assert "k3 was over its limit 1e-3 on 20 of 20 steps" in over.text
    nan = read(write_report([make_run(tmp_path / "nan", k3=float("nan"))], tmp_path / "2.html"))
    assert "k3 was over its limit 1e-3 on 20 of 20 steps" in nan.text
    flat = read(write_report([make_run(tmp_path / "flat", gain=-0.1)], tmp_path / "3.html"))
    assert "Reward did not rise" in flat.text and "Held-out accuracy did not rise" in flat.text


def test_ranks_that_disagree_are_a_problem(tmp_path):
    with Run(tmp_path / "r", config={}, wandb_mode="disabled", project="p", name="n") as run:
        run.log_head_status([{"rank": 0, "mode": "cached"}, {"rank": 1, "mode": "native"}])
        run.finish({})
    page = read(write_report([tmp_path / "r"], tmp_path / "r.html"))
    assert "The ranks do not have the same head: mode is cached and native." in page.text


@pytest.mark.slow
def test_the_same_run_gives_the_same_page(pair, pages, tmp_path):
    assert write_report([pair[0]], tmp_path / "again.html").read_text(encoding="utf-8") == pages["one"]


def test_pages_stay_small_when_runs_are_long():
    steps = list(range(100_000))
    values = np.random.default_rng(0).lognormal(-20, 1, len(steps))
    assert len(line_chart([Line(steps=steps, values=values, color="#000")], log=True, name="x")) < 60_000
    many = table(["a"], [[str(i)] for i in range(1000)], cap=50)
    assert many.count("<tr>") == 51 and "950 more rows" in many


@pytest.mark.parametrize("values", [[0.0, 0.0], [float("nan")] * 3, [1e-300, 1.0], [-1e-20, 1e-9], [5.0]])
def test_charts_are_drawn_for_awkward_values(values):
    svg = line_chart([Line(steps=range(len(values)), values=values, color="#000")], log=True, limit=1e-3, name="x")
    assert svg.startswith("<svg") and "nan" not in svg
    ordered = np.sort(np.abs(np.array(values)[np.isfinite(values)]))
    assert histogram(ordered, color="#000", low=1e-12, high=1.0, name="y").startswith("<svg")


def test_directories_that_are_no_runs_and_too_many_runs_are_refused(pair, tmp_path):
    with pytest.raises(ValueError, match="not a run directory"):
        write_report([tmp_path], tmp_path / "r.html")
    with pytest.raises(ValueError, match="1 to 6"):
        write_report([pair[0]] * 7, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_numbers_and_tokens_are_written_for_a_reader():
    assert [short(v) for v in (0, 1e-9, 4.24e-6, 0.05, 1200, 1e-3)] == ["0", "1e-9", "4.2e-6", "0.05", "1,200", "1e-3"]
    assert num(1.5e-10, ".2e") == "1.50e-10" and num(1e7, ".1e") == "1.0e7" and "nan" in num(float("nan"))
    assert token_text("\u0120a\n") == "\u2423a\u23ce" and token_text("") == "(empty)"
    assert esc("\x00<") == "\\x00&lt;" and prose("k3 = 1e-9") == 'k3 = <span class="whole">1e-9</span>'
