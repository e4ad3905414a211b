"""Queries, keys and values after rope belong to no module: they are seen in the attention function that transformers looks up.

B sequences, H heads, L length, E head size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Given an attention module and its [query, key, value], each [B, H, L, E], returns what it shall attend with.
Change = Callable[[nn.Module, list[Tensor]], list[Tensor]]


@contextmanager
def heads_changed(network: PreTrainedModel, change: Change) -> Iterator[None]:
    """Call `change` before every attention of every forward inside.

    Raises ValueError where the model's attention cannot be seen: it then must be run with the sdpa or eager implementation.
    """
    name = network.config._attn_implementation
    if name not in ("sdpa", "eager") and name not in ALL_ATTENTION_FUNCTIONS:
        raise ValueError(
            f"the trainer's attention implementation {name!r} cannot be seen; load the model with sdpa or eager"
        )
    known = ALL_ATTENTION_FUNCTIONS.get(name)

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: object
    ) -> tuple:
        own = known or sys.modules[type(module).__module__].eager_attention_forward
        return own(module, *change(module, [query, key, value]), mask, **options)

    ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        yield
    finally:
        if known is None:
            del ALL_ATTENTION_FUNCTIONS[name]
        else:
            ALL_ATTENTION_FUNCTIONS[name] = known
