"""Make the demo's policy and print its folder: make_tiny_policy.py [--out DIR] [--tied] [--seed N]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rlalign.tiny_policy import cache_root, make_tiny_policy
from rlalign.tiny_policy.teaching import TinyRecipe


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train a tiny Qwen3 policy on two-digit addition, or reuse the cached one."
    )
    parser.add_argument("--out", type=Path, default=cache_root(), help="folder that holds the policies")
    parser.add_argument("--tied", action="store_true", help="share the embedding with the lm_head")
    parser.add_argument("--seed", type=int, default=TinyRecipe().seed)
    asked = parser.parse_args()
    recipe = TinyRecipe(tied=asked.tied, seed=asked.seed)
    print(make_tiny_policy(asked.out, recipe, progress=lambda line: print(line, file=sys.stderr, flush=True)))


if __name__ == "__main__":
    main()
