"""HTTPScorer: reward models behind somebody's HTTP server; dialect="auto" goes by what the server says of itself."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import msgspec

from rlalign.config.reward import DIALECTS
from rlalign.scoring.http.dialect import Ask, Dialect, HTTPRequest, known
from rlalign.scoring.http.engine_dialects import OURS
from rlalign.scoring.http.transport import Call, Json, RequestFailed, Transport
from rlalign.scoring.params import InvalidParams, ScoringParams
from rlalign.scoring.result import Answer, score_result
from rlalign.scoring.scorer import Scoring, checked_inputs
from rlalign.scoring.sequences import Sequencer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlalign.scoring.result import ScoreResult
    from rlalign.scoring.scorer import Text


def detect(ask: Ask) -> str:
    """The dialect's name. Raises ValueError where the server could be several, or none that is known."""
    owners = {str(card.get("owned_by")) for card in _cards(ask, "/v1/models")}
    owners |= {str(card.get("owned_by")) for card in _cards(ask, "/models")}
    found = {owner for owner in ("vllm", "sglang", "infinity") if owner in owners}
    found |= {"sglang"} if OURS in owners else set()
    stated = _optional(ask, "/info")
    if isinstance(stated, dict) and {"model_id", "model_type", "max_client_batch_size"} <= stated.keys():
        found.add("tei")
    if not found:
        paths = _optional(ask, "/openapi.json")
        if isinstance(paths, dict) and "/get_reward" in (paths.get("paths") or {}):
            found.add("openrlhf")
    if len(found) != 1:
        raise ValueError(
            f"the server speaks {'none of' if not found else 'more than one of'} {', '.join(sorted(found or DIALECTS))}, "
            f"by what it says of itself: choose one with dialect="
        )
    return found.pop()


def _cards(ask: Ask, path: str) -> list[dict[str, Any]]:
    body = _optional(ask, path)
    listed = body.get("data") if isinstance(body, dict) else None
    return [card for card in listed if isinstance(card, dict)] if isinstance(listed, list) else []


def _optional(ask: Ask, path: str) -> Json | None:
    """The JSON of a page, None where the server has no such page. A server that cannot be reached is an error."""
    try:
        return ask(Call(path=path))
    except RequestFailed as error:
        if error.status is None or error.status in (401, 403, 429) or error.status >= 500:
            raise
        return None


CUTS = ("item_first", "truncate_prompt_tokens", "max_tokens_per_item")  # done while tokens are joined
OF_ITEMS = (400, 413, 422)  # statuses that one bad item of a call can bring
CLOSE = 1e-3  # relative; a logit that a second calibration would move moves by far more


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownLogits:
    """Raw logits of the served model, computed elsewhere: proof that the server adds nothing to them.

    logits: of the first label, one an item, two or more.
    """

    query: Text
    items: Sequence[Text]
    logits: Sequence[float]


