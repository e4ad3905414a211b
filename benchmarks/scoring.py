"""Throughput of scoring many items behind one query: packed in one row, against every other way to run them.

    OMP_NUM_THREADS=2 python benchmarks/scoring.py --shape 32x512x32 --shape 100x320x32 --json scoring.json
    python benchmarks/scoring.py --json scoring.json --out benchmarks/results/scoring.md

A shape is items x query tokens x item tokens. The ways take turns, so that a busy machine slows all of them:
one by one (a request an item), batched (all items, padded, each with its own copy of the query), prefix-cached (the query's
keys and values kept, then a request an item behind them), packed and auto (HFScorer). A random Qwen3 reward model in float32;
every way has to give the same scores. Ratios are medians over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rlalign.tracking.environment import cpu_model

WAYS = ("one by one", "batched", "prefix-cached", "packed", "auto")
HEADER = """# Many items behind one query

{machine}; shared with other work, so trust the ratios before the seconds. Qwen3 reward model of {millions} M parameters
(hidden {hidden}, {layers} layers), random, float32. Written by `benchmarks/scoring.py`, whose docstring explains each way. First
the seconds of each way, then how many times faster than one by one, then the largest distance of any score from one by one.

Packing loses where items are much longer than their query, and where rows get long: SDPA computes every pair of tokens of a row
and then hides most of them. `packed` fills rows up to {budget} tokens whatever the lengths, and is half as fast as one by one at
100 items as long as their query. `auto`, HFScorer's default, makes a row only as long as pays off, down to one item (then it is
`batched`). `prefix-cached` needs no mask, and can win between the two.

"""


def build(hidden: int, layers: int) -> object:
    """A one-label Qwen3 reward model, float32, random."""
    import torch
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=1024, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_labels=1,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, head_dim=64, max_position_embeddings=40960,
        pad_token_id=0, initializer_range=0.05,
    )  # fmt: skip
    return Qwen3ForSequenceClassification(config).eval()


def ways_of(model: object, budget: int) -> dict[str, Callable[[list[int], list[list[int]]], list[float]]]:
    """Each way to score items behind a query."""
    import torch
    from transformers import DynamicCache

    from rlalign.scoring import HFScorer

    alone = HFScorer.wrap(model, None, id="alone", packing="never")
    packed = HFScorer.wrap(model, None, id="packed", packing="always", max_pack_tokens=budget)
    auto = HFScorer.wrap(model, None, id="auto")

    @torch.inference_mode()
    def cached(query: list[int], items: Sequence[list[int]]) -> list[float]:
        cache = DynamicCache(config=model.config)
        model.model(input_ids=torch.tensor([query]), past_key_values=cache, use_cache=True)
        scores = []
        for item in items:
            states = model.model(input_ids=torch.tensor([item]), past_key_values=cache, use_cache=True)
            scores.append(float(model.score(states.last_hidden_state[0, -1])))
            cache.crop(-len(item))
        return scores

    return {
        "one by one": lambda query, items: [alone.score(query, [item]).rewards()[0] for item in items],
        "batched": lambda query, items: alone.score(query, items).rewards(),
        "prefix-cached": cached,
        "packed": lambda query, items: packed.score(query, items).rewards(),
        "auto": lambda query, items: auto.score(query, items).rewards(),
    }


def measure(ways: dict, shape: tuple[int, ...], rounds: int) -> dict:
    """Seconds of every way in every round, and the largest distance from the scores of one by one."""
    import torch

    count, query_length, item_length = shape
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 1024, (query_length + count * item_length,), generator=generator).tolist()
    query = ids[:query_length]
    items = [ids[query_length + i * item_length :][:item_length] for i in range(count)]
    expected = torch.tensor(ways["one by one"](query, items[:2]))  # also warms up
    found = {way: torch.tensor(score(query, items[:2])) for way, score in ways.items()}
    error = max(float((scores - expected).abs().max()) for scores in found.values())
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    results: dict[str, torch.Tensor] = {}
    for _ in range(rounds):
        for way, score in ways.items():
            began = time.perf_counter()
            results[way] = torch.tensor(score(query, items))
            seconds[way].append(time.perf_counter() - began)
    error = max(error, *(float((scores - results["one by one"]).abs().max()) for scores in results.values()))
    return {"shape": shape, "seconds": seconds, "error": error}


def table(content: dict) -> str:
    """The committed page."""
    lines = [
        f"| items x query x item | {' | '.join(WAYS)} | {' | '.join(WAYS[1:])} | largest difference | rounds |",
        f"|---|{'---:|' * (2 * len(WAYS) + 1)}",
    ]
    for row in content["rows"]:
        seconds = row["seconds"]
        ratios = {way: [a / b for a, b in zip(seconds[WAYS[0]], times, strict=True)] for way, times in seconds.items()}
        lines.append(
            f"| {' x '.join(map(str, row['shape']))} | {' | '.join(f'{statistics.median(seconds[w]):.3f}' for w in WAYS)} "
            f"| {' | '.join(f'{statistics.median(ratios[w]):.2f}' for w in WAYS[1:])} | {row['error']:.0e} "
            f"| {len(seconds[WAYS[0]])} |"
        )
    return HEADER.format(**content["about"]) + "\n".join(lines) + "\n"


def main() -> None:
    """Measure shapes and add them to the JSON file, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", default=[], help="items x query x item, such as 32x512x32")
    parser.add_argument("--json", type=Path, required=True, help="measured rows are added to it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--budget", type=int, default=4096, help="tokens of a row of `packed`")
    parser.add_argument("--out", type=Path, help="write the table of the JSON file here")
    args = parser.parse_args()
    content = json.loads(args.json.read_text()) if args.json.exists() else {"rows": []}
    if args.shape:
        import torch

        model = build(args.hidden, args.layers)
        ways = ways_of(model, args.budget)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        content["about"] = {
            "machine": f"{cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
            "millions": f"{millions:.0f}", "hidden": args.hidden, "layers": args.layers, "budget": args.budget,
        }  # fmt: skip
        for text in args.shape:
            content["rows"].append(measure(ways, tuple(int(n) for n in text.split("x")), args.rounds))
            args.json.write_text(json.dumps(content))
            print(table(content).splitlines()[-1], flush=True)
    if args.out:
        args.out.write_text(table(content))


if __name__ == "__main__":
    main()
