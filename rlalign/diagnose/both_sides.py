"""Both engines on the same tokens, outside a run: what parity, doctor, attribution and suspects share.

Suffixes: B sequences, L padded length, D hidden, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rlalign.config import RunConfig
from rlalign.head import widened
from rlalign.logprobs.truncation import Truncation
from rlalign.loops.mirrors import Settled, recorded
from rlalign.run.assembly import PROOF_PROMPTS, encode, fitted_task, load_task_of, resolve_model, settle_body
from rlalign.tasks.rows import cell, jsonl_rows
from rlalign.trainer import head_isolation
from rlalign.trainer.checkpoint_names import as_checkpoint
from rlalign.types import Rollout, RolloutBatch, collate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlalign.rollout.attached import AttachedEngine
    from rlalign.rollout.engine.embedded import VLLMEngine
    from rlalign.trainer.rounding.mirroring import BodyPlan

LOGITS = 2**25  # at a time, where a head builds them: 128 MiB in float32, of which a softmax makes several copies


def model_folder(config: RunConfig) -> Path:
    """Of the configured model; one of the demo's is built in silence where it is not there yet."""
    return resolve_model(config.model.path, say=lambda _: None)


def task_prompts(
    tokenizer: PreTrainedTokenizerBase, config: RunConfig, *, count: int, file: Path | None = None
) -> list[list[int]]:
    """Token ids of the first prompts of the user's file, or of the task; with task.unusable_prompts=drop of those that fit."""
    if file is not None:
        return read_prompts(file, tokenizer, chat=config.task.chat_template, limit=count)
    task = load_task_of(config)
    if config.task.unusable_prompts == "drop":
        task = fitted_task(config, model_folder(config), tokenizer)
    chosen = task.train_prompts(0, min(count, len(task.train)))
    return [encode(tokenizer, p.text, chat=config.task.chat_template) for p in chosen]


def sample(
    engine: VLLMEngine, tokenizer: PreTrainedTokenizerBase, config: RunConfig, *, prompts: int, samples: int
) -> tuple[RolloutBatch, list[Rollout]]:
    """Completions of the task's first training prompts, through the live engine."""
    ids = task_prompts(tokenizer, config, count=prompts)
    rollouts = engine.generate(ids, prompt_ids=range(len(ids)), samples=samples, seed=config.seed)
    return collate(rollouts, pad_token_id=cast("int", tokenizer.pad_token_id), spec=engine.spec), rollouts


@contextmanager
def at_temperature(engine: VLLMEngine, temperature: float) -> Iterator[None]:
    """Let a live engine sample at another temperature, and say so in its spec."""
    config, spec = engine.config, engine.spec
    engine.config = replace(config, temperature=temperature)
    engine.spec = replace(spec, temperature=temperature)
    try:
        yield
    finally:
        engine.config, engine.spec = config, spec


def probed_body(engine: VLLMEngine, model: Path, config: RunConfig, prompts: Sequence[Sequence[int]]) -> Settled:
    """What the live engine's ops were found to round like, while it sampled a few of these prompts."""
    few = list(prompts[:PROOF_PROMPTS])
    settled, _ = recorded(
        engine,
        lambda: engine.generate(few, prompt_ids=range(len(few)), samples=2, seed=config.seed),
        Path(config.weights.shared),
        lambda answer: settle_body(model, config, answer),
    )
    return settled


def trainer_network(
    model: Path, body: str, *, exact: bool = False, mirrored: BodyPlan | None = None
) -> PreTrainedModel:
    """The transformers model in evaluation mode, with a body of this dtype, where a trainer has it.

    exact: see `make_exact`. mirrored: where it rounds instead (`mirror_body`).
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from rlalign.trainer import attention_choice
    from rlalign.trainer.exact_network import make_exact

    disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = attention_choice.of_folder(model).name
    network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, body), attn_implementation=kind)
    nn.Module.to(network.eval(), device)
    if exact:
        return make_exact(network)
    widened.decide_for(network)
    if mirrored is not None:
        from rlalign.trainer.rounding.mirroring import mirror_body

        mirror_body(network, mirrored.choices, kernels=mirrored.kernels)
    return network


def ask_about_weights(
    engine: VLLMEngine, network: nn.Module, question: str, folder: Path | None
) -> list[dict[str, Any]]:
    """Every rank's answer to a question about the trainer's weights, which lie in one file below `folder` meanwhile."""
    with tempfile.TemporaryDirectory(prefix="rlalign-weights-", dir=folder) as temporary:
        file, named = Path(temporary) / "trainer.safetensors", as_checkpoint(network, network.named_parameters())
        save_file({name: parameter.detach().cpu().contiguous() for name, parameter in named}, file)
        return engine.ask(question, str(file))


def isolated_heads(
    engine: VLLMEngine | AttachedEngine,
    network: nn.Module,
    hidden_BLD: Tensor,
    batch: RolloutBatch,
    *,
    tokens: int,
    shared: Path,
    master_VD: Tensor | None = None,
) -> dict[str, float]:
    """What `head_isolation.measure` gives of both live heads, on hidden states of at most so many scored tokens."""
    hidden, ids = head_isolation.predicting(hidden_BLD, batch.token_ids_BL, batch.loss_mask_BL, limit=tokens)
    return head_isolation.measure(engine, network, hidden, ids, temperature=1.0, shared=shared, master_VD=master_VD)


def head_weight(network: PreTrainedModel) -> Tensor:
    """[V, D], the network's own."""
    return cast("Tensor", lm_head_of(network).weight)


