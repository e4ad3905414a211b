"""Seconds, bytes and memory of publishing a model's weights by each transport, against a plain copy of the same bytes.

    python benchmarks/publish.py [--sizes 20m,500m] [--rounds 5] [--out benchmarks/results]

One real vLLM server holds a random Qwen3 in bf16; this process holds the same model as the trainer would. In every round the
transports and `cp` take turns, so that a busy machine slows all of them; ratios are medians over the rounds of the ratio
within a round. Memory: growth of the peak resident set over the state before, of the trainer and of the worker, and what lay
in the shared folder, beside the bounds of docs/weights.md. Writes publish.md; sizes that are not asked for keep their section.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

MIB = 2**20
SIZES = {
    "20m": {"vocab_size": 32000, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4},
    "500m": {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 22},
}
TIED = {"20m": False, "500m": True}
MEMORY_COPY, DISK_COPY = "cp in shared memory", "cp on disk, with fsync"


@dataclass
class Result:
    seconds: list[float] = field(default_factory=list)
    carry: list[float] = field(default_factory=list)  # of these, until the last bucket was taken
    trainer: int = 0  # bytes of the peak resident set over the one before, the model's own pages all being there
    worker: int = 0
    folder: int = 0


def build(folder: Path, size: str) -> Path:
    """A random model as a Hugging Face folder."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from rlalign.tiny_policy.tokenizer import byte_tokenizer

    torch.manual_seed(0)
    heads = SIZES[size]["hidden_size"] // 64
    tokenizer = byte_tokenizer(256)
    config = Qwen3Config(
        **SIZES[size], tie_word_embeddings=TIED[size],
        num_attention_heads=heads, num_key_value_heads=heads // 2, head_dim=128, max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def resident(pid: int, entry: str) -> int:
    """VmRSS or VmHWM of a process, bytes."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(entry)]
    return int(line.split()[1]) * 1024


@contextmanager
def peaks(result: Result, pids: dict[str, int], shared: Path) -> Iterator[None]:
    """Remember how far both processes and the folder grow meanwhile."""
    before = {}
    for who, pid in pids.items():
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # VmHWM starts again
        before[who] = resident(pid, "VmRSS")
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            held = sum(f.stat().st_size for f in shared.rglob("*") if f.is_file() and f.exists())
            result.folder = max(result.folder, held)

    def watch_safely() -> None:
        while not done.is_set():
            try:
                watch()
            except OSError:  # a file went away between the listing and the look
                continue

    thread = threading.Thread(target=watch_safely)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    for who, pid in pids.items():
        setattr(result, who, max(getattr(result, who), resident(pid, "VmHWM") - before[who]))


def copies(folder: Path, source: Path) -> Callable[[], float]:
    """`cp` of the checkpoint's weights inside one filesystem; seconds. durable on disk: flushed, as a publish there is."""

    def run() -> float:
        target = folder / "copy.safetensors"
        started = time.perf_counter()
        subprocess.run(["cp", source, target], check=True)
        if not str(folder).startswith("/dev/shm"):
            subprocess.run(["sync", target], check=True)
        seconds = time.perf_counter() - started
        target.unlink()
        return seconds

    return run


@dataclass
class Published:
    """What travelled: bytes of all tensors, of the largest and of the vocabulary's, and how many."""

    bytes: int
    largest: int
    vocabulary: int
    tensors: int


def measure(size: str, rounds: int, home: Path, memory: Path) -> tuple[dict[str, Result], Published]:
    """{path: Result} and what was published, for one size of model."""
    import torch
    from transformers import AutoModelForCausalLM

    from rlalign.config import RolloutConfig, WeightsConfig
    from rlalign.rollout.server.launching import Launch, open_pool
    from rlalign.weights import open_transport, publish

    model_folder = build(home / size, size)
    rollout = RolloutConfig(
        backend="server",
        start=1,
        max_tokens=8,
        max_model_len=64,
        max_num_seqs=4,
        enforce_eager=True,
        start_timeout_s=300,
    )
    launch = Launch(model=model_folder, config=rollout, dtype="bfloat16", head_dtype="float32", seed=0)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # from_pretrained maps the file: its pages would count as growth
    shutil.copy(model_folder / "model.safetensors", memory / "source.safetensors")
    pool = open_pool(launch, logs=home)
    (memory / "shared").mkdir(exist_ok=True)
    (home / "shared").mkdir(exist_ok=True)
    kinds = {
        "shared_memory": WeightsConfig(shared=str(memory / "shared")),
        "folder": WeightsConfig(transport="folder", shared=str(home / "shared")),
        "gloo": WeightsConfig(transport="gloo"),
    }
    transports = {kind: open_transport(config) for kind, config in kinds.items()}
    plain = {
        MEMORY_COPY: copies(memory, memory / "source.safetensors"),
        DISK_COPY: copies(home, model_folder / "model.safetensors"),
    }
    results = {name: Result() for name in (*plain, *transports)}
    version = 0
    try:
        for turn in range(rounds + 1):  # the first one warms up: group, buffers, page tables
            for name, copy in plain.items():
                seconds = copy()
                results[name].seconds += [seconds] if turn else []
            for kind, transport in transports.items():
                version += 1
                with torch.no_grad():
                    model.get_output_embeddings().weight.mul_(1.0 + 2**-7)
                for parameter in model.parameters():
                    parameter.sum()  # the machine may have taken pages of an idle process back
                pids = {"trainer": os.getpid(), "worker": pool.status()[0]["pid"]}
                with peaks(results[kind], pids, Path(kinds[kind].shared) if kind != "gloo" else home / "shared"):
                    report = publish(model.named_parameters(), version, receiver=pool, transport=transport)
                results[kind].seconds += [report.seconds] if turn else []
                results[kind].carry += [report.carry_seconds] if turn else []
    finally:
        for transport in transports.values():
            transport.close()
        pool.close()
    sizes = {p: p.nbytes for p in model.parameters()}
    vocabulary = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    return results, Published(report.bytes, max(sizes.values()), sum(sizes[p] for p in vocabulary), report.tensors)


def table(results: dict[str, Result], size: int) -> Iterator[str]:
    columns = (
        "path",
        "s, median",
        "s, min",
        "GiB/s",
        "times cp in shared memory",
        "of which proof, s",
        "trainer, MiB",
        "worker, MiB",
    )
    yield f"| {' | '.join(columns)} | folder, MiB |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    base = results[MEMORY_COPY].seconds
    for name, r in results.items():
        ratio = statistics.median(a / b for a, b in zip(r.seconds, base, strict=True))
        median = statistics.median(r.seconds)
        cells = [f"{median:.3f}", f"{min(r.seconds):.3f}", f"{size / 2**30 / median:.2f}", f"{ratio:.2f}"]
        if r.carry:
            proof = statistics.median(s - c for s, c in zip(r.seconds, r.carry, strict=True))
            cells += [f"{proof:.3f}", *(f"{n / MIB:.0f}" for n in (r.trainer, r.worker, r.folder))]
        else:
            cells += [""] * 4
        yield f"| {name} | {' | '.join(cells)} |"


def bounds(published: Published) -> str:
    """What docs/weights.md allows, in MiB; S: the larger of a bucket and the largest tensor."""
    s, tensor = max(256 * MIB, published.largest) / MIB, published.largest / MIB
    one, two = min(s, published.bytes / MIB), min(2 * s, published.bytes / MIB)
    return (
        f"Bounds: S = {s:.0f} MiB. Trainer: {tensor:.0f} MiB through files (one tensor), {two + tensor:.0f} over a wire (two "
        f"buckets, which stay from publish to publish, and a tensor). Folder: {two:.0f}. Worker: "
        f"{one + 2 * tensor + published.vocabulary / MIB:.0f} (a bucket, twice the largest layer while vLLM packs it, and the "
        f"vocabulary's tensors where they wait) and the columns kept for the proof. Load average: {os.getloadavg()[0]:.1f}."
    )


def section(size: str, rounds: int) -> str:
    """The results of one size of model."""
    with (
        tempfile.TemporaryDirectory(prefix="publish-") as home,
        tempfile.TemporaryDirectory(dir="/dev/shm") as memory,
    ):
        results, published = measure(size, rounds, Path(home), Path(memory))
    title = f"## {size}: {published.bytes / MIB:.0f} MiB in {published.tensors} tensors, {rounds} rounds"
    return "\n".join([title, "", *table(results, published.bytes), "", bounds(published)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="20m,500m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    head = (
        f"# Publishing weights\n\n{platform.machine()}, {os.cpu_count()} cores, one vLLM server on CPU in bf16, buckets of 256 "
        "MiB, medians over interleaved rounds. Written by benchmarks/publish.py. *proof*: head refreshed, every tensor read back "
        "through the kernel that multiplies by it. Memory: the largest growth of the peak resident set in any round; a mapped "
        "bucket counts for the worker that maps it."
    )
    file = arguments.out / "publish.md"
    older = file.read_text().split("\n## ")[1:] if file.exists() else []
    sections = {text.split(":")[0]: f"## {text.strip()}" for text in older}
    for size in arguments.sizes.split(","):
        sections[size] = section(size, arguments.rounds)
        print(sections[size])
        arguments.out.mkdir(parents=True, exist_ok=True)
        file.write_text("\n\n".join([head, *(sections[size] for size in SIZES if size in sections)]) + "\n")


if __name__ == "__main__":
    main()
