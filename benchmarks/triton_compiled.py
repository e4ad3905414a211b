"""What the GPU's own assembler makes of each Triton kernel, without a GPU: registers, spills, shared memory, instructions.

    python -m benchmarks.triton_compiled --markdown benchmarks/results/triton_compiled.md

Every kernel of rlalign/head/triton in each plan and way of loading, for compute capabilities 8.0 (A100), 9.0 (H100, H200) and
10.0 (B200). Triton compiles to PTX, its wheel's ptxas to machine code; both are read. Needs triton and no device.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rlalign.head.triton import PLANS, Plan, head_kernels
from rlalign.head.triton.launches import MERGED_ROWS, MERGED_TILES, OPTIONS

SHARED = {
    80: 166912,
    90: 232448,
    100: 232448,
}  # bytes a block may have (CUDA programming guide, "Technical Specifications")
NAMES = {80: "sm_80 (A100)", 90: "sm_90 (H100, H200)", 100: "sm_100 (B200)"}
MEANT = {80: "mma.sync.aligned.m16n8k16", 90: "wgmma.mma_async.sync.aligned.m64n256k16", 100: "tcgen05.mma"}
POINTERS = {"target": "*i64"}
SOFTMAX = ("bias", "temperature", "target", "lse", "logprob_grad", "entropy", "entropy_grad", "bias_grad")
FLOATS = {"soft_cap", "logit_scale"}


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel to compile. options: arguments that are None, by name, and constants that differ from the plainest."""

    kernel: str
    plan: Plan | None
    described: bool = False
    from_memory: bool = False
    capped: bool = False
    barred: bool = False
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        """For the table."""
        words = [self.kernel.removesuffix("_kernel")]
        if self.plan is not None:
            words.append(f"{self.plan.rows} x {self.plan.columns}")
        words += [
            word
            for word, there in (
                ("TMA", self.described),
                ("read", self.from_memory),
                ("cap", self.capped),
                ("kept sets", self.barred),
            )
            if there
        ]
        return ", ".join(words if self.dtype == "bf16" else [*words, self.dtype])


