"""Sample a policy with vLLM, verify, write JSONL: the data of scripts/train_reward_model.py and of reward references.

python scripts/verified_samples.py --out samples.jsonl --prompts 512 [--config-name train] model.path=FOLDER task.name=NAME ...
"""

import argparse
import sys
from pathlib import Path

from rlalign.cli import set_environment
from rlalign.config import compose, load

set_environment()


def main() -> None:
    from rlalign.run.verified_samples import write_verified_samples

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
