"""The real parties of a run: where the model, the tokenizer, the task, the engine and the policy come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign import ranks
from rlalign.config import RewardConfig, RunConfig, ScheduleMode
from rlalign.reward.mixture import RewardMixture, Rewards, Sample
from rlalign.run import conversation
from rlalign.tasks import Prompt, Task
from rlalign.types import collate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase

    from rlalign.loops.mirrors import Settled
    from rlalign.reward.drift_watch import DriftWatch, EventLog
    from rlalign.rollout.engine.embedded import VLLMEngine
    from rlalign.rollout.server.pool import ServerPool
    from rlalign.rollout.shared import SharedEngine
    from rlalign.run.parties import Parties, RolloutEngine
    from rlalign.trainer.critic import Critic
    from rlalign.trainer.policy import Policy
    from rlalign.types import LogprobSpec, Rollout
    from rlalign.weights import Transport

PROOF_PROMPTS = 8  # of a mirrored body, at the start of a run
PROOF_LIMIT = 1e-4  # nats: float32 heads and normalisers measure up to 2e-6, bodies that round apart 1e-3 to 5e-2


def resolve_model(path: str, say: Callable[[str], None] = print, *, what: str = "model.path") -> Path:
    """The folder of a model: a local Hugging Face folder, or the tiny policy named tiny:untied or tiny:tied.

    Raises ValueError for anything else.
    """
    if path.startswith("tiny:"):
        from rlalign.tiny_policy import cached_policy

        return cached_policy(path.removeprefix("tiny:"), report=say)
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{what}={path!r} is not a Hugging Face folder (no config.json there). Give a local folder with config.json, "
            "weights and tokenizer, or tiny:untied / tiny:tied for the built-in demo policy."
        )
    return folder


def load_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer. Raises ValueError when its ids do not fit the model's vocabulary.

    Special tokens behind the model's last row are let through: text-only checkpoints keep the placeholders of images that way,
    and only a prompt that holds one is impossible (`fitting`).
    """
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    size = AutoConfig.from_pretrained(model).get_text_config().vocab_size
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    words = [id for id in tokenizer.get_vocab().values() if id not in special]
    if max(words, default=0) >= size:
        raise ValueError(
            f"{model}: the tokenizer has token ids up to {max(words)}, the model only {size} rows of embeddings; "
            "tokenizer and checkpoint do not belong together"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{model}: the tokenizer has neither a pad nor an eos token; rollouts cannot end")
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool) -> list[int]:
    """Token ids of a prompt, in the tokenizer's chat template when asked."""
    if not chat:
        return tokenizer.encode(text)
    message = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)


def prompt_encoder(config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """From a prompt's text to its ids: of the text alone, or of the first messages of its environment."""
    if config.task.environment:
        return conversation.prompts_of(config, task, tokenizer)
    return partial(encode, tokenizer, chat=config.task.chat_template)


def sampling(
    config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase
) -> Callable[[RolloutEngine], RolloutEngine]:
    """From an engine to what completions come from: itself, or conversations with the run's environment over it."""
    return conversation.talking(config, task, tokenizer) if config.task.environment else lambda engine: engine


def load_task_of(config: RunConfig) -> Task:
    """The configured task."""
    from rlalign.tasks import load_task

    c = config.task
    return load_task(c.name, dict(c.params), train_size=c.train_size, eval_size=c.eval_size, seed=c.seed)


def fitted_task(
    config: RunConfig, model: Path, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None] = lambda _: None
) -> Task:
    """The configured task without the prompts that this model and engine cannot take; say: told how many those were.

    Raises ValueError for one of them unless task.unusable_prompts=drop.
    """
    from transformers import AutoConfig

    rows = AutoConfig.from_pretrained(model).get_text_config().vocab_size
    task = load_task_of(config)
    task, dropped = fitted(task, config, prompt_encoder(config, task, tokenizer), rows)
    if dropped:
        say(f"{dropped} prompts dropped that are too long for the engine or hold ids that the model has no row for")
    return task


