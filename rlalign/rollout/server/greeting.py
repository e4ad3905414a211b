"""What a server must be for this run to sample from it; every refusal names the host and the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlalign.rollout.engine import handshake
from rlalign.rollout.head.head_settings import HeadSettings
from rlalign.rollout.server.client import Client, Refused
from rlalign.rollout.server.every_engine import ENGINES
from rlalign.rollout.versions import has_output_spans
from rlalign.rollout.worker.model_identity import digests

PATIENCE = 60.0  # seconds for an answer of a server that may be computing


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What every server must run. dtype: of the body; the rest as in the configuration."""

    model: Path
    dtype: str
    head_dtype: str
    head_mode: str
    exact: bool
    max_model_len: int

    def digests(self) -> dict[str, str | None]:
        return digests(self.model)


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


async def greet(client: Client, wanted: Wanted) -> Greeting:
    """Ask everything, on every rank. Raises Refused for a server that this run must not use, Unreachable for a silent one."""
    version = await client.version(PATIENCE)
    if not has_output_spans(version):
        raise Refused(
            f"{client.url} runs vLLM {version}, which does not say which weights sampled a token; install vLLM 0.32 or later there",
            200,
        )
    await client.require_generate(PATIENCE)
    identities = await client.rpc("rlalign_identity", (), PATIENCE)
    try:
        reason = _wrong(identities, wanted)
    except KeyError as missing:
        raise Refused(
            f"{client.url} says nothing of its {missing}: it runs another rlalign; install the same version everywhere",
            200,
        ) from missing
    if reason:
        raise Refused(f"{client.url} (host {identities[0]['host']}) {reason}", 200)
    engines = int(identities[0].get(ENGINES, 1))
    settings = HeadSettings.of_run(wanted.head_dtype, wanted.head_mode, exact=wanted.exact)
    mode = settings.resolve(device=str(identities[0]["device"]), vllm=version).value
    statuses = await client.rpc("rlalign_status", (), PATIENCE)
    try:
        handshake.require(statuses, mode=mode, ranks=int(identities[0]["ranks"]) * engines)
    except RuntimeError as error:
        raise Refused(f"{client.url} (host {identities[0]['host']}): {error}", 200) from error
    if ENGINES not in identities[0]:
        raise Refused(
            f"{client.url} (host {identities[0]['host']}): rlalign's plugin is in its workers, but not in its HTTP process, which "
            "passes on what the first of its data-parallel engines answers and nothing of the others; start it with `rlalign "
            "rollout-server`",
            200,
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
                "one version",
                200,
            )
        try:
            handshake.require_same_bits({other.url: other.head, greeting.url: greeting.head})
        except RuntimeError as error:
            raise Refused(str(error), 200) from error


def _wrong(identities: Sequence[dict], wanted: Wanted) -> str | None:
    mine = wanted.digests()
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
        if int(said["max_model_len"]) < wanted.max_model_len:
            return (
                f"takes sequences of {said['max_model_len']} tokens ({rank}), this run needs {wanted.max_model_len}; "
                f"start it with rollout.max_model_len={wanted.max_model_len}"
            )
        if said["logprobs_mode"] != "processed_logprobs":
            return (
                f"returns {said['logprobs_mode']} ({rank}): without the temperature they are not the sampler's; "
                "start it with --logprobs-mode processed_logprobs, as `rlalign rollout-server` does"
            )
    return None
