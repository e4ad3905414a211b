"""The experiments: how the engine answers, how the trainer calls its model, what the engine holds. None of them changes anything.

Suffixes: B sequences, L padded length, N sampled tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlalign.diagnose.both_sides import head_put_back, isolated_heads
from rlalign.diagnose.doctor import tokens
from rlalign.diagnose.suspects.case import ROUNDING, Case
from rlalign.head.projection import project
from rlalign.head.transform import HeadTransform
from rlalign.mismatch.causes import Cause
from rlalign.rollout.engine import noise_floor
from rlalign.trainer import head_isolation, logit_check
from rlalign.trainer.checkpoint_names import as_checkpoint
from rlalign.trainer.head_mirror import mirror

if TYPE_CHECKING:
    pass

HEAD_ROUNDING = 1e-5  # nats between two float32 heads; a 16-bit one is a thousand times further
ISOLATED_TOKENS = 256
FACTOR_TOKENS = 32
SLOPE = 1e-3  # of logits against logits: what rounding cannot do


def of_answers(case: Case) -> list[Cause]:
    """Everything that the engine's answers show by themselves."""
    return [*_settings(case), *_engine_head(case), *_semantics(case), *_tokenizer(case), *_caches(case)]


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


def _engine_head(case: Case) -> Iterator[Cause]:
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
    master_VD = case.master_VD if head == "master" else None
    with head_put_back(case.network):
        mirror(case.network, head_dtype=head, chunk=0).master_VD = master_VD
        return isolated_heads(
            case.engine, case.network, case.hidden_BLD, case.batch, tokens=ISOLATED_TOKENS, shared=case.shared,
            master_VD=master_VD,
        )  # fmt: skip


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


FAR = 4.0  # times the floor
NEAR = 0.25  # of the difference left: an explanation has to remove three quarters
TEMPERATURES = (0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0)


def of_calls(case: Case) -> list[Cause]:
    """Nothing when the trainer's scores are those of its model; else what explains them, or that nothing tried does."""
    away = _nearest(case, case.old_BL, case.temperature, case.head)
    if away <= ROUNDING:
        return []
    found = _trainer_temperature(case, away) or _trainer_head(case, away)
    if found or case.apart(case.old_BL, case.reference_BL) <= FAR * case.floor:
        return found
    return _padding_or_positions(case, case.apart(case.old_BL, case.reference_BL))


def fitting_temperature(case: Case, said_BL: Tensor) -> tuple[float, float]:
    """The temperature under which the plain model comes nearest to `said`, and the mean distance left (nats)."""
    tried = sorted({*TEMPERATURES, case.temperature, 1.0 / case.temperature, case.temperature**2})
    left = {t: _nearest(case, said_BL, t, case.head) for t in tried}
    best = min(left, key=left.__getitem__)
    return best, left[best]


def _nearest(case: Case, said_BL: Tensor, temperature: float, head: str) -> float:
    """Distance from the plain model, alone or in the padded batch: without a fault a trainer has the bits of one of them."""
    return min(case.apart(said_BL, case.plain(temperature, head, together=t)) for t in (False, True))


def _trainer_temperature(case: Case, away: float) -> list[Cause]:
    best, left = fitting_temperature(case, case.old_BL)
    if best == case.temperature or left > NEAR * away:
        return []
    ignored = "it ignores the temperature" if best == 1.0 else "another temperature"
    why = (
        f"the trainer's scores are its model's at temperature {best:g} (within {left:.1e} nats), the engine samples at "
        f"{case.temperature:g}: {ignored}"
    )
    return [Cause("temperature", why, "rlalign doctor", 1.0)]


def _trainer_head(case: Case, away: float) -> list[Cause]:
    for head in {"model", "float32"} - {case.head}:
        left = _nearest(case, case.old_BL, case.temperature, head)
        if left <= NEAR * away:
            why = f"the trainer's scores are those of a {head} head (within {left:.1e} nats), the engine's head is {case.head}"
            return [Cause("one-sided head", why, "rlalign parity", 1.0)]
    return []


def _padding_or_positions(case: Case, away: float) -> list[Cause]:
    """Padding is to blame when a sequence alone is scored right; positions, when the first sampled token still is."""
    alone_BL = torch.zeros_like(case.old_BL)
    for i, row in enumerate(case.alone):
        scores_1L = case.score(row).cpu()
        alone_BL[i, : scores_1L.shape[1]] = scores_1L[0]
    left = case.apart(alone_BL, case.reference_BL)
    wrong_BL = (case.old_BL - case.reference_BL).abs() > FAR * case.floor
    if left <= NEAR * away:
        length_B, wrong_B = case.batch.attention_mask_BL.sum(1), wrong_BL.logical_and(case.batch.loss_mask_BL).any(1)
        longest = int(length_B.max())
        why = (
            f"in its batch the trainer is {away:.2g} nats from its own model, with each sequence alone {left:.1e}: "
            f"{int(wrong_B.sum())} of {len(wrong_B)} sequences are wrong, of those of the full length {longest} "
            f"{int(wrong_B[length_B == longest].sum())}: padding is attended to"
        )
        command = "rlalign attribute (the trainer's attention mask and position ids)"
        return [Cause("attention mask", why, command, 1.0), Cause("position ids", why, command, 0.5)]
    first, later = _first_and_later(wrong_BL, case.batch.loss_mask_BL)
    why = (
        f"the trainer is {away:.2g} nats from its own model, also with each sequence alone: {first:.0%} of first sampled tokens "
        f"and {later:.0%} of later ones are wrong"
    )
    names = ("position ids", "attention mask") if first < 0.5 * later else ("attention mask", "position ids")
    command = "rlalign attribute (position ids and mask that the trainer passes)"
    return [Cause(names[0], why, command, 0.95), Cause(names[1], why, command, 0.6)]