class SharedReward:
    """The task's verifier and the configured reward models. The first rank holds the models and scores for all.

    Raises ValueError, CalibrationMismatchError or OSError where a model, a calibration or a server cannot be used.
    """

    def __init__(self, config: RunConfig, say: Callable[[str], None] = print) -> None:
        self.local: RewardMixture | None = None
        ranks.on_first(lambda: self._start(config.reward, say))

    def __call__(self, samples: Sequence[Sample]) -> Rewards:
        return ranks.on_first(lambda: self.local(samples))

    def _start(self, config: RewardConfig, say: Callable[[str], None]) -> None:
        if config.models:
            from rlalign.reward.loading import load_mixture

            self.local = load_mixture(config, say)
        else:
            self.local = RewardMixture(weights=config.active, max_failed=config.max_failed)


def start_drift_watch(
    reward: SharedReward, config: RunConfig, log: EventLog, say: Callable[[str], None]
) -> DriftWatch | None:
    """The monitors of the calibrated reward models; on the first rank, which holds the models. None elsewhere."""
    from rlalign.reward.drift_watch import DriftWatch

    if reward.local is None:
        return None
    folder = Path(config.output_dir) / "drift"
    return DriftWatch(reward.local.models, config.reward.drift, folder=folder, log=log, say=say)


def start_engine(model: Path, config: RunConfig, say: Callable[[str], None] = print) -> VLLMEngine | ServerPool:
    """vLLM with the run's head, proved on every rank: inside this process, or behind HTTP (rollout.backend).

    say: writes down what becomes of servers, from any thread. Raises ValueError for a model that cannot be published to.
    """
    from rlalign.rollout.engine.arguments import require_reloads

    require_reloads(model)
    if config.rollout.backend == "server":
        from rlalign.rollout.server.launching import Launch, open_pool

        return open_pool(Launch.of(config, model), logs=Path(config.output_dir) / "servers", say=say)
    return start_embedded(model, config, beside_training=config.schedule.mode is not ScheduleMode.synchronous)


def start_embedded(model: Path, config: RunConfig, *, beside_training: bool = False) -> VLLMEngine:
    """vLLM inside this process, whatever rollout.backend says: diagnosis looks into it, and servers sample the same.

    beside_training: in a process of its own instead.
    """
    from rlalign.rollout.engine.embedded import VLLMEngine

    return VLLMEngine(
        model,
        config.rollout,
        dtype=config.model.dtype.value,
        head_dtype=config.head_dtype.value,
        seed=config.seed,
        exact=config.exact,
        steady=config.mirrored,
        beside_training=beside_training,
    )


def start_policy(model: Path, config: RunConfig, probed: ProbedBody | None = None) -> Policy:
    """The model in DeepSpeed, with the mirrored head, and body where it was probed."""
    from transformers.utils.logging import disable_progress_bar

    from rlalign.trainer.policy import Policy

    disable_progress_bar()  # the run shows its own
    return Policy(
        model,
        config.trainer,
        config.algo,
        dtype=config.model.dtype.value,
        head_dtype=config.head_dtype.value,
        temperature=config.rollout.temperature,
        seed=config.seed,
        exact=config.exact,
        mirrored=None if probed is None else probed.settled.plan,
        replay_experts=config.rollout.replay_experts,
    )


def require_steady(statuses: Sequence[dict]) -> None:
    """Raise RuntimeError unless every rollout rank keeps to one order of additions, as a mirrored trainer does."""
    for rank, status in enumerate(statuses):
        if unsteady := status.get("unsteady", ["all: it says nothing of it"]):
            raise RuntimeError(
                f"trainer.body=mirrored: rollout rank {rank} has linear layers whose bits change with the number of rows "
                f"({', '.join(unsteady[:3])}{', ...' if len(unsteady) > 3 else ''}); start it with RLALIGN_STEADY=1, as those that "
                "a run starts itself are"
            )


