"""The live engine and the trainer's model: settings, heads, weights, prefix cache, and whether their numbers agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlalign import mismatch
from rlalign.config import GateAction, HeadDtype, RunConfig
from rlalign.diagnose import body_rounding
from rlalign.diagnose.both_sides import (
    head_weight,
    isolated_heads,
    lm_head_of,
    model_folder,
    probed_body,
    sample,
    task_prompts,
    trainer_network,
    trainer_scores,
)
from rlalign.diagnose.doctor import tokens
from rlalign.diagnose.doctor.check import Check, judged
from rlalign.head import multiplied
from rlalign.rollout.engine.arguments import caches_prefixes
from rlalign.rollout.engine.surface import spec_of
from rlalign.run.assembly import PROOF_PROMPTS, load_tokenizer, start_embedded
from rlalign.trainer.checkpoint_names import as_checkpoint
from rlalign.trainer.rounding.variants import MODEL
from rlalign.types import RolloutBatch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from rlalign.loops.mirrors import Settled
    from rlalign.rollout.attached import AttachedEngine
    from rlalign.rollout.engine.embedded import VLLMEngine

ISOLATED_TOKENS = 64  # of the head alone


def engine_and_trainer(config: RunConfig, say: Callable[[str], None] = lambda _: None) -> Iterator[Check]:
    """Start both, publish the trainer's own copy, sample, teacher-force: weights, tokens and numbers of both sides at once."""
    model = model_folder(config)
    say("starting vLLM")
    engine = start_embedded(model, config)  # proves the head on every rank, or raises
    try:
        yield from settings(engine, config)
        settled = None
        if config.mirrored:
            say("probing the engine's ops")
            prompts = task_prompts(load_tokenizer(model), config, count=PROOF_PROMPTS)
            settled = probed_body(engine, model, config, prompts)
            yield mirrored_body(settled)
        say("loading the trainer's model")
        plan = None if settled is None else settled.plan
        network = trainer_network(model, config.model.dtype.value, exact=config.exact, mirrored=plan)
        yield tied(engine, network)
        say("publishing the weights, every tensor verified")
        yield _published(engine, network, config)
        tokenizer = load_tokenizer(model)
        yield tokens.both_sides(tokenizer, engine.tokenizer())
        say("sampling")
        batch, rollouts = sample(engine, tokenizer, config, prompts=tokens.PROMPTS, samples=2)
        yield tokens.round_trip(rollouts, tokenizer)
        yield tokens.unknown_sampled(rollouts, tokenizer)
        say("prefix cache")
        yield prefix_cache(engine, batch)
        say("the same tokens through both sides")
        yield from _agreement(engine, network, batch, config)
        yield from heads(engine)
    finally:
        engine.close()


def mirrored_body(settled: Settled) -> Check:
    """Do the chosen variants give the bits of the engine's ops?"""
    probed, chosen = settled.probed, settled.as_dict()["choices"]
    apart = {op: probed.apart(op, name) for op, name in chosen.items()}
    ops = ", ".join(
        f"{op} {name} ({probed.apart(op, MODEL)} elements before, {apart[op]} after)" for op, name in chosen.items()
    )
    wrong = "; ".join(settled.unsettled()) or ", ".join(f"{op}: {n} elements differ" for op, n in apart.items() if n)
    found = f"{probed.tokens} tokens: {ops}" + "".join(
        f"; {part} not probed: {why}" for part, why in probed.left.items()
    )
    return judged("mirrored body", not wrong, f"{wrong}; {found}" if wrong else found, "use trainer.body=model")


def settings(engine: VLLMEngine, config: RunConfig) -> Iterator[Check]:
    """What the running engine says of itself, against what the run needs."""
    live = engine.settings()
    wanted = {"logprobs mode": "processed_logprobs", "body dtype": config.model.dtype.value}
    wanted["prefix caching"] = str(caches_prefixes(model_folder(config), config.rollout))
    wanted["tensor parallel"] = str(config.rollout.tensor_parallel_size)
    for name, value in live.items():
        if name in ("kv-cache dtype", "tied embeddings"):
            continue
        yield judged(name, wanted.get(name, value) == value, value, f"this run needs {wanted.get(name)}")
    yield kv_cache(live["kv-cache dtype"], config.model.dtype.value)
    wanted_spec = spec_of(config.rollout, config.head_dtype.value, vocab_size=engine.spec.vocab_size)
    shaped = f"temperature {engine.spec.temperature:g}, top_p {engine.spec.top_p:g}, top_k {engine.spec.top_k}"
    yield judged(
        "sampling is comparable",
        engine.spec == wanted_spec and not engine.spec.unrepeatable,
        f"{shaped}, min_p {engine.spec.min_p:g}, over {engine.spec.support}, {'processed' if engine.spec.processed else 'raw'}",
        f"sample with processed logprobs as the configuration says: {wanted_spec}",
    )


