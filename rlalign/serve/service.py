"""From a checked request to scores: limits, the calibration, the batch, and nothing that is not finite.

N items, K labels, T tokens or steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from rlalign.scoring.calibrated import calibrated
from rlalign.scoring.params import InvalidParams, ScoringParams
from rlalign.scoring.result import activate
from rlalign.scoring.scorer import ItemRefused, in_order, prepared_each
from rlalign.serve.batcher import Batcher
from rlalign.serve.bodies import ApiError, invalid
from rlalign.serve.calibrations import Calibrations, InForce

if TYPE_CHECKING:
    from rlalign.scoring.result import ScoreResult
    from rlalign.scoring.scorer import Prepared, RewardScorer, Text
    from rlalign.serve.batcher import ServerMetrics
    from rlalign.serve.settings import ServerSettings

NUMBERS = ("logits", "scores", "pooled_hidden_states", "token_logprobs", "label_mass")


def only_finite(result: ScoreResult) -> ScoreResult:
    """The result with a reason in place of every item that has a NaN or an infinity anywhere."""
    bad = {
        i: name
        for name in NUMBERS
        for i, entry in enumerate(getattr(result, name) or ())
        if entry is not None and not np.isfinite(np.asarray(entry)).all()
    }
    if not bad:
        return result

    def kept(name: str) -> list | None:
        column = getattr(result, name)
        return None if column is None else [None if i in bad else entry for i, entry in enumerate(column)]

    errors = [error or (f"not_finite: {bad[i]}" if i in bad else None) for i, error in enumerate(result.errors)]
    return replace(result, **{name: kept(name) for name in NUMBERS}, errors=errors)


def with_softmax(result: ScoreResult, temperature: float) -> ScoreResult:
    """softmax(logits / temperature) over the labels, in float64."""
    with np.errstate(over="ignore", invalid="ignore"):  # a tiny temperature; only_finite finds it
        rows = [
            None if row is None else activate(row.astype(np.float64) / temperature, "softmax") for row in result.logits
        ]
    return replace(result, scores=rows)


def single_logits(result: ScoreResult, *, generative: bool) -> list[float | None]:
    """The one logit of each item (a judge's log-odds); None where an item failed or has several."""
    rows = [row if error is None else None for row, error in zip(result.logits, result.errors, strict=True)]
    if generative:
        rows = [row[:1] - row[1:] if row is not None and len(row) == 2 else None for row in rows]
    return [float(row[0]) if row is not None and row.shape == (1,) else None for row in rows]


SCORED_TASKS = ("classify", "token_classify", "generative")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What one client wants. pairs: (query, items) each; dialects with one query have one pair.

    calibration: what `Service.calibration` gave when the request came in, None for raw scores. softmax_temperature:
    softmax(logits / temperature) over a classifier's labels. policy_version: of the policy that wrote the items. whole: items are
    whole sequences, special tokens included, so that none are added.
    """

    pairs: Sequence[tuple[Text, Sequence[Text]]]
    params: ScoringParams
    model: str | None = None
    calibration: InForce | None = None
    softmax_temperature: float | None = None
    policy_version: int | None = None
    whole: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One result a pair, all made with the calibration named by calibration_id."""

    results: list[ScoreResult]
    calibration_id: str
    task: str

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the model read for this request."""
        return sum(sum(result.prompt_tokens) for result in self.results)


class Service:
    """What every dialect calls."""

    def __init__(
        self,
        scorer: RewardScorer,
        settings: ServerSettings,
        batcher: Batcher,
        calibrations: Calibrations,
        metrics: ServerMetrics,
    ) -> None:
        self.scorer = scorer
        self.settings = settings
        self.params = settings.params or ScoringParams()
        self.batcher = batcher
        self.calibrations = calibrations
        self.metrics = metrics

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self.settings.model_name or self.scorer.info.id

    @property
    def task(self) -> str:
        """Of requests that name none."""
        return self.params.task or self.scorer.info.tasks[0]

    def calibration(self, asked: bool | None, task: str) -> InForce | None:
        """What calibrates a request that says `asked` (None: whenever one is in force).

        Raises ApiError 400 where it was asked for and there is none, or nothing to calibrate.
        """
        in_force = self.calibrations.in_force
        if asked and task not in SCORED_TASKS:
            raise invalid(f"task {task!r} gives no scores that could be calibrated", "calibrate")
        if asked and not in_force.given:
            raise invalid("no calibration is in force; PUT one to /v1/calibration, or leave calibrate out", "calibrate")
        return in_force if in_force.given and asked is not False and task in SCORED_TASKS else None

    def require_model(self, name: str | None) -> None:
        """Raise ApiError 404 for the name of another model."""
        if name not in (None, "default", self.model_name, self.scorer.info.id):
            raise ApiError(
                404, f"there is no model {name!r} here, only {self.model_name!r}", type="not_found", param="model"
            )

    def require_one_number(self) -> None:
        """Raise ApiError 400 unless the model gives an item one number, before anything is computed for nothing."""
        labels = self.scorer.info.num_labels
        if self.task not in ("classify", "generative") or (self.task == "classify" and labels != 1):
            raise invalid(
                f"this path returns one number an item; the model's task is {self.task} with {labels} labels; use /v1/score"
            )

    async def score(self, ask: Ask, request_id: str) -> Scored:
        """Scores of every item of every pair. Raises ApiError."""
        self._check(ask)
        task = ask.params.task or self.task

        prepared: list[tuple[Prepared | None, list[int], dict[int, str]]] = []

        def prepare() -> list[Prepared]:
            for query, items in ask.pairs:
                query, items = self._whole(query, items) if ask.whole else (query, items)
                prepared.append(prepared_each(self.scorer, query, items, ask.params, ItemRefused))
            return [request for request, _, _ in prepared if request is not None]

        try:
            answers = iter(await self.batcher.submit(prepare))
        except InvalidParams as error:
            raise invalid(str(error), error.fields[0] if error.fields else None) from error
        except ValueError as error:
            raise invalid(str(error)) from error
        results = [self._complete(next(answers) if one[0] is not None else None, *one[1:]) for one in prepared]
        finished = [self._finished(result, ask, task) for result in results]
        self._count(finished)
        # scores of one logit each, under `request_id/index`, the index running over all pairs
        found = [logit for result in finished for logit in single_logits(result, generative=task == "generative")]
        known = {f"{request_id}/{i}": logit for i, logit in enumerate(found) if logit is not None}
        in_force = ask.calibration or self.calibrations.in_force
        self.calibrations.remember(in_force, list(known), list(known.values()), ask.policy_version)
        used = "identity" if ask.calibration is None else ask.calibration.id
        return Scored(results=finished, calibration_id=used, task=task)

    def _check(self, ask: Ask) -> None:
        self.require_model(ask.model)
        items = sum(1 if isinstance(items, str) else len(items) for _, items in ask.pairs)
        if items > self.settings.max_items:
            raise ApiError(
                413, f"{items} items, at most {self.settings.max_items} a request", type="too_large", param="items"
            )

    def _whole(self, query: Text, items: Sequence[Text]) -> tuple[Text, Sequence[Text]]:
        """Whole texts as their token ids, where the scorer has a tokenizer and reads no pairs."""
        tokenizer = getattr(self.scorer, "tokenizer", None)
        if tokenizer is None or not self.scorer.info.causal:
            return query, items
        return [], [tokenizer(item, add_special_tokens=False)["input_ids"] for item in items]

    def _complete(self, result: ScoreResult | None, places: list[int], reasons: dict[int, str]) -> ScoreResult:
        """The scorer's answer with the items that it did not take in their places, each with its reason."""
        if result is not None and len(result) != len(places):
            raise RuntimeError(f"scorer.run: expected {len(places)} answers for these items, got {len(result)}")
        if result is not None and not reasons:
            return result
        found = [] if result is None else [result]
        return in_order(found, [places] if found else [], reasons, len(places) + len(reasons), self.scorer.info.id)

    def _finished(self, result: ScoreResult, ask: Ask, task: str) -> ScoreResult:
        """Calibrated or softmaxed scores in place of raw ones, and a reason in place of every number that is not finite."""
        result = only_finite(result)
        try:
            if ask.calibration is not None:
                result = calibrated(result, ask.calibration.calibrator, generative=task == "generative")
            elif ask.softmax_temperature is not None:
                result = with_softmax(result, ask.softmax_temperature)
        except ValueError as error:
            raise invalid(str(error)) from error
        return only_finite(result)

    def _count(self, results: Sequence[ScoreResult]) -> None:
        failed = sum(error is not None for result in results for error in result.errors)
        self.metrics.items.inc(sum(map(len, results)) - failed)
        self.metrics.failed_items.inc(failed)
        self.metrics.prompt_tokens.inc(sum(sum(result.prompt_tokens) for result in results))