@dataclass(frozen=True, slots=True)
class ProbedBody:
    """What a mirrored run found at its start. rollouts: what the engine sampled meanwhile, to be scored by the mirrored trainer."""

    settled: Settled
    rollouts: Sequence[Rollout]

    def prove(self, policy: Policy, spec: LogprobSpec, pad: int) -> str:
        """Compare both sides' logprobs of what was sampled, in one line. Every rank must call it.

        Raises RuntimeError where the trainer's are further from the engine's than float32 heads and normalisers are.
        """
        batch = collate(self.rollouts, pad_token_id=pad, spec=spec)
        apart = (policy.score(batch)[0] - batch.rollout_logprobs_BL)[batch.loss_mask_BL].abs()
        found = (
            f"{int((apart == 0).sum())} of {len(apart)} sampled tokens have the engine's logprob in every bit, mean |log_ratio| "
            f"{float(apart.mean()):.2g}, largest {float(apart.max()):.2g} nats"
        )
        if not float(apart.mean()) < PROOF_LIMIT:
            table = "\n".join(self.settled.describe())
            raise RuntimeError(
                f"trainer.body=mirrored, and the bodies round apart: {found} (limit {PROOF_LIMIT:g}). Use trainer.body=model. The "
                f"probe of single ops found:\n{table}"
            )
        return f"mirrored: {found}"


def probe_body(
    engine: SharedEngine, model: Path, config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase
) -> ProbedBody | None:
    """Sample a few prompts while the engine's ops are recorded, and choose a variant for each; None for trainer.body=model.

    Every rank must call it; all get the first one's answer. Raises RuntimeError for an engine that cannot be probed or is not
    steady, and for ops whose probe gave another answer at an earlier start.
    """
    if not config.mirrored:
        return None
    from rlalign.loops.mirrors import recorded

    require_steady(engine.status())
    prompts = [p.text for p in task.train_prompts(0, min(PROOF_PROMPTS, len(task.train)))]
    ids = [encode(tokenizer, text, chat=config.task.chat_template) for text in prompts]

    def sample() -> list[Rollout]:
        return engine.generate(ids, prompt_ids=range(len(ids)), samples=2, seed=config.seed)

    def read(answer: dict) -> Settled:
        return ranks.on_first(lambda: settle_body(model, config, answer))

    settled, rollouts = recorded(engine, sample, Path(config.weights.shared), read)
    settled.require_settled()
    return ProbedBody(settled, rollouts)


def settle_body(model: Path, config: RunConfig, answer: Mapping[str, object]) -> Settled:
    """The choices for this folder's model and a recording of its engine. The model is loaded for it, and let go."""
    import torch
    from transformers import AutoModelForCausalLM

    from rlalign.head import widened
    from rlalign.loops.mirrors import examine, settle

    network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, config.model.dtype.value)).eval()
    widened.decide_for(network)
    return settle(examine(network, answer), network)


def require_same_head(policy: Policy, statuses: Sequence[dict]) -> None:
    """Raise RuntimeError unless every trainer rank and every rollout rank makes float32 logits with the same bits.

    statuses: what the rollout ranks answered.
    """
    from rlalign.rollout.engine import handshake

    own = {"route": policy.head.route, "kernel": policy.head.kernel, "bits": policy.head.bits}
    trainers = {f"trainer rank {rank}": proof for rank, proof in enumerate(ranks.of_all(own))}
    handshake.require_same_bits(trainers | handshake.proofs_of(statuses))


def critic_folder(model: Path, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Path | None:
    """The folder the critic starts from; None where advantages need none.

    Raises ValueError for one that cannot be found, or that reads other tokens than the policy writes.
    """
    if config.algo.advantage != "gae":
        return None
    path = config.algo.critic.path
    if not path:
        return model
    folder = resolve_model(path, what="algo.critic.path")
    if load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"algo.critic.path={path}: its tokenizer gives tokens other ids than the policy's; a critic reads the policy's own "
            "tokens. Give a model of the same family, or leave the path empty"
        )
    return folder


