"""What a scorer says of the model behind it: which tasks it can do, and every default that a request may leave open."""

from __future__ import annotations

from typing import Literal

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
