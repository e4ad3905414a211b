"""The nouns that travel between the rooms.

Every per-token array is aligned to `token_ids`: entry t is about token t; entry 0 is never in a mask.
Suffixes: B sequences, L padded length.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from rlalign.ragged import KeptSets, Routes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

__all__ = [
    "Correction",
    "KeptSets",
    "LogprobSpec",
    "RewardScore",
    "Rollout",
    "RolloutBatch",
    "Routes",
    "TrainBatch",
    "collate",
    "spread",
]


UNKNOWN_VERSION = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobSpec:
    """What a log-probability means. Numbers with different specs are different quantities and are never compared.

    temperature: divides the logits (vLLM's convention, not a multiplication by 1/T).
    top_p, top_k, min_p: truncation of the sampling distribution; 1.0, 0 and 0.0 mean none.
    processed: True when temperature, truncation and every setting below are in the number (vLLM `processed_logprobs`).
    head_dtype: "float32", "master" (float32 with the unrounded fp32 weight), or "model" (the dtype of the model's body).
    vocab_size: ids from here on are barred on both sides; 0 bars none.
    repetition_penalty ... structured: what else vLLM may do to logits before it samples; the defaults mean off. structured:
    a grammar or a schema barred tokens. `of_sampling` reads all of them.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    processed: bool = True
    head_dtype: str = "float32"
    vocab_size: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    structured: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "logit_bias", tuple(sorted((int(i), float(x)) for i, x in self.logit_bias)))
        object.__setattr__(self, "bad_words", tuple(self.bad_words))
        object.__setattr__(self, "allowed_token_ids", tuple(sorted(self.allowed_token_ids)))

    @classmethod
    def of_sampling(
        cls, params: object, *, processed: bool, head_dtype: str = "float32", vocab_size: int = 0
    ) -> LogprobSpec:
        """Read the convention of logprobs sampled with `params`: vLLM's SamplingParams, or the fields of a request's body.

        A name that is absent, None or vLLM's word for off is off. processed: the engine's logprobs_mode is processed_logprobs.
        """
        read = params.get if isinstance(params, Mapping) else lambda name: getattr(params, name, None)
        values: dict[str, Any] = {name: value for name in _SAMPLING if (value := read(name)) is not None}
        values["top_k"] = max(0, values.get("top_k", 0))
        values["logit_bias"] = tuple(dict(values.get("logit_bias", ())).items())
        structured = any(
            read(name) is not None for name in ("structured_outputs", "guided_decoding", "response_format")
        )
        return cls(**values, structured=structured, processed=processed, head_dtype=head_dtype, vocab_size=vocab_size)

    @property
    def truncated(self) -> bool:
        """True when the engine renormalised over a kept set of tokens: `RolloutBatch.kept`, once both sides share it."""
        return self.processed and (self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0)

    @property
    def support(self) -> str:
        """The set that probabilities, entropies and KLs under this convention run over, in words."""
        limits = {"top_p": self.top_p if self.top_p < 1.0 else None, "top_k": self.top_k, "min_p": self.min_p}
        kept = ", ".join(f"{name} {value:g}" for name, value in limits.items() if value) if self.truncated else ""
        barred = f"ids below {self.vocab_size}" if self.vocab_size else "the whole vocabulary"
        return f"{kept} of {barred}" if kept else barred

    @property
    def unrepeatable(self) -> tuple[str, ...]:
        """The settings in the number that no trainer here computes: penalties, biases, barred words, grammars."""
        plain = LogprobSpec()
        return tuple(n for n in _UNREPEATABLE if self.processed and getattr(self, n) != getattr(plain, n))

    def untruncated(self) -> LogprobSpec:
        """The same convention over the whole vocabulary: what a trainer without the kept sets computes."""
        return replace(self, top_p=1.0, top_k=0, min_p=0.0, processed=True)

    def require_repeatable(self, *, what: str) -> None:
        """Raise ValueError naming every setting that no trainer computes."""
        if self.unrepeatable:
            given = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.unrepeatable)
            raise ValueError(
                f"{what}: sampled with {given}, which change the engine's logprobs token by token and are not repeated by the "
                "trainer; every ratio would be biased. Sample without them"
            )

    def require_equal(self, other: LogprobSpec, *, what: str) -> None:
        """Raise ValueError naming every field in which the two conventions differ."""
        different = [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]
        if different:
            detail = ", ".join(f"{n}: {getattr(self, n)!r} against {getattr(other, n)!r}" for n in different)
            raise ValueError(
                f"{what}: log-probabilities with different conventions cannot be compared ({detail}). "
                "Sample with processed logprobs at the trainer's temperature and head dtype, over the trainer's support, "
                "without penalties, biases and barred words."
            )


