"""The policies behind benchmarks/adaptive.py: the tiny policy, then GRPO until it is surer than it is right.

The parties are those of `rlalign train`: vLLM samples, DeepSpeed trains. Few prompts and many steps make the overconfidence.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from rlalign.cli import set_environment
from rlalign.config import compose
from rlalign.tiny_policy import cached_policy


def overconfident_policy(folder: Path, steps: int) -> Path:
    """The folder of the tiny addition policy after `steps` of GRPO on 512 prompts; trained when it is not there yet."""
    if (folder / "config.json").is_file():
        return folder
    set_environment()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from rlalign.config import load
    from rlalign.run import assembly
    from rlalign.run.parties import Parties
    from rlalign.run.step import train_step
    from rlalign.weights import publish

    overrides = ["task.train_size=512", "task.eval_size=128", "rollout.prompts_per_step=32", f"steps={steps}"]
    config = load(compose("demo", overrides))
    base = cached_policy("untied", report=print)
    tokenizer = assembly.load_tokenizer(base)
    engine = assembly.start_engine(base, config)
    try:
        policy = assembly.start_policy(base, config)
        try:
            parties = Parties(
                engine=engine,
                trainer=policy,
                task=assembly.load_task_of(config),
                publish=partial(publish, receiver=engine, shared=Path(config.weights.shared)),
                encode=partial(assembly.encode, tokenizer, chat=False),
                pad_token_id=tokenizer.pad_token_id,
            )
            parties.publish(policy.named_weights(), policy.version)
            for step in range(steps):
                metrics = train_step(step, parties, config).metrics
                if step % 10 == 0:
                    print(
                        f"grpo step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in metrics.items() if "reward" in k),
                        flush=True,
                    )
            policy.save(folder)
        finally:
            policy.close()
    finally:
        engine.close()
    tokenizer.save_pretrained(folder)
    return folder
