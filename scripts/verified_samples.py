"""Sample a policy with vLLM, verify, write JSONL: the data of scripts/train_reward_model.py and of reward references.

python scripts/verified_samples.py --out samples.jsonl --prompts 512 [--config-name train] model.path=FOLDER task.name=NAME ...
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign.cli import set_environment
from rlalign.config import RunConfig, compose, load

if TYPE_CHECKING:
    from rlalign.reward.training.examples import Labelled

set_environment()

SEED_OFFSET = 7_919  # another stream than the run's own, whose first steps would else be repeated


def write_verified_samples(
    config: RunConfig, out: Path, *, prompts: int, say: Callable[[str], None] = print
) -> "list[Labelled]":
    """Sample as the run would (its engine, its settings, group_size completions) and write JSONL rows of `rlalign.reward.training`.

    prompts: of the training split, from its first step on. Empty completions are left out: no reward model can read them.
    Raises ValueError when the split has fewer prompts.
    """
    from rlalign.reward.training.examples import Labelled, write_rows
    from rlalign.run import assembly
    from rlalign.run.parties import verified_of

    task = assembly.load_task_of(config)
    chosen = task.train_prompts(0, prompts)
    model = assembly.resolve_model(config.model.path, say)
    tokenizer = assembly.load_tokenizer(model)
    engine = assembly.start_embedded(model, config)
    try:
        ids_of = assembly.prompt_encoder(config, task, tokenizer)
        rollouts = assembly.sampling(config, task, tokenizer)(engine).generate(
            [ids_of(p.text) for p in chosen],
            prompt_ids=[p.prompt_id for p in chosen],
            samples=config.rollout.group_size,
            seed=config.seed * 1_000_003 + SEED_OFFSET,
        )
    finally:
        engine.close()
    verified = [verified_of(r, chosen[r.group_id], task) for r in rollouts]
    rows = [
        Labelled(prompt=chosen[r.group_id].text, completion=r.text, label=label)
        for r, label in zip(rollouts, verified, strict=True)
        if r.text and label is not None
    ]
    write_rows(out, rows)
    right = sum(row.label for row in rows) / max(len(rows), 1)
    say(
        f"{out}: {len(rows)} samples, {right:.1%} right; {len(rollouts) - len(rows)} empty or without a reward left out"
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--prompts", type=int, default=512, help="training prompts to sample from (default: %(default)s)"
    )
    parser.add_argument("--config-name", default="train")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_args()
    try:
        write_verified_samples(load(compose(given.config_name, given.overrides)), given.out, prompts=given.prompts)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"verified_samples: {error}")


if __name__ == "__main__":
    main()
