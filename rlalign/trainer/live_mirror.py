"""mirror(): the rollout engine's head in a model that somebody else built and wrapped, and can have back as it was.

Suffixes: B sequences, L padded length, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from rlalign.trainer import checkpoint_names, head_mirror
from rlalign.trainer.head_mirror import Asked, HeadStatus, Tokens
from rlalign.trainer.rounding.mirroring import MirroredBody, unmirror_body

__all__ = ["Mirror", "causal_model", "mirror"]

# Where wrappers keep what they wrap: DDP, FSDP1, DeepSpeed and DataParallel; torch.compile; TRL's value heads.
INSIDE = ("module", "_orig_mod", "pretrained_model")


def mirror(model: nn.Module, *, head_dtype: str = "float32", chunk: int = 0, keep_mib: int = 0) -> Mirror:
    """Let a causal language model's lm_head project as the rollout engine does: float32 logits, from the same product.

    model: as the training loop calls it, in any of the wrappers DDP, FSDP1, FSDP2, DeepSpeed (ZeRO 0 to 3), torch.compile, PEFT, or
    a value head around a `pretrained_model`. Its weights, hooks and optimizer are not touched; only the lm_head's `forward` is
    replaced, until `restore`. head_dtype: what the engine runs, "float32" or "master". chunk, keep_mib: as in `token_logprobs`.
    Raises ValueError for a model without a plain nn.Linear lm_head, one whose head carries an adapter, is quantised, is split over
    a tensor-parallel group, or has been replaced already, by this or by another library.
    """
    if head_dtype not in ("float32", "master"):
        raise ValueError(f'mirror: head_dtype is {head_dtype!r}; choose "float32" or "master", as the engine runs')
    inner = causal_model(model)
    lm_head = _plain_head(inner)
    weight = head_mirror._weight(lm_head)
    if head_dtype == "master" and weight is not None and weight.dtype != torch.float32:
        raise ValueError(
            f"mirror: head_dtype=master projects with an unrounded lm_head, and {type(inner).__name__}'s is {weight.dtype}; load "
            "the model in float32 (with autocast for the body), or use head_dtype=float32"
        )
    status = head_mirror.mirror(inner, head_dtype=head_dtype, chunk=chunk, keep_mib=keep_mib)
    return Mirror(model, inner, lm_head, status)


class Mirror:
    """A mirrored model. Also a context manager that restores it at its end."""

    def __init__(self, model: nn.Module, inner: nn.Module, lm_head: nn.Linear, status: HeadStatus) -> None:
        self.model, self.inner, self.status = model, inner, status
        self.body: MirroredBody | None = None  # what of the layers is mirrored, too
        self._lm_head = lm_head
        self._mirrored = True

    @property
    def head_dtype(self) -> str:
        """ "float32" or "master"."""
        return self.status.dtype

    def token_logprobs(
        self,
        inputs: Mapping[str, object],
        mask_BL: Tensor,
        *,
        temperature: float = 1.0,
        exact: bool = False,
        through: nn.Module | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logprobs and entropies, both [B, L] float32 in nats, through one forward of the whole wrapped model; no logits are built.

        inputs: what the model is called with; "input_ids" [B, L] among it. mask_BL bool: the tokens to score, entry t about token
        t; 0.0 elsewhere. temperature divides the logits. exact: the sampler's own softmax over whole rows, for numbers that are
        compared and not differentiated. through: the model in a wrapper that it got after it was mirrored. Gradients
        flow through the wrappers as from any output of the model.
        Raises ValueError for inputs without input_ids and what `rlalign.token_logprobs` refuses, RuntimeError after `restore` and
        for a model whose forward does not call its lm_head.
        """
        if not isinstance(inputs.get("input_ids"), Tensor):
            raise ValueError(f"mirror: inputs need input_ids as a tensor [B, L]; got {', '.join(inputs) or 'nothing'}")
        self.ask(Tokens(inputs["input_ids"], mask_BL, temperature), exact=exact)
        try:
            output = (through or self.model)(**inputs)
        except BaseException:
            self.status.asked = None
            raise
        return self.answer(output)

    def ask(self, tokens: Tokens, *, exact: bool) -> None:
        """Let the next forward of the model, whoever calls it, answer this in place of building logits: `answer` has it."""
        self.require_in_place()
        self.status.asked = Asked(tokens, exact)

    def answer(self, output: object) -> tuple[Tensor, Tensor]:
        """Logprobs and entropies, as in `token_logprobs`, of the forward since `ask`, which returned `output`."""
        asked, self.status.asked = self.status.asked, None
        if asked is None:
            raise RuntimeError("mirror: nothing was asked before this forward; ask(tokens) first")
        if asked.logprobs_BL is None:
            raise RuntimeError(
                f"the forward of {type(self.inner).__name__} did not call its lm_head ({self.status.name}): a fused loss or "
                "another patch stands in its place, and logits are not the mirror's. Call it without labels, or undo that patch"
            )
        # zeros; through them the gradient enters the wrappers at their outputs, where FSDP and DDP wait for it
        through = next(t for t in _tensors(output) if t.is_floating_point()).float().sum() * 0.0
        return asked.logprobs_BL + through, asked.entropy_BL

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face names and whole tensors, for `publish` and `verify`: shards gathered, LoRA merged; all ranks iterate."""
        return checkpoint_names.named_weights(self.model, self.inner)

    def require_in_place(self) -> None:
        """Raise RuntimeError when the head is not the mirror's any more."""
        current = vars(self._lm_head).get("forward")
        if not self._mirrored or self.inner.get_output_embeddings() is not self._lm_head:
            raise RuntimeError(
                "this mirror was restored, or the model has another lm_head since; mirror the model again"
            )
        if getattr(current, "__module__", None) != head_mirror.__name__:
            raise RuntimeError(
                f"{self.status.name}.forward was replaced after it was mirrored, by {getattr(current, '__module__', None)}; "
                "its logits are not the engine's. Mirror after that library has patched the model, or leave its patch out"
            )

    def restore(self) -> None:
        """Give the lm_head, and layers that were mirrored with it, their own forwards back. Safe to call twice."""
        if self.body is not None:
            unmirror_body(self.inner)
            self.body = None
        if self._mirrored:
            vars(self._lm_head).pop("forward", None)
            self._mirrored = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def causal_model(model: nn.Module) -> nn.Module:
    """The transformers model inside whatever wraps it. Raises ValueError where there is none with an lm_head and a config."""
    inner = model
    while not (hasattr(inner, "get_output_embeddings") and hasattr(inner, "config")) or _wraps(inner):
        if hasattr(inner, "get_base_model"):  # PEFT
            inner = inner.get_base_model()
            continue
        name = next((n for n in INSIDE if isinstance(vars(inner).get("_modules", {}).get(n), nn.Module)), None)
        if name is None:
            raise ValueError(
                f"{type(model).__name__}: found no causal language model of transformers inside it (looked through "
                f"{', '.join(INSIDE)}); give the model that has get_output_embeddings() and config"
            )
        inner = getattr(inner, name)
    return inner


