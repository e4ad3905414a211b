"""The result of benchmarks.real_model as Markdown: phases with time and memory, then heads, layers and steps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path


def markdown(result: Mapping, out: Path) -> str:
    """Everything that is finished so far."""
    model, machine, phases = result["model"], result["machine"], result["phases"]
    about = f"{model['architecture']}, {model['parameters'] / 1e6:,.1f} M parameters, {model['vocabulary']:,} words"
    about += f", {model['layers']} layers, {'tied' if model['tied'] else 'untied'} lm_head, "
    about += "prompts in its chat template" if model["chat"] else "no chat template"
    versions = ", ".join(f"{n} {machine['versions'][n]}" for n in ("vllm", "torch", "transformers", "deepspeed"))
    lines = [f"**{Path(model['folder']).name}**: {about}.", ""]
    lines += [f"{machine['cpu']}, {machine['cores_usable']} cores, {machine['memory_gib']} GiB; {versions}.", ""]
    lines += ["| phase | | seconds | peak MiB | what it found |", "|---|---|--:|--:|---|"]
    for name, row in phases.items():
        found = row["reason"] if row["state"] in ("failed", "refused") else _found(name, row, out)
        lines.append(f"| {name} | {row['state']} | {row['seconds']:,.0f} | {row['peak_mib']:,} | {_cell(found)} |")
    for body in ("bfloat16", "float32"):
        if phases.get(f"parity_{body}", {}).get("state") in ("fine", "finding"):
            lines += ["", *_heads(_read(out / f"parity_{body}.json"), body)]
    return "\n".join([*lines, ""])


def _found(name: str, row: Mapping, out: Path) -> str:
    if name == "doctor":
        checks = _read(out / "doctor.json")
        wrong = [f"{c['name']}: {c['found']}" for c in checks if c["state"] == "problem"]
        return f"{len(checks)} checks, {len(wrong)} problem" + "".join(f"; {line}" for line in wrong)
    if name.startswith("parity"):
        both = _pick(_read(out / f"{name}.json")["rows"], "float32", "float32")
        floor = f"noise floor {both['floor_abs_mean']:.1e}, the body's rounding {both['rounding_abs_mean']:.1e}"
        found = f"float32 heads on both sides: k3 {both['k3']:.1e}, mean {both['abs_mean']:.1e} nats ({floor})"
        return found + (f"; {row['reason']}" if row["state"] == "finding" else "")
    if name == "exact":
        rows = _read(out / "exact.json")["rows"]
        worst = max(row["abs_max"] for row in rows)
        return f"{rows[0]['tokens']:,} sampled tokens; largest |log_ratio| {worst:.3g} nats"
    if name == "replay":
        return _replay(_read(out / "replay.json"))
    if name == "attribute":
        return _attribution(_read(out / "attribute.json"))
    return _steps(out / "run")


def _replay(found: Mapping) -> str:
    sides = [f"{a['name']}: {a['equal']:,} of {a['tokens']:,} tokens equal, {a['verdict']}" for a in found["answers"]]
    return f"step {found['step']}; " + "; ".join(sides)


def _attribution(found: Mapping) -> str:
    parts = []
    for route, numbers in found["routes"].items():
        first, over = numbers["first_over_floor"], [p for p in numbers["points"] if p["over_floor"]]
        named = f"{first} is the first of {len(over)} points over its floor" if first else "no point over its floor"
        parts.append(f"{route}: {named}")
    return f"{found['scored_tokens']} tokens; " + "; ".join(parts)


def _steps(run: Path) -> str:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = ", ".join(f"{row['time/step_s']:.1f}" for row in rows)
    k3 = ", ".join(f"{row['mismatch/lag0/k3']:.1e}" for row in rows)
    tokens = ", ".join(f"{row['rollout/tokens']:.0f}" for row in rows)
    return f"{len(rows)} steps of {seconds} s, {tokens} tokens sampled; k3 at lag 0 {k3}"


def _heads(result: Mapping, body: str) -> Iterator[str]:
    """The 2x2 table of heads."""
    tokens = result["tokens"][body]
    yield f"{body} body, {tokens:,} sampled tokens; k3 of KL(rollout || trainer) and mean |log_ratio|, nats per token:"
    yield ""
    yield "| rollout head | trainer head | whole model: k3 | mean | head alone: k3 | mean |"
    yield "|---|---|--:|--:|--:|--:|"
    for whole, alone in zip(result["rows"], result["head_isolated"], strict=True):
        numbers = [whole["k3"], whole["abs_mean"], alone["k3"], alone["abs_mean"]]
        cells = [whole["rollout_head"], whole["trainer_head"], *(f"{x:.1e}" if x else "0" for x in numbers)]
        yield "| " + " | ".join(cells) + " |"


def _pick(rows: list[dict], rollout: str, trainer: str) -> dict:
    return next(r for r in rows if (r["rollout_head"], r["trainer_head"]) == (rollout, trainer))


def _read(file: Path) -> object:
    return json.loads(file.read_text())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
