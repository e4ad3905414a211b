"""What a quantised rollout engine costs: k3 against the plain body, split into weights, activations and KV cache, and by layer.

Everything is a transformers model in float32, fake quantised: no GPU is needed, and nothing but quantisation differs. Numbers are
expectations over the whole vocabulary under the quantised policy at every scored position: what `mismatch.compare` tends to on
tokens that such an engine samples, without the noise of sampling them.
Suffixes: N scored positions, D hidden, V vocabulary, B sequences, L padded length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlalign.diagnose.body_rounding import FLOAT32, in_float32
from rlalign.head import multiplied
from rlalign.head.multiplied import Multiplied
from rlalign.objective import presets
from rlalign.trainer import logit_check
from rlalign.trainer.fake_quantised import FORMATS, Recipe, fake_quantised, layers_of
from rlalign.types import RolloutBatch

LOGIT_ELEMENTS = 2**22  # logits compared at once
PLAIN = Recipe()
PRESETS = {
    "tis": presets.tis,
    "icepop": presets.icepop,
    "kpop": presets.kpop,
}  # of single tokens; their authors' bounds
ENOUGH = 0.95  # effective sample size of a correction's weights; ess_tis's own target


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Of a plain policy from a quantised one that samples, a position: KL(rollout || old), which k3 estimates (nats), chi2 of
    the token ratio rho = old / rollout, the share of probability that moved, and of each preset how much of the ratio it
    leaves uncorrected, E|rho - w|, and the effective sample size of its weights w."""

    k3: float
    chi2: float
    moved: float
    uncorrected: Mapping[str, float]
    ess: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """format, kv: names of formats. rounding_k3: of the body's own dtype against float32. alone: one component quantised;
    share: its part of together.k3, these add up to it (Shapley values). layers: k3 of one component in one layer.
    quantised_head: what a head in the same format would add alone; head: how the head of the quantised model was found to multiply.
    """

    model: str
    format: str
    kv: str
    tokens: int
    temperature: float
    rounding_k3: float
    together: Divergence
    alone: Mapping[str, Divergence]
    share: Mapping[str, float]
    layers: Sequence[Mapping[str, float]]
    quantised_head: float
    head: Multiplied

    @property
    def advice(self) -> tuple[str, str]:
        """(preset or "", why): none where rounding does as much; of those whose weights keep their sample size the one that leaves
        the least of the ratio uncorrected; else `ess_tis`, which makes them keep it."""
        k3, found = self.together.k3, self.together
        if k3 <= self.rounding_k3:
            return "", f"k3 {k3:.1e} is no more than the body's own rounding does, {self.rounding_k3:.1e}"
        usable = [name for name in PRESETS if found.ess[name] >= ENOUGH]
        if not usable:
            worst = ", ".join(f"{name} {found.ess[name]:.2f}" for name in PRESETS)
            return "ess_tis", f"with every other bound the effective sample size falls under {ENOUGH} ({worst})"
        best = min(usable, key=lambda name: found.uncorrected[name])
        rest = ", ".join(f"{name} {found.uncorrected[name]:.1e}" for name in PRESETS)
        return best, (
            f"it leaves the least of the ratio uncorrected ({rest}; nothing: {found.moved * 2:.1e}) "
            f"at an effective sample size of {found.ess[best]:.3f}"
        )

    def as_json(self) -> dict[str, object]:
        """Every number and the advice."""
        preset, why = self.advice
        return asdict(self) | {"preset": preset, "why": why}


