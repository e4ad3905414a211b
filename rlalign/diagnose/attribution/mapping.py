"""Which module of the rollout engine and which of the trainer compute the same thing.

The built-in pairs cover pre-norm decoders (Llama, Mistral, Qwen2, Qwen3 and their mixtures of experts) in both libraries. Another
architecture brings its own pairs in a YAML file of the same shape; docs/attribution.md shows one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rlalign.rollout.worker.recording import Tap

EMBED, FINAL_NORM, LOGITS = "embed", "final_norm", "logits"
RESIDUAL, ROUTER = "residual", "router"
# One point of a layer: "MODULE [input|output|attention] [INDEX] [part N]" on each side, below the layer's own module; "." is the
# layer itself and "+" its successor (the next layer's first norm, or the model's last norm), which adds the residual in vLLM.
LAYER_PAIRS = {
    "input_norm": ("input_layernorm", "input_layernorm"),
    "q": ("self_attn.qkv_proj part 0", "self_attn.q_proj"),
    "k": ("self_attn.qkv_proj part 1", "self_attn.k_proj"),
    "v": ("self_attn.qkv_proj part 2", "self_attn.v_proj"),
    "q_norm": ("self_attn.q_norm", "self_attn.q_norm"),
    "k_norm": ("self_attn.k_norm", "self_attn.k_norm"),
    "q_rope": ("self_attn.attn input 0", "self_attn attention 0"),
    "k_rope": ("self_attn.attn input 1", "self_attn attention 1"),
    "attention": ("self_attn.o_proj input", "self_attn.o_proj input"),
    "attn_out": ("self_attn.o_proj", "self_attn.o_proj"),
    "mid_residual": ("post_attention_layernorm output 1", "post_attention_layernorm input"),
    "mlp_norm": ("post_attention_layernorm", "post_attention_layernorm"),
    "router": ("mlp.gate", "mlp.gate"),
    "gate": ("mlp.gate_up_proj part 0", "mlp.gate_proj"),
    "up": ("mlp.gate_up_proj part 1", "mlp.up_proj"),
    "activation": ("mlp.down_proj input", "mlp.down_proj input"),
    "mlp_out": ("mlp", "mlp"),
    "residual": ("+ output 1", "."),
}
OPTIONAL = {
    "q_norm",
    "k_norm",
    "router",
    "gate",
    "up",
    "activation",
}  # not in every architecture, and in none by halves
MODEL_PAIRS = {EMBED: ("model.embed_tokens", "model.embed_tokens"), FINAL_NORM: ("model.norm", "model.norm")}
LAYERS = ("model.layers", "model.layers")
FIRST_NORM = "input_layernorm"  # of the next layer, in the rollout engine
# What each kind of point hangs on: a layer of another shape (norms after attention, parallel blocks) must not be mistaken for ours.
EXPECTED_CHILDREN = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ALIASES = {"block_sparse_moe": "mlp"}  # vLLM's Mixtral


@dataclass(frozen=True, slots=True)
class Pair:
    """One matching point. layer: its number, or None; replace: a patch may put the rollout's value in the trainer's place."""

    point: str
    kind: str
    layer: int | None
    rollout: Tap
    trainer: Tap
    replace: bool = True


@dataclass(frozen=True, slots=True)
class ModelMap:
    """All matching points of a model, in the order in which they are computed. Logits are matched by both sides themselves.

    tuples: the trainer's layers answer with a tuple.
    """

    pairs: tuple[Pair, ...]
    layers: int
    trainer_layers: str = LAYERS[1]
    tuples: bool = False

    @property
    def rollout_taps(self) -> list[Tap]:
        return [pair.rollout for pair in self.pairs]

    def points(self) -> list[str]:
        return [*(pair.point for pair in self.pairs), LOGITS]

    def pair(self, point: str) -> Pair:
        return next(pair for pair in self.pairs if pair.point == point)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """What a mapping says, before it is looked up in two models. layer_children: what every layer consists of; empty: unchecked."""

    layers: tuple[str, str] = LAYERS
    model: Mapping[str, tuple[str, str]]
    layer: Mapping[str, tuple[str, str]]
    optional: Collection[str] = ()
    first_norm: str = FIRST_NORM
    layer_children: Collection[str] = ()


BUILT_IN = Pairs(model=MODEL_PAIRS, layer=LAYER_PAIRS, optional=OPTIONAL, layer_children=EXPECTED_CHILDREN)


def read_pairs(path: Path) -> Pairs:
    """The mapping of a YAML file. Raises ValueError naming what is wrong in it."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"mapping {path}: {error}") from error
    keys = {"layers", "model", "layer", "optional", "first_norm"}
    if not isinstance(data, dict) or not {"layers", "model", "layer"} <= set(data) <= keys:
        raise ValueError(
            f"mapping {path}: expected the keys layers, model, layer (and optional, first_norm); see docs/attribution.md"
        )
    if missing := {EMBED, FINAL_NORM} - set(data["model"]):
        raise ValueError(f"mapping {path}: model: lacks {sorted(missing)}")
    if RESIDUAL not in data["layer"]:
        raise ValueError(f"mapping {path}: layer: lacks {RESIDUAL!r}, the output of a block that patching replaces")
    return Pairs(
        layers=_two(data["layers"], path, "layers"),
        model={point: _two(value, path, point) for point, value in data["model"].items()},
        layer={point: _two(value, path, point) for point, value in data["layer"].items()},
        optional=data.get("optional", ()),
        first_norm=data.get("first_norm", FIRST_NORM),
    )