def lm_head_of(network: PreTrainedModel) -> nn.Module:
    """The network's lm_head. Raises ValueError where it has none."""
    found = network.get_output_embeddings()
    if found is None:
        raise ValueError(f"{type(network).__name__} has no lm_head: expected a causal language model")
    return found


@torch.no_grad()
def hidden_states(network: PreTrainedModel, batch: RolloutBatch, *, rows: int = 0) -> Tensor:
    """[B, L, D] in the body's dtype: what the lm_head is given. rows: sequences in one forward, 0 for all."""
    device, found = network.device, []
    for start in range(0, len(batch), rows or len(batch)):
        part = batch.rows(slice(start, start + (rows or len(batch))))
        body = network.base_model(
            input_ids=part.token_ids_BL.to(device), attention_mask=part.attention_mask_BL.to(device), use_cache=False
        )
        found.append(body.last_hidden_state)
    return torch.cat(found)


@torch.no_grad()
def head_logprobs(
    network: PreTrainedModel,
    hidden_BLD: Tensor,
    batch: RolloutBatch,
    head_dtype: str,
    *,
    temperature: float,
    master_VD: Tensor | None = None,
    chunk: int = 0,
    exact: bool = True,
) -> Tensor:
    """[B, L] float32 on CPU: the trainer's logprobs of the sampled tokens from given hidden states, with this head.

    head_dtype: "model", "float32" or "master", which needs master_VD. The head stays mirrored like this afterwards.
    chunk: as in `mirror`. exact: as old_logprobs are computed; otherwise as in the pass with a gradient. The model's own head
    builds logits, of as many sequences at a time as fit LOGITS of them.
    """
    from rlalign.trainer.head_mirror import Tokens, mirror

    mirror(network, head_dtype=head_dtype, chunk=chunk).master_VD = master_VD if head_dtype == "master" else None
    device = hidden_BLD.device
    cut = Truncation.of(batch.spec) if batch.spec.truncated else None
    lm_head = lm_head_of(network)
    length, vocabulary = batch.token_ids_BL.shape[1], head_weight(network).shape[0]
    at_once = max(1, LOGITS // (length * vocabulary)) if head_dtype == "model" else len(batch)
    found = []
    for start in range(0, len(batch), at_once):
        part = batch.rows(slice(start, start + at_once))
        ids_BL, mask_BL = part.token_ids_BL.to(device), part.loss_mask_BL.to(device)
        tokens = Tokens(ids_BL, mask_BL, temperature, part.kept if cut else None, cut, batch.spec.vocab_size)
        found.append(lm_head(hidden_BLD[start : start + at_once], tokens, exact=exact)[0].cpu())
    return torch.cat(found)


@contextmanager
def head_put_back(network: PreTrainedModel) -> Iterator[None]:
    """Whatever head is tried meanwhile, afterwards the network has the one it had: a trainer goes on with it."""
    lm_head = lm_head_of(network)
    before = lm_head.__dict__.get("forward")
    try:
        yield
    finally:
        lm_head.__dict__.pop("forward", None)
        if before is not None:
            lm_head.forward = before


def trainer_scores(
    network: PreTrainedModel,
    batch: RolloutBatch,
    head_dtype: str,
    *,
    temperature: float,
    master_VD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Logprobs [B, L] and hidden states [B, L, D] of the trainer's side, with this head."""
    hidden_BLD = hidden_states(network, batch)
    scores_BL = head_logprobs(network, hidden_BLD, batch, head_dtype, temperature=temperature, master_VD=master_VD)
    return scores_BL, hidden_BLD


def lengthened(prompts: Sequence[Sequence[int]], length: int, *, count: int) -> list[list[int]]:
    """`count` prompts of exactly `length` tokens: the given ones strung together, each starting at another of them."""
    found = []
    for first in range(min(count, len(prompts))):
        tokens: list[int] = []
        at = first
        while len(tokens) < length:
            tokens += prompts[at % len(prompts)]
            at += 1
        found.append(tokens[:length])
    return found


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase, *, chat: bool, limit: int) -> list[list[int]]:
    """Token ids of the first `limit` prompts. Raises ValueError naming file and line for what cannot be used."""
    if path.suffix != ".jsonl":
        if not path.is_file():
            raise ValueError(f"prompt file {path} does not exist")
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = [encode(tokenizer, line, chat=chat) for line in lines[:limit]]
    else:
        found = []
        for where, row in jsonl_rows(path):
            if len(found) == limit:
                break
            if "token_ids" in row:
                found.append(_prompt_ids(row["token_ids"], where, len(tokenizer)))
            else:
                found.append(encode(tokenizer, cell(row, "prompt", where), chat=chat))
    if not found:
        raise ValueError(f"prompt file {path} holds no prompts")
    return found


def _prompt_ids(value: Any, where: str, vocabulary: int) -> list[int]:
    right = isinstance(value, list) and value and all(type(i) is int and 0 <= i < vocabulary for i in value)
    if not right:
        raise ValueError(f"{where}: token_ids must be a list of ids below {vocabulary}, got {str(value)[:60]}")
    return value