@torch.no_grad()
def measure(
    network: PreTrainedModel,
    batch: RolloutBatch,
    *,
    format: str,
    kv: str = "",
    by_layer: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Budget:
    """Budget of a body in this format, with keys and values in `kv` ("" for plain ones), on these tokens.

    Sequences run one by one without padding: a scale of all tokens is one of a sequence. The network is in float32 meanwhile and
    unchanged afterwards. by_layer: three more forwards a layer.
    Raises ValueError for unknown formats, a batch without a scored token, and models that cannot be faked; RuntimeError when logits
    are not finite or the head turns out not to be plain.
    """
    whole = Recipe(weights=format, activations=format, kv=kv)
    parts = ("weights", "activations", *(("kv",) if kv else ()))
    if not batch.loss_mask_BL.any():
        raise ValueError("a budget needs scored tokens, and the batch's loss mask is empty")
    before = network.get_output_embeddings().weight.detach().clone()
    rounded_ND = _hidden(network, batch)
    own = network.get_input_embeddings().weight.dtype
    with in_float32(network):
        head = _Head(network, batch.spec.temperature)
        say("plain body in float32")
        plain_ND = _hidden(network, batch)

        def under(recipe: Recipe) -> Divergence:
            with fake_quantised(network, recipe):
                return head.compared(plain_ND, _hidden(network, batch))

        found: dict[frozenset[str], Divergence] = {}
        for count in range(1, len(parts) + 1):
            for chosen in combinations(parts, count):
                say(f"{format}: {' and '.join(chosen)}")
                found[frozenset(chosen)] = under(_only(whole, chosen))
        layers = []
        for at in range(len(layers_of(network)) if by_layer else 0):
            say(f"{format}: layer {at}")
            layers.append({part: under(replace(_only(whole, (part,)), layers=frozenset({at}))).k3 for part in parts})
        with fake_quantised(network, whole):
            proved = head.proved(before, _hidden(network, batch.rows(slice(0, 1))))
        return Budget(
            model=type(network).__name__,
            format=format,
            kv=kv,
            tokens=len(plain_ND),
            temperature=batch.spec.temperature,
            rounding_k3=FLOAT32["rounding_k3"]
            if own == torch.float32
            else head.compared(plain_ND, rounded_ND.float()).k3,
            together=found[frozenset(parts)],
            alone={part: found[frozenset({part})] for part in parts},
            share=_shapley({chosen: divergence.k3 for chosen, divergence in found.items()}, parts),
            layers=layers,
            quantised_head=head.compared(plain_ND, plain_ND, head.quantised(format)).k3,
            head=proved,
        )


def _only(recipe: Recipe, parts: Sequence[str]) -> Recipe:
    return replace(recipe, **{part: "" for part in ("weights", "activations", "kv") if part not in parts})


def _hidden(network: PreTrainedModel, batch: RolloutBatch) -> Tensor:
    """[N, D]: what the head is given for every scored token."""
    found = []
    for ids_L, real_L, mask_L in zip(batch.token_ids_BL, batch.attention_mask_BL, batch.loss_mask_BL, strict=True):
        ids_1L = ids_L[real_L][None].to(network.device)
        hidden_LD = network.base_model(input_ids=ids_1L, use_cache=False).last_hidden_state[0]
        found.append(hidden_LD[mask_L[real_L].nonzero()[:, 0].to(hidden_LD.device) - 1])
    return torch.cat(found)


def _shapley(k3: Mapping[frozenset[str], float], parts: Sequence[str]) -> dict[str, float]:
    """Each component's mean over all orders in which they could be added: the shares sum to k3 of all."""
    share = dict.fromkeys(parts, 0.0)
    for part in parts:
        rest = [p for p in parts if p != part]
        for count in range(len(parts)):
            weight = math.factorial(count) * math.factorial(len(parts) - count - 1) / math.factorial(len(parts))
            for chosen in combinations(rest, count):
                share[part] += weight * (k3[frozenset({*chosen, part})] - k3.get(frozenset(chosen), 0.0))
    return share


class _Head:
    """The network's own lm_head, called as a module: whatever replaces its product shows."""

    def __init__(self, network: PreTrainedModel, temperature: float) -> None:
        self.module, self.temperature = network.get_output_embeddings(), temperature
        self.transform = logit_check.transform_of(network)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        return self.module(self.transform.hidden(hidden_ND))

    def quantised(self, format: str) -> Callable[[Tensor], Tensor]:
        """Logits of a head whose weight and input were in this format."""
        weight_VD = FORMATS[format].weights(self.module.weight.detach(), None)

        def logits(hidden_ND: Tensor) -> Tensor:
            given_ND = FORMATS[format].activations(self.transform.hidden(hidden_ND))
            return torch.nn.functional.linear(given_ND, weight_VD, self.module.bias)

        return logits

    def proved(self, weight_VD: Tensor, hidden_ND: Tensor) -> Multiplied:
        """Its products against float64 ones with the weight from before. Raises RuntimeError where they are not plain ones."""
        given_ND = self.transform.hidden(hidden_ND)
        found = multiplied.of_logits(self.module(given_ND), given_ND, weight_VD, self.module.bias)
        if found.dtype != "float32":
            raise RuntimeError(
                f"the quantised model's head is not plain: {multiplied.said(found.as_dict())}, where float32 products were "
                "expected. Leave lm_head out of the quantisation (ignore it in the recipe)"
            )
        return found

    def compared(
        self, plain_ND: Tensor, other_ND: Tensor, logits: Callable[[Tensor], Tensor] | None = None
    ) -> Divergence:
        """Expectations under the policy of `other_ND`, in float64. logits: of that side, where its head is another."""
        step = max(1, LOGIT_ELEMENTS // self.module.out_features)
        sums, count = dict.fromkeys(("k3", "chi2", "moved"), 0.0), len(plain_ND)
        first, second, left = (dict.fromkeys(PRESETS, 0.0) for _ in range(3))
        for plain, other in zip(plain_ND.split(step), other_ND.split(step), strict=True):
            old_NV = self._logprobs(self.logits(plain))
            rollout_NV = self._logprobs((logits or self.logits)(other))
            d_NV, p_NV = old_NV - rollout_NV, rollout_NV.exp()
            sums["k3"] += float((p_NV * (d_NV.expm1() - d_NV)).sum())
            sums["chi2"] += float((p_NV * d_NV.expm1().square()).sum())
            sums["moved"] += float((p_NV * d_NV.expm1().abs()).sum()) / 2
            for name, preset in PRESETS.items():
                correction = preset(old_NV, rollout_NV, torch.ones_like(old_NV, dtype=torch.bool))
                w_NV = correction.weights * correction.keep
                first[name] += float((p_NV * w_NV).sum())
                second[name] += float((p_NV * w_NV.square()).sum())
                left[name] += float((p_NV * (d_NV.exp() - w_NV).abs()).sum())
        means = {name: total / count for name, total in sums.items()}
        if not all(map(math.isfinite, means.values())):
            raise RuntimeError(f"logits of a quantised body are not finite: {means} over {count} positions")
        return Divergence(
            **means,
            uncorrected={name: total / count for name, total in left.items()},
            ess={name: first[name] ** 2 / second[name] / count for name in PRESETS},
        )

    def _logprobs(self, logits_NV: Tensor) -> Tensor:
        return (self.transform.apply(logits_NV.double()) / self.temperature).log_softmax(-1)


def text(found: Budget, *, shown: int = 5) -> str:
    """The table on the console; shown: layers, the worst ones."""
    kv = f", KV cache {found.kv}" if found.kv else ""
    lines = [
        f"{found.model}, body {found.format} ({FORMATS[found.format].about}){kv}; {found.tokens} positions, temperature "
        f"{found.temperature:g}",
        f"{'quantised':14} {'k3':>9} {'share':>7} {'chi2':>9} {'moved':>9}",
    ]
    whole = found.together.k3
    for name, divergence in (*found.alone.items(), ("together", found.together)):
        share = f"{found.share[name] / whole:7.0%}" if name in found.share else f"{1:7.0%}"
        lines.append(f"{name:14} {divergence.k3:9.2e} {share} {divergence.chi2:9.2e} {divergence.moved:9.2e}")
    lines += [
        f"{'body rounding':14} {found.rounding_k3:9.2e}",
        f"lm_head: plain, {multiplied.said(found.head.as_dict())}; quantised it alone would add k3 {found.quantised_head:.2e}",
    ]
    sums = {at: sum(layer.values()) for at, layer in enumerate(found.layers)}
    for at in sorted(sums, key=lambda at: -sums[at])[:shown]:
        parts = ", ".join(f"{part} {k3:.1e}" for part, k3 in found.layers[at].items())
        lines.append(f"layer {at:3}: k3 {sums[at]:.2e} ({parts})")
    preset, why = found.advice
    lines.append(f"correction={preset}: {why}" if preset else f"no correction needed: {why}")
    return "\n".join(lines)
