"""One fault at a time in a real engine or trainer: the diagnosis names it, and where; without one it claims nothing.

Here with a float32 body on one engine, and without the layer attribution, which takes longest. `benchmarks/planted_faults.py` has
every fault in both bodies, two ranks and the layers.
"""

import pytest

from benchmarks import planted_faults, planting
from benchmarks.planting_bench import Bench, build_model
from rlalign.diagnose import suspects

ONE_RANK = [f for f in planting.FAULTS if planting.FLOAT32 in f.benches]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    model = build_model(folder / "model")
    (folder / "shared").mkdir()
    bench = Bench.build(model, folder / "shared", body="float32")
    yield bench
    bench.engine.close()


def test_without_a_fault_nothing_is_claimed(bench):
    found = planted_faults.examine(bench, planting.NO_FAULT)
    assert found.k3 < 1e-9 and all(c.score < planted_faults.CLAIM for c in found.causes)


@pytest.mark.parametrize("fault", ONE_RANK, ids=lambda fault: fault.name)
def test_the_fault_is_named(bench, fault):
    found = planted_faults.examine(bench, fault, with_layers=False)
    assert found.hit, suspects.report(found.causes)
    assert fault.expected == "tokenizer" or found.k3 > 1e-6, "the fault changed nothing: this shows nothing"


@pytest.mark.parametrize("name", ["RMSNorm epsilon of one layer", "a half-updated weight"])
def test_the_attribution_points_at_the_same_layer(bench, name):
    (fault,) = [f for f in ONE_RANK if f.name == name]
    try:
        causes = suspects.of_layers(fault.plant(bench))
    finally:
        bench.put_right()
    first = max(causes, key=lambda c: c.score)
    assert first.name == fault.expected and f"layers.{planting.WHERE}." in first.why


def test_the_bench_is_in_order_again(bench):
    assert planted_faults.examine(bench, planting.NO_FAULT, with_layers=False).k3 < 1e-9
