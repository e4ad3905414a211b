"""vLLM's V2 model runner, GPUs' default, on a CPU: its Triton kernels run in Triton's interpreter.

    python -m tests.engine.v2_runner MODEL MIXTURE OUT.json

The runner asks for a Triton with a CPU backend, which no wheel has; one that does nothing is put in its place, since the
interpreter never compiles.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1", TORCHDYNAMO_DISABLE="1")

from triton.backends import backends

backends["cpu"] = SimpleNamespace(compiler=None, driver=SimpleNamespace(is_active=lambda: True))

from tests.engine.conftest import (  # noqa: E402 (Triton must know first that it is interpreted)
    PROMPTS,
    ROLLOUT,
    bare_engine,
    logprobs_of,
    perturbed,
    sample,
    start,
    worker_of,
)

TRUNCATED = {"top_p": 0.9, "top_k": 30, "min_p": 0.01}


def main(model: Path, mixture: Path, out: Path) -> None:
    from vllm import SamplingParams

    from rlalign.weights import publish

    config = replace(ROLLOUT, temperature=0.7, max_num_batched_tokens=256, max_num_seqs=8)
    engine = start(model, dtype="float32", rollout=config)
    runner = worker_of(engine._llm).model_runner
    found = {"runner": [f"{kind.__module__}.{kind.__qualname__}" for kind in type(runner).__mro__]}
    before = sample(engine, samples=2)
    for version in (1, 2):
        changed = perturbed(model, seed=version)
        publish(changed.float().named_parameters(), version, receiver=engine, shared=out.parent)
    after = sample(engine, samples=2)
    found |= {"before": [vars_of(r) for r in before], "after": [vars_of(r) for r in after]}
    found["truncated"] = TRUNCATED
    found["changed"] = logprobs_of(before) != logprobs_of(after)
    found["status"] = engine.ask("rlalign_status")[0]
    engine.config = replace(config, temperature=1.0)
    engine.spec = replace(engine.spec, temperature=1.0)
    found["scored"] = engine.score([r.token_ids for r in after])
    try:
        engine.ask("rlalign_capture_start", str(out.parent), [])
    except Exception as error:
        found["capture"] = str(error)
    engine.close()
    from vllm.v1.sample.ops import topk_topp_sampler
    from vllm.v1.worker.gpu.sample import sampler

    # its Triton kernel is beyond the interpreter
    sampler.apply_top_k_top_p = lambda logits, k, p, **_: topk_topp_sampler.apply_top_k_top_p_pytorch(logits, k, p)
    llm = bare_engine(
        model, dtype="float32", max_num_seqs=8, max_num_batched_tokens=256, return_sampling_mask=True, max_logprobs=64
    )
    params = SamplingParams(max_tokens=6, seed=1, temperature=0.7, logprobs=64, **TRUNCATED)
    outputs = [o.outputs[0] for o in llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)]
    found["masks"] = [
        {
            "token_ids": list(o.token_ids),
            "mask": [sorted(ids) for ids in o.sampling_mask.token_ids],
            "logprobs": [{str(i): entry.logprob for i, entry in step.items()} for step in o.logprobs],
        }
        for o in outputs
    ]
    del llm
    found["routed"] = routed(mixture, out.parent)
    out.write_text(json.dumps(found, default=str))


def routed(mixture: Path, folder: Path) -> dict[str, object]:
    """Rollouts of a mixture of experts: cold, with its prompts cached, and after a publish."""
    from rlalign.weights import publish

    config = replace(ROLLOUT, replay_experts="all", prefix_caching=True, max_num_batched_tokens=256, max_num_seqs=8)
    engine = start(mixture, dtype="float32", rollout=config)
    prompts = [[1, *range(40, 190)], [1, *range(40, 180), 7], [1, 40, 41]]  # beyond a block of the KV cache

    def sampled() -> list[dict[str, object]]:
        rollouts = engine.generate(prompts, prompt_ids=range(3), samples=2, seed=3)
        return [{**vars_of(r), "experts": list(r.experts), "shape": list(r.experts_shape)} for r in rollouts]

    cold, warm = sampled(), sampled()
    publish(perturbed(mixture, seed=1).float().named_parameters(), 1, receiver=engine, shared=folder)
    found = {"cold": cold, "warm": warm, "published": sampled(), "layers": engine.routed.layers}
    engine.close()
    return found


def vars_of(rollout) -> dict[str, object]:
    fields = ("token_ids", "prompt_length", "rollout_logprobs", "version_spans")
    return {name: list(v) if not isinstance(v := getattr(rollout, name), int) else v for name in fields}


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
