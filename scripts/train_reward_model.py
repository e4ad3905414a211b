"""Train a reward model on verified samples or preferences; one process, or many under `accelerate launch`.

python scripts/train_reward_model.py --rows samples.jsonl --base my/policy --out runs/rm --objective pairs --learning-rate 1e-5
Every option of the training and its default: rlalign.reward.training.fit.Recipe
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from rlalign.cli import set_environment

set_environment()


def main() -> None:
    from rlalign.reward.training import OBJECTIVES, Recipe, read_rows, train_reward_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=Path, required=True, help="JSONL: prompt, completion, label or prompt, chosen, rejected"
    )
    parser.add_argument(
        "--base", type=Path, required=True, help="a causal language model, or a reward model to go on with"
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to make; must not exist")
    parser.add_argument("--objective", choices=OBJECTIVES, default="pairs", help="default: %(default)s")
    parser.add_argument("--pairs-per-prompt", type=int, default=8, help="of labelled rows (default: %(default)s)")
    parser.add_argument("--save-dtype", default="auto", help="of the weights: auto (the base's), float32, bfloat16")
    for field in fields(Recipe):
        flag, about = f"--{field.name.replace('_', '-')}", "default: %(default)s"
        if isinstance(field.default, bool):
            parser.add_argument(flag, default=field.default, help=about, action=argparse.BooleanOptionalAction)
        else:
            parser.add_argument(flag, default=field.default, help=about, type=type(field.default))
    given = vars(parser.parse_args())
    try:
        train_reward_model(
            read_rows(given["rows"]),
            base=given["base"],
            out=given["out"],
            objective=given["objective"],
            recipe=Recipe(**{field.name: given[field.name] for field in fields(Recipe)}),
            pairs_per_prompt=given["pairs_per_prompt"],
            save_dtype=given["save_dtype"],
        )
    except (ValueError, RuntimeError) as error:
        sys.exit(f"train_reward_model: {error}")


if __name__ == "__main__":
    main()