@dataclass(frozen=True, slots=True)
class Compiled:
    """What came out. products: tensor-core instructions of the PTX by name, with how often each is written there."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    products: dict[str, int]
    loads: str


def variants(target: int) -> Iterator[Variant]:
    """Every kernel that runs on this target."""
    for described in (False, True) if target >= 90 else (False,):
        for plan in PLANS.values():
            yield Variant("logits_kernel", plan, described)
        for kernel in ("sums_kernel", "gradient_kernel"):
            yield Variant(kernel, PLANS[128], described)
            yield Variant(kernel, PLANS[128], described, capped=True)
            yield Variant(kernel, PLANS[128], described, barred=True)
    for kernel in ("sums_kernel", "gradient_kernel"):
        yield Variant(kernel, PLANS[128], from_memory=True)
    yield Variant("logits_kernel", PLANS[64], dtype="fp16")
    yield Variant("merge_kernel", None)


def compiled(variant: Variant, target: int) -> Compiled:
    """Compile one variant for `sm_<target>` and read what the assembler says of it."""
    signature, constants, attributes = _arguments(variant)
    source = ASTSource(getattr(head_kernels, variant.kernel), signature, constants, attributes)
    options = dict(OPTIONS)
    if variant.plan is not None:
        options |= {"num_warps": variant.plan.warps, "num_stages": variant.plan.stages}
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    ptx = made.asm["ptx"]
    found = re.findall(r"\b(mma\.sync\.[\w.]+|wgmma\.mma_async\.[\w.]+|tcgen05\.mma\.[\w.:]+)", ptx)
    registers, spilled = _assembled(made.asm["cubin"])
    loads = "TMA" if "cp.async.bulk.tensor" in ptx else "cp.async" if "cp.async" in ptx else "ld.global"
    return Compiled(registers, spilled, made.metadata.shared, dict(Counter(found)), loads)


def _arguments(variant: Variant) -> tuple[dict[str, str], dict[str, object], dict[tuple[int], list]]:
    kernel, plan = getattr(head_kernels, variant.kernel), variant.plan
    constants: dict[str, object] = {"MEAN": True, "CAPPED": variant.capped, "EVEN": True, "WIDEN": False}
    constants |= {"DESCRIBED": variant.described, "BLOCK_T": MERGED_TILES, "BLOCK_N": MERGED_ROWS}
    if plan is not None:
        constants |= {"BLOCK_N": plan.rows, "BLOCK_V": plan.columns, "BLOCK_K": plan.inner, "GROUP": plan.group}
        constants |= {"hidden_d": 1, "weight_d": 1}
        constants["kept"] = None
        if not variant.barred:
            constants["allowed"] = None
        if not variant.from_memory:
            constants["made"] = None
        if variant.kernel == "logits_kernel":
            constants["bias"] = None
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for at, name in enumerate(kernel.arg_names):
        kind = "constexpr" if name in constants else _kind(name, variant)
        signature[name] = kind
        if kind.startswith("*") or (kind == "i32" and (name.endswith("_n") or name in ("size", "weight_v", "sums_t"))):
            attributes[(at,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _kind(name: str, variant: Variant) -> str:
    plan = variant.plan
    if name in ("hidden", "weight"):
        if variant.described and plan is not None:
            rows = plan.rows if name == "hidden" else plan.columns
            return f"tensordesc<{variant.dtype}[{rows}, {plan.inner}]>"
        return f"*{variant.dtype}"
    if name == "out":
        return "*fp32" if variant.kernel == "logits_kernel" else f"*{variant.dtype}"
    if name == "allowed":
        return "*u8"
    if name in POINTERS:
        return POINTERS[name]
    if name in FLOATS:
        return "fp32"
    if name in (*SOFTMAX, "made", "peaks", "totals", "weights", "target_logit", "mean"):
        return "*fp32"
    return "i32"


def _assembled(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory a thread spills to) of a cubin, by cuobjdump of Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+)", said), re.search(r"STACK:(\d+)", said)
    local = re.search(r"LOCAL:(\d+)", said)
    assert registers and stack and local, said
    return int(registers[1]), max(int(stack[1]), int(local[1]))


def fingerprint() -> str:
    """Of the device code and its plans: a table of other sources says another one."""
    folder = Path(head_kernels.__file__).parent
    sources = [(folder / name).read_bytes() for name in ("tile_code.py", "head_kernels.py")]
    return hashlib.sha256(b"".join([*sources, repr(PLANS).encode()])).hexdigest()[:12]


def table(targets: tuple[int, ...]) -> str:
    """Markdown, one row for each variant and target."""
    lines = [
        "# Triton kernels as compiled",
        "",
        f"triton {triton.__version__}, torch {torch.__version__}; compiled, not run, by `python -m benchmarks.triton_compiled`.",
        f"Sources {fingerprint()}. A thread has 255 registers at most; a block has",
        "163 KiB of shared memory at most (sm_80), or 227 KiB (sm_90, sm_100).",
        "",
        "| target | kernel | warps | registers | spilled, bytes a thread | shared, KiB | loads | tensor-core instructions |",
        "|---|---|--:|--:|--:|--:|---|---|",
    ]
    for target in targets:
        for variant in variants(target):
            got = compiled(variant, target)
            products = ", ".join(f"{count} x `{name}`" for name, count in sorted(got.products.items())) or "none"
            warps = variant.plan.warps if variant.plan else 4
            lines.append(
                f"| {NAMES[target]} | {variant.name} | {warps} | {got.registers} | {got.spilled_bytes} | "
                f"{got.shared_bytes / 1024:.0f} | {got.loads} | {products} |"
            )
            print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, required=True)
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 90, 100], choices=sorted(NAMES))
    arguments = parser.parse_args()
    arguments.markdown.write_text(table(tuple(arguments.targets)))


if __name__ == "__main__":
    main()
