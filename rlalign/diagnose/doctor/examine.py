"""All groups of checks, in the order in which a mistake would bite: of a configuration, or of another stack's engine."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlalign import mismatch
from rlalign.config import Dtype, RunConfig
from rlalign.diagnose import body_rounding
from rlalign.diagnose.both_sides import head_weight, model_folder, trainer_network, trainer_scores
from rlalign.diagnose.doctor import check, live, machine, tokens
from rlalign.diagnose.doctor.check import Check, guarded, judged
from rlalign.diagnose.families import family_table
from rlalign.diagnose.families.family_table import RECIPES
from rlalign.rollout.attached import AttachedEngine, attach
from rlalign.rollout.worker import model_identity
from rlalign.run.assembly import load_tokenizer
from rlalign.tracking.console import Stages
from rlalign.trainer.checkpoint_names import as_checkpoint
from rlalign.types import LogprobSpec, Rollout, RolloutBatch, collate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STAGES, ENGINE_STAGES = 7, 4  # the cheap checks, then those of live.engine_and_trainer, or of `_engine`


def examine(config: RunConfig) -> list[Check]:
    """Every check on this configuration. Starts the engine and loads the trainer's model once."""
    with Stages("doctor", STAGES) as stages:
        stages.stage("installation, machine, tokenizer")
        return _examined(config, stages.stage)


def _examined(config: RunConfig, say: Callable[[str], None]) -> list[Check]:
    return [
        *guarded("installation", lambda: machine.packages(config)),
        *guarded("vllm plugin", machine.plugin),
        *guarded("disk", lambda: machine.disks(config)),
        *guarded("clock", lambda: machine.clock(config)),
        *guarded("head memory", lambda: machine.head_memory(config)),
        *guarded("checkpoint", lambda: check.of_checkpoint(config)),
        *guarded("family", lambda: of_family(config)),
        *guarded("bf16 products", lambda: machine.products(config)),
        *guarded("tokenizer", lambda: tokens.tokenizer(config)),
        *guarded("engine", lambda: live.engine_and_trainer(config, say)),
    ]


# by `rlalign families --json`, on the versions that it names
TABLE = Path(family_table.__file__).with_name("table.json")


def of_family(config: RunConfig) -> Iterator[Check]:
    """One line about the family; a cell of it that is not sound is unknown for this model, and said."""
    fields = check.text_config(model_folder(config))
    yield judged_family(str(fields.get("model_type", "")), family_table.read(TABLE))
    yield from of_latent_norms(fields)


def of_latent_norms(fields: dict[str, Any]) -> Iterator[Check]:
    """MiniCPM 3's latents: transformers norms them with its class's epsilon, vLLM with the configuration's (docs/upstream.md)."""
    own, given = 1e-6, fields.get("rms_norm_eps", 1e-5)
    if fields.get("model_type") != "minicpm3":
        return
    if given == own:
        yield Check("latent norms", "ok", f"rms_norm_eps={given:g} is the one that transformers gives the latents too")
        return
    found = f"vLLM norms the latents with rms_norm_eps={given:g}, transformers with {own:g}: 7e-05 nats on a tiny float32 model"
    remedy = f"accept the gap, or set rms_norm_eps={own:g}, which moves every norm of both sides alike"
    yield Check("latent norms", "problem", found, remedy)


def judged_family(model_type: str, table: dict[str, dict[str, family_table.Cell]]) -> Check:
    """From the rows of this model type."""
    rows = {name: table[name] for name, recipe in RECIPES.items() if recipe.model_type == model_type and name in table}
    if not rows:
        found = (
            f"{model_type}: no tiny model of it was measured; `rlalign doctor` and `rlalign parity` measure this one"
        )
        return Check("family", "unknown", found)
    every = [(name, column, c) for name, cells in rows.items() for column, c in cells.items()]
    unsound = [f"{name}, {column}: {c.state}, {c.found}" for name, column, c in every if c.state != family_table.OK]
    if unsound:
        return Check(
            "family", "unknown", f"on a tiny model: {'; '.join(unsound)}", f"rlalign families {' '.join(rows)}"
        )
    sound = ", ".join(f"{column} {c.found.split(';')[0]}".strip() for _, column, c in every)
    return Check("family", "ok", f"{', '.join(rows)} on a tiny model: {sound}")


def examine_engine(config: RunConfig, target: str) -> list[Check]:
    """Every check that an engine of another stack answers, against the folder `config.model.path`. It is left as it is.

    target: the address of a `vllm serve` with VLLM_SERVER_DEV_MODE=1, or module:object, a vllm.LLM or what returns one. The head
    asked for is config.head_dtype; weights and hidden states pass through config.weights.shared.
    """
    with Stages("doctor", ENGINE_STAGES) as stages:
        stages.stage("installation, checkpoint")
        return [
            *guarded("installation", lambda: machine.packages(config)),
            *guarded("vllm plugin", machine.plugin),
            *guarded("checkpoint", lambda: check.of_checkpoint(config)),
            *guarded("family", lambda: of_family(config)),
            *guarded("engine", lambda: _engine(config, target, stages.stage)),
        ]


