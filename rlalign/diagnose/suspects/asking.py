"""How the engine answers: its settings, its head, what temperature and truncation are in its numbers, what its caches hold.

Suffixes: N sampled tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rlalign.diagnose.both_sides import head_put_back
from rlalign.diagnose.doctor import tokens
from rlalign.diagnose.suspects.calling import FAR, NEAR, fitting_temperature
from rlalign.diagnose.suspects.case import Case
from rlalign.head.projection import project
from rlalign.head.transform import HeadTransform
from rlalign.mismatch.causes import Cause
from rlalign.rollout.engine import noise_floor
from rlalign.trainer import head_isolation, logit_check
from rlalign.trainer.head_mirror import mirror

HEAD_ROUNDING = 1e-5  # nats between two float32 heads; a 16-bit one is a thousand times further
ISOLATED_TOKENS = 256
FACTOR_TOKENS = 32
SLOPE = 1e-3  # of logits against logits: what rounding cannot do


def causes(case: Case) -> list[Cause]:
    """Everything that the engine's answers show by themselves."""
    return [*_settings(case), *_heads(case), *_semantics(case), *_tokenizer(case), *_caches(case)]


def _settings(case: Case) -> Iterator[Cause]:
    live = case.engine.settings()
    if live["logprobs mode"] != "processed_logprobs":
        why = f"the engine runs with logprobs_mode={live['logprobs mode']}"
        yield Cause("raw against processed logprobs", why, "rlalign doctor", 1.0)
    body = str(next(case.network.parameters()).dtype).removeprefix("torch.")
    if live["body dtype"] != body:
        why = f"the engine's body is {live['body dtype']}, the trainer's {body}"
        yield Cause("body dtype", why, "rlalign doctor", 1.0)
    if live["kv-cache dtype"] not in ("auto", body):
        why = f"the engine stores keys and values as {live['kv-cache dtype']}, the trainer computes with {body}"
        yield Cause("kv-cache dtype", why, "rlalign doctor", 0.9)


def _heads(case: Case) -> Iterator[Cause]:
    """Both heads on the same hidden states."""
    asked = case.engine.spec.head_dtype
    wrong = [s for s in case.engine.status() if s["mode"] != case.engine.mode]
    if wrong:
        ranks = ", ".join(f"rank {s['rank']} runs {s['mode']}" for s in wrong)
        yield Cause("one-sided head", f"{ranks}; the run asked for {case.engine.mode}", "rlalign parity", 1.0)
    if asked == "model":
        return
    apart = _isolated(case, asked)
    if not apart["abs_mean"] > HEAD_ROUNDING:
        return
    why = (
        f"on the same hidden states the engine's head is {apart['abs_mean']:.1e} nats from a {asked} one with the trainer's "
        f"weight, and {apart['rollout_error']:.1e} from float64"
    )
    if factor := _logit_factor(case):
        yield factor
        return
    coarse = _isolated(case, "model")["abs_mean"]
    if coarse <= NEAR * apart["abs_mean"]:
        why += f"; from one in the body's dtype it is {coarse:.1e}"
        yield Cause("one-sided head", why, "rlalign parity", 0.95)
    else:
        yield Cause("head weight", why, "rlalign doctor (publishes and verifies every weight)", 0.8)


def _logit_factor(case: Case) -> Cause | None:
    """Do the engine's logits, on the same hidden states, lie on a line through the trainer's whose slope is not 1?"""
    batch = case.batch
    hidden_ND, _ = head_isolation.predicting(
        case.hidden_BLD, batch.token_ids_BL, batch.loss_mask_BL, limit=FACTOR_TOKENS
    )
    weight_VD, transform = case.network.get_output_embeddings().weight, HeadTransform.of(case.network.config)
    with torch.no_grad():
        ours_NV = transform.apply(project(transform.hidden(hidden_ND), weight_VD)).double().cpu()
    theirs_NV = head_isolation.engine_logits(case.engine, hidden_ND, case.shared).double()
    ours_NV, theirs_NV = (x - x.mean(1, keepdim=True) for x in (ours_NV, theirs_NV[:, : ours_NV.shape[1]]))
    slope = float((ours_NV * theirs_NV).sum() / ours_NV.square().sum())
    away, left = float((theirs_NV - ours_NV).norm()), float((theirs_NV - slope * ours_NV).norm())
    if abs(slope - 1) <= SLOPE or left > NEAR * away:
        return None
    likely = logit_check.likely_fields(case.network.config, slope)
    field = f"; {' or '.join(likely)} of the configuration has that value" if likely else ""
    why = (
        f"on the same hidden states the engine's logits are {slope:.6g} times the trainer's, with {left / away:.0%} of the "
        f"difference left{field}: one side reads a multiplier, a cap or a scale that the other does not"
    )
    return Cause("logit factor", why, "rlalign parity", 1.0)


