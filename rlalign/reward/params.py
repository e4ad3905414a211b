"""What a scoring request asks for. `verify` resolves it against a model and lists every invalid field at once.

Raw logits are the default: reinforcement learning wants them. vLLM differs, its use_activation defaults to True and squashes
a reward through a sigmoid. Embeddings have unit length by default, as in vLLM.
"""

from __future__ import annotations

import warnings

import msgspec

from rlalign.reward.model_info import Activation, ModelInfo, PoolerDefaults, Task
from rlalign.reward.verify import VALID, InvalidParams, is_real, per_item_labels, resolve

__all__ = ["Activation", "InvalidParams", "ModelInfo", "PoolerDefaults", "ScoringParams", "Task"]

REMOVED_TASKS = {"score": "classify", "reward": "classify", "encode": "embed"}


class ScoringParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Parameters of one request; None leaves a choice to the model, then to the task.

    use_activation: sigmoid or softmax on the logits, unit length on embeddings. Logits are raw unless it is True.
    calibrate: apply the calibrator attached to the scorer; by default exactly when there is one.
    logit_mean, logit_sigma: scores are activation((logit - mean) / sigma); `ScoreResult.logits` stay as the head gave them.
    return_pooled_hidden_states: the state of each item before the head. label_token_ids: the answers of a generative judge,
    one list for all items or one for each. temperature: divides the judge's label logits. full_vocabulary: the labels'
    probabilities among all tokens, which do not add up to 1. min_label_mass: below it an answer is flagged low_label_mass and
    is no reward.
    step_tag_id, returned_token_ids: rows and columns of a step-pooling process reward model.
    item_first: the item before the query. truncate_prompt_tokens: keep the last k tokens, -1 as many as the model reads,
    None: too long an input is an error. max_tokens_per_item: keep the first k tokens of each item.
    softmax, activation, normalize, logit_bias, logit_scale: removed upstream, accepted with a DeprecationWarning.
    """

    task: str | None = None
    use_activation: bool | None = None
    calibrate: bool | None = None
    logit_mean: float | None = None
    logit_sigma: float | None = None
    return_pooled_hidden_states: bool = False
    return_token_logprobs: bool = False
    label_token_ids: list[int | list[int]] | None = None
    temperature: float | None = None
    full_vocabulary: bool = False
    min_label_mass: float | None = None
    step_tag_id: int | None = None
    returned_token_ids: list[int] | None = None
    dimensions: int | None = None
    item_first: bool = False
    truncate_prompt_tokens: int | None = None
    max_tokens_per_item: int | None = None
    skip_reading_prefix_cache: bool | None = None
    softmax: bool | None = None
    activation: bool | None = None
    normalize: bool | None = None
    logit_bias: float | None = None
    logit_scale: float | None = None

    def __post_init__(self) -> None:
        if self.task in REMOVED_TASKS:
            raise ValueError(f"task {self.task!r} was removed upstream: use task={REMOVED_TASKS[self.task]!r}")
        if self.task is not None and self.task not in VALID:
            raise ValueError(f"task: expected one of {', '.join(VALID)}, got {self.task!r}")
        for old in ("softmax", "activation", "normalize"):
            if (value := getattr(self, old)) is not None:
                self._renamed(old, "use_activation", value, f"use_activation={value}")
        if self.logit_bias is not None:
            self._renamed("logit_bias", "logit_mean", self.logit_bias, f"logit_mean={self.logit_bias}")
        if self.logit_scale is not None:
            if not is_real(self.logit_scale) or self.logit_scale == 0:
                raise ValueError(f"logit_scale: expected a finite number other than 0, got {self.logit_scale!r}")
            sigma = 1 / self.logit_scale
            self._renamed("logit_scale", "logit_sigma", sigma, f"logit_sigma={sigma:g}, its inverse")

    def _renamed(self, old: str, new: str, value: bool | float, form: str) -> None:
        """Move a removed name to its new one. Raises ValueError where both are given and disagree."""
        given = getattr(self, new)
        if given is not None and given != value:
            raise ValueError(f"{old} and {new} disagree: {old} means {form}, but {new}={given}; give {new} only")
        warnings.warn(f"{old} was removed upstream: write {form}", DeprecationWarning, stacklevel=3)
        msgspec.structs.force_setattr(self, new, value)
        msgspec.structs.force_setattr(self, old, None)

    def verify(self, model_info: ModelInfo, *, task: Task | None = None) -> ScoringParams:
        """A copy with every choice made: the user's, else the model's pooler defaults, else the task's.

        task: what the caller is about to run. Resolving twice changes nothing. Raises InvalidParams (a ValueError) that
        names every invalid field and what the task supports, and refuses to overwrite a task.
        """
        return resolve(self, model_info, task)

    def label_ids(self, num_items: int) -> list[list[int]]:
        """The judge's label tokens of each item. Raises ValueError where there is not one list an item."""
        ids = self.label_token_ids or []
        if not per_item_labels(self.label_token_ids):
            return [list(ids)] * num_items
        if len(ids) != num_items:
            raise InvalidParams(
                f"label_token_ids: {len(ids)} lists for {num_items} items; give one list for all, or one an item",
                ["label_token_ids"],
            )
        return [list(entry) for entry in ids]
