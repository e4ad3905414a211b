"""Speed and memory of one decode step's head inside the real engine, against vLLM's own heads.

    python benchmarks/decode_head.py [--tensor-parallel 2] [--out benchmarks/results]

A one-layer model (hidden 1024, vocabulary 151,936, bf16, tied) runs in vLLM with our plugin; the layer that the engine built is
called on the engine's own lm_head in every worker. All paths of a shape take turns, so a busy machine slows all of them; ratios
are medians over rounds of the ratio within a round. Writes decode_head.md and head_memory.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

HIDDEN, VOCABULARY = 1024, 151936
SIZES = (1, 8, 64, 256)
BASE, NATIVE, OURS = "vLLM bf16", "vLLM float32 (casts the weight)", "rlalign"
PATHS = (BASE, "vLLM bf16, then float32 for the sampler", NATIVE, OURS, "rlalign with an fp32 copy", "rlalign, master")


def measure(wrapper: object, sizes: tuple[int, ...], rounds: int) -> dict:
    """On one worker: {"device", "route", "seconds": {size: {path: [seconds per round]}}, "memory": {path: (held, peak)}}."""
    import gc
    import platform
    import time

    import torch

    from rlalign.rollout import head_layer
    from rlalign.rollout.head_layer import HeadMode

    worker = wrapper.worker
    layer, (_, lm_head) = worker._rlalign_layer(), worker._rlalign_named_head()
    chosen, mode = head_layer.reads_weight_directly, layer.mode

    def through(mode: HeadMode, *, copies: bool = False, widen: bool = False):  # noqa: ANN202
        def call(hidden: torch.Tensor) -> torch.Tensor:
            layer.set_mode(mode)
            head_layer.reads_weight_directly = (lambda hidden, weight: False) if copies else chosen
            logits = layer._apply_head(lm_head, hidden, None)
            return logits.float() if widen else logits

        return call

    calls = dict(
        zip(
            PATHS,
            (
                through(HeadMode.OFF),
                through(HeadMode.OFF, widen=True),
                through(HeadMode.NATIVE),
                through(HeadMode.CACHED),
                through(HeadMode.CACHED, copies=True),
                through(HeadMode.MASTER),
            ),
            strict=True,
        )
    )

    def resident(field: str) -> int:
        text = Path("/proc/self/status").read_text()
        return int(next(line for line in text.splitlines() if line.startswith(field)).split()[1]) * 1024

    def forget() -> None:
        head_layer.CACHE.drop()
        head_layer.MASTER.drop()
        gc.collect()

    def memory(call) -> tuple[int, int]:  # noqa: ANN001
        """(held after the call, highest during it), bytes beyond the state before the first call."""
        hidden = torch.randn(8, HIDDEN).bfloat16()
        forget()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = resident("VmRSS")
        call(hidden)
        call(hidden)
        return resident("VmRSS") - before, resident("VmHWM") - before

    seconds = {}
    with torch.inference_mode():
        held = {path: memory(call) for path, call in calls.items()}
        for n in sizes:
            hidden = torch.randn(n, HIDDEN).bfloat16()
            seconds[n] = {path: [] for path in calls}
            for round_ in range(rounds + 1):
                for path, call in calls.items():
                    started = time.perf_counter()
                    call(hidden)
                    if round_:  # the first warms up: copies are made, kernels packed
                        seconds[n][path].append(time.perf_counter() - started)
    forget()
    layer.set_mode(mode)
    head_layer.reads_weight_directly = chosen
    layer.set_mode(HeadMode.CACHED)
    route = worker.rlalign_status()["route"]
    flags = Path("/proc/cpuinfo").read_text()
    isa = " ".join(f for f in ("avx512f", "avx512_bf16", "amx_bf16") if f" {f}" in flags)
    return {
        "device": f"{platform.machine()} ({isa}), {torch.get_num_threads()} thread(s) a rank, torch {torch.__version__}",
        "route": route,
        "rows": lm_head.weight.shape[0],
        "seconds": seconds,
        "memory": held,
    }


def build(folder: Path) -> Path:
    """The one-layer model with random weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("cpu"):
        Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def run(tensor_parallel: int, rounds: int) -> list[dict]:
    """Start the engine and measure on every rank."""
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # the function above is sent to the workers
    from rlalign.rollout.engine import EMBEDDED_ENVIRONMENT
    from rlalign.rollout.head_plugin import SETTINGS_KEY

    for name, value in (EMBEDDED_ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1"}).items():
        os.environ.setdefault(name, value)
    from vllm import LLM

    with tempfile.TemporaryDirectory() as folder:
        llm = LLM(
            model=str(build(Path(folder))),
            dtype="bfloat16",
            max_model_len=128,
            enforce_eager=True,
            skip_tokenizer_init=True,
            tensor_parallel_size=tensor_parallel,
            worker_extension_cls="rlalign.rollout.worker.WorkerExtension",
            additional_config={SETTINGS_KEY: {"head_dtype": "float32", "mode": "auto"}},
        )
        return llm.collective_rpc(measure, args=(SIZES, rounds))


def speed_table(ranks: list[dict]) -> list[str]:
    """Markdown lines: milliseconds (best round of the slowest rank), and the two ratios that matter."""
    lines = [
        "| rows decoded | path | ms | of vLLM's bf16 head | faster than vLLM's float32 head |",
        "|---:|---|---:|---:|---:|",
    ]
    for n in SIZES:
        for path in PATHS:
            best = max(min(r["seconds"][n][path]) for r in ranks)
            ratios = [
                [
                    statistics.median(a / b for a, b in zip(r["seconds"][n][x], r["seconds"][n][y], strict=True))
                    for r in ranks
                ]
                for x, y in ((path, BASE), (NATIVE, path))
            ]
            lines.append(f"| {n} | {path} | {best * 1e3:.1f} | {max(ratios[0]):.2f} | {min(ratios[1]):.1f} |")
    return lines


def memory_table(ranks: list[dict]) -> list[str]:
    """Markdown lines: MiB held between calls and at the highest point of a call, beyond the engine's bf16 weight."""
    lines = ["| path | held, MiB | peak of a call, MiB |", "|---|---:|---:|"]
    for path in PATHS:
        held, peak = (max(r["memory"][path][i] for r in ranks) / 2**20 for i in (0, 1))
        lines.append(f"| {path} | {max(held, 0):.0f} | {max(peak, 0):.0f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    ranks = run(options.tensor_parallel, options.rounds)
    what = f"{HIDDEN} hidden, {VOCABULARY} vocabulary ({ranks[0]['rows']} rows a rank), {ranks[0]['device']}"
    suffix = "" if options.tensor_parallel == 1 else f"_tp{options.tensor_parallel}"
    title = f"tensor parallel {options.tensor_parallel}"
    for name, table in (("decode_head", speed_table(ranks)), ("head_memory", memory_table(ranks))):
        note = f"{what}; rlalign's route here: {ranks[0]['route']}. Written by benchmarks/decode_head.py."
        text = "\n".join([f"# {name.replace('_', ' ')}, {title}", "", note, "", *table, ""])
        (options.out / f"{name}{suffix}.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