def _first_and_later(wrong_BL: Tensor, mask_BL: Tensor) -> tuple[float, float]:
    first_BL = mask_BL & (mask_BL.cumsum(1) == 1)
    later_BL = mask_BL & ~first_BL
    return float(wrong_BL[first_BL].float().mean()), float(wrong_BL[later_BL].float().mean())


LAYER = re.compile(r"layers\.(\d+)\.")
LORA = "lora_"
PUBLISH = "rlalign doctor (publishes the weights once more and verifies them)"


def of_weights(case: Case) -> list[Cause]:
    """What differs, by name."""
    return [*_adapters(case), *_weights(case), *_constants(case)]


def _adapters(case: Case) -> Iterator[Cause]:
    names = [n for n, _ in case.network.named_parameters() if LORA in n]
    if names and case.weights is None:
        why = f"the trainer's model has {len(names)} adapter weights ({names[0]}, ...), the engine serves the base model alone"
        yield Cause("LoRA not applied", why, "merge the adapter before publishing, or serve it and verify_adapter", 1.0)


def _weights(case: Case) -> Iterator[Cause]:
    from rlalign.rollout.engine import teacher_forcing

    own = list(as_checkpoint(case.network, ((n, p) for n, p in case.network.named_parameters() if LORA not in n)))
    weights = own if case.weights is None else list(case.weights())
    by_rank = teacher_forcing.differing_weights(case.engine, weights, shared=Path(case.shared))
    wrong = {rank: lines for rank, lines in by_rank.items() if lines}
    if not wrong:
        return
    total, rank = len(weights), max(wrong, key=lambda r: len(wrong[r]))
    names = [line.split(":")[0] for line in wrong[rank]]
    why = f"{len(names)} of {total} weights on rank {rank} are not the trainer's: {_summary(names)}"
    if len(wrong) < len(by_rank):
        right = sorted(set(by_rank) - set(wrong))
        why += f"; rank(s) {', '.join(map(str, right))} have them all"
        yield Cause("one engine rank differs", why, PUBLISH, 1.0)
    yield Cause("stale weights", why, PUBLISH, 0.95 if len(wrong) < len(by_rank) else 1.0)


def _summary(names: Sequence[str]) -> str:
    """The first names, or the layers where there are many."""
    if len(names) <= 4:
        return ", ".join(names)
    layers = sorted({int(m.group(1)) for n in names if (m := LAYER.search(n))})
    others = [n for n in names if not LAYER.search(n)]
    where = [f"layer(s) {', '.join(map(str, layers))}"] if layers else []
    return "; ".join([*where, *others[:3]])


def _constants(case: Case) -> Iterator[Cause]:
    from rlalign.rollout.engine import teacher_forcing

    theirs, ours = teacher_forcing.constants(case.engine), _trainer_constants(case.network)
    wrong = [n for n in theirs if n in ours and not _same(theirs[n], ours[n])]
    epsilons = [n for n in wrong if n != teacher_forcing.FREQUENCIES]
    if epsilons:
        shown = ", ".join(f"{n} {theirs[n][0]:g} against {ours[n][0]:g}" for n in epsilons[:3])
        why = f"{len(epsilons)} norm(s) have another epsilon in the engine than in the trainer: {shown}"
        yield Cause("norm epsilon", why, "rlalign attribute", 1.0)
    if teacher_forcing.FREQUENCIES in wrong:
        one, other = theirs[teacher_forcing.FREQUENCIES], ours[teacher_forcing.FREQUENCIES]
        why = f"positions are rotated by {_theta(one)} in the engine and {_theta(other)} in the trainer"
        yield Cause("rope theta", why, "rlalign attribute", 1.0)


def _trainer_constants(network: nn.Module) -> dict[str, list[float]]:
    from rlalign.rollout.engine.teacher_forcing import FREQUENCIES

    found: dict[str, list[float]] = {}
    for name, module in network.named_modules():
        for attribute in ("variance_epsilon", "eps"):  # transformers uses either
            if type(module).__name__.endswith("RMSNorm") and attribute in vars(module):
                found[name] = [float(vars(module)[attribute])]
        if "inv_freq" in module._buffers:
            found[FREQUENCIES] = module.inv_freq.float().tolist()
    return found


def _same(one: Sequence[float], other: Sequence[float]) -> bool:
    """An epsilon exactly; frequencies as far as a cosine table in bf16 keeps them."""
    if len(one) != len(other):
        return False
    if len(one) == 1:
        return one == other
    return all(math.isclose(a, b, rel_tol=1e-2, abs_tol=5e-3) for a, b in zip(one, other, strict=True))


def _theta(frequencies: Sequence[float]) -> str:
    """The base that gives these frequencies: theta ** (-2 j / D)."""
    ratio = frequencies[1] / frequencies[0]
    return f"theta {ratio ** -len(frequencies):.4g}"
