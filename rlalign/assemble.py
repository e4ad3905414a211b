"""The real parties of a run: where the model, the tokenizer, the task, the engine and the policy come from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign import ranks
from rlalign.config import RewardConfig, RunConfig
from rlalign.reward.mixture import RewardMixture, Rewards, Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerBase

    from rlalign.reward.drift.watch import DriftWatch, EventLog
    from rlalign.rollout.engine import VLLMEngine
    from rlalign.tasks import Task
    from rlalign.trainer.policy import Policy


def join_ranks() -> int:
    """Join the process group of torchrun, deepspeed or srun, where one of them started this process; returns the rank.

    Alone, nothing is joined yet: the embedded vLLM makes the group of one that the trainer then shares. Raises ValueError for
    a launcher's variables that do not fit together.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return 0
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE={size}, but {', '.join(missing)} is not set; start the ranks with torchrun, deepspeed or srun "
            "(slurm/ has working files), or unset WORLD_SIZE for one process"
        )
    from rlalign.trainer.deepspeed_setup import join_process_group

    join_process_group()
    return ranks.rank()


def resolve_model(path: str, say: Callable[[str], None] = print) -> Path:
    """The folder of a model: a local Hugging Face folder, or the tiny policy named tiny:untied or tiny:tied.

    Raises ValueError for anything else.
    """
    if path.startswith("tiny:"):
        from rlalign.tiny_policy import cached_policy

        return cached_policy(path.removeprefix("tiny:"), report=say)
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model.path={path!r} is not a Hugging Face folder (no config.json there). Give a local folder with config.json, "
            "weights and tokenizer, or tiny:untied / tiny:tied for the built-in demo policy."
        )
    return folder


def load_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer. Raises ValueError when its ids do not fit the model's vocabulary."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    size = AutoConfig.from_pretrained(model).vocab_size
    largest = max(tokenizer.get_vocab().values())
    if largest >= size:
        raise ValueError(
            f"{model}: the tokenizer has token ids up to {largest}, the model only {size} rows of embeddings; "
            "tokenizer and checkpoint do not belong together"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{model}: the tokenizer has neither a pad nor an eos token; rollouts cannot end")
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool) -> list[int]:
    """Token ids of a prompt, in the tokenizer's chat template when asked."""
    if not chat:
        return tokenizer.encode(text)
    message = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)


def load_task_of(config: RunConfig) -> Task:
    """The configured task."""
    from rlalign.tasks import load_task

    c = config.task
    return load_task(c.name, dict(c.params), train_size=c.train_size, eval_size=c.eval_size, seed=c.seed)


class SharedReward:
    """The task's verifier and the configured reward models. The first rank holds the models and scores for all.

    Raises ValueError, CalibrationMismatchError or OSError where a model, a calibration or a server cannot be used.
    """

    def __init__(self, config: RunConfig, say: Callable[[str], None] = print) -> None:
        self.local: RewardMixture | None = None
        ranks.on_first(lambda: self._start(config.reward, say))

    def __call__(self, samples: Sequence[Sample]) -> Rewards:
        return ranks.on_first(lambda: self.local(samples))

    def _start(self, config: RewardConfig, say: Callable[[str], None]) -> None:
        if config.models:
            from rlalign.reward.load import load_mixture

            self.local = load_mixture(config, say)
        else:
            self.local = RewardMixture(weights=config.active, max_failed=config.max_failed)


def start_drift_watch(
    reward: SharedReward, config: RunConfig, log: EventLog, say: Callable[[str], None]
) -> DriftWatch | None:
    """The monitors of the calibrated reward models; on the first rank, which holds the models. None elsewhere."""
    from rlalign.reward.drift.watch import DriftWatch

    if reward.local is None:
        return None
    folder = Path(config.output_dir) / "drift"
    return DriftWatch(reward.local.models, config.reward.drift, folder=folder, log=log, say=say)


def start_engine(model: Path, config: RunConfig) -> VLLMEngine:
    """vLLM with the run's head, proved on every rank."""
    from rlalign.rollout.engine import VLLMEngine

    return VLLMEngine(
        model, config.rollout, dtype=config.model.dtype.value, head_dtype=config.head_dtype.value, seed=config.seed
    )


def start_policy(model: Path, config: RunConfig) -> Policy:
    """The model in DeepSpeed, with the mirrored head."""
    from transformers.utils.logging import disable_progress_bar

    from rlalign.trainer.policy import Policy

    disable_progress_bar()  # the run shows its own
    return Policy(
        model,
        config.trainer,
        config.algo,
        dtype=config.model.dtype.value,
        head_dtype=config.head_dtype.value,
        temperature=config.rollout.temperature,
        seed=config.seed,
    )
