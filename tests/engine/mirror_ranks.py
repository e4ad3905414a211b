"""rlalign.mirror around models of two ranks: one forward, backward and SGD step in real DeepSpeed or FSDP2, and in float64.

`torchrun -m tests.engine.mirror_ranks MODEL FOLDER` leaves each rank's results of CASES in FOLDER, `... MORE_CASES` of those.
"""

import os
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

import rlalign
from rlalign import ranks
from tests.engine.updates import make_batch

CASES, MORE_CASES = ("zero1", "zero3", "fsdp2"), ("zero0", "zero2", "ddp")
LR = 0.3


def share(rank: int, of: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """This rank's rows: inputs of the model, and the tokens to score."""
    batch = make_batch()
    rows = batch.rows(slice(rank * len(batch) // of, (rank + 1) * len(batch) // of))
    return {"input_ids": rows.token_ids_BL, "attention_mask": rows.attention_mask_BL.long()}, rows.loss_mask_BL


def in_float64(folder: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """[B, L] logprobs before, and all weights after a step on the mean of both ranks' mean losses."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double()
    inputs, mask = share(0, 1)
    logprobs = model(**inputs).logits[:, :-1].log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    halves = zip(logprobs.chunk(2), mask[:, 1:].chunk(2), strict=True)
    (-sum(own[tokens].mean() for own, tokens in halves) / 2).backward()
    with torch.no_grad():
        after = {name: p - LR * p.grad for name, p in model.named_parameters()}
    return nn.functional.pad(logprobs.detach(), (1, 0)) * mask, after


def in_deepspeed(model: nn.Module, stage: int) -> tuple[nn.Module, object]:
    """The engine, and what steps it."""
    import deepspeed

    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}  # else ones as small as these stay whole
    settings = {"train_micro_batch_size_per_gpu": 6, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    settings |= {"gradient_clipping": 0.0}  # 1.0 by default
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=LR), config=settings, dist_init_required=False
    )
    return engine, engine


def run_case(folder: Path, name: str) -> dict[str, object]:
    """Logprobs of this rank's rows before a step, and every weight after it as `named_weights` gives it."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine = None
    if name.startswith("zero"):
        wrapped, engine = in_deepspeed(model, int(name[4:]))
    elif name == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    held = sum(getattr(p, "ds_tensor", p).numel() if hasattr(p, "ds_id") else p.numel() for p in model.parameters())
    local = sum(p.to_local().numel() for p in model.parameters()) if name == "fsdp2" else held
    mirrored = rlalign.mirror(wrapped)
    inputs, mask = share(ranks.rank(), 2)
    logprobs, _ = mirrored.token_logprobs(inputs, mask)
    loss = -logprobs[mask].mean()
    if engine is None:
        loss.backward()
        torch.optim.SGD(wrapped.parameters(), lr=LR).step()
    else:
        engine.backward(loss)
        engine.step()
    after = {n: t.to("cpu", copy=True) for n, t in mirrored.named_weights()}
    mirrored.restore()
    return {"logprobs": logprobs.detach(), "after": after, "held": local, "dtype": mirrored.status.multiplied.dtype}


def main(folder: Path, out: Path, names: tuple[str, ...]) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    from rlalign.trainer.deepspeed_setup import join_process_group

    join_process_group()
    for name in names:
        torch.save(run_case(folder, name), out / f"{name}-{ranks.rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), MORE_CASES if sys.argv[3:] == ["more"] else CASES)
