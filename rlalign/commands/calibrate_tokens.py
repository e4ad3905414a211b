"""rlalign calibrate-tokens: fit token temperatures of a causal LM folder, judge them on prompts they did not see."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlalign.calibration.adaptive import AdaptiveTemperature, Confidence, Objective, TokenBatch, Training, confidence_at
from rlalign.calibration.adaptive.batches import Completion, ModelBatches, encode, read_completions
from rlalign.calibration.adaptive.heads import Kind
from rlalign.calibration.calibrators.calibration_file import ModelIdentity
from rlalign.calibration.metrics import auroc, brier_score, ece_noise_floor, expected_calibration_error
from rlalign.calibration.metrics.reliability import reliability_diagram, write_reliability
from rlalign.head import widened
from rlalign.trainer import attention_choice

if TYPE_CHECKING:
    from rlalign.calibration.adaptive.batches import Batches, Level

KEPT_BELOW = 2 << 30  # bytes of hidden states: above, the body runs again every epoch
FEWEST = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is fitted and how; the shares are of distinct prompts."""

    head: Kind = "transformer"
    objective: Objective = field(default_factory=Objective)
    level: Level = "token"
    training: Training = field(default_factory=Training)
    batch_size: int = 16
    chat: bool = False
    dtype: str = "auto"
    validation_share: float = 0.2
    test_share: float = 0.2


def calibrate_tokens(
    model_folder: Path,
    data_file: Path,
    out: Path,
    options: Options,
    *,
    revision: str | None = None,
    plot: Path | None = None,
    json_path: Path | None = None,
) -> int:
    """Fit on some prompts, stop by others, print how it does on the rest, write `out`.

    Judged against T = 1 and against the best single temperature, fitted with the same loss on the same prompts. Returns
    1, and writes nothing, when the Brier score on the test prompts is not below that of the single temperature (of
    T = 1 for the constant head): then it does harm or nothing. Raises ValueError on what cannot be used.
    """
    parts = split(read_completions(data_file), options)
    sets = _batches(model_folder, parts, options)
    fitted = {"one T" if head == "constant" else f"{head} head": _fit(head, sets, options)
              for head in dict.fromkeys(("constant", options.head))}  # fmt: skip
    *others, chosen = ("T = 1", *fitted)
    calibrator = fitted[chosen]
    judged = _judge(sets["test"], {"T = 1": None, **fitted})
    table = {name: _quality(each) for name, each in judged.items()}
    print(_summary(calibrator, {name: len(part) for name, part in parts.items()}))
    print(_lines(table))
    if plot:
        diagrams = {name: reliability_diagram(c.top_N.double().clamp(0, 1), c.right_N) for name, c in judged.items()}
        write_reliability(plot, diagrams, title=f"tokens of {len(parts['test'])} test prompts")
        print(f"plot: {plot}")
    if json_path:
        fit = {name: asdict(each.report) for name, each in fitted.items()}
        content = {"calibration_id": calibrator.calibration_id, "fit": fit, "test": table}
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    if table[chosen]["brier"] >= table[others[-1]]["brier"]:
        print(
            f"On the test prompts {chosen} is no better than {others[-1]}: {out} was not written. Give it more prompts, "
            "and more kinds of them, or take a head with fewer numbers (constant has one)."
        )
        return 1
    dtype = str(sets["test"][0].hidden.dtype).removeprefix("torch.")
    calibrator.save(out, model=ModelIdentity(id=str(model_folder), revision=revision, dtype=dtype))
    print(f"calibration: {out}")
    return 0


def _fit(head: Kind, sets: dict[str, Batches[TokenBatch]], options: Options) -> AdaptiveTemperature:
    calibrator = AdaptiveTemperature(
        head=head, objective=options.objective, level=options.level, training=options.training
    )
    return calibrator.fit(
        sets["fit"], validation=sets["validation"], progress=lambda line: print(f"{head}: {line}", file=sys.stderr)
    )


def _summary(calibrator: AdaptiveTemperature, prompts: dict[str, int]) -> str:
    """What was fitted, and the temperatures it gives."""
    fit = calibrator.report
    return (
        f"{calibrator.calibration_id}: {calibrator.kind} head, loss {calibrator.objective.loss}, a temperature per "
        f"{calibrator.level}; prompts: {', '.join(f'{count} {name}' for name, count in prompts.items())}\n"
        f"{fit.n} tokens fitted, epoch {fit.epoch} kept; T {' / '.join(f'{t:.2f}' for t in fit.temperature_quantiles)} "
        f"(minimum, quartiles, maximum), {fit.clipped:.1%} at the range's ends"
    )