def kv_cache(cache: str, body: str) -> Check:
    """Does the engine keep keys and values in the dtype that the body computes them in?"""
    remedy = "decoding reads keys and values that were rounded; run with kv_cache_dtype=auto"
    return judged("kv-cache dtype", cache in ("auto", body), cache, remedy)


def tied(engine: VLLMEngine, network: PreTrainedModel) -> Check:
    """Do both sides share the embedding with the head, or neither?"""
    theirs = engine.settings()["tied embeddings"] == "True"
    ours = head_weight(network) is network.get_input_embeddings().weight
    return judged(
        "tied embeddings",
        ours == theirs,
        str(theirs) if ours == theirs else f"{theirs} in the engine, {ours} in the trainer",
        "set tie_word_embeddings in config.json to what the checkpoint holds",
    )


def prefix_cache(engine: VLLMEngine, batch: RolloutBatch) -> Check:
    """After a reset no token may come from the cache: it would hold keys and values of older weights.

    Asked with a prompt as long as the context, since only whole blocks are kept (128 tokens of vLLM on CPU).
    """
    ids = batch.token_ids_BL[batch.attention_mask_BL].tolist()
    longest = engine.config.max_model_len - 2
    prompt = (ids * (longest // len(ids) + 1))[:longest]
    engine.next_logprobs([prompt], [ids[-1]])
    _, warm = engine.next_logprobs([prompt], [ids[-1]])
    engine.reset_prefix_cache()
    _, kept = engine.next_logprobs([prompt], [ids[-1]])
    policy = "on, reset with every publish" if engine.config.prefix_caching else "off"
    shorter = "" if warm or not engine.config.prefix_caching else " (no prompt of this run fills a block of it)"
    found = f"{policy}{shorter}; {warm} of {longest} tokens from it before a reset, {kept} after"
    return judged("prefix cache", kept == 0, found, "rollout.prefix_caching=false")


def _published(engine: VLLMEngine, network: PreTrainedModel, config: RunConfig) -> Check:
    from rlalign.weights import MASTER_WEIGHT, publish

    weights = [*as_checkpoint(network, network.named_parameters())]
    if config.head_dtype is HeadDtype.master:  # a checkpoint has no unrounded head: its own values stand in
        weights.append((MASTER_WEIGHT, head_weight(network).float()))
    published = publish(weights, 0, receiver=engine, shared=Path(config.weights.shared))
    repaired = f", {published.repaired} repaired" if published.repaired else ""
    return Check("weights", "ok", f"{published.tensors} tensors verified on {published.ranks} rank(s){repaired}")


def _agreement(engine: VLLMEngine, network: PreTrainedModel, batch: RolloutBatch, config: RunConfig) -> Iterator[Check]:
    from rlalign.trainer.head_mirror import status_of

    head, temperature = config.head_dtype.value, config.rollout.temperature
    master_VD = head_weight(network).detach().float() if head == "master" else None

    def score(tokens: RolloutBatch) -> tuple[Tensor, Tensor]:
        return trainer_scores(network, tokens, head, temperature=temperature, master_VD=master_VD)

    trainer_BL, hidden_BLD = score(batch)
    trainer = status_of(lm_head_of(network))
    if trainer.multiplied is not None:
        promise = trainer.dtype if trainer.mode == "off" else "float32"
        yield _multiplied("logits of the trainer", promise, trainer.multiplied.as_dict())
    sides = f"rollout {engine.spec.head_dtype} ({engine.mode}), trainer {head}"
    yield judged("heads of both sides", engine.spec.head_dtype == head, sides, "set head_dtype once, for the run")
    yield head_alone(engine, network, hidden_BLD, batch, config, master_VD)
    rollout_BL = batch.rollout_logprobs_BL
    measured = mismatch.compare(trainer_BL, rollout_BL, batch.loss_mask_BL, positions=False)
    if config.exact:
        yield judged(
            "exact mode",
            measured["abs_max"] == 0.0,
            f"{measured['tokens']:.0f} tokens, largest |log_ratio| {measured['abs_max']:.1e}; attention "
            f"{', '.join(engine.status()[0]['attention'])}",
            "the two sides must agree in every bit: `rlalign attribute` names the first step that does not",
        )
    elif head != "model":
        measured |= body_rounding.measure(network, batch, trainer_BL, rollout_BL, lambda few: score(few)[0])
        yield mismatch_at_lag_0(measured)
    yield limit_of_the_run(measured, config)


def head_alone(
    engine: VLLMEngine | AttachedEngine,
    network: PreTrainedModel,
    hidden_BLD: Tensor,
    batch: RolloutBatch,
    config: RunConfig,
    master_VD: Tensor | None = None,
) -> Check:
    """Does each side's live head, given the same hidden states, multiply in the dtype it is named after?"""
    shared, scored = Path(config.weights.shared), min(ISOLATED_TOKENS, int(batch.loss_mask_BL.sum()))
    measured = isolated_heads(
        engine, network, hidden_BLD, batch, tokens=ISOLATED_TOKENS, shared=shared, master_VD=master_VD
    )
    found = f"mean distance from the float64 head: rollout {measured['rollout_error']:.1e}, "
    found += f"trainer {measured['trainer_error']:.1e} nats over {scored} tokens"
    wrong = "" if config.head_dtype is HeadDtype.model else body_rounding.heads_over(measured)
    return judged("head alone", not wrong, wrong or found, "that side's head is other than its name; see its status")


def mismatch_at_lag_0(measured: Mapping[str, float]) -> Check:
    """Is the difference of the two sides no more than rounding explains? measured: as `body_rounding.over` takes it."""
    k3, mean = body_rounding.limits(measured)
    found = (
        f"k3 {measured['k3']:.2e}, mean |log_ratio| {measured['abs_mean']:.2e} over {measured['tokens']:.0f} tokens; "
    )
    found += f"rounding explains up to {k3:.1e} and {mean:.1e} for this model"
    wrong = body_rounding.over(measured)
    remedy = "`rlalign parity` tells the head from the body, `rlalign attribute` names the layer"
    return judged("mismatch at lag 0", not wrong, wrong or found, remedy)


def limit_of_the_run(measured: Mapping[str, float], config: RunConfig) -> Check:
    """Would the first step pass the run's own gate?"""
    k3, limit = measured["k3"], config.mismatch.k3_limit
    stops = "stop the run at its first step" if config.mismatch.action is GateAction.stop else "warn at every step"
    found = f"k3 {k3:.2e} against mismatch.k3_limit={limit:.0e}" + ("" if k3 <= limit else f": it would {stops}")
    remedy = f"mismatch.k3_limit={10 * k3:.0e}, ten times this, unless the checks above name a fault"
    return judged("limit of the run", k3 <= limit, found, remedy)


def _multiplied(name: str, promise: str, found: dict[str, Any]) -> Check:
    """The dtype that live logits turned out to be computed in, against what the head's mode promises."""
    if found["dtype"] is None:
        return Check(name, "unknown", f"{promise} by its name; {multiplied.said(found)}")
    fine = found["dtype"] == promise or (promise != "float32" and found["dtype"] == multiplied.OTHER)
    remedy = (
        f"the head's name promises {promise}; look for another plugin or patch, or run with the head_dtype that it has"
    )
    return judged(name, fine, multiplied.said(found), remedy)


def heads(engine: VLLMEngine | AttachedEngine) -> Iterator[Check]:
    """The head of every rank: its mode, and the dtype in which its logits turned out to be computed."""
    from rlalign.rollout.head.head_settings import promised

    for status in engine.status():
        promise = promised(status["mode"], status["body_dtype"])
        for where, found in status["multiplied"].items():
            if found is not None:
                yield _multiplied(f"logits of rank {status['rank']}, {where}", promise, found)
        what = f"{status['mode']}, {status['calls']} calls, policy version {status['policy_version']}"
        yield judged(
            f"head of rank {status['rank']}",
            status["mode"] == engine.mode and status["calls"] > 0 and status["policy_version"] == engine.policy_version,
            f"{what}, {status['cache_bytes'] / 2**20:.1f} MiB of fp32 copies",
            f"every rank must run mode {engine.mode} at version {engine.policy_version}",
        )