def start_critic(folder: Path | None, config: RunConfig) -> Critic | None:
    """The critic in DeepSpeed, beside the policy."""
    if folder is None:
        return None
    from rlalign.trainer.critic import Critic

    return Critic(folder, config.trainer, config.algo.critic, dtype=config.model.dtype.value)


def parties(
    config: RunConfig,
    engine: SharedEngine,
    policy: Policy,
    critic: Critic | None,
    task: Task,
    reward: SharedReward,
    tokenizer: PreTrainedTokenizerBase,
    transport: Transport,
    say: Callable[[int, str], None],
) -> Parties:
    """Everyone a step talks to. say: told each phase of a step as it begins."""
    from rlalign.objective.reference_kl import KlController
    from rlalign.rollout.engine import noise_floor
    from rlalign.run.parties import Parties
    from rlalign.weights import publish_from_ranks

    floor = noise_floor.read(Path(config.mismatch.floor), config.model.dtype.value) if config.mismatch.floor else None
    return Parties(
        engine=engine,
        trainer=policy,
        critic=critic,
        kl_penalty=KlController(config.algo.kl_penalty) if config.algo.kl_penalty.coef else None,
        task=task,
        reward=reward,
        publish=partial(publish_from_ranks, receiver=lambda: engine.local, transport=transport),
        encode=prompt_encoder(config, task, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        floor=floor,
        say=say,
    )


SHOWN = 3  # prompts that an error names


@dataclass(frozen=True, slots=True)
class Unfit:
    """A prompt that cannot be used, and why."""

    prompt: Prompt
    why: str


def unfit(prompts: Sequence[Prompt], config: RunConfig, encode: Callable[[str], list[int]], rows: int) -> list[Unfit]:
    """Those longer than the engine has room for, and those with an id that the model has no row for (rows: of its embedding)."""
    room = config.rollout.max_model_len - config.rollout.max_tokens
    found = []
    for prompt in prompts:
        ids = encode(prompt.text)
        if not ids:
            found.append(Unfit(prompt, "no token"))
        elif len(ids) > room:
            found.append(Unfit(prompt, f"{len(ids)} tokens"))
        elif max(ids) >= rows:
            found.append(Unfit(prompt, f"token id {max(ids)}, the model has {rows} rows"))
    return found


def fitted(task: Task, config: RunConfig, encode: Callable[[str], list[int]], rows: int) -> tuple[Task, int]:
    """The task with prompts that fit, and how many were dropped (task.unusable_prompts=drop).

    Raises ValueError naming them where the run is to stop at them, and where too few are left.
    """
    bad = unfit([*task.train, *task.held_out], config, encode, rows)
    if not bad:
        return task, 0
    what = describe_unfit(bad, len(task.train) + len(task.held_out), config)
    if config.task.unusable_prompts == "stop":
        raise ValueError(f"task {task.name!r}: {what}; raise rollout.max_model_len, or task.unusable_prompts=drop")
    gone = {each.prompt.text for each in bad}
    train = tuple(p for p in task.train if p.text not in gone)
    held_out = tuple(p for p in task.held_out if p.text not in gone)
    if len(train) < config.rollout.prompts_per_step or not held_out:
        raise ValueError(
            f"task {task.name!r}: {what}; {len(train)} training and {len(held_out)} held-out prompts are left, and a run needs "
            f"rollout.prompts_per_step={config.rollout.prompts_per_step} and 1"
        )
    return replace(task, train=train, held_out=held_out), len(bad)


def describe_unfit(bad: Sequence[Unfit], of: int, config: RunConfig) -> str:
    """How many of how many, the first of them, and the room there is."""
    room = config.rollout.max_model_len - config.rollout.max_tokens
    named = "; ".join(f"{each.why}: {each.prompt.text[:40]!r}" for each in bad[:SHOWN])
    more = ", ..." if len(bad) > SHOWN else ""
    return (
        f"{len(bad)} of {of} prompts cannot be used (room for {room} tokens: rollout.max_model_len - rollout.max_tokens), "
        f"{named}{more}"
    )