_UNREPEATABLE = (
    "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "bad_words", "allowed_token_ids",
    "min_tokens", "structured",
)  # fmt: skip
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", *_UNREPEATABLE[:-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled sequence in wire form: plain lists, picklable, JSON-able.

    token_ids: prompt followed by sampled tokens, length L.
    loss_mask: True on sampled tokens only.
    rollout_logprobs: nats, as the engine sampled them; 0.0 where loss_mask is False.
    version_spans: (start, end, policy_version) over sampled positions of token_ids, end exclusive, in order.
    kv_spans: the same over all positions, prompt included: the version that computed a position's keys and values. Older than
        what sampled the next token where weights changed in flight or a prefix cache outlived them. Empty: not known.
    kv_recomputed: True where updates in flight had all keys and values computed again: each token saw keys of its own version.
    kept_ids, kept_counts: the ids each sampled token was drawn from, one token's behind the other's, and how many those are;
        0 where the engine did not give the whole set. Both empty: not captured. array("i") and array("q").
    experts, experts_shape: the experts that the first positions went through in the engine, and (mixture layers, experts of a
        token); array("B") for at most 256 experts, else array("H"). Empty and (0, 0): not captured.
    outcome, why, verified: of a conversation, how it ended, its environment's error, and its reward, None for none; "" for a
        single answer. turn_rewards: what the environment gave for a turn, with the position of the turn's last token.
    """

    token_ids: list[int]
    loss_mask: list[bool]
    rollout_logprobs: list[float]
    prompt_id: int
    group_id: int
    finish_reason: str
    version_spans: list[tuple[int, int, int]]
    kv_spans: list[tuple[int, int, int]] = field(default_factory=list)
    kv_recomputed: bool = False
    text: str = ""
    kept_ids: Sequence[int] = field(default_factory=lambda: array("i"))
    kept_counts: Sequence[int] = field(default_factory=lambda: array("q"))
    experts: array = field(default_factory=lambda: array("B"))
    experts_shape: tuple[int, int] = (0, 0)
    outcome: str = ""
    why: str = ""
    verified: float | None = None
    turn_rewards: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        if len(self.loss_mask) != n or len(self.rollout_logprobs) != n:
            raise ValueError(
                f"rollout of prompt {self.prompt_id}: token_ids, loss_mask and rollout_logprobs must have one entry per "
                f"token; got {n}, {len(self.loss_mask)}, {len(self.rollout_logprobs)}"
            )
        if self.kept_counts and (len(self.kept_counts), sum(self.kept_counts)) != (
            sum(self.loss_mask),
            len(self.kept_ids),
        ):
            raise ValueError(
                f"rollout of prompt {self.prompt_id}: kept_counts must have one entry per sampled token and add up to the length "
                f"of kept_ids; got {len(self.kept_counts)} entries, sum {sum(self.kept_counts)}, for {sum(self.loss_mask)} sampled "
                f"tokens and {len(self.kept_ids)} ids"
            )
        Routes.require_whole(len(self.experts), self.experts_shape, n, what=f"rollout of prompt {self.prompt_id}")
        if n and self.loss_mask[0]:
            raise ValueError(
                f"rollout of prompt {self.prompt_id}: token 0 has no context, so it cannot be in loss_mask"
            )

    @property
    def prompt_length(self) -> int:
        """Tokens before the first sampled one."""
        return self.loss_mask.index(True) if True in self.loss_mask else len(self.token_ids)

    @property
    def policy_version(self) -> int:
        """The oldest version that sampled a token of this sequence."""
        return min(version for _, _, version in self.version_spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """Padded rollouts. Right padding; immutable; shapes and dtypes checked, values (NaN, -inf) are counted later.

    token_ids_BL int64, attention_mask_BL bool, loss_mask_BL bool, rollout_logprobs_BL float32 (nats under `spec`),
    prompt_id_B, group_id_B int64.
    policy_version_BL int64: the version that sampled the token, -1 outside the loss mask. kv_version_BL int64: the oldest
    version among the keys and values it was sampled with, -1 outside the loss mask and where nobody knows.
    kept: where `spec.truncated`, the set each token was drawn from, as the engine gave it or the trainer computed it.
    routes: the experts that the engine sent each position to, for a trainer that repeats them.
    """

    token_ids_BL: Tensor
    attention_mask_BL: Tensor
    loss_mask_BL: Tensor
    rollout_logprobs_BL: Tensor
    prompt_id_B: Tensor
    group_id_B: Tensor
    policy_version_BL: Tensor
    kv_version_BL: Tensor
    spec: LogprobSpec
    kept: KeptSets | None = None
    routes: Routes | None = None

    def __post_init__(self) -> None:
        import torch

        shape = self.token_ids_BL.shape
        wanted = {
            "token_ids_BL": (shape, torch.int64),
            "attention_mask_BL": (shape, torch.bool),
            "loss_mask_BL": (shape, torch.bool),
            "rollout_logprobs_BL": (shape, torch.float32),
            "prompt_id_B": (shape[:1], torch.int64),
            "group_id_B": (shape[:1], torch.int64),
            "policy_version_BL": (shape, torch.int64),
            "kv_version_BL": (shape, torch.int64),
        }
        for name, (want_shape, want_dtype) in wanted.items():
            got = getattr(self, name)
            if got.shape != want_shape or got.dtype != want_dtype:
                raise ValueError(
                    f"RolloutBatch.{name}: expected {tuple(want_shape)} {want_dtype}, got {tuple(got.shape)} {got.dtype}"
                )
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"RolloutBatch needs at least one sequence and one token; got shape {tuple(shape)}")
        if self.kept is not None and self.kept.count_BL.shape != shape:
            raise ValueError(
                f"RolloutBatch.kept: sets of {tuple(self.kept.count_BL.shape)} positions, expected those of token_ids_BL, "
                f"{tuple(shape)}; cut both with `rows`"
            )
        if self.routes is not None and (
            len(self.routes.count_B) != shape[0] or int(self.routes.count_B.max()) > shape[1]
        ):
            raise ValueError(
                f"RolloutBatch.routes: of {len(self.routes.count_B)} sequences with up to {int(self.routes.count_B.max())} "
                f"positions, expected {shape[0]} with at most {shape[1]}; the routes belong to another batch"
            )
        if bool(self.loss_mask_BL[:, 0].any()):
            raise ValueError("RolloutBatch.loss_mask_BL marks token 0, which has no context to be predicted from")

    def rows(self, index: slice | Tensor, length: int | None = None) -> RolloutBatch:
        """The sequences in `index`, with the same padding, or cut to their first `length` positions."""
        tensors = {name: tensor[index] for name, tensor in self.tensors().items()}
        cut = {name: tensor[:, :length] if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
        kept = None if self.kept is None else self.kept.rows(index, length)
        routes = None if self.routes is None else self.routes.rows(index)
        return RolloutBatch(**cut, spec=self.spec, kept=kept, routes=routes)

    def tensors(self) -> dict[str, Tensor]:
        """The padded tensors by their names."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("spec", "kept", "routes")}

    def __len__(self) -> int:
        return self.token_ids_BL.shape[0]


