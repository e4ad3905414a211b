"""Speed and memory of one decode step's head inside the real engine, against vLLM's own heads.

    python benchmarks/decode_head.py [--tensor-parallel 2] [--out benchmarks/results] [--kind avx2 --host NAME]

A one-layer model (hidden 1024, vocabulary 151,936, bf16, tied) runs in vLLM with our plugin; the layer that the engine built is
called on the engine's own lm_head in every worker. All paths of a shape take turns, so a busy machine slows all of them; ratios
are medians over rounds of the ratio within a round. Writes decode_head.md and head_memory.md; --kind marks another sort of host.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

HIDDEN, VOCABULARY = 1024, 151936
SIZES = (1, 8, 64, 256)
BASE, NATIVE, OURS = "vLLM bf16", "vLLM float32 (casts the weight)", "rlalign"
LIBRARY = "rlalign, without the compiled kernel"
COPY = "torch's float32 product with an fp32 copy"
PATHS = (
    BASE, "vLLM bf16, then float32 for the sampler", NATIVE, OURS, LIBRARY, "rlalign with an fp32 copy", "rlalign, master", COPY,
)  # fmt: skip


def measure(wrapper: object, sizes: tuple[int, ...], rounds: int, host: str, clock: str) -> dict:
    """On one worker: {"device", "route", "rows", "seconds": {size: {path: [per round]}}, "memory": {path: (held, peak)}}."""
    import platform

    import torch

    from rlalign.rollout.head.logits_processor import HeadMode

    worker = wrapper.worker
    layer, (_, lm_head) = worker._rlalign_layer(), worker._rlalign_named_head()
    calls = paths_of(layer, lm_head)
    with torch.inference_mode():
        held = {path: memory(call, layer) for path, call in calls.items()}
        seconds = {n: take_turns(calls, torch.randn(n, HIDDEN).bfloat16(), rounds, clock) for n in sizes}
    layer.set_mode(HeadMode.CACHED)
    flags = Path("/proc/cpuinfo").read_text()
    isa = " ".join(f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {f}" in flags)
    name = host or f"{platform.machine()} ({isa})"
    return {
        "device": f"{name}, {torch.get_num_threads()} thread(s) a rank, torch {torch.__version__}",
        "route": worker.rlalign_status()["route"],
        "kernel": worker.rlalign_status()["kernel"],
        "rows": lm_head.weight.shape[0],
        "seconds": seconds,
        "memory": held,
        "sample_us": sample_cost(lm_head.weight),
    }


def sample_cost(weight: object) -> float:
    """Microseconds that looking at a sample of the content adds to one use of the fp32 copy (median of 200)."""
    import time

    from rlalign.head.cache import HeadCache

    medians = []
    cache = HeadCache()
    for cache.check_every in (1, 10**9):
        cache.get(weight)
        seconds = []
        for _ in range(200):
            started = time.perf_counter()
            cache.get(weight)
            seconds.append(time.perf_counter() - started)
        medians.append(statistics.median(seconds))
    return (medians[0] - medians[1]) * 1e6


def paths_of(layer: object, lm_head: object) -> dict[str, Callable]:
    """hidden -> logits for each path, through the layer as vLLM calls it."""
    import torch

    from rlalign.head import kernel
    from rlalign.rollout.head import logits_processor
    from rlalign.rollout.head.logits_processor import HeadMode

    chosen, asked = logits_processor.reads_weight_directly, kernel.forced()

    def through(mode: HeadMode, *, copies: bool = False, widen: bool = False, library: bool = False) -> Callable:
        def call(hidden: object) -> object:
            layer.set_mode(mode)
            os.environ[kernel.VARIABLE] = "none" if library else asked
            logits_processor.reads_weight_directly = (lambda hidden, weight: False) if copies else chosen
            logits = layer._apply_head(lm_head, hidden, None)
            logits_processor.reads_weight_directly = chosen
            os.environ[kernel.VARIABLE] = asked
            return logits.float() if widen else logits

        return call

    def copied(hidden: object) -> object:
        return torch.nn.functional.linear(hidden.float(), logits_processor.CACHE.get(lm_head.weight))

    ways = (
        through(HeadMode.OFF),
        through(HeadMode.OFF, widen=True),
        through(HeadMode.NATIVE),
        through(HeadMode.CACHED),
        through(HeadMode.CACHED, library=True),
        through(HeadMode.CACHED, copies=True),
        through(HeadMode.MASTER),
        copied,
    )
    return dict(zip(PATHS, ways, strict=True))


def take_turns(calls: dict[str, Callable], hidden: object, rounds: int, clock: str) -> dict[str, list[float]]:
    """Seconds of each path in each round; the first round warms up (copies are made, kernels packed) and is left out."""
    import time

    now = time.thread_time if clock == "processor" else time.perf_counter
    seconds = {path: [] for path in calls}
    for round_ in range(rounds + 1):
        for path, call in calls.items():
            started = now()
            call(hidden)
            if round_:
                seconds[path].append(now() - started)
    return seconds


def memory(call: Callable, layer: object) -> tuple[int, int]:
    """(held after two calls of 8 rows, highest during them), bytes beyond the state before."""
    import gc

    import torch

    from rlalign.head.cache import Epoch

    hidden = torch.randn(8, HIDDEN).bfloat16()
    Epoch.bump("benchmark")  # releases fp32 copies and the block of logits
    layer.master.drop()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    call(hidden)
    call(hidden)
    return resident("VmRSS") - before, resident("VmHWM") - before


def resident(field: str) -> int:
    """A field of /proc/self/status, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


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


