"""A bench for planted faults: one engine in this process and one trainer's network over the same small model, in good order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from rlalign.config import RolloutConfig
from rlalign.diagnose.both_sides import trainer_network, trainer_scores
from rlalign.diagnose.suspects import Case
from rlalign.rollout.engine.embedded import VLLMEngine
from rlalign.run.assembly import load_tokenizer
from rlalign.tiny_policy.tokenizer import byte_tokenizer
from rlalign.types import RolloutBatch, collate
from rlalign.weights import publish

ROLLOUT = RolloutConfig(max_tokens=16, max_model_len=256, max_num_seqs=32, enforce_eager=True)
LAYERS, WIDTH = 4, 128


def build_model(folder: Path, *, seed: int = 0) -> Path:
    """A random Qwen3 of 4 layers with realistic logits, as a bf16 checkpoint."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(256)
    config = Qwen3Config(
        vocab_size=288, hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, tie_word_embeddings=False, initializer_range=0.08,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.lm_head.weight.data.mul_(2.0)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prompts() -> list[list[int]]:
    """Of different lengths, so that there is padding; two fill a block of the prefix cache (128 tokens on CPU)."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, 250, (n,), generator=generator).tolist() for n in (150, 9, 33, 140, 21, 48)]


@dataclass
class Bench:
    """An engine and a trainer's network with the same weights, in order."""

    folder: Path
    shared: Path
    body: str
    engine: VLLMEngine
    network: nn.Module
    undo: Callable[[], object] = lambda: None  # what a plant asks to be called afterwards

    @classmethod
    def build(cls, folder: Path, shared: Path, *, body: str, ranks: int = 1, cache: str = "auto") -> Bench:
        """cache: vLLM's kv_cache_dtype, which no configuration of ours can set."""
        import vllm

        rollout, plain = replace(ROLLOUT, tensor_parallel_size=ranks), vllm.LLM
        vllm.LLM = partial(plain, kv_cache_dtype=cache)
        try:
            engine = VLLMEngine(folder, rollout, dtype=body, head_dtype="float32", seed=0)
        finally:
            vllm.LLM = plain
        return cls(folder, shared, body, engine, trainer_network(folder, body))

    def sample(self) -> RolloutBatch:
        rollouts = self.engine.generate(prompts(), prompt_ids=range(6), samples=4, seed=1)
        return collate(rollouts, pad_token_id=0, spec=self.engine.spec)

    def sample_at(self, temperature: float) -> None:
        """From now on; the spec says so."""
        self.engine.config.temperature = temperature
        self.engine.spec = replace(self.engine.spec, temperature=temperature)

    def put_right(self) -> None:
        """Undo what the plant did, and forget keys and values from under it."""
        self.undo()
        self.engine.reset_prefix_cache()
        self.undo = lambda: None
        self.engine.config.top_p = 1.0
        self.sample_at(1.0)

    def score(self, batch: RolloutBatch, *, temperature: float = 1.0, head: str = "float32") -> Tensor:
        """As a trainer in good order does it."""
        return trainer_scores(self.network, batch, head, temperature=temperature)[0]

    def case(self, batch: RolloutBatch, score: Callable[[RolloutBatch], Tensor] | None = None) -> Case:
        tokenizer = load_tokenizer(self.folder)
        return Case(
            engine=self.engine, network=self.network, batch=batch, score=score or self.score, tokenizer=tokenizer,
            shared=self.shared,
        )  # fmt: skip

    def publish(self, weights: dict[str, Tensor], version: int = 1) -> None:
        publish(weights.items(), version, receiver=self.engine, shared=self.shared)

    def restore(self) -> None:
        """Both sides back to the checkpoint."""
        self.network = trainer_network(self.folder, self.body)
        self.publish(dict(self.network.named_parameters()), 0)

    def worker(self) -> object:
        """The engine's only worker."""
        return self.engine._llm.llm_engine.model_executor.driver_worker.worker

    def model(self) -> nn.Module:
        """The engine's own module tree."""
        return self.worker().get_model()

    def move(self, size: float = 0.05) -> dict[str, Tensor]:
        """A made-up optimizer step of the trainer; returns the weights before it."""
        before = {n: p.detach().clone() for n, p in self.network.named_parameters()}
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in self.network.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.mul_((1.0 + size * noise).to(parameter.dtype))
        return before
