"""What a model's own forward does between its last hidden states and its logits, compared with what `HeadTransform` read.

The body is left out (random hidden states stand in for it) and the lm_head answers with random logits, so that no weight is
touched: a model of any size, partitioned by ZeRO-3 or not, is checked in a moment, and to the last bits.
L rows, D hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
import weakref
from types import MethodType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlalign.head.transform import HeadTransform

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ROWS = 4
SPREAD = 4.0  # standard deviation of the logits that stand in: a cap has to show
ROUNDING = 1e-5  # relative, of a few float32 operations in another order
_CHECKED: weakref.WeakKeyDictionary[nn.Module, HeadTransform] = weakref.WeakKeyDictionary()


def transform_of(model: nn.Module) -> HeadTransform:
    """The transform of this model's configuration, after its own forward has been seen to do the same.

    Raises ValueError where it does something else, naming the field of the configuration that explains it.
    """
    if model in _CHECKED:
        return _CHECKED[model]
    transform = HeadTransform.of(model.config)
    hidden_LD, given_LD, raw_LV, logits_LV = observed(model)
    wanted_LD, wanted_LV = transform.hidden(hidden_LD), transform.apply_as_transformers(raw_LV)
    fields = model.config.get_text_config()
    if not _equal(given_LD.float(), wanted_LD.to(given_LD.dtype).float()):
        what = f"gives its lm_head hidden states {_slope(given_LD, hidden_LD):.6g} times the last ones"
        wanted = f"{1 / transform.hidden_divisor:.6g}"
        _refuse(model, what, wanted, likely_fields(fields, _slope(given_LD, hidden_LD)))
    if not _equal(logits_LV, wanted_LV):
        small_LV = raw_LV.abs() < 0.1  # where a cap does nothing yet
        slope = _slope(logits_LV[small_LV], raw_LV[small_LV])
        what = f"makes logits {slope:.6g} times its lm_head's, the largest {float(logits_LV.abs().max()):.4g}"
        wanted = f"{transform.logit_scale:.6g}, {float(wanted_LV.abs().max()):.4g}"
        _refuse(model, what, wanted, likely_fields(fields, slope))
    _CHECKED[model] = transform
    return transform


def observed(model: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Last hidden states [L, D], what the lm_head was given for them, what it answered [L, V], and the model's logits of that."""
    bodies = {model.base_model, model.base_model.get_decoder()}  # OPT calls the inner one
    head = model.get_output_embeddings()
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    config = model.config.get_text_config()
    hidden_1LD = torch.randn(1, ROWS, head.in_features, generator=generator).bfloat16().float()  # FSDP2 may cast it
    hidden_1LD = hidden_1LD.to(device)
    raw_1LV = (torch.randn(1, ROWS, head.out_features, generator=generator) * SPREAD).to(device)
    given: list[Tensor] = []

    def stand_in(self: nn.Module, *args: object, **kwargs: object) -> _Output:
        return _Output(hidden_1LD)

    def answer(self: nn.Module, hidden: Tensor) -> Tensor:
        given.append(hidden.detach())
        return raw_1LV.clone()

    forwards = {module: module.__dict__.get("forward") for module in (*bodies, head)}
    head.forward = MethodType(answer, head)
    for body in bodies:
        body.forward = MethodType(stand_in, body)
    try:
        ids_1L = torch.zeros(1, ROWS, dtype=torch.int64, device=device)
        accepted = inspect.signature(model.forward).parameters
        extra = {"use_cache": False} if "use_cache" in accepted else {}
        extra |= {"output_router_logits": False} if "output_router_logits" in config.to_dict() else {}
        extra |= {"attention_mask": torch.ones_like(ids_1L)} if "attention_mask" in accepted else {}
        with torch.no_grad():
            found = model(ids_1L, **extra)
    finally:
        for module, forward in forwards.items():
            del module.forward
            if forward is not None:
                module.forward = forward
    if len(given) != 1:
        raise ValueError(f"the forward of {type(model).__name__} called its lm_head {len(given)} times; expected once")
    return hidden_1LD[0], given[0][0], raw_1LV[0], found.logits[0]


class _Output:
    """In place of a body's output: hidden states, and nothing else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int | slice) -> object:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


def _equal(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= ROUNDING * wanted.abs().max())


def _slope(of: Tensor, on: Tensor) -> float:
    """Least squares through the origin."""
    return float((of.double() * on.double()).sum() / on.double().square().sum())


def likely_fields(config: PreTrainedConfig, factor: float) -> list[str]:
    """Fields of the configuration whose value, or its inverse, is this factor."""
    numbers = {n: v for n, v in config.to_dict().items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return [
        f"{name}={value}"
        for name, value in numbers.items()
        if value not in (0, 1) and any(abs(factor - guess) <= 1e-4 * abs(guess) for guess in (value, 1 / value))
    ]


def _refuse(model: nn.Module, what: str, wanted: str, likely: list[str]) -> None:
    field = f"likely {' or '.join(likely)}" if likely else "no field of its configuration has that value"
    raise ValueError(
        f"{type(model).__name__} {what}; rlalign reads {wanted} from its configuration ({field}). Every logprob would be off; "
        "the field has to be known to rlalign.head.transform"
    )
