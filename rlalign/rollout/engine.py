"""VLLMEngine: the offline vLLM engine of a run. Tokens in, rollouts out, weights in, proof on demand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign.config import RolloutConfig
from rlalign.rollout import handshake
from rlalign.rollout.head_plugin import SETTINGS_KEY
from rlalign.rollout.versions import has_weight_version
from rlalign.types import LogprobSpec, Rollout

if TYPE_CHECKING:
    from vllm import LLM, CompletionOutput, SamplingParams

# Set before vLLM is imported, and only where the user has not chosen. In-process: the engine shares the trainer's process and
# its two cores; without it vLLM spawns two more processes that import everything again (15 s) and pin themselves to core 0.
EMBEDDED_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

EMBEDDED = "embedded"  # the name of the one engine inside this process


class VLLMEngine:
    """One vLLM engine with rlalign's head. Refuses to generate while its weights are in doubt."""

    engines = [EMBEDDED]
    in_flight_updates = False  # weights change between two calls of `generate`, never during one

    def __init__(self, model: Path, config: RolloutConfig, *, dtype: str, head_dtype: str, seed: int) -> None:
        """Start vLLM on a Hugging Face folder and prove that every rank runs the head asked for.

        dtype: "bfloat16" or "float32", the model's body. Raises RuntimeError when the handshake fails.
        """
        handshake.preflight()
        self.config = config
        self.spec = LogprobSpec(
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
            processed=True,
            head_dtype=head_dtype,
        )
        self._llm = _start(model, config, dtype=dtype, head_dtype=head_dtype, seed=seed)
        self._refusal: str | None = None
        self._proven_live = False
        self.policy_version = 0
        self.mode = _expected_mode(head_dtype, config.head_mode, self._llm)
        self.acknowledge(0)
        handshake.require(self.status(), mode=self.mode, ranks=config.tensor_parallel_size)

    @property
    def version(self) -> str:
        """vLLM's version."""
        import vllm

        return vllm.__version__

    def generate(
        self, prompts: Sequence[Sequence[int]], *, prompt_ids: Sequence[int], samples: int, seed: int
    ) -> list[Rollout]:
        """Sample `samples` completions of each prompt; rollouts come grouped by prompt, in order.

        prompts: token ids. seed: of this call; completion i of prompt p is reproducible from (seed, p, i) in any batch.
        Raises ValueError for a prompt that leaves no room in the context, RuntimeError while the weights are in doubt.
        """
        self._refuse_if_in_doubt()
        self._check_lengths(prompts, prompt_ids)
        params = [self._sampling(samples, seed=(seed * 1_000_003 + p * samples) % 2**31) for p in range(len(prompts))]
        outputs = self._llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
        rollouts = [
            self._rollout(prompt, completion, prompt_id=prompt_id, group_id=group)
            for group, (prompt, prompt_id, output) in enumerate(zip(prompts, prompt_ids, outputs, strict=True))
            for completion in output.outputs
        ]
        if not self._proven_live:
            handshake.require_called(self.status())
            self._proven_live = True
        return rollouts

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Teacher-forced logprobs of given sequences, entry t about token t, entry 0 is 0.0 (nats, temperature 1).

        vLLM applies neither temperature nor truncation to prompt logprobs, so another spec is refused with ValueError.
        """
        from vllm import SamplingParams

        self._refuse_if_in_doubt()
        plain = LogprobSpec(head_dtype=self.spec.head_dtype)
        self.spec.require_equal(plain, what="scoring through prompt_logprobs")
        params = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0)
        outputs = self._llm.generate([{"prompt_token_ids": list(s)} for s in sequences], params, use_tqdm=False)
        return [
            [0.0] + [entry[token].logprob for entry, token in zip(o.prompt_logprobs[1:], sequence[1:], strict=True)]
            for o, sequence in zip(outputs, sequences, strict=True)
        ]

    def next_logprobs(self, prefixes: Sequence[Sequence[int]], tokens: Sequence[int]) -> tuple[list[float], int]:
        """Logprob of each token as the next one after its prefix, by decoding (nats, temperature 1).

        The second number is how many prefix tokens came from the prefix cache.
        """
        from vllm import SamplingParams

        self._refuse_if_in_doubt()
        params = [SamplingParams(max_tokens=1, temperature=1.0, logprobs=1, logprob_token_ids=[t]) for t in tokens]
        outputs = self._llm.generate([{"prompt_token_ids": list(p)} for p in prefixes], params, use_tqdm=False)
        logprobs = [o.outputs[0].logprobs[0][token].logprob for o, token in zip(outputs, tokens, strict=True)]
        return logprobs, sum(o.num_cached_tokens or 0 for o in outputs)

    # --- what everything about workers is built on ---

    def ask(self, method: str, *args: object) -> list[dict]:
        """One RPC of the worker extension on every rank; each answer with its "rank" and its "engine"."""
        answers = self._llm.collective_rpc(method, args=args)
        return [labelled(answer, rank, EMBEDDED, method) for rank, answer in enumerate(answers)]

    def ask_each(self, method: str, args_of_engine: Sequence[tuple]) -> list[dict]:
        """`ask` with a tuple of arguments for each of `engines`, in their order."""
        (args,) = args_of_engine
        return self.ask(method, *args)

    # --- the receiving side of weights.publish ---

    def suspend(self, reason: str) -> None:
        """Refuse to generate from now on."""
        self._refusal = reason

    def load(self, directory: Path) -> list[dict]:
        """Load a published folder on every rank and verify it there."""
        return self.ask("rlalign_load", str(directory))

    def reset_prefix_cache(self) -> None:
        """Forget key/value blocks of older weights. Raises RuntimeError when vLLM keeps some (requests still running)."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM did not reset its prefix cache: blocks computed with the old weights are still in use"
            )

    def acknowledge(self, version: int) -> None:
        """Stamp `version` on everything sampled from now on."""
        self.ask("rlalign_acknowledge", version)
        if has_weight_version(self.version):
            self._llm.update_weight_version(str(version))
        self.policy_version = version
        self._refusal = None

    # --- evidence ---

    def status(self) -> list[dict]:
        """What each rank's head is and did (see WorkerExtension.rlalign_status)."""
        return self.ask("rlalign_status")

    def settings(self) -> dict[str, str]:
        """What the running engine says of itself, as far as it decides numbers."""
        running = self._llm.llm_engine.vllm_config
        return {
            "body dtype": str(running.model_config.dtype).removeprefix("torch."),
            "logprobs mode": str(running.model_config.logprobs_mode),
            "kv-cache dtype": str(running.cache_config.cache_dtype),
            "prefix caching": str(bool(running.cache_config.enable_prefix_caching)),
            "tied embeddings": str(bool(running.model_config.hf_config.tie_word_embeddings)),
            "tensor parallel": str(running.parallel_config.tensor_parallel_size),
        }

    def set_head(self, mode: str) -> None:
        """Switch the head of a live engine; for `rlalign parity` only."""
        self.ask("rlalign_set_head", mode)

    def head_logits(self, hidden_file: Path, *, batch: int) -> Path:
        """Project stored hidden states through the engine's head, `batch` rows at a time; returns the file of logits."""
        return Path(self.ask("rlalign_head_logits", str(hidden_file), batch)[0]["file"])

    def close(self) -> None:
        """Stop the engine and its processes. Safe to call twice."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    # --- inside ---

    def _refuse_if_in_doubt(self) -> None:
        if self._refusal is not None:
            raise RuntimeError(f"the rollout engine refuses to run: {self._refusal}")

    def _check_lengths(self, prompts: Sequence[Sequence[int]], prompt_ids: Sequence[int]) -> None:
        room = self.config.max_model_len - self.config.max_tokens
        for prompt, prompt_id in zip(prompts, prompt_ids, strict=True):
            if not 0 < len(prompt) <= room:
                raise ValueError(
                    f"prompt {prompt_id} has {len(prompt)} tokens; with rollout.max_tokens={self.config.max_tokens} and "
                    f"rollout.max_model_len={self.config.max_model_len} it must have 1 to {room}"
                )

    def _sampling(self, samples: int, *, seed: int) -> SamplingParams:
        from vllm import SamplingParams

        c = self.config
        return SamplingParams(
            n=samples,
            temperature=c.temperature,
            top_p=c.top_p,
            top_k=c.top_k,
            min_p=c.min_p,
            max_tokens=c.max_tokens,
            logprobs=0,
            seed=seed,
        )

    def _rollout(
        self, prompt: Sequence[int], completion: CompletionOutput, *, prompt_id: int, group_id: int
    ) -> Rollout:
        tokens = list(completion.token_ids)
        start = len(prompt)
        spans = self._spans(completion, start, len(tokens))
        return Rollout(
            token_ids=[*prompt, *tokens],
            loss_mask=[False] * start + [True] * len(tokens),
            rollout_logprobs=[0.0] * start + [e[t].logprob for e, t in zip(completion.logprobs, tokens, strict=True)],
            prompt_id=prompt_id,
            group_id=group_id,
            finish_reason=completion.finish_reason,
            version_spans=spans,
            kv_spans=kv_spans(spans),
            text=completion.text,
        )

    def _spans(self, completion: CompletionOutput, start: int, count: int) -> list[tuple[int, int, int]]:
        """From vLLM where it reports them; before that from the version held, which cannot change while `generate` runs."""
        from rlalign.rollout.versions import has_output_spans

        if not has_output_spans(self.version):
            return [(start, start + count, self.policy_version)]
        return [(start + s.start, start + s.end, int(s.version)) for s in completion.weight_versions]


def labelled(answer: object, rank: int, engine: str, method: str) -> dict:
    """A worker's answer with where it came from. Raises RuntimeError when it is no dict: HTTP would make a string of it."""
    if not isinstance(answer, dict):
        raise RuntimeError(f"{engine}, rank {rank}: {method} answered {type(answer).__name__}; worker RPCs return dicts")
    return {"rank": rank, **answer, "engine": engine}


