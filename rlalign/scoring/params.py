"""What a scoring request asks for, what a scorer says of its model, and how the one is resolved against the other.

`verify` lists every invalid field at once. Raw logits are the default: reinforcement learning wants them. vLLM differs, its
use_activation defaults to True and squashes a reward through a sigmoid. Embeddings have unit length by default, as in vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, cast

import msgspec

Task = Literal["classify", "token_classify", "embed", "token_embed", "generative"]
Activation = Literal["sigmoid", "softmax", "identity"]


class PoolerDefaults(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The model's own choices, between the user's and the task's defaults. None: no choice.

    pooling: which states of a sequence make its one state. token_pooling: ALL rows, or STEP: the rows at `step_tag_id` only.
    logit_mean, logit_sigma: scores are activation((logit - mean) / sigma).
    """

    pooling: Literal["LAST", "MEAN", "CLS"] | None = None
    token_pooling: Literal["ALL", "STEP"] | None = None
    use_activation: bool | None = None
    dimensions: int | None = None
    step_tag_id: int | None = None
    returned_token_ids: tuple[int, ...] | None = None
    logit_mean: float | None = None
    logit_sigma: float | None = None


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One reward model as a scorer serves it.

    tasks: the first is what a request without a task gets. num_labels: columns of the score head, 0 without one.
    activation: what use_activation=True applies to the logits; embeddings are always scaled to unit length.
    labels: names of the head's columns, in their order. max_length: tokens of one sequence, None where there is no limit.
    exposes_hidden_states: pooled states before the head can be returned; if not, hidden_states_reason says why.
    packs: several items can share one query's computation exactly; if not, packing_reason says why.
    matryoshka_dimensions: None: embeddings must not be cut; (): any cut is fine.
    template_sha256: of the chat template text, None without one.
    already_calibrated: the scores arrive shifted and scaled by the server, so no calibrator may be attached.
    calibration_id: of the calibrator attached in this process, None without one.
    """

    id: str
    architecture: str
    tasks: tuple[Task, ...]
    vocab_size: int
    hidden_size: int
    revision: str | None = None
    num_labels: int = 0
    activation: Activation = "identity"
    labels: tuple[str, ...] = ()
    max_length: int | None = None
    dtype: str | None = None
    head_dtype: str | None = None
    causal: bool = True
    exposes_hidden_states: bool = False
    hidden_states_reason: str = ""
    packs: bool = False
    packing_reason: str = ""
    matryoshka_dimensions: tuple[int, ...] | None = None
    pooler: PoolerDefaults = PoolerDefaults()
    template_sha256: str | None = None
    already_calibrated: bool = False
    calibration_id: str | None = None


COMMON = ("truncate_prompt_tokens", "truncation_side", "max_tokens_per_item", "skip_reading_prefix_cache")
VALID: dict[Task, tuple[str, ...]] = {
    "classify": ("use_activation", "calibrate", "return_pooled_hidden_states", "item_first", "alone", "logit_mean", "logit_sigma"),
    "token_classify": ("use_activation", "calibrate", "step_tag_id", "returned_token_ids", "logit_mean", "logit_sigma"),
    "embed": ("use_activation", "dimensions"),
    "token_embed": ("use_activation", "dimensions"),
    "generative": ("calibrate", "return_token_logprobs", "label_token_ids", "temperature", "full_vocabulary",
                   "min_label_mass", "item_first"),
}  # fmt: skip
FROM_POOLER = ("use_activation", "dimensions", "step_tag_id", "returned_token_ids", "logit_mean", "logit_sigma")
BOOLEANS = ("use_activation", "calibrate", "return_pooled_hidden_states", "return_token_logprobs", "item_first", "alone",
            "full_vocabulary", "skip_reading_prefix_cache")  # fmt: skip
STEP_ONLY = ("step_tag_id", "returned_token_ids")


class InvalidParams(ValueError):
    """A request that this model cannot answer. fields: every parameter at fault."""

    def __init__(self, message: str, fields: Sequence[str]) -> None:
        super().__init__(message)
        self.fields = tuple(fields)


def per_item_labels(labels: list[int | list[int]] | None) -> bool:
    """Whether label_token_ids has a list for each item."""
    return any(isinstance(entry, list | tuple) for entry in labels or ())


class _Problems(dict[str, str]):
    """Field -> what is wrong with it; the first complaint about a field stays."""

    def add(self, field: str, what: str) -> None:
        self.setdefault(field, what)

    def raise_any(self, params: ScoringParams, info: ModelInfo) -> None:
        if self:
            found = "; ".join(f"{field}={getattr(params, field)!r}: {what}" for field, what in self.items())
            supported = ", ".join((*VALID[params.chosen], *COMMON))
            said = f"{info.id} ({info.architecture}), task {params.task!r}: {found}. The task supports {supported}"
            raise InvalidParams(said, list(self))


def _check_supported(params: ScoringParams, info: ModelInfo, problems: _Problems) -> None:
    valid = (*VALID[params.chosen], *COMMON)
    if params.return_pooled_hidden_states and not info.exposes_hidden_states:
        problems.add("return_pooled_hidden_states", f"not available: {info.hidden_states_reason or 'no reason given'}")
    for name, default in zip(params.__struct_fields__, params.__struct_defaults__, strict=True):
        if name != "task" and name not in valid and getattr(params, name) is not default:
            problems.add(name, "not a parameter of this task")
        elif name in STEP_ONLY and info.pooler.token_pooling != "STEP" and getattr(params, name) is not None:
            problems.add(name, "only with step pooling (pooler default token_pooling='STEP')")


def _check_values(params: ScoringParams, info: ModelInfo, problems: _Problems) -> None:
    """Types too: a Struct made in Python is not type-checked."""
    for name in BOOLEANS:
        if not isinstance(getattr(params, name), bool | None):
            problems.add(name, "expected True or False")
    for name, bounds in {
        "dimensions": (1, info.hidden_size),
        "truncate_prompt_tokens": (-1, info.max_length),
        "max_tokens_per_item": (1, None),
        "step_tag_id": (0, info.vocab_size - 1),
    }.items():
        value, (low, high) = getattr(params, name), bounds
        if value is not None and not (_whole(value) and value >= low and (high is None or value <= high)):
            problems.add(name, f"expected a whole number from {low}" + ("" if high is None else f" to {high}"))
    if params.truncate_prompt_tokens == 0:
        problems.add("truncate_prompt_tokens", "nothing would be left; -1 keeps as much as the model reads")
    if params.truncation_side not in (None, "left", "right"):
        problems.add("truncation_side", "expected left, right or None")
    elif params.truncation_side is not None and params.truncate_prompt_tokens is None:
        problems.add("truncation_side", "nothing is cut without truncate_prompt_tokens")
    if params.truncate_prompt_tokens == -1 and info.max_length is None:
        problems.add("truncate_prompt_tokens", "the model has no maximum length to cut to")
    for name in ("logit_mean", "logit_sigma", "temperature", "min_label_mass"):
        if (value := getattr(params, name)) is not None and not is_real(value):
            problems.add(name, "expected a finite number")
        elif value is not None and name in ("logit_sigma", "temperature") and value <= 0:
            problems.add(name, "must be positive")
        elif value is not None and name == "min_label_mass" and not 0 <= value <= 1:
            problems.add(name, "a probability, 0 to 1")
    columns = info.num_labels or info.vocab_size
    if params.returned_token_ids is not None and (bad := _bad_ids(params.returned_token_ids, columns)):
        problems.add("returned_token_ids", bad)
    labels = params.label_token_ids
    if isinstance(labels, list | tuple) and per_item_labels(labels):
        for i, ids in enumerate(labels):
            if bad := _bad_ids(ids, info.vocab_size):
                problems.add("label_token_ids", f"item {i}: {bad}")
    elif labels is not None and (bad := _bad_ids(labels, info.vocab_size)):
        problems.add("label_token_ids", bad)
    if params.dimensions is not None and "dimensions" not in problems and params.task in ("embed", "token_embed"):
        allowed = info.matryoshka_dimensions
        if allowed is None:
            problems.add("dimensions", "the model has no Matryoshka training, so a cut embedding means little")
        elif allowed and params.dimensions not in allowed:
            problems.add("dimensions", f"the model was trained for {', '.join(map(str, allowed))}")


def _check_resolved(params: ScoringParams, info: ModelInfo, problems: _Problems) -> None:
    if params.calibrate:
        if info.calibration_id is None:
            problems.add("calibrate", "no calibrator is attached to this scorer (with_calibration attaches one)")
        for name in ("use_activation", "logit_mean", "logit_sigma", "full_vocabulary"):
            if (value := getattr(params, name)) is not None and value is not False:
                problems.add(name, "the calibrator already maps logits to probabilities; ask for one of the two")
    if params.use_activation and params.task in ("classify", "token_classify") and info.activation == "softmax":
        if info.num_labels == 1 and params.returned_token_ids is None:
            problems.add("use_activation", "the softmax of one label is always 1.0")
        if params.logit_mean:
            problems.add("logit_mean", "a mean shared by all labels cancels in the softmax")
    if params.task == "generative":
        _check_labels(params, problems)
    if params.task == "token_classify" and info.pooler.token_pooling == "STEP" and params.step_tag_id is None:
        problems.add("step_tag_id", "step pooling needs the token that ends a step")
    if params.task in ("token_classify", "token_embed") and not params.skip_reading_prefix_cache:
        problems.add("skip_reading_prefix_cache", "a cached prefix has no states to return; token tasks must skip it")


def _check_labels(params: ScoringParams, problems: _Problems) -> None:
    if not params.label_token_ids:
        problems.add("label_token_ids", "a generative judge needs the token ids of its answers, such as Yes and No")
        return
    labels = params.label_token_ids
    sizes = {len(ids) for ids in labels if not isinstance(ids, int)} or {len(labels)}
    if 1 in sizes and not params.full_vocabulary:
        problems.add(
            "label_token_ids", "the probability of one label among itself is always 1.0; give two, or full_vocabulary"
        )
    if params.calibrate and sizes != {2}:
        problems.add("calibrate", "the calibrator takes the log-odds of exactly two labels")
    if params.full_vocabulary and params.temperature != 1.0:
        problems.add("temperature", "applies to the renormalised probabilities, not to full_vocabulary")


def _with_defaults(params: ScoringParams, info: ModelInfo) -> ScoringParams:
    valid = VALID[params.chosen]
    chosen: dict[str, bool | float | int | list[int] | None] = {}
    if "calibrate" in valid and params.calibrate is None:
        chosen["calibrate"] = info.calibration_id is not None
    calibrated = chosen.get("calibrate", params.calibrate)
    for name in FROM_POOLER:
        default = getattr(info.pooler, name)
        wanted = name in valid and getattr(params, name) is None and default is not None
        if wanted and not (calibrated and name not in STEP_ONLY):
            chosen[name] = list(default) if isinstance(default, tuple) else default
    if "use_activation" in valid and params.use_activation is None:
        chosen.setdefault("use_activation", params.task in ("embed", "token_embed"))
    if params.skip_reading_prefix_cache is None:
        chosen["skip_reading_prefix_cache"] = params.task in ("token_classify", "token_embed")
    if params.truncate_prompt_tokens == -1:
        chosen["truncate_prompt_tokens"] = info.max_length
    if params.task == "generative":
        chosen["temperature"] = 1.0 if params.temperature is None else params.temperature
        chosen["min_label_mass"] = 0.5 if params.min_label_mass is None else params.min_label_mass
    return msgspec.structs.replace(params, **chosen)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _bad_ids(ids: object, size: int) -> str | None:
    if not isinstance(ids, list | tuple) or not ids:
        return "expected a list of token ids"
    for token in ids:
        if not _whole(token) or not 0 <= token < size:
            return f"{token!r} is not an id from 0 to {size - 1}"
    return "the same id twice" if len(set(ids)) < len(ids) else None


__all__ = ["Activation", "InvalidParams", "ModelInfo", "PoolerDefaults", "ScoringParams", "Task"]

REMOVED_TASKS = {"score": "classify", "reward": "classify", "encode": "embed"}
REMOVED = {
    "softmax": "use_activation",
    "activation": "use_activation",
    "normalize": "use_activation, for embeddings only",
    "logit_bias": "logit_mean",
    "logit_scale": "logit_sigma, its inverse",
}


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
    item_first: the item before the query. alone: a cross-encoder reads each item as one text, not as a pair whose first text is
    empty; only with an empty query. truncate_prompt_tokens: keep k tokens, -1 as many as the model reads, None: too long an
    input is an error. truncation_side: which end is cut; None: a pair's as its tokenizer says (right in most), else left, since a
    reward stands at the end. max_tokens_per_item: keep the first k tokens of each item.
    softmax, activation, normalize, logit_bias, logit_scale: removed upstream; giving one raises ValueError with its successor.
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
    alone: bool = False
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
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
        for old, new in REMOVED.items():
            if getattr(self, old) is not None:
                raise ValueError(f"{old} was removed upstream: use {new}")

    @property
    def chosen(self) -> Task:
        """The task of parameters that `verify` resolved."""
        if self.task is None:
            raise RuntimeError("these parameters are not resolved against a model: call verify(info) first")
        return cast("Task", self.task)

    def verify(self, model_info: ModelInfo, *, task: Task | None = None) -> ScoringParams:
        """A copy with every choice made: the user's, else the model's pooler defaults, else the task's.

        task: what the caller is about to run. Resolving twice changes nothing. Raises InvalidParams (a ValueError) that
        names every invalid field and what the task supports, and refuses to overwrite a task.
        """
        if task is not None and self.task is not None and task != self.task:
            raise InvalidParams(f"cannot overwrite task={self.task!r} with {task!r}", ["task"])
        params = msgspec.structs.replace(self, task=self.task or task or model_info.tasks[0])
        problems = _Problems()
        if params.task not in model_info.tasks:
            problems.add("task", f"the model supports {', '.join(model_info.tasks)}")
        _check_supported(params, model_info, problems)
        _check_values(params, model_info, problems)
        problems.raise_any(params, model_info)
        params = _with_defaults(params, model_info)
        _check_resolved(params, model_info, problems)
        problems.raise_any(params, model_info)
        return params

    def label_ids(self, num_items: int) -> list[list[int]]:
        """The judge's label tokens of each item. Raises ValueError where there is not one list an item."""
        given = self.label_token_ids or []
        lists = [list(entry) for entry in given if not isinstance(entry, int)]
        if not lists:
            return [[entry for entry in given if isinstance(entry, int)]] * num_items
        if len(lists) != num_items:
            raise InvalidParams(
                f"label_token_ids: {len(lists)} lists for {num_items} items; give one list for all, or one an item",
                ["label_token_ids"],
            )
        return lists