def match(rollout: Mapping[str, str], trainer: Mapping[str, str], pairs: Pairs = BUILT_IN) -> ModelMap:
    """Look the pairs up in two module trees ({name: class}).

    Raises ValueError listing what was looked for and not found, or when the sides have different numbers of layers.
    """
    counts = [_count(names, prefix) for names, prefix in zip((rollout, trainer), pairs.layers, strict=True)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"mismatched checkpoints: {counts[0]} layers in the rollout engine ({pairs.layers[0]}), {counts[1]} in the trainer "
            f"({pairs.layers[1]})"
        )
    problems: list[str] = [] if counts[0] else [f"no layers under {pairs.layers[0]!r} and {pairs.layers[1]!r}"]
    found = [_pair(EMBED, EMBED, None, pairs.model[EMBED], rollout, trainer, problems)]
    for layer in range(counts[0]):
        found += _layer(pairs, layer, counts[0], rollout, trainer, problems)
    others = [point for point in pairs.model if point not in (EMBED, FINAL_NORM)]
    found += [_pair(p, p, None, pairs.model[p], rollout, trainer, problems) for p in (*others, FINAL_NORM)]
    if problems:
        raise ValueError(_unknown(rollout, trainer, problems))
    return ModelMap(tuple(p for p in found if p is not None), counts[0], pairs.layers[1])


def _layer(
    pairs: Pairs, layer: int, layers: int, rollout: Mapping[str, str], trainer: Mapping[str, str], problems: list[str]
) -> list[Pair | None]:
    before = [f"{prefix}.{layer}" for prefix in pairs.layers]
    for names, prefix, side in zip((rollout, trainer), before, ("rollout engine", "trainer"), strict=True):
        children = {ALIASES.get(name, name) for name in _children(names, prefix)}
        if pairs.layer_children and children != set(pairs.layer_children):
            problems.append(f"{side}: {prefix} consists of {sorted(children)}, expected {sorted(pairs.layer_children)}")
    after = f"{pairs.layers[0]}.{layer + 1}.{pairs.first_norm}"
    successor = after if layer + 1 < layers else pairs.model[FINAL_NORM][0].split()[0]
    found = []
    for kind, (on_rollout, on_trainer) in pairs.layer.items():
        sides = (_under(on_rollout, before[0], successor, rollout), _under(on_trainer, before[1], "", trainer))
        quiet = kind in pairs.optional
        pair = _pair(f"layers.{layer}.{kind}", kind, layer, sides, rollout, trainer, [] if quiet else problems)
        found.append(pair and replace(pair, replace=kind != ROUTER))
    return found