class HTTPScorer(Scoring[HTTPRequest]):
    """Scores through a server that is running already. Connects when it is made, and asks what is served.

    tokenizer: of the served model; requests then carry token ids, cut into query and item exactly as HFScorer does, where the
    dialect takes them. Without one, text is sent as it is. cross_encoder: the server reads (query, item) as a pair (vLLM only;
    TEI and infinity always do). timeout: seconds of one call with all its retries; retries: on no connection, 429 and 5xx only.
    server_calibrated: whether the server shifts and scales its logits, where it cannot be found out. A calibrator may only be
    attached to raw logits: proven by the dialect, by known_logits, or stated with server_calibrated=False.

    A call that fails makes its items errors with the reason, never zeros. Raises RequestFailed where the server cannot be reached
    or understood when connecting, ValueError where it cannot score.
    """

    def __init__(
        self,
        base_url: str,
        dialect: str = "auto",
        *,
        model: str | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        cross_encoder: bool = False,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        concurrency: int = 16,
        server_calibrated: bool | None = None,
        known_logits: KnownLogits | None = None,
    ) -> None:
        if dialect != "auto" and dialect not in DIALECTS:
            raise ValueError(f"dialect: expected auto or one of {', '.join(DIALECTS)}, got {dialect!r}")
        self._transport = Transport(
            base_url, api_key=api_key, timeout=timeout, retries=retries, concurrency=concurrency
        )
        self._concurrency = concurrency
        try:
            self.dialect = detect(self._transport.send) if dialect == "auto" else dialect
            module, _, kind = DIALECTS[self.dialect].partition(".")
            self._dialect: Dialect = getattr(import_module(f"rlalign.scoring.http.{module}"), kind)()
            self._served = self._dialect.connect(self._transport.send, model=model, pairs=cross_encoder)
            self.info = self._served.info
            if isinstance(tokenizer, str):
                from transformers import AutoTokenizer

                self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
            else:
                self.tokenizer = tokenizer
            self._takes_ids = self._dialect.takes_ids and (self.info.causal or self.dialect != "vllm")  # /score is text
            # cuts and joins token ids, and text too where there is a tokenizer; not where the server reads query and item apart
            joins = self._dialect.takes_ids and self.info.causal
            limit, name = self.info.max_length, self.info.id
            self._sequencer = Sequencer(self.tokenizer, pairs=False, max_length=limit, model=name) if joins else None
            self._settle(server_calibrated, known_logits)
        except BaseException:
            self.close()
            raise

    def prepare(self, query: Text, items: Text | Sequence[Text], params: ScoringParams | None = None) -> HTTPRequest:
        """Check a request, and tokenise it where the client does. Raises ValueError before anything is sent."""
        params = params or ScoringParams()
        resolved = params.verify(self.info)
        query, listed = checked_inputs(query, items, self.info.vocab_size)
        sequencer = None if isinstance(query, str) and self.tokenizer is None else self._sequencer
        self._refuse(params, here=sequencer is not None, text=isinstance(query, str))
        if not self._takes_ids and not isinstance(query, str):
            raise ValueError(f"{self.info.id}: the {self.dialect} server reads text here, got token ids")
        labels = resolved.label_ids(len(listed)) if resolved.task == "generative" else []
        sequences = None if sequencer is None else sequencer.sequences(query, listed, resolved)
        return HTTPRequest(params=resolved, query=query, items=listed, sequences=sequences, labels=labels)

    def run(self, requests: Sequence[HTTPRequest]) -> list[ScoreResult]:
        """Score prepared requests, several calls at a time."""
        return self._transport.wait(self.arun(requests))

    async def arun(self, requests: Sequence[HTTPRequest]) -> list[ScoreResult]:
        """`run` in the caller's event loop; cancelling it gives up the calls that are under way."""
        jobs, gate = self._jobs(requests), asyncio.Semaphore(self._concurrency)

        async def in_turn(place: int, span: range) -> list[Answer]:
            async with gate:  # so that a call's deadline begins when it is sent
                return await self._answered(requests[place], span)

        answers = await asyncio.gather(*(in_turn(place, span) for place, span in jobs))
        found: list[list[Answer]] = [[] for _ in requests]
        for (place, _), part in zip(jobs, answers, strict=True):
            found[place] += part
        return [score_result(row, request.params, self.info) for row, request in zip(found, requests, strict=True)]

    async def ascore(
        self, query: Text, items: Text | Sequence[Text], params: ScoringParams | None = None
    ) -> ScoreResult:
        """`score` without blocking the event loop."""
        return (await self.arun([self.prepare(query, items, params)]))[0]

    def close(self) -> None:
        """Close connections. Safe to call twice."""
        self._transport.close()

    # --- inside ---

    def _jobs(self, requests: Sequence[HTTPRequest]) -> list[tuple[int, range]]:
        """(place of the request, items of one call): at most a batch, all with the same labels."""
        jobs = []
        for place, request in enumerate(requests):
            start = 0
            for end in range(1, len(request.items) + 1):
                full = end - start == self._served.batch or end == len(request.items)
                if full or (request.labels and request.labels[end] != request.labels[start]):
                    jobs.append((place, range(start, end)))
                    start = end
        return jobs

    async def _answered(self, request: HTTPRequest, span: range) -> list[Answer]:
        """Answers of a span's items; where the server refuses the call for its items, each is asked for alone."""
        try:
            calls = self._dialect.calls(request, self._served, span)
            bodies = [await self._transport.asend(call) for call in calls]
            return self._dialect.answers(request, self._served, span, bodies)
        except RequestFailed as error:
            if error.status in OF_ITEMS and len(span) > 1:
                return [answer for i in span for answer in await self._answered(request, range(i, i + 1))]
            return [replace(known(request, i), error=f"server: {error}") for i in span]

    def _refuse(self, params: ScoringParams, *, here: bool, text: bool) -> None:
        """Raise InvalidParams on what neither this client nor the server can do. here: token ids are made in this client."""
        refused = [
            name
            for name in self._served.refuses
            if getattr(params, name) not in (None, False, getattr(self.info.pooler, name, None))
            and not (here and name in CUTS)
        ]
        if refused:
            raise InvalidParams(
                f"{self.info.id}: the {self.dialect} server has no word for {', '.join(refused)}; leave them out",
                refused,
            )
        side = params.truncation_side or ("left" if self.info.causal else "right")
        if not here and self.dialect == "vllm" and params.truncate_prompt_tokens is not None and side == "left":
            raise InvalidParams(
                f"{self.info.id}: vLLM's server cuts the special tokens with the text on the left; ask for "
                "truncation_side='right', or give HTTPScorer the model's tokenizer",
                ["truncation_side"],
            )
        if text and not here and self.dialect == "vllm" and self.info.tasks == ("generative",):
            raise ValueError(
                f"{self.info.id}: vLLM's judge cuts text that is too long without saying so; give HTTPScorer the model's "
                "tokenizer, or pass token ids"
            )

    def _settle(self, stated: bool | None, known_logits: KnownLogits | None) -> None:
        """Decide whether scores arrive raw, and refuse contradictions. Without any proof they count as calibrated."""
        calibrated = self.info.already_calibrated
        if stated is False and calibrated:
            raise ValueError(
                f"{self.info.id}: server_calibrated=False, but the server says logit_mean={self.info.pooler.logit_mean}, "
                f"logit_sigma={self.info.pooler.logit_sigma}"
            )
        proven = bool(self._served.proof) or stated is False
        if known_logits is not None:
            self._compare(known_logits)
            proven = True
        already = bool(stated) or calibrated or not proven
        self.info = msgspec.structs.replace(self.info, already_calibrated=already)

    def _compare(self, known_logits: KnownLogits) -> None:
        if len(known_logits.logits) < 2:
            raise ValueError(f"known_logits: {len(known_logits.logits)} logits prove nothing; give two or more")
        result = self.score(known_logits.query, known_logits.items)
        failed = [f"item {i}: {error}" for i, error in enumerate(result.errors) if error is not None]
        if failed or len(result) != len(known_logits.logits):
            raise ValueError(f"known_logits: {failed[0] if failed else f'{len(result)} items'} for "
                             f"{len(known_logits.logits)} logits")  # fmt: skip
        for i, (logits, want) in enumerate(zip(result.logits, known_logits.logits, strict=True)):
            found = math.nan if logits is None else float(logits[0])
            if not math.isclose(found, want, rel_tol=CLOSE, abs_tol=CLOSE):
                raise ValueError(
                    f"{self.info.id}: known_logits item {i} is {want:.6g}, the server gives {found:.6g}: it serves "
                    "another model, or calibrates or activates its scores. A calibrator on top would be wrong"
                )
