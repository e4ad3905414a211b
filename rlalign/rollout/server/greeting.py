"""What a server is started with, and must then be for a run to sample from it; every refusal names the host and the remedy."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlalign import ranks
from rlalign.config import RolloutConfig, RunConfig
from rlalign.rollout import ENGINES
from rlalign.rollout.engine import handshake
from rlalign.rollout.engine.arguments import as_options, engine_arguments, engine_environment
from rlalign.rollout.exact import VARIABLE as EXACT
from rlalign.rollout.head.head_settings import HeadSettings
from rlalign.rollout.server import process_guard as guard
from rlalign.rollout.server.client import Client, Refused
from rlalign.rollout.versions import has_output_spans
from rlalign.rollout.worker.cpu import STEADY
from rlalign.rollout.worker.model_identity import digests

PATIENCE = 60.0  # seconds for an answer of a server that may be computing


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What a server is started with. exact: by `rlalign.head.exact`; steady: adding in one order; options: more of vLLM's own."""

    model: Path
    config: RolloutConfig
    dtype: str
    head_dtype: str
    seed: int
    exact: bool = False
    steady: bool = False
    options: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: RunConfig, model: Path, options: Sequence[str] = ()) -> Launch:
        """As a run with this configuration needs it."""
        return cls(
            model=model,
            config=config.rollout,
            dtype=config.model.dtype.value,
            head_dtype=config.head_dtype.value,
            seed=config.seed,
            exact=config.exact,
            steady=config.mirrored,
            options=tuple(options),
        )

    def command(self, host: str, port: int, key: str | None) -> list[str]:
        """The command line of vLLM's server."""
        arguments = engine_arguments(
            self.model, self.config, dtype=self.dtype, head_dtype=self.head_dtype, seed=self.seed, exact=self.exact
        )
        return [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--host", host, "--port", str(port), "--enable-scale-out", "--disable-uvicorn-access-log"),
            *as_options(arguments),
            *(("--middleware", guard.CLASS) if key else ()),
            *self.options,
        ]

    def environment(self, key: str | None) -> dict[str, str]:
        """Its environment: ours without the launcher's, with the development routes that weights travel through."""
        found = engine_environment(self.config) | ranks.environment_without_launcher()
        found |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        own = {
            EXACT: "1" if self.exact else None,
            STEADY: "1" if self.steady else None,
            guard.KEY_VARIABLE: key or None,
        }
        return {name: value for name, value in (found | own).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Greeting:
    """What a server said in the handshake that it passed."""

    url: str
    version: str  # vLLM's
    mode: str  # of its head
    life: str
    engines: int  # data-parallel ones behind its url
    ranks: int  # of all of them
    head: Mapping[str, str | None] = field(default_factory=dict)  # its proof: see rollout.handshake.require_same_bits


async def greet(client: Client, wanted: Launch) -> Greeting:
    """Ask everything, on every rank. Raises Refused for a server that this run must not use, Unreachable for a silent one."""
    version = await client.version(PATIENCE)
    if not has_output_spans(version):
        raise Refused(
            f"{client.url} runs vLLM {version}, which does not say which weights sampled a token; install vLLM 0.32 or later there"
        )
    await client.require_generate(PATIENCE)
    identities = await client.rpc("rlalign_identity", (), PATIENCE)
    try:
        reason = _wrong(identities, wanted)
    except KeyError as missing:
        raise Refused(
            f"{client.url} says nothing of its {missing}: it runs another rlalign; install the same version everywhere"
        ) from missing
    if reason:
        raise Refused(f"{client.url} (host {identities[0]['host']}) {reason}")
    engines = int(identities[0].get(ENGINES, 1))
    settings = HeadSettings.of_run(wanted.head_dtype, wanted.config.head_mode, exact=wanted.exact)
    mode = settings.resolve(device=str(identities[0]["device"])).value
    statuses = await client.rpc("rlalign_status", (), PATIENCE)
    try:
        handshake.require(statuses, mode=mode, ranks=int(identities[0]["ranks"]) * engines)
    except RuntimeError as error:
        raise Refused(f"{client.url} (host {identities[0]['host']}): {error}") from error
    if ENGINES not in identities[0]:
        raise Refused(
            f"{client.url} (host {identities[0]['host']}): rlalign's plugin is in its workers, but not in its HTTP process, which "
            "passes on what the first of its data-parallel engines answers and nothing of the others; start it with `rlalign "
            "rollout-server`"
        )
    life = str(identities[0]["life"])
    return Greeting(
        url=client.url, version=version, mode=mode, life=life, engines=engines, ranks=len(statuses), head=statuses[0]
    )


def require_same_numbers(greeting: Greeting, others: Iterable[Greeting]) -> None:
    """Raise Refused where a server that passed already runs another vLLM, or makes logits with other bits."""
    for other in others:
        if other.version != greeting.version:
            raise Refused(
                f"{greeting.url} runs vLLM {greeting.version}, {other.url} runs {other.version}: their numbers differ; install "
                "one version"
            )
        try:
            handshake.require_same_bits({other.url: other.head, greeting.url: greeting.head})
        except RuntimeError as error:
            raise Refused(str(error)) from error


def _wrong(identities: Sequence[dict], wanted: Launch) -> str | None:
    mine = digests(wanted.model)
    for said in identities:
        rank = f"rank {said['rank']}"
        if said["config"] != mine["config"]:
            return (
                f"serves another model: {rank} has {said['model']} (config {said['config']}), this run trains {wanted.model} "
                f"(config {mine['config']}); start it with model.path={wanted.model}, or a folder with the same config.json"
            )
        if said["tokenizer"] != mine["tokenizer"]:
            return (
                f"has another tokenizer: {rank} has that of {said['model']} ({said['tokenizer']}), this run {wanted.model}'s "
                f"({mine['tokenizer']}); its texts would be scored as something else"
            )
        if said["dtype"] != wanted.dtype:
            return f"computes in {said['dtype']} ({rank}), this run in {wanted.dtype}; start it with model.dtype={wanted.dtype}"
        if int(said["max_model_len"]) < wanted.config.max_model_len:
            return (
                f"takes sequences of {said['max_model_len']} tokens ({rank}), this run needs {wanted.config.max_model_len}; "
                f"start it with rollout.max_model_len={wanted.config.max_model_len}"
            )
        if said["logprobs_mode"] != "processed_logprobs":
            return (
                f"returns {said['logprobs_mode']} ({rank}): without the temperature they are not the sampler's; "
                "start it with --logprobs-mode processed_logprobs, as `rlalign rollout-server` does"
            )
    return None
