"""Two trainer ranks and one engine: the first one's threads sample, both get the batches, and a failure ends both."""

import pickle

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from rlalign.exits import Lost
from rlalign.rollout.shared import SharedEngine
from rlalign.run.parties import Parties
from rlalign.run.sampler import Sampler, sample_probe
from rlalign.run.step import collect
from tests.async_parties import Engine, Trainer, config
from tests.fakes import FakeTask


class Local(Engine):
    version, mode = "fake", "off"
    in_flight_updates = False
    engines = ("fake",)

    def generate(self, prompts, **request):
        if request["seed"] == 1 and request["samples"] > 1:
            raise Lost("the server hung up")
        return super().generate(prompts, **request)


def on_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    run = config("one_step_off", schedule={"probe_every": 1, "probe_prompts": 3})
    engine = SharedEngine(lambda: Local([]))
    p = Parties(
        engine=engine, trainer=Trainer([], version=0), task=FakeTask(), publish=None, encode=lambda text: [1, 2], pad_token_id=0
    )  # fmt: skip
    sampler = Sampler(p, run, engine=lambda: engine.local, say=print)
    found = {"first": collect(0, p, run, sampler).batch.token_ids_BL.tolist()}
    p.trainer.version = 1  # trained, not yet published: a probe is due
    found["probe"] = len(sample_probe(0, p, run))
    try:
        sampler.before_publish()
    except RuntimeError as error:
        found["error"] = f"{type(error).__name__}: {error}"
    with open(f"{folder}/{rank}", "wb") as file:
        pickle.dump(found, file)
    dist.destroy_process_group()


@pytest.mark.slow
def test_both_ranks_get_the_batch_and_both_get_the_failure(tmp_path):
    mp.start_processes(on_rank, (str(tmp_path),), nprocs=2, start_method="forkserver")
    first, second = (pickle.loads((tmp_path / str(rank)).read_bytes()) for rank in (0, 1))
    assert first["first"] == second["first"] and len(first["first"]) == 16
    assert first["probe"] == second["probe"] == 4, "three probes are no even share of two ranks"
    assert first["error"] == "Lost: the server hung up"
    assert second["error"] == "Lost: rank 0 stopped the run: Lost: the server hung up", (
        "both must ask to be started again"
    )