def collate(rollouts: Sequence[Rollout], *, pad_token_id: int, spec: LogprobSpec) -> RolloutBatch:
    """Pad rollouts on the right to the longest one. Raises ValueError on an empty list."""
    import torch

    if not rollouts:
        raise ValueError("collate: no rollouts; the engine returned an empty batch")
    lengths = torch.tensor([len(r.token_ids) for r in rollouts])
    attention = torch.arange(int(lengths.max())) < lengths[:, None]

    def padded(rows: Sequence[Sequence[float]], empty: float, dtype: torch.dtype, code: str) -> Tensor:
        values_BL = torch.full(attention.shape, empty, dtype=dtype)
        values = array(code, chain.from_iterable(rows))  # four times as fast as torch.tensor of a list
        values_BL[attention] = torch.frombuffer(values, dtype=dtype)
        return values_BL

    token_ids = padded([r.token_ids for r in rollouts], pad_token_id, torch.int64, "q")
    loss_mask = padded([r.loss_mask for r in rollouts], False, torch.bool, "b")
    logprobs = padded([r.rollout_logprobs for r in rollouts], 0.0, torch.float32, "f")
    versions = spread([r.version_spans for r in rollouts], attention.shape[1])
    oldest = spread([r.kv_spans for r in rollouts], attention.shape[1]).cummin(1).values
    before = torch.nn.functional.pad(oldest[:, :-1], (1, 0), value=UNKNOWN_VERSION)  # a token sees the keys before it
    recomputed_B1 = torch.tensor([[r.kv_recomputed] for r in rollouts])
    kv_versions = torch.where(recomputed_B1, versions, before)
    _require_versions(versions, loss_mask)
    kv_versions[~loss_mask] = UNKNOWN_VERSION
    return RolloutBatch(
        token_ids_BL=token_ids,
        attention_mask_BL=attention,
        loss_mask_BL=loss_mask,
        rollout_logprobs_BL=logprobs,
        prompt_id_B=torch.tensor([r.prompt_id for r in rollouts]),
        group_id_B=torch.tensor([r.group_id for r in rollouts]),
        policy_version_BL=versions,
        kv_version_BL=kv_versions,
        spec=spec,
        kept=_kept(rollouts, loss_mask),
        routes=Routes.of([(r.experts, r.experts_shape) for r in rollouts]),
    )