def _wraps(module: nn.Module) -> bool:
    return hasattr(module, "get_base_model") or any(name in module._modules for name in INSIDE)


def _plain_head(inner: nn.Module) -> nn.Linear:
    lm_head = inner.get_output_embeddings()
    kind = f"{type(lm_head).__module__}.{type(lm_head).__qualname__}"
    if hasattr(lm_head, "base_layer") or hasattr(lm_head, "modules_to_save"):
        raise ValueError(
            f"{type(inner).__name__}: its lm_head carries an adapter ({kind}), which the mirror would pass by. Leave lm_head "
            "out of target_modules and modules_to_save"
        )
    if type(lm_head).forward is not nn.Linear.forward or not isinstance(lm_head, nn.Linear):
        raise ValueError(
            f"{type(inner).__name__}: its lm_head is {kind}; the mirror covers a plain nn.Linear (not quantised, not fused, no "
            "factorised head). Keep lm_head out of the quantisation, or run head_dtype=model on both sides"
        )
    own = vars(lm_head).get("forward")
    if own is not None:
        origin = getattr(own, "__module__", "?")
        if origin == head_mirror.__name__:
            raise ValueError(f"{type(inner).__name__} is mirrored already; use that mirror, or restore() it first")
        raise ValueError(
            f"{type(inner).__name__}: the forward of its lm_head was replaced by {origin}; two patches cannot both make the "
            "logits. Switch that one off (TRL: cast_lm_head_to_fp32=False)"
        )
    weight = head_mirror._weight(lm_head)
    if weight is not None and _tensor_parallel(weight):
        raise ValueError(
            f"{type(inner).__name__}: its lm_head is split over a tensor-parallel group ({weight.placements}); give the slices to "
            "rlalign.token_logprobs(shard=...), which knows vocabulary-parallel heads"
        )
    return lm_head


def _tensor_parallel(weight: Tensor) -> bool:
    """A DTensor that nobody will gather in time: FSDP2 does for its own, whose mesh carries no tensor-parallel dimension."""
    mesh = getattr(weight, "device_mesh", None)
    return mesh is not None and any(name and "tp" in name for name in mesh.mesh_dim_names or ())


def _tensors(output: object) -> Iterator[Tensor]:
    """All tensors in what a model returned: an output of transformers, a tuple, a tensor."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)