def kv_spans(version_spans: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Which version computed the keys and values of each position, given which sampled each token.

    A position's keys are computed in the step that samples the next token, a prompt's in the step of the first; an update in
    flight leaves them. A request that vLLM preempted since then recomputed them: the age that follows is an upper bound.
    """
    found = []
    reached = 0
    for _, end, version in version_spans:
        if end - 1 > reached:
            found.append((reached, end - 1, version))
            reached = end - 1
    return found


def _start(model: Path, config: RolloutConfig, *, dtype: str, head_dtype: str, seed: int) -> LLM:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Whatever was set: a process has one process group, the trainer's is larger than vLLM's, and inside it vLLM would wait
        # for ranks that never come.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    for name, value in EMBEDDED_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(config.cpu_kv_cache_gib))
    if (
        config.enforce_eager
    ):  # no compilation was asked for; the first request with logprobs would compile a helper for seconds
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    from vllm import LLM

    return LLM(
        model=str(model),
        dtype=dtype,
        seed=seed,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens or None,
        tensor_parallel_size=config.tensor_parallel_size,
        gpu_memory_utilization=config.gpu_memory_utilization,
        enforce_eager=config.enforce_eager,
        enable_prefix_caching=config.prefix_caching,
        logprobs_mode="processed_logprobs",
        worker_extension_cls="rlalign.rollout.worker.WorkerExtension",
        additional_config={SETTINGS_KEY: {"head_dtype": head_dtype, "mode": config.head_mode}},
        generation_config="vllm",  # sampling defaults come from our config, never from a file beside the model
        disable_log_stats=True,
        use_tqdm_on_load=False,
    )


def _expected_mode(head_dtype: str, head_mode: str, llm: LLM) -> str:
    if head_dtype == "model":
        return "off"
    if head_dtype == "master":
        return "master"
    if head_mode != "auto":
        return head_mode
    return "cached" if llm.llm_engine.vllm_config.device_config.device_type == "cpu" else "native"