def _kept(rollouts: Sequence[Rollout], loss_mask_BL: Tensor) -> KeptSets | None:
    """The captured sets of a batch; None where no rollout has any."""
    import torch

    if not any(r.kept_counts for r in rollouts):
        return None
    ids = array("i", chain.from_iterable(r.kept_ids for r in rollouts))
    counts = array("q", chain.from_iterable(r.kept_counts or [0] * sum(r.loss_mask) for r in rollouts))
    ids_E = torch.frombuffer(ids, dtype=torch.int32) if ids else torch.zeros(0, dtype=torch.int32)
    position_N = loss_mask_BL.flatten().nonzero().squeeze(1)
    return KeptSets.spread(ids_E, torch.frombuffer(counts, dtype=torch.int64), position_N, loss_mask_BL.shape)


def spread(spans: Sequence[Sequence[tuple[int, int, int]]], length: int) -> Tensor:
    """The version of every position, [B, L] int64, from each row's (start, end, version) spans; UNKNOWN_VERSION elsewhere.

    Raises ValueError on spans that overlap or leave [0, length), and on negative versions.
    """
    import torch

    found = []
    for row, of_row in enumerate(spans):
        reached = 0
        for start, end, version in of_row:
            if not reached <= start < end <= length or version < 0:
                raise ValueError(
                    f"sequence {row}: version span ({start}, {end}, {version}) overlaps the one before or leaves 0..{length}, or "
                    "has no version from 0 on; spans are (start, end, version) over this sequence's positions, in order"
                )
            found.append((row * length + start, end - start, version))
            reached = end
    version_BL = torch.full((len(spans), length), UNKNOWN_VERSION)
    if found:
        first_S, count_S, version_S = torch.tensor(found).unbind(1)
        before_S = count_S.cumsum(0) - count_S
        position_N = torch.arange(int(count_S.sum())) + (first_S - before_S).repeat_interleave(count_S)
        version_BL.view(-1)[position_N] = version_S.repeat_interleave(count_S)
    return version_BL


def _require_versions(policy_version_BL: Tensor, loss_mask_BL: Tensor) -> None:
    nameless = (loss_mask_BL & (policy_version_BL == UNKNOWN_VERSION)).nonzero()
    if len(nameless):
        row, position = nameless[0].tolist()
        raise ValueError(
            f"collate: {len(nameless)} sampled tokens are in no version span, the first at sequence {row}, position {position}; "
            "every sampled token must name the policy version that sampled it"
        )
    policy_version_BL[~loss_mask_BL] = UNKNOWN_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """What the loss does about the mismatch. Rejected tokens leave the denominator through `keep`; weights never encode it.

    weights: [B, L] float32, detached; finite everywhere, 0.0 where not kept.
    keep: [B, L] bool, a subset of the loss mask.
    """

    weights: Tensor
    keep: Tensor

    def to(self, device: torch.device) -> Correction:
        """The same on another device."""
        return Correction(weights=self.weights.to(device), keep=self.keep.to(device))

    def rows(self, index: slice | Tensor, length: int | None = None) -> Correction:
        """The sequences in `index`, or their first `length` positions."""
        return Correction(weights=self.weights[index, :length], keep=self.keep[index, :length])


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardScore:
    """Rewards of a batch. raw and calibrated: [B] float32; calibration_id is "identity" where nothing was fitted."""

    raw: Tensor
    calibrated: Tensor
    calibration_id: str = "identity"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """All that a policy loss reads.

    old_logprobs_BL, ref_logprobs_BL: [B, L] float32; advantages_BL: [B, L] float32;
    values_BL, returns_BL: [B, L] float32, the critic's before the update and what it should have said; PPO only.
    num_tokens, num_sequences: kept tokens, and sequences with a kept token, of the whole optimizer step: the denominators.
    """

    rollouts: RolloutBatch
    old_logprobs_BL: Tensor
    advantages_BL: Tensor
    correction: Correction
    num_tokens: int
    num_sequences: int
    ref_logprobs_BL: Tensor | None = None
    values_BL: Tensor | None = None
    returns_BL: Tensor | None = None

    def rows(self, index: slice | Tensor, length: int | None = None) -> TrainBatch:
        """The sequences in `index`, or their first `length` positions; the denominators stay those of the whole step."""
        optional = ("ref_logprobs_BL", "values_BL", "returns_BL")
        present = {name: tensor for name in optional if (tensor := getattr(self, name)) is not None}
        return replace(
            self,
            rollouts=self.rollouts.rows(index, length),
            old_logprobs_BL=self.old_logprobs_BL[index, :length],
            advantages_BL=self.advantages_BL[index, :length],
            correction=self.correction.rows(index, length),
            **{name: tensor[index, :length] for name, tensor in present.items()},
        )