def run(tensor_parallel: int, rounds: int, host: str, clock: str) -> list[dict]:
    """Start the engine and measure on every rank."""
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # the function above is sent to the workers
    from rlalign.rollout import SETTINGS_KEY
    from rlalign.rollout.engine.embedded import EMBEDDED_ENVIRONMENT

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
            worker_extension_cls="rlalign.rollout.worker.extension.WorkerExtension",
            additional_config={SETTINGS_KEY: {"head_dtype": "float32", "mode": "auto"}},
        )
        return llm.collective_rpc(measure, args=(SIZES, rounds, host, clock))


def speed_table(ranks: list[dict]) -> list[str]:
    """Markdown lines: milliseconds (best round of the slowest rank), and the two ratios that matter."""
    lines = [
        "| rows decoded | path | ms | of vLLM's bf16 head | of torch's product with a copy | faster than vLLM's float32 head |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for n in SIZES:
        for path in PATHS:
            best = max(min(r["seconds"][n][path]) for r in ranks)
            ratios = [
                [
                    statistics.median(a / b for a, b in zip(r["seconds"][n][x], r["seconds"][n][y], strict=True))
                    for r in ranks
                ]
                for x, y in ((path, BASE), (path, COPY), (NATIVE, path))
            ]
            cells = f"{max(ratios[0]):.2f} | {max(ratios[1]):.2f} | {min(ratios[2]):.1f}"
            lines.append(f"| {n} | {path} | {best * 1e3:.1f} | {cells} |")
    return lines


def memory_table(ranks: list[dict]) -> list[str]:
    """Markdown lines: MiB held between calls and at the highest point of a call, beyond the engine's bf16 weight."""
    lines = ["| path | held, MiB | peak of a call, MiB |", "|---|---:|---:|"]
    for path in PATHS:
        held, peak = (max(r["memory"][path][i] for r in ranks) / 2**20 for i in (0, 1))
        lines.append(f"| {path} | {max(held, 0):.0f} | {max(peak, 0):.0f} |")
    return lines


def notes_of(ranks: list[dict]) -> dict[str, str]:
    """What the tables do not say."""
    return {
        "decode_head": " vLLM's bf16 kernel writes bf16, which the sampler then widens to float32 (second path). Ours reads the "
        "bf16 weight as it lies and writes float32: through the compiled kernel (`rlalign build-kernel`), or without a compiler "
        "through library products (with AMX of the same bits, elsewhere of one fixed shape). Where an fp32 copy "
        f"is needed, the sample of the content that guards it adds {max(r['sample_us'] for r in ranks):.0f} microseconds a call, "
        "whatever the number of rows.",
        "head_memory": " Beyond the engine's own bf16 weight, at 8 rows, logits included. A copy or a master is one float32 weight "
        "(4 bytes x vocabulary x hidden / tensor parallel) at rest and at the peak; it is released before weights change, a master "
        "excepted. Logits that go straight from the weight reuse one block of at most 512 MiB (rows x vocabulary x 4 bytes), "
        "released with the copies. With head_dtype=master each trainer rank holds one float32 lm_head more.",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--clock", choices=("wall", "processor"), default="wall", help="processor: on a busy machine, one thread"
    )
    parser.add_argument("--kind", default="", help="a word at the end of the tables' names")
    parser.add_argument("--host", default="", help="what to call this machine, where its processor hides what it is")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    ranks = run(options.tensor_parallel, options.rounds, options.host, options.clock)
    what = f"{HIDDEN} hidden, {VOCABULARY} vocabulary ({ranks[0]['rows']} rows a rank), {ranks[0]['device']}"
    suffix = f"_{options.kind}" if options.kind else ""
    suffix += "" if options.tensor_parallel == 1 else f"_tp{options.tensor_parallel}"
    title = f"tensor parallel {options.tensor_parallel}"
    for name, table in (("decode_head", speed_table(ranks)), ("head_memory", memory_table(ranks))):
        ours = f"rlalign's route here: {ranks[0]['route']}, kernel: {ranks[0]['kernel']}"
        note = f"{what}; {ours}; {options.clock} time. Written by benchmarks/decode_head.py."
        note += notes_of(ranks)[name]
        text = "\n".join([f"# {name.replace('_', ' ')}, {title}", "", note, "", *table, ""])
        (options.out / f"{name}{suffix}.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
