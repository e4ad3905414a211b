"""vLLM's 16-bit linear layers on a CPU without instructions for them, in engines that rlalign starts: through
`rlalign.head.widened`.

vLLM (0.32) packs a layer's weight for oneDNN and multiplies by the packed copy. Where oneDNN has no 16-bit product (AVX2), vLLM
itself falls back to torch's, which are slow there; where oneDNN only imitates one (AVX-512 without bf16), its own is slow. In both
cases `rlalign.head.widened` measures the faster way, and vLLM is led into its fallback, whose products are then widened. Nothing is
packed on that way, so a published weight cannot leave a stale copy behind, and readback's one-hot products pass through it too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlalign.head import widened

if TYPE_CHECKING:
    from torch import Tensor


def install() -> None:
    """Let vLLM ask us before it packs a weight, in this process. Idempotent; nothing happens where the device is not the CPU."""
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    pack = getattr(_custom_ops, "create_onednn_mm", None)
    if not current_platform.is_cpu() or pack is None or pack.__module__ == __name__:
        return

    def pack_unless_widened(weight: Tensor, *args: object, **kwargs: object) -> object:
        choice = widened.decide(weight.dtype)
        if choice is not None and choice.products == widened.WIDENED:
            raise RuntimeError(choice.describe())  # vLLM's own sign that oneDNN cannot: it takes torch's products
        return pack(weight, *args, **kwargs)

    _custom_ops.create_onednn_mm = pack_unless_widened
