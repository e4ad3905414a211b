"""benchmarks/gpu.py where there is no GPU: the same path in Triton's interpreter, resumed, and the table of what was not run."""

import json
import sys
import time

import pytest
import torch

from benchmarks import gpu, gpu_laws, gpu_paths
from rlalign.head.triton import TRITON

CPU = torch.device("cpu")


def command(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    return gpu.main()


@pytest.fixture
def few(monkeypatch):
    """One law, two tasks, four ways, in the interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    chosen = ("rlalign triton", "rlalign cublas_one_pass", "full logits bf16", "Liger CuTe (fp16-staged)")
    monkeypatch.setattr(gpu_paths, "SCORING", [way for way in gpu_paths.SCORING if way.name in chosen])
    monkeypatch.setattr(gpu_laws, "LAWS", {"plans agree": gpu_laws.LAWS["plans agree"]})
    monkeypatch.setattr(gpu, "tasks", lambda small: [(gpu.BOTH, (6, 16, 40)), (gpu.DECODE, (2, 16, 40))])


@pytest.mark.slow
def test_it_measures_what_is_there_says_what_is_not_and_goes_on_where_it_stopped(few, monkeypatch, tmp_path):
    file, table = tmp_path / "gpu.json", tmp_path / "gpu.md"
    asked = ["--json", str(file), "--markdown", str(table), "--device", "cpu"]
    assert command(monkeypatch, *asked, "--minutes", "0.3") == 0  # less than what is left for what was begun
    assert not file.exists()  # no time, no result
    assert command(monkeypatch, *asked, "--minutes", "5") == 0
    results = json.loads(file.read_text())
    assert [law["holds"] for law in results["laws"]] == [True]
    rows = {(row["what"], row["way"]): row for row in results["rows"]}
    for what, way in (
        (gpu.BOTH, "rlalign triton"),
        (gpu.BOTH, "rlalign cublas_one_pass"),
        (gpu.DECODE, "rlalign triton"),
    ):
        assert rows[what, way]["max_error"] < 2e-5 and rows[what, way]["ms"] > 0
    assert rows[gpu.BOTH, "full logits bf16"]["max_error"] > 1e-3
    assert "compute capability 9.0" in rows[gpu.BOTH, "Liger CuTe (fp16-staged)"]["status"]
    results["rows"] = [row for row in results["rows"] if row["what"] == gpu.BOTH]
    file.write_text(json.dumps(results))
    monkeypatch.setattr(
        gpu, "measured", lambda what, shape, *_: [{"what": what, "shape": shape, "way": "again", "ms": 1.0}]
    )
    assert command(monkeypatch, *asked) == 0
    again = json.loads(file.read_text())["rows"]
    assert [(row["what"], row["shape"]) for row in again if row["way"] == "again"] == [(gpu.DECODE, [2, 16, 40])]
    file.write_text(json.dumps({**results, "machine": {"device": "another"}}))
    assert command(monkeypatch, *asked) == 0
    assert {row["way"] for row in json.loads(file.read_text())["rows"]} == {"again"}


@pytest.mark.slow
def test_a_head_that_breaks_a_law_is_not_timed(few, monkeypatch):
    def broken(device: torch.device, small: bool) -> str:
        raise AssertionError("65 rows differ")

    monkeypatch.setattr(gpu_laws, "LAWS", {"a row's bits are its own": (TRITON, broken)})
    results = gpu.empty({})
    gpu.run(results, CPU, time.monotonic() + 100, lambda: None)
    assert results["laws"][0]["holds"] is False and "65 rows differ" in results["laws"][0]["found"]
    rows = {(row["what"], row["way"]): row for row in results["rows"]}
    assert rows[gpu.DECODE, "rlalign triton"]["status"] == "RuntimeError: a law does not hold"
    assert "ms" in rows[gpu.DECODE, "mm(out_dtype=float32): rlalign cublas, vLLM native"]
    assert "**no**" in gpu.markdown(results)


def test_what_breaks_the_device_is_not_asked_again_and_what_had_no_time_is(few, monkeypatch):
    def breaks(*_):
        raise RuntimeError("an illegal memory access")

    def lost(device: torch.device):
        raise gpu.LostDeviceError("no answer")

    calls, fine = [], gpu_paths.Way("fine", True, lambda: gpu_paths.full_fp32)
    monkeypatch.setattr(gpu_laws, "LAWS", {})
    monkeypatch.setattr("benchmarks.gpu_rounding.rows", lambda device: [{"op": "none"}])
    monkeypatch.setattr(gpu_paths, "SCORING", [gpu_paths.Way("breaks", True, lambda: breaks), fine])
    monkeypatch.setattr(gpu, "tasks", lambda small: [(gpu.FORWARD, (6, 16, 40))])
    results = gpu.empty({})
    with monkeypatch.context() as poisoned, pytest.raises(gpu.LostDeviceError):
        poisoned.setattr(gpu, "ask_sign_of_life", lambda device: calls.append(1) if not calls else lost(device))
        gpu.run(results, CPU, time.monotonic() + 100, lambda: None)
    assert list(results["broken"].values()) == ["RuntimeError: an illegal memory access"] and not results["rows"]
    with monkeypatch.context() as late:  # the time is up once the first way was looked at
        late.setattr(gpu.time, "monotonic", iter((0.0, 9.0)).__next__)
        late.setattr(gpu.Measurement, "ms", lambda *_: 1.0)
        gpu.run(results, CPU, 5.0, lambda: None)
    assert {row["way"]: row.get("status") for row in results["rows"]} == {
        gpu.GEMM: None, "breaks": "RuntimeError: an illegal memory access", "fine": gpu.NO_TIME,
    }  # fmt: skip
    gpu.run(results, CPU, time.monotonic() + 100, lambda: None)
    assert {row["way"]: "ms" in row for row in results["rows"]} == {gpu.GEMM: True, "breaks": False, "fine": True}


def test_without_results_the_table_says_so_and_predicts(monkeypatch, tmp_path):
    table = tmp_path / "gpu.md"
    assert command(monkeypatch, "--markdown", str(table)) == 0
    lines = table.read_text().splitlines()
    assert sum("| not run |" in line for line in lines) == len(gpu.tasks(small=False))
    assert gpu.predicted_ms(gpu.BOTH, (8, 4, 2)) == 4 * gpu.predicted_ms(gpu.FORWARD, (8, 4, 2))
    for shape in gpu.SHAPES:  # memory beyond operands and gradients, whatever the number of tokens and the vocabulary
        *_, sums, backward = gpu.launches(shape)
        assert int(sums) + int(backward) <= 512
    weight_read = 2 * 4096 * 131072 / gpu.BANDWIDTH * 1e3
    assert weight_read < gpu.predicted_ms(gpu.DECODE, (1, 4096, 131072)) < 1.01 * weight_read