def split(rows: Sequence[Completion], options: Options) -> dict[str, list[Completion]]:
    """Rows for fit, validation and test; rows of one prompt stay together. Raises ValueError below 10 prompts each."""
    prompts = sorted({row.prompt for row in rows})
    random.Random(options.training.seed).shuffle(prompts)
    held, tested = (round(share * len(prompts)) for share in (options.validation_share, options.test_share))
    ends = {"test": prompts[:tested], "validation": prompts[tested : tested + held], "fit": prompts[tested + held :]}
    for name, part in ends.items():
        if len(part) < FEWEST:
            raise ValueError(
                f"{len(prompts)} distinct prompts leave {len(part)} for {name}; at least {FEWEST} are needed"
            )
    name_of = {prompt: name for name, part in ends.items() for prompt in part}
    return {name: [row for row in rows if name_of[row.prompt] == name] for name in ("fit", "validation", "test")}


def _batches(folder: Path, parts: dict[str, list[Completion]], options: Options) -> dict[str, Batches[TokenBatch]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: not a Hugging Face folder (no config.json there)")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = attention_choice.of_folder(folder).name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=options.dtype, attn_implementation=kind)
    torch.nn.Module.to(model, device).requires_grad_(False)
    widened.decide_for(model)
    config = model.config.get_text_config()
    encoded = {
        name: encode(rows, tokenizer, longest=config.max_position_embeddings, chat=options.chat)
        for name, rows in parts.items()
    }
    size = (
        sum(len(row.token_ids) for rows in encoded.values() for row in rows) * config.hidden_size * model.dtype.itemsize
    )
    streams = {name: ModelBatches(model, rows, batch_size=options.batch_size) for name, rows in encoded.items()}
    if size >= KEPT_BELOW:
        return dict(streams)
    return {name: [stream[i] for i in range(len(stream))] for name, stream in streams.items()}


def _judge(batches: Batches[TokenBatch], methods: dict[str, AdaptiveTemperature | None]) -> dict[str, Confidence]:
    """Every method on the same batches, each of them made once."""
    found: dict[str, list[Confidence]] = {name: [] for name in methods}
    for i in range(len(batches)):
        batch = batches[i]
        for name, method in methods.items():
            ones_N = torch.ones(len(batch), device=batch.hidden.device)
            found[name].append(confidence_at(batch, ones_N) if method is None else method.confidence(batch))
    return {
        name: Confidence(*(torch.cat(each).cpu() for each in zip(*list_, strict=True))) for name, list_ in found.items()
    }


def _quality(c: Confidence) -> dict[str, Any]:
    """Top-label metrics, and the mean -log p of the reference's tokens."""
    top_N, right_N = c.top_N.double().clamp(0, 1).numpy(), c.right_N.numpy()
    return {
        "accuracy": float(right_N.mean()),
        "confidence": float(top_N.mean()),
        "ece": expected_calibration_error(top_N, right_N),
        "ece_null_p95": ece_noise_floor(top_N).p95,
        "brier": brier_score(top_N, right_N),
        "auroc": auroc(top_N, right_N) if 0 < right_N.mean() < 1 else None,
        "token_nll": float(-np.log(np.maximum(c.target_N.double().numpy(), 1e-300)).mean()),
    }


def _lines(table: dict[str, dict[str, Any]]) -> str:
    names = {
        "accuracy": "accuracy", "confidence": "mean confidence", "ece": "ece, 15 bins", "ece_null_p95": "  by chance (95 %)",
        "brier": "brier", "auroc": "auroc", "token_nll": "nll of the tokens (nats)",
    }  # fmt: skip
    lines = [f"{'':<26}" + "".join(f"{name:>20}" for name in table)]
    for key, title in names.items():
        cells = (each[key] for each in table.values())
        lines.append(
            f"{title:<26}" + "".join(f"{'-' if value is None else format(value, '.4f'):>20}" for value in cells)
        )
    return "\n".join(lines)