def _under(text: str, prefix: str, successor: str, names: Mapping[str, str]) -> str:
    module, *rest = text.split()
    if module == "+":
        return " ".join([successor, *rest])
    full = prefix if module == "." else f"{prefix}.{module}"
    if full not in names:
        head, _, leaf = module.partition(".")
        for alias in (a for a, name in ALIASES.items() if name == head):
            full = f"{prefix}.{alias}.{leaf}".rstrip(".") if f"{prefix}.{alias}" in names else full
    return " ".join([full, *rest])


def _pair(
    point: str,
    kind: str,
    layer: int | None,
    sides: tuple[str, str],
    rollout: Mapping[str, str],
    trainer: Mapping[str, str],
    problems: list[str],
) -> Pair | None:
    taps = [parse(point, text) for text in sides]
    missing = [
        f"{side}: {tap.module} (for {point})"
        for tap, names, side in zip(taps, (rollout, trainer), ("rollout engine", "trainer"), strict=True)
        if tap.module not in names
    ]
    problems += missing
    return None if missing else Pair(point, kind, layer, *taps)


def parse(point: str, text: str) -> Tap:
    """A tap from "MODULE [input|output|attention] [INDEX] [part N]". Raises ValueError for anything else."""
    module, *words = text.split()
    side = words.pop(0) if words and words[0] in ("input", "output", "attention") else "output"
    index = int(words.pop(0)) if words and words[0].isdigit() else 0
    part = None
    if len(words) == 2 and words[0] == "part" and words[1].isdigit():
        part, words = int(words[1]), []
    if words:
        raise ValueError(
            f"mapping: {point}: cannot read {text!r}; expected MODULE [input|output|attention] [INDEX] [part N]"
        )
    return Tap(point, module, side, index, part)


def _two(value: object, path: Path, where: str) -> tuple[str, str]:
    if isinstance(value, str):
        return value, value
    if (
        isinstance(value, dict)
        and set(value) == {"rollout", "trainer"}
        and all(isinstance(v, str) for v in value.values())
    ):
        return value["rollout"], value["trainer"]
    raise ValueError(
        f"mapping {path}: {where}: expected a module or {{rollout: MODULE, trainer: MODULE}}, got {value!r}"
    )


def _children(names: Mapping[str, str], prefix: str) -> set[str]:
    return {name[len(prefix) + 1 :].split(".")[0] for name in names if name.startswith(f"{prefix}.")}


def _count(names: Mapping[str, str], prefix: str) -> int:
    return sum(child.isdigit() for child in _children(names, prefix))


def _unknown(rollout: Mapping[str, str], trainer: Mapping[str, str], problems: list[str]) -> str:
    shown = [f"  {line}" for line in problems[:12]]
    more = [f"  and {len(problems) - 12} more"] if len(problems) > 12 else []
    tops = [
        f"{side}: {names.get('', '?')} with {_outline(names)}"
        for side, names in (("rollout", rollout), ("trainer", trainer))
    ]
    return "\n".join(
        [
            "attribution does not know this architecture. Looked for and did not find:",
            *shown,
            *more,
            "The models consist of:",
        ]
        + [f"  {line}" for line in tops]
        + ["Pass the pairs of modules that compute the same thing: --mapping FILE.yaml (docs/attribution.md)."]
    )


def _outline(names: Mapping[str, str]) -> str:
    """Modules of a model as a reader wants them: layer 0 for all layers, two levels below it."""
    chosen = [n for n in names if n and not any(part.isdigit() and part != "0" for part in n.split("."))]
    return ", ".join(n for n in chosen if n.count(".") <= 4)[:900]
