"""Measure a grid: every pair of heads on the same tokens, then the matched pairs under every setting, each with its floor.

Both sides hold the checkpoint's weights, so there is no staleness. The head in isolation is measured beside the whole model,
since the body can hide the head. Suffixes: B sequences, L padded length, D hidden, V vocabulary.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from rlalign import mismatch
from rlalign.config import RunConfig
from rlalign.diagnose import body_rounding
from rlalign.diagnose.both_sides import (
    at_temperature,
    head_logprobs,
    head_weight,
    hidden_states,
    isolated_heads,
    lengthened,
    probed_body,
    task_prompts,
    trainer_network,
)
from rlalign.diagnose.parity.grid import COLUMNS, ERRORS, HEAD_OF_MODE, Grid, Setting, rollout_modes, stage_count
from rlalign.rollout.engine import noise_floor
from rlalign.run.assembly import load_tokenizer, resolve_model
from rlalign.tracking.console import Stages
from rlalign.trainer.checkpoint_names import as_checkpoint
from rlalign.trainer.rounding.mirroring import body_of
from rlalign.types import Rollout, RolloutBatch, collate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlalign.rollout.engine.embedded import VLLMEngine

# Any float this close (relative) to a bf16 number rounds to it, on either side of a power of two.
HALF_ULP = 2.0**-9


def unrounded(network: PreTrainedModel, model: Path) -> tuple[Tensor, str]:
    """[V, D] float32 that rounds to the network's bf16 lm_head bit for bit, and where it comes from.

    A float32 checkpoint holds the real one. A bf16 checkpoint has lost it: then every weight is moved at random within what
    rounding takes away, which is how far an optimizer's copy would be. Raises RuntimeError should it not round back.
    """
    weight_VD = head_weight(network).detach()
    master_VD, source = _saved(network, model), "the checkpoint's own float32 weight"
    if master_VD is None:
        generator = torch.Generator().manual_seed(0)
        share_VD = torch.rand(weight_VD.shape, generator=generator).to(weight_VD.device) * 2.0 - 1.0
        master_VD = weight_VD.float() * (1.0 + 0.98 * HALF_ULP * share_VD)
        source = "made up: bf16 weights moved within their rounding, as after optimizer steps"
    if not torch.equal(master_VD.to(weight_VD.dtype), weight_VD):
        raise RuntimeError(
            "parity: the float32 lm_head does not round to the network's weight; report the model's type"
        )
    return master_VD, source


def _saved(network: PreTrainedModel, model: Path) -> Tensor | None:
    """The lm_head as the folder stores it, where that is float32."""
    from safetensors import safe_open

    lm_head = head_weight(network)
    names = {name for name, p in network.named_parameters(remove_duplicate=False) if p is lm_head}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in names & set(opened.keys()):
                tensor = opened.get_tensor(name)
                return tensor.to(lm_head.device) if tensor.dtype == torch.float32 else None
    return None


ISOLATED_TOKENS = 256
LONG_PROMPTS = 4


def measure(config: RunConfig, grid: Grid, *, prompt_file: Path | None = None) -> dict:
    """Fill the grid on the configured model. JSON-able, in nats.

    Keys: model, identity (see `baseline`), tokens, rows (every pair of heads), head_isolated, settings (matched pairs), and
    noise_floor where asked for. Raises ValueError for prompts or a context that the model cannot take.
    """
    from rlalign.diagnose.parity.baseline import identity

    model = resolve_model(config.model.path, say=_aside)
    result = {"model": config.model.path, "identity": identity(model), "tokens": {}, "rows": [], "head_isolated": []}
    result |= {"settings": [], "notes": []} | ({"noise_floor": {}} if grid.noise_floor else {})
    tokenizer = load_tokenizer(model)
    prompts = task_prompts(tokenizer, config, count=grid.prompts, file=prompt_file)
    needed = max(grid.longest, *(len(p) for p in prompts)) + config.rollout.max_tokens + 1  # scoring samples one more
    _require_room(model, needed)
    plain = config.rollout.over_all_ids()
    if plain != config.rollout:
        result["notes"].append(
            "sampled and compared over the whole vocabulary: top_p, top_k, min_p and barred ids are left out"
        )
    room = replace(plain, temperature=1.0, max_model_len=max(config.rollout.max_model_len, needed))
    with Stages("parity", stage_count(config.exact, grid)) as stages:
        for size, body in product(grid.tensor_parallel, grid.bodies):
            sized = replace(config, rollout=replace(room, tensor_parallel_size=size))
            _one_engine(model, sized, grid, body, prompts, cast("int", tokenizer.pad_token_id), result, stages.stage)
    return result


def longest_context(model: Path, max_tokens: int, wanted: int) -> int:
    """`wanted` tokens of prompt, or as many as leave room for max_tokens."""
    return min(wanted, _positions(model) - max_tokens - 1)


def _aside(line: str) -> None:
    print(line, file=sys.stderr)  # standard output is the table


def _positions(model: Path) -> int:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).get_text_config().max_position_embeddings


def _require_room(model: Path, needed: int) -> None:
    if needed > _positions(model):
        raise ValueError(
            f"parity: {needed} tokens of prompt and completion are more than the {_positions(model)} positions of {model}; "
            "choose a shorter --context, shorter prompts or a smaller rollout.max_tokens"
        )


def _one_engine(
    model: Path,
    config: RunConfig,
    grid: Grid,
    body: str,
    prompts: list[list[int]],
    pad: int,
    result: dict,
    say: Callable[[str], None],
) -> None:
    from rlalign.rollout.engine.embedded import VLLMEngine

    kinds = {"dtype": body, "head_dtype": "float32", "seed": config.seed, "exact": config.exact}
    mirrored = config.mirrored and body == config.model.dtype.value
    say(f"{body} body: starting vLLM")
    engine = VLLMEngine(model, config.rollout, steady=mirrored, **kinds)
    try:
        say(f"{body} body: loading the trainer's model")
        settled = probed_body(engine, model, config, prompts) if mirrored else None
        plan = None if settled is None else settled.plan
        network = trainer_network(model, body, exact=config.exact, mirrored=plan)
        if settled is not None:
            rounded = body_of(network)
            result["notes"] += [*([] if rounded is None else rounded.describe()), *settled.describe()]
            result["body"] = settled.as_dict()
        sides = _Sides(engine, network, config, grid, body, prompts, pad, say)
        sides.prepare_master(model, result)
        sides.every_pair(result)
        for setting in grid.settings:
            sides.matched_pairs(setting, result)
        first_size = config.rollout.tensor_parallel_size == grid.tensor_parallel[0]
        if "noise_floor" in result and first_size:
            say(f"{body} body: noise floor, source by source")
            engine.set_head(engine.mode)
            batch = sides.tokens_of(Setting(), engine.mode)
            of_engine = noise_floor.measure(engine, model, config, batch, body=body)
            of_trainer = body_rounding.trainer_floor(sides.score_again, batch)
            result["noise_floor"][body] = body_rounding.with_trainer_floor(of_engine, of_trainer)
    finally:
        engine.close()
        gc.collect()  # two engines follow each other in one process


@dataclass
class _Sides:
    """One engine and one network over the same weights, and the tokens both are asked about."""

    engine: VLLMEngine
    network: PreTrainedModel
    config: RunConfig
    grid: Grid
    body: str
    prompts: list[list[int]]
    pad: int
    say: Callable[[str], None]
    master_VD: Tensor | None = None

    @cached_property
    def modes(self) -> tuple[str, ...]:
        return rollout_modes(self.config.exact, self.grid, self.body, self.engine.mode)

    def prepare_master(self, model: Path, result: dict) -> None:
        """Publish the weights once more with an unrounded lm_head, where that mode is measured."""
        from rlalign.weights import MASTER_WEIGHT, publish

        if "master" not in self.modes:
            return
        self.master_VD, source = unrounded(self.network, model)
        result["notes"] = [*result["notes"], f"master head: {source}"]
        weights = [*as_checkpoint(self.network, self.network.named_parameters()), (MASTER_WEIGHT, self.master_VD)]
        publish(weights, 0, receiver=self.engine, shared=Path(self.config.weights.shared))

    def every_pair(self, result: dict) -> None:
        """Each rollout head against each trainer head, teacher-forced at temperature 1."""
        self.say(f"{self.body} body: sampling from {len(self.prompts)} prompts")
        batch = self.tokens_of(Setting(), self.engine.mode)
        result["tokens"][self.body] = int(batch.loss_mask_BL.sum())
        hidden_BLD = self._hidden(batch)
        trainer_heads = tuple(dict.fromkeys(HEAD_OF_MODE[m] for m in self.modes))
        for mode in self.modes:
            self.say(f"{self.body} body: rollout head {mode} against every trainer head")
            self.engine.set_head(mode)
            rollout_BL = noise_floor.scores(self.engine, batch)
            floor = noise_floor.of_scoring(self.engine, batch, rollout_BL)
            for head in trainer_heads:
                trainer_BL = self._trainer(hidden_BLD, batch, head, temperature=1.0)
                row = self._row(Setting(), mode, head)
                rounding = self._rounding(batch, head, trainer_BL, rollout_BL)
                result["rows"].append(row | _measured(trainer_BL, rollout_BL, batch) | floor | rounding)
                result["head_isolated"].append(row | self._isolated(hidden_BLD, batch, head))

    def matched_pairs(self, setting: Setting, result: dict) -> None:
        """Each rollout head against the trainer's same head, asked in this way."""
        for mode in self.modes:
            asked = f"{setting.path}, temperature {setting.temperature:g}, batch {setting.batch or 'all'}"
            self.say(f"{self.body} body: {asked}, head {mode} on both")
            self.engine.set_head(mode)
            head = HEAD_OF_MODE[mode]
            with at_temperature(self.engine, setting.temperature):
                batch = self.tokens_of(setting, mode)
                if setting.path == "decode":
                    rollout_BL = batch.rollout_logprobs_BL
                    floor = self._floor_of_decoding(setting, batch)
                else:
                    rollout_BL = noise_floor.scores(self.engine, batch, at_once=setting.batch)
                    floor = noise_floor.of_scoring(self.engine, batch, rollout_BL)
            trainer_BL = self._trainer(self._hidden(batch), batch, head, temperature=setting.temperature)
            row = self._row(setting, mode, head)
            rounding = self._rounding(batch, head, trainer_BL, rollout_BL, temperature=setting.temperature)
            result["settings"].append(row | _measured(trainer_BL, rollout_BL, batch) | floor | rounding)

    def tokens_of(self, setting: Setting, mode: str) -> RolloutBatch:
        """What is compared under a setting: for teacher forcing the same tokens under every head, else sampled by each."""
        self.engine.set_head(self.engine.mode if setting.path == "prefill" else mode)
        rollouts = self._sampled(self._prompts_of(setting), 0 if setting.path == "prefill" else setting.batch)
        self.engine.set_head(mode)
        return collate(rollouts, pad_token_id=self.pad, spec=self.engine.spec)

    def _prompts_of(self, setting: Setting) -> list[list[int]]:
        return lengthened(self.prompts, setting.context, count=LONG_PROMPTS) if setting.context else self.prompts

    def _sampled(self, prompts: Sequence[list[int]], at_once: int) -> list[Rollout]:
        seed = self.config.seed
        if not at_once:
            samples = self.config.rollout.group_size
            return self.engine.generate(prompts, prompt_ids=range(len(prompts)), samples=samples, seed=seed)
        return [
            rollout
            for start in range(0, len(prompts), at_once)
            for rollout in self.engine.generate(
                prompts[start : start + at_once],
                prompt_ids=range(start, min(start + at_once, len(prompts))),
                samples=1,
                seed=seed + start,
            )
        ]

    def _floor_of_decoding(self, setting: Setting, batch: RolloutBatch) -> dict[str, float]:
        """Against its own teacher forcing; at temperatures where vLLM has none, against decoding half of the prompts."""
        if setting.temperature == 1.0:
            return noise_floor.of_difference(noise_floor.scores(self.engine, batch), batch.rollout_logprobs_BL, batch)
        half = self._sampled(self.prompts[: max(1, len(self.prompts) // 2)], 0)
        again = collate(half, pad_token_id=self.pad, spec=self.engine.spec)
        return noise_floor.of_repeated_sampling(again, batch)

    def score_again(self, batch: RolloutBatch, *, rows: int = 0, chunk: int = 0, exact: bool = True) -> Tensor:
        """The trainer's logprobs with the float32 head, gone through in another way; see `trainer_floor.measure`."""
        hidden_BLD = hidden_states(self.network, batch, rows=rows)
        options = {"temperature": 1.0, "chunk": chunk, "exact": exact}
        return head_logprobs(self.network, hidden_BLD, batch, "float32", **options)

    def _hidden(self, batch: RolloutBatch) -> Tensor:
        return hidden_states(self.network, batch, rows=self.config.trainer.micro_batch_size)

    def _trainer(self, hidden_BLD: Tensor, batch: RolloutBatch, head: str, *, temperature: float) -> Tensor:
        return head_logprobs(self.network, hidden_BLD, batch, head, temperature=temperature, master_VD=self.master_VD)

    def _rounding(
        self, batch: RolloutBatch, head: str, trainer_BL: Tensor, rollout_BL: Tensor, *, temperature: float = 1.0
    ) -> dict[str, float]:
        """What rounding explains of this row; in exact mode nothing is explained by it."""
        if self.config.exact:
            return {}
        return body_rounding.measure(
            self.network,
            batch,
            trainer_BL,
            rollout_BL,
            lambda few: self._trainer(self._hidden(few), few, head, temperature=temperature),
        )

    def _row(self, setting: Setting, mode: str, trainer_head: str) -> dict:
        return {
            "body_dtype": self.body,
            "tensor_parallel": self.config.rollout.tensor_parallel_size,
            "path": setting.path,
            "temperature": setting.temperature,
            "batch": setting.batch,
            "context": setting.context,
            "rollout_head": HEAD_OF_MODE[mode],
            "mode": mode,
            "trainer_head": trainer_head,
        }

    def _isolated(self, hidden_BLD: Tensor, batch: RolloutBatch, head: str) -> dict[str, float]:
        measured = isolated_heads(
            self.engine, self.network, hidden_BLD, batch, tokens=ISOLATED_TOKENS, shared=Path(self.config.weights.shared),
            master_VD=self.master_VD if head == "master" else None,
        )  # fmt: skip
        return _columns(measured) | {error: measured[error] for error in ERRORS}


def _measured(trainer_BL: Tensor, rollout_BL: Tensor, batch: RolloutBatch) -> dict[str, float]:
    measured = mismatch.compare(trainer_BL, rollout_BL, batch.loss_mask_BL, positions=False)
    return _columns(measured) | {"tokens": int(torch.count_nonzero(batch.loss_mask_BL))}


def _columns(measured: dict[str, float]) -> dict[str, float]:
    return {name: measured[key] + 0.0 for name, key in COLUMNS.items()}  # + 0.0: no minus sign before a zero
