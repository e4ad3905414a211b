"""VLLMEngine: the offline vLLM engine of a run. Tokens in, rollouts out, weights in, proof on demand."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign.config import RolloutConfig
from rlalign.rollout.engine import handshake, own_process
from rlalign.rollout.engine.arguments import ENVIRONMENT, Arguments, engine_arguments, engine_environment
from rlalign.rollout.engine.completions import RoutedExperts, UnknownIds, core_of, rollout_of, said, texts
from rlalign.rollout.engine.surface import (
    EMBEDDED,
    captured_ids,
    forcing,
    group_seed,
    labelled,
    of_prompt,
    require_room,
    spec_of,
)
from rlalign.rollout.exact import building
from rlalign.rollout.head.head_settings import HeadSettings
from rlalign.rollout.versions import has_output_spans
from rlalign.rollout.worker.cpu import building_steady
from rlalign.types import LogprobSpec, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm import LLM, RequestOutput, SamplingParams

# In the trainer's process, on its cores: vLLM would else spawn two more processes that import everything again (15 s).
EMBEDDED_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"} | ENVIRONMENT


log = logging.getLogger("rlalign.rollout")


class VLLMEngine:
    """One vLLM engine with rlalign's head. Refuses to generate while its weights are in doubt."""

    in_flight_updates = False  # weights change between two calls of `generate`, never during one

    def __init__(
        self,
        model: Path,
        config: RolloutConfig,
        *,
        dtype: str,
        head_dtype: str,
        seed: int,
        exact: bool = False,
        steady: bool = False,
        beside_training: bool = False,
    ) -> None:
        """Start vLLM on a Hugging Face folder and prove that every rank runs the head asked for.

        dtype: "bfloat16" or "float32", the model's body. exact: computing as `rlalign.head.exact` does, its float32 head included.
        steady: linear layers add in one order (`rlalign.rollout.worker.cpu`), as a mirrored trainer's do.
        beside_training: in a process of its own, so that `generate` can run in a thread meanwhile. It gets one in any case where
        vLLM serves the model through transformers' own classes.
        Raises RuntimeError when the handshake fails, ValueError for a dtype that vLLM cannot run the model in.
        """
        handshake.preflight()
        self.config = config
        self.engines = [EMBEDDED]
        arguments = engine_arguments(model, config, dtype=dtype, head_dtype=head_dtype, seed=seed, exact=exact)
        self._processes = own_process.EngineProcesses()
        # A process has one process group: the trainer's is larger than vLLM's, which inside it would wait for ranks that
        # never come.
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if not (apart := beside_training or several) and (reason := own_process.needed_for(model)):
            log.info("the rollout engine gets a process of its own: %s, which would be the trainer's too", reason)
            apart = True
        with self._processes.starting(apart):
            self._llm = _start(arguments, engine_environment(config), exact=exact, steady=steady)
        self._core = core_of(self._llm.get_tokenizer())
        rows = self._llm.llm_engine.vllm_config.model_config.get_vocab_size()
        barred_from = UnknownIds.of(self._llm.get_tokenizer(), rows).bar() if config.bar_unknown_ids else 0
        self.spec = spec_of(config, head_dtype, vocab_size=barred_from)
        self._reports_spans = has_output_spans(self.version)
        self._refusal: str | None = None
        self._proven_live = False
        self.policy_version = 0
        device = self._llm.llm_engine.vllm_config.device_config.device_type
        wanted = HeadSettings.of_run(head_dtype, config.head_mode, exact=exact)
        self.mode = wanted.resolve(device=device).value
        self.routed = RoutedExperts(self.ask) if config.replay_experts != "off" else None
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
        require_room(prompts, prompt_ids, self.config)
        params = [self._sampling(samples, seed=group_seed(seed, group, samples)) for group in range(len(prompts))]
        if self.routed is not None:
            self.routed.forget()
        outputs = self.request(prompts, params)
        routes = None if self.routed is None else self.routed.take(self.policy_version)
        found = self._texts(prompts, outputs)
        rollouts = [
            rollout_of(
                prompts[group],
                completion,
                prompt_id=prompt_ids[group],
                group_id=group,
                # before vLLM reports spans: the version held, which cannot change while `generate` runs
                version=None if self._reports_spans else self.policy_version,
                text=text,
                reported=captured_ids(self.config),
                experts=None
                if routes is None
                else routes(
                    completion, params[group].seed + completion.index, len(prompts[group]) + len(completion.token_ids)
                ),
                experts_shape=(0, 0) if self.routed is None else self.routed.shape,
            )
            for group, (output, of_group) in enumerate(zip(outputs, found, strict=True))
            for completion, text in zip(output.outputs, of_group, strict=True)
        ]
        if not self._proven_live:
            statuses = self.status()
            handshake.require_called(statuses)
            handshake.require_multiplied(statuses)
            self._proven_live = True
        return rollouts

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Teacher-forced logprobs of given sequences, entry t about token t, entry 0 is 0.0 (nats, temperature 1).

        vLLM applies neither temperature nor truncation to prompt logprobs, so another spec is refused with ValueError.
        """
        self._refuse_if_in_doubt()
        plain = LogprobSpec(head_dtype=self.spec.head_dtype)
        self.spec.require_equal(plain, what="scoring through prompt_logprobs")
        outputs = self.request(sequences, [forcing()] * len(sequences))
        return [of_prompt(output, ids) for output, ids in zip(outputs, sequences, strict=True)]

    def next_logprobs(self, prefixes: Sequence[Sequence[int]], tokens: Sequence[int]) -> tuple[list[float], int]:
        """Logprob of each token as the next one after its prefix, by decoding (nats, temperature 1).

        The second number is how many prefix tokens came from the prefix cache.
        """
        from vllm import SamplingParams

        self._refuse_if_in_doubt()
        of_token = {"max_tokens": 1, "temperature": 1.0, "logprobs": 1, "detokenize": False}
        params = [SamplingParams(**of_token, logprob_token_ids=[t]) for t in tokens]
        outputs = self.request(prefixes, params)
        logprobs = [o.outputs[0].logprobs[0][token].logprob for o, token in zip(outputs, tokens, strict=True)]
        return logprobs, sum(o.num_cached_tokens or 0 for o in outputs)

    # --- vLLM's own answers, for diagnosis ---

    def request(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[RequestOutput]:
        """What vLLM says of these prompts under sampling parameters of the caller's."""
        self._refuse_if_in_doubt()
        inputs, llm, wanted = [{"prompt_token_ids": list(p)} for p in prompts], self._llm, list(params)
        if not self._processes:
            return llm.generate(inputs, wanted, use_tqdm=False)
        return self._processes.watch(lambda: own_process.generate(llm, inputs, wanted))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer inside the engine."""
        return self._llm.get_tokenizer()

    def architecture(self) -> dict[str, object]:
        """The Hugging Face config that the engine was built from."""
        return self._llm.llm_engine.vllm_config.model_config.hf_config.to_dict()

    # --- what everything about workers is built on ---

    def ask(self, method: str, *args: object) -> list[dict]:
        """One RPC of the worker extension on every rank; each answer with its "rank" and its "engine"."""
        llm = self._llm
        answers = self._processes.watch(lambda: llm.collective_rpc(method, args=args))
        return [labelled(answer, rank, EMBEDDED, method) for rank, answer in enumerate(answers)]

    def ask_each(self, method: str, args_of_engine: Sequence[tuple]) -> list[dict]:
        """`ask` with a tuple of arguments for each of `engines`, in their order."""
        (args,) = args_of_engine
        return self.ask(method, *args)

    # --- the receiving side of weights.publish ---

    def suspend(self, reason: str) -> None:
        """Refuse to generate from now on."""
        self._refusal = reason

    def reset_prefix_cache(self) -> None:
        """Forget key/value blocks of older weights. Raises RuntimeError when vLLM keeps some (requests still running)."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM did not reset its prefix cache: blocks computed with the old weights are still in use"
            )

    def acknowledge(self, version: int) -> None:
        """Stamp `version` on everything sampled from now on, with no key/value block of older weights."""
        self.reset_prefix_cache()
        self.ask("rlalign_acknowledge", version)
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

    def _sampling(self, samples: int, *, seed: int) -> SamplingParams:
        from vllm import SamplingParams

        c = self.config
        return SamplingParams(
            n=samples,
            temperature=c.temperature,
            top_p=c.top_p,
            top_k=c.top_k,
            min_p=c.min_p,
            allowed_token_ids=list(range(self.spec.vocab_size)) or None,
            max_tokens=c.max_tokens,
            logprobs=captured_ids(c),
            flat_logprobs=True,
            detokenize=self._core is None,
            seed=seed,
        )

    def _texts(self, prompts: Sequence[Sequence[int]], outputs: Sequence[RequestOutput]) -> list[list[str]]:
        if self._core is None:
            return [[completion.text for completion in output.outputs] for output in outputs]
        sampled = [[said(c.token_ids, c.finish_reason) for c in output.outputs] for output in outputs]
        return texts(self._core, prompts, sampled)


def _start(arguments: Arguments, environment: dict[str, str], *, exact: bool, steady: bool) -> LLM:
    for name, value in {**EMBEDDED_ENVIRONMENT, **environment}.items():
        os.environ.setdefault(name, value)
    from vllm import LLM

    with building(exact), building_steady(steady):
        return LLM(**arguments)
