"""Tables and a plot from the rows of benchmarks/head.py: python benchmarks/head_table.py results/head_cpu.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

Row = dict[str, object]
OUTSIDE = "Bare library products; inside the engine, with the compiled kernel: decode_head.md, decode_head_tp2.md."
OURS, FP32, BF16 = "#c0392b", "#34495e", "#b2bec3"  # colours of the bars


def groups(rows: list[Row], what: str) -> dict[tuple[int, int, str], list[Row]]:
    """Rows of `what` by (tokens, vocabulary, run): what ran interleaved, and only that, is compared."""
    found: dict[tuple[int, int, str], list[Row]] = {}
    for row in rows:
        if row["what"] == what:
            found.setdefault((row["n"], row["vocab"], row["run"]), []).append(row)
    return dict(sorted(found.items()))


def score_table(rows: list[Row], what: str) -> list[str]:
    lines = []
    for (n, vocab, run), group in groups(rows, what).items():
        measured = sorted((r for r in group if "seconds" in r), key=lambda r: r["seconds"])
        ours = next(r for r in measured if r["path"] == "rlalign fast")
        weight = vocab * ours["hidden"] * 2 if what == "forward_backward" else 0
        beyond = " beyond the weight gradient" if weight else ""
        clock = "processor seconds" if ours.get("clock") == "processor" else "seconds"
        threads = ours["device"].split(", ")[-2]
        lines += [f"### {what.replace('_', ' + ')}, {n:,} tokens x {vocab:,}, hidden {ours['hidden']:,} ({run}, {threads})", "",
                  f"| path | fp32 logits | {clock} | x rlalign | extra MiB{beyond} | max / mean error | runs |",
                  "|---|:-:|--:|--:|--:|--:|--:|"]  # fmt: skip
        for r in measured:
            memory, error = "", ""
            if "max_error" in r:
                memory = f"{(r['peak_extra_bytes'] - weight) / 2**20:,.0f}"
                error = f"{r['max_error']:.1e} / {r['mean_error']:.1e}"
            lines.append(
                f"| {r['path']} | {'yes' if r['fp32_output'] else 'no'} | {r['seconds']:.2f} | "
                f"{r['seconds'] / ours['seconds']:.2f} | {memory} | {error} | {r['repeats']} |"
            )
        for bare in (r for r in measured if r["path"].endswith("alone")):
            lines += ["", f"rlalign fast: {ours['seconds'] / bare['seconds']:.2f} times the {bare['path']}."]
        peers = [r for r in measured if not r["path"].startswith("rlalign") and "max_error" in r]
        for fp32, words in ((True, "with fp32 logits"), (False, "with bf16 logits")):
            best = min((r for r in peers if r["fp32_output"] == fp32), key=lambda r: r["seconds"], default=None)
            if best is not None:
                shares = [
                    f"{r['path']} {r['seconds'] / best['seconds']:.2f}"
                    for r in measured
                    if r["path"].startswith("rlalign fast")
                ]
                lines += ["", f"Times the best peer {words} ({best['path']}): {'; '.join(shares)}."]
        lines += ["", *(f"{r['path']}: {r['status']}." for r in group if "status" in r), ""]
    return lines


def decode_table(rows: list[Row]) -> list[str]:
    lines = []
    by_shape = groups(rows, "decode")
    for vocab in sorted({key[1] for key in by_shape}):
        columns = {n: {r["path"]: r for r in group} for (n, v, _), group in by_shape.items() if v == vocab}
        lines += [f"### Decode head, vocabulary {vocab:,}, ms a call", "", OUTSIDE, "", "| path | " +
                  " | ".join(f"{n} rows" for n in columns) + " |", "|---|" + "--:|" * len(columns)]  # fmt: skip
        for path in next(iter(columns.values())):
            lines.append(
                f"| {path} | " + " | ".join(f"{1e3 * c[path]['seconds']:.1f}" for c in columns.values()) + " |"
            )
        cast, bf16, ours = "fp32 by casting the weight each call", "bf16 head", "rlalign project"
        for base, words in ((bf16, "project / bf16 head"), (cast, "project / cast")):
            cells = [f"{c[ours]['seconds'] / c[base]['seconds']:.2f}" for c in columns.values()]
            lines.append(f"| **{words}** | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.2))
    for axis, what in zip(axes, ("forward", "forward_backward"), strict=True):
        (n, vocab, _), group = max(groups(rows, what).items(), key=lambda item: (len(item[1]), item[0][:2]))
        measured = sorted((r for r in group if "max_error" in r), key=lambda r: r["seconds"], reverse=True)
        colors = [OURS if r["path"].startswith("rlalign") else FP32 if r["fp32_output"] else BF16 for r in measured]
        bars = axis.barh([r["path"] for r in measured], [r["seconds"] for r in measured], color=colors)
        axis.bar_label(bars, [f"{r['seconds']:.1f}" for r in measured], padding=3, fontsize=8)
        axis.set(xlabel="seconds")
        axis.set_title(f"{what.replace('_', ' + ')}, {n} x {vocab:,}", loc="left", fontsize=11)
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    names = {OURS: "rlalign, float32 logits", FP32: "float32 logits", BF16: "bfloat16 logits"}
    axes[1].legend([plt.Rectangle((0, 0), 1, 1, color=c) for c in names], names.values(), loc="upper right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    source = Path(sys.argv[1])
    rows = json.loads(source.read_text())["rows"]
    *host, _, torch = rows[-1]["device"].split(", ")
    text = ["# Token logprobs from hidden states: speed, memory, error", "",
            f"{', '.join(host)}, {torch}. Minimum of the runs, all paths of a table interleaved in one process; the machine",
            "was shared: compare within a table only, and a path with one run may have met a busy moment. bf16 weights.",
            "Error in nats against float64. Processor seconds are those the process itself ran, on one thread, whatever else the",
            "machine did; the bare products read float32 copies made beforehand. keep_mib: logits kept for the backward pass.", "",
            f"![seconds]({source.with_suffix('.png').name})", ""]  # fmt: skip
    for what in ("forward", "forward_backward"):
        text += score_table(rows, what)
    source.with_suffix(".md").write_text("\n".join(text + decode_table(rows)))
    plot(rows, source.with_suffix(".png"))


if __name__ == "__main__":
    main()