def reached(target: str) -> object:
    """What `attach` takes: an address, or the object behind module:object, called where it is a function.

    Raises ValueError for what is neither.
    """
    if target.startswith(("http://", "https://")):
        return target
    module, _, name = target.partition(":")
    if not module or not name:
        raise ValueError(
            f"--engine {target}: give the address of a `vllm serve` (http://host:8000), or module:object, a vllm.LLM or a "
            "function that returns one"
        )
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"--engine {target}: {module} cannot be imported here ({error}); set PYTHONPATH") from error
    finally:
        sys.path.remove(os.getcwd())
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"--engine {target}: {getattr(found, '__name__', found)} has no {part}")
        found = getattr(found, part)
    return found() if callable(found) and not hasattr(found, "collective_rpc") else found


def _engine(config: RunConfig, target: str, say: Callable[[str], None]) -> Iterator[Check]:
    say("the engine's head")
    model, shared = model_folder(config), Path(config.weights.shared)
    key = os.environ.get("RLALIGN_ROLLOUT_KEY")
    engine = attach(reached(target), head_dtype=config.head_dtype.value, key=key, shared=shared, after_generation=True)
    try:
        yield from _settings(engine, model)
        config = replace(
            config, model=replace(config.model, dtype=Dtype(str(engine.body_dtype).removeprefix("torch.")))
        )
        say("loading the folder's model")
        network = trainer_network(model, config.model.dtype.value)
        say("weights, and the same tokens through both sides")
        yield from guarded("weights", lambda: _weights(engine, network, model))
        yield from guarded("agreement", lambda: _agreement(engine, network, model, config))
        yield from live.heads(engine)  # after its first tokens
    finally:
        engine.detach()


def _settings(engine: AttachedEngine, model: Path) -> Iterator[Check]:
    """What the engine says of itself, as far as it decides numbers."""
    said = engine.identity()
    yield Check("body dtype", "ok", said["dtype"])
    processed = said["logprobs_mode"] == "processed_logprobs"
    remedy = "start it with logprobs_mode=processed_logprobs; raw ones know nothing of temperature and truncation"
    yield judged("logprobs mode", processed, said["logprobs_mode"], remedy)
    yield live.kv_cache(said["kv_cache_dtype"], said["dtype"])
    defaults = ", ".join(f"{name}={value}" for name, value in sorted(said["sampling_defaults"].items()))
    note = "send each of these with every request, or start it with generation_config=vllm" if defaults else ""
    yield Check("sampling defaults", "ok", defaults or "none: what a request leaves out is off", note)
    ours = model_identity.digests(model)
    for name, file in (("config", "config.json"), ("tokenizer", "tokenizer.json")):
        remedy = f"start the engine and this check from one folder; it was started from {said['model']}"
        same = said[name] == ours[name]
        yield judged(
            f"{file} of both sides", same, "the same" if same else f"{said[name]} there, {ours[name]} here", remedy
        )


def _weights(engine: AttachedEngine, network: PreTrainedModel, model: Path) -> Iterator[Check]:
    found = engine.verify(as_checkpoint(network, network.named_parameters()), hold=False)
    yield Check("weights", "ok", f"{found.tensors} tensors of {model} are what {found.ranks} rank(s) compute with")


def _agreement(engine: AttachedEngine, network: PreTrainedModel, model: Path, config: RunConfig) -> Iterator[Check]:
    """Given tokens through the engine's prefill and the folder's model, as far apart as rounding explains, or further."""
    head = config.head_dtype.value
    batch = _scored(engine, load_tokenizer(model), head, int(engine.identity()["max_model_len"]))
    master_VD = head_weight(network).detach().float() if head == "master" else None

    def score(part: RolloutBatch) -> tuple:
        return trainer_scores(network, part, head, temperature=1.0, master_VD=master_VD)

    trainer_BL, hidden_BLD = score(batch)
    rollout_BL = batch.rollout_logprobs_BL
    measured = mismatch.compare(trainer_BL, rollout_BL, batch.loss_mask_BL, positions=False)
    yield live.head_alone(engine, network, hidden_BLD, batch, config, master_VD)
    if head == "model":
        found = (
            f"k3 {measured['k3']:.2e}, mean |log_ratio| {measured['abs_mean']:.2e} over {measured['tokens']:.0f} tokens"
        )
        yield Check("mismatch at lag 0", "ok", found, "head_dtype=float32 on both sides takes the heads' part away")
        return
    measured |= body_rounding.measure(network, batch, trainer_BL, rollout_BL, lambda few: score(few)[0])
    yield live.mismatch_at_lag_0(measured)


def _scored(engine: AttachedEngine, tokenizer: PreTrainedTokenizerBase, head: str, room: int) -> RolloutBatch:
    """The doctor's conversation, each message once and all of them in a row, with the engine's logprobs."""
    texts = [turn["content"] for turn in tokens.CONVERSATION]
    sequences = [tokenizer.encode(text)[: room - 1] for text in [*texts, "\n".join(texts)]]
    sequences = [ids for ids in sequences if len(ids) > 1]
    rollouts = [
        Rollout(
            token_ids=ids, loss_mask=[False] + [True] * (len(ids) - 1), rollout_logprobs=logprobs, prompt_id=i, group_id=i,
            finish_reason="", version_spans=[(1, len(ids), engine.policy_version)],
        )
        for i, (ids, logprobs) in enumerate(zip(sequences, engine.score(sequences), strict=True))
    ]  # fmt: skip
    return collate(rollouts, pad_token_id=0, spec=LogprobSpec(head_dtype=head))