def _isolated(case: Case, head: str) -> dict[str, float]:
    """The engine's head against the trainer's weight under this head."""
    batch, master_VD = case.batch, case.master_VD if head == "master" else None
    hidden, ids = head_isolation.predicting(
        case.hidden_BLD, batch.token_ids_BL, batch.loss_mask_BL, limit=ISOLATED_TOKENS
    )
    with head_put_back(case.network):
        mirror(case.network, head_dtype=head, chunk=0).master_VD = master_VD
        return head_isolation.measure(
            case.engine, case.network, hidden, ids, temperature=1.0, shared=case.shared, master_VD=master_VD
        )


def _semantics(case: Case) -> Iterator[Cause]:
    """Does another temperature, or a truncated distribution, explain the engine's numbers?"""
    said_BL, mask_BL = case.batch.rollout_logprobs_BL, case.batch.loss_mask_BL
    away = case.apart(said_BL, case.reference_BL)
    best, left = fitting_temperature(case, said_BL)
    if best != case.temperature and left <= NEAR * away and away > FAR * case.floor:
        why = (
            f"the engine's logprobs are the trainer's at temperature {best:g} (within {left:.1e} nats), it was to sample at "
            f"{case.temperature:g}"
        )
        if best == 1.0:
            yield Cause("raw against processed logprobs", why + ": raw logprobs", "rlalign doctor", 0.95)
        yield Cause("temperature", why, "rlalign doctor", 0.9)
    d_N = (case.reference_BL - said_BL)[mask_BL].double()
    k1, highest = float(-d_N.mean()), float(d_N.max())
    moved = float((d_N.abs() > FAR * case.floor).double().mean())
    if k1 > max(0.01, FAR * case.floor) and highest < 0.1 * k1:
        why = (
            f"the engine is above the trainer's model for {moved:.0%} of tokens and never below (largest log-ratio "
            f"{highest:.1e}, k1 {k1:.2g}): it renormalises over the tokens that top-p, top-k or min-p left"
        )
        yield Cause("truncation", why, "rlalign doctor", 0.97)


def _tokenizer(case: Case) -> Iterator[Cause]:
    if case.tokenizer is None:
        return
    check = tokens.both_sides(case.tokenizer, case.engine.tokenizer())
    if check.state == "problem":
        yield Cause("tokenizer", check.found, "rlalign doctor", 1.0)


def _caches(case: Case) -> Iterator[Cause]:
    """The engine's next token after every sequence from its caches as they are, and with an empty cache."""
    batch = case.batch
    last_B = (batch.attention_mask_BL.sum(1) - 1).tolist()
    prefixes = [ids[:n].tolist() for ids, n in zip(batch.token_ids_BL, last_B, strict=True)]
    wanted = [int(ids[n]) for ids, n in zip(batch.token_ids_BL, last_B, strict=True)]
    as_it_is, from_cache = case.engine.next_logprobs(prefixes, wanted)
    case.engine.reset_prefix_cache()
    cold, _ = case.engine.next_logprobs(prefixes, wanted)
    apart_B = (torch.tensor(as_it_is) - torch.tensor(cold)).abs()
    if from_cache and float(apart_B.mean()) > FAR * case.floor:
        why = (
            f"with the prefix cache as it was ({from_cache} tokens from it) the engine is {float(apart_B.mean()):.2g} nats from "
            f"what it says with an empty one: keys and values of older weights were kept"
        )
        yield Cause("prefix cache after sync", why, "rlalign doctor", 1.0)
    if case.temperature != 1.0 or case.engine.spec.truncated:
        return
    forced_BL = noise_floor.scores(case.engine, batch)
    decoded = case.apart(batch.rollout_logprobs_BL, forced_BL)
    right = case.apart(forced_BL, case.reference_BL)
    if decoded > FAR * case.floor and right <= NEAR * decoded:
        why = (
            f"what the engine sampled is {decoded:.2g} nats from its own teacher forcing, which agrees with the trainer "
            f"({right:.1e}): decoding reads something else than prefilling computes"
        )
        yield Cause("prefix cache after sync", why, "rlalign doctor", 0.7)
        yield Cause("kv-cache dtype", why, "rlalign doctor", 0.5)
