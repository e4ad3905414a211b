"""Seconds and memory of a publish whose read-back runs vLLM's loaders a second time, against other trees and against no read-back.

    git worktree add /tmp/before 7385c48^
    python benchmarks/publish_twins.py --before /tmp/before [--rounds 9] [--out benchmarks/results]

A child process per way holds one embedded engine in bf16 and the same random Qwen3 as a trainer would; the ways take turns within
a round, so that a busy machine slows all of them, and the ratio of a way is the median over the rounds of its ratio within a
round. Ways: `twins` (this tree), `before` (the tree given), `no read-back` (this tree, vLLM's reload alone).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SIZES = {
    "20m": {"vocab_size": 32000, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4},
    "150m": {"vocab_size": 65536, "hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 12},
}
PLAIN = "no read-back"


def build(folder: Path, size: str) -> None:
    """A random Qwen3 as a Hugging Face folder."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from rlalign.tiny_policy.tokenizer import byte_tokenizer

    tokenizer, heads = byte_tokenizer(256), SIZES[size]["hidden_size"] // 64
    config = Qwen3Config(
        **SIZES[size], num_attention_heads=heads, num_key_value_heads=heads // 2, head_dim=64, max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def child(folder: Path, way: str) -> None:
    """One engine; a line on stdin is a publish, answered by its seconds and the growth of the peak resident set (MiB)."""
    import torch
    from transformers import AutoModelForCausalLM

    from rlalign.config import RolloutConfig
    from rlalign.rollout.engine.embedded import VLLMEngine
    from rlalign.weights import publish

    rollout = RolloutConfig(max_tokens=8, max_model_len=64, max_num_seqs=4, enforce_eager=True)
    engine = VLLMEngine(folder, rollout, dtype="bfloat16", head_dtype="float32", seed=0)
    if way == PLAIN:
        from rlalign.rollout.worker.load_record import LoadRecord

        LoadRecord._take = lambda self, layer, info: []
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).requires_grad_(False)
    print("READY", flush=True)
    for version, _ in enumerate(sys.stdin, 1):
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(1.0 + 2**-7)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        report = publish(model.named_parameters(), version, receiver=engine)
        print("RESULT", json.dumps([report.seconds, (resident("VmHWM") - before) / 2**10]), flush=True)
    engine.close()


def resident(entry: str) -> int:
    """KiB of this process."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(entry)]
    return int(line.split()[1])


def measure(size: str, rounds: int, trees: dict[str, Path]) -> str:
    """The section of one size."""
    with tempfile.TemporaryDirectory(prefix="publish-twins-") as home:
        folder = Path(home) / size
        build(folder, size)
        children = {}
        for way, tree in trees.items():
            children[way] = subprocess.Popen(
                [sys.executable, __file__, "--child", str(folder), way],
                cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            answer(children[way], "READY")
        found: dict[str, list[tuple[float, float]]] = {way: [] for way in children}
        for turn in range(rounds + 1):  # the first one warms up
            for way, process in children.items():
                print("publish", file=process.stdin, flush=True)
                result = json.loads(answer(process, "RESULT"))
                found[way] += [result] if turn else []
        for process in children.values():
            process.stdin.close()
            process.wait()
    lines = [
        f"## {size}, {rounds} rounds",
        "",
        "| way | s, median | s, min | times no read-back | peak, MiB |",
        "|---|--:|--:|--:|--:|",
    ]
    for way, results in found.items():
        ratio = statistics.median(a[0] / b[0] for a, b in zip(results, found[PLAIN], strict=True))
        seconds = [r[0] for r in results]
        peak = max(r[1] for r in results)
        lines.append(f"| {way} | {statistics.median(seconds):.3f} | {min(seconds):.3f} | {ratio:.2f} | {peak:.0f} |")
    return "\n".join(lines)


def answer(process: subprocess.Popen, word: str) -> str:
    """The rest of the next line that starts with the word."""
    for line in process.stdout:
        if line.startswith(word):
            return line.removeprefix(word)
    raise RuntimeError(f"the child ended with {process.wait()} before it said {word}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another tree of this project, such as one from before a change")
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(Path(arguments.child[0]), arguments.child[1])
        return
    here = Path(__file__).resolve().parents[1]
    trees = {PLAIN: here, "twins": here} | ({"before": arguments.before.resolve()} if arguments.before else {})
    head = (
        f"# A publish whose read-back loads twice\n\n{platform.machine()}, {os.cpu_count()} cores, one thread, embedded vLLM in "
        "bf16 on CPU, interleaved. Written by benchmarks/publish_twins.py. *no read-back*: vLLM's layerwise reload alone; *twins*: "
        "every layer is loaded a second time, onto a twin that the live one is compared with; *before*: a list of names and "
        "layouts of ours, compared without loading anything (7385c48^). Peak: growth of the peak resident set in a publish."
    )
    sections = [measure(size, arguments.rounds, trees) for size in arguments.sizes.split(",")]
    text = "\n\n".join([head, *sections, f"Load average at the end: {os.getloadavg()[0]:.1f}."])
    print(text)
    (arguments.out / "publish_twins.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
