"""Small stand-ins for the heavy parties. Each shares one event list, so that tests can assert who did what, in which order."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from rlalign.run.parties import Parties
from rlalign.types import LogprobSpec, Rollout
from rlalign.weights import publish

VOCAB = 16


@dataclass
class FakeEngine:
    """Rollout engine and receiver: samples fixed tokens with the logprobs of a uniform policy."""

    events: list
    spec: LogprobSpec = field(default_factory=LogprobSpec)
    policy_version: int = 0
    refusal: str | None = None
    problems: list[str] = field(default_factory=list)
    shift: float = 0.0  # added to every rollout logprob: an engine that disagrees
    stale_stamp: int | None = None
    taken: list[dict] = field(default_factory=list)  # entries of the buckets of the last publish

    def generate(self, prompts, *, prompt_ids, samples, seed):
        if self.refusal:
            raise RuntimeError(self.refusal)
        self.events.append(("generate", self.policy_version))
        generator = torch.Generator().manual_seed(seed)
        version = self.policy_version if self.stale_stamp is None else self.stale_stamp
        return [
            self._rollout(p, i, group, generator, version)
            for group, (p, i) in enumerate(zip(prompts, prompt_ids, strict=True))
            for _ in range(samples)
        ]

    def _rollout(self, prompt, prompt_id, group, generator, version):
        tokens = torch.randint(1, VOCAB, (3,), generator=generator).tolist()
        start, logprob = len(prompt), -float(torch.log(torch.tensor(float(VOCAB)))) + self.shift
        return Rollout(
            token_ids=[*prompt, *tokens],
            loss_mask=[False] * start + [True] * 3,
            rollout_logprobs=[0.0] * start + [logprob] * 3,
            prompt_id=prompt_id,
            group_id=group,
            finish_reason="stop",
            version_spans=[(start, start + 3, version)],
            kv_spans=[(0, start + 2, version)],
            text=str(tokens[0] % 2),
        )

    def suspend(self, reason):
        self.refusal = reason
        self.events.append(("suspend", reason))

    engines = ("embedded",)

    def ask(self, method, *args):
        told = {"rank": 0, "engine": "embedded", "problems": []}
        match method:
            case "rlalign_whereabouts":
                return [told | {"host": "here", "pid": -1, "device": "cpu", "version": self.policy_version}]
            case "rlalign_begin":
                self.taken = []
            case "rlalign_take":
                self.taken += args[0]["entries"]
            case "rlalign_finish":
                self.events.append(("load", args[0]["version"]))
                ack = {"version": args[0]["version"], "tensors": len(self.taken), "problems": list(self.problems)}
                size = sum(e["end"] - e["start"] for e in self.taken)
                return [told | ack | {"bytes": size, "repaired": [], "rebuilds": 1, "fingerprint": "", "seconds": 0.0}]
        return [told]

    def acknowledge(self, version):
        self.events.append(("acknowledge", version))
        self.policy_version, self.refusal = version, None


@dataclass
class FakeTrainer:
    """A uniform policy with one parameter; counts its steps."""

    events: list
    version: int = 0
    weight: torch.Tensor = field(default_factory=lambda: torch.zeros(1, requires_grad=True))

    def _logprobs(self, batch):
        logprob = -torch.log(torch.tensor(float(VOCAB))) + self.weight
        return torch.where(batch.loss_mask_BL, logprob, 0.0)

    def score(self, batch):
        self.events.append(("score", self.version))
        return self._logprobs(batch).detach(), torch.ones_like(batch.rollout_logprobs_BL)

    def score_reference(self, batch):
        return None

    def forward_backward(self, batch, loss_function):
        self.events.append(("forward_backward", batch.num_tokens))
        loss, metrics = loss_function(self._logprobs(batch.rollouts), batch)
        loss.backward()
        return {name: float(value) for name, value in metrics.items()}

    def optim_step(self):
        self.version += 1
        self.events.append(("optim_step", self.version))
        return {"lr": 0.0, "grad_norm": float(self.weight.grad.abs())}

    def named_weights(self):
        return [("weight", self.weight)]


@dataclass
class FakePrompt:
    prompt_id: int
    text: str


class FakeTask:
    """Rewards completions whose text is "1"; `same` rewards all."""

    def __init__(self, *, same: bool = False) -> None:
        self.same = same

    def train_prompts(self, step, count):
        return [FakePrompt(prompt_id=step * count + i, text="x") for i in range(count)]

    def reward(self, prompt, completion):
        return 1.0 if self.same or completion == "1" else 0.0


def parties(tmp_path: Path, *, engine: FakeEngine, trainer: FakeTrainer, task: FakeTask | None = None) -> Parties:
    """The fakes around the real publish()."""
    return Parties(
        engine=engine,
        trainer=trainer,
        task=task or FakeTask(),
        publish=partial(publish, receiver=engine, shared=tmp_path),
        encode=lambda text: [1, 2],
        pad_token_id=0,
    )
