"""The contract of every scoring backend: prepare (checks and tokens), run (one batch), and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rlalign.reward.params import ModelInfo, ScoringParams
    from rlalign.reward.result import ScoreResult

Text = str | Sequence[int]  # a string, or token ids


class Prepared(Protocol):
    """One request, checked, resolved and tokenised: ready to run in any batch."""

    num_tokens: int  # the model will read; what a batch's budget is counted in


class RewardScorer(Protocol):
    """Scores items against a query. `score` is `run([prepare(...)])[0]`; a server batches the prepared requests of many."""

    info: ModelInfo

    def prepare(self, query: Text, items: Text | Sequence[Text], params: ScoringParams | None = None) -> Prepared:
        """Check a request and tokenise it. Raises ValueError before any computation."""

    def run(self, requests: Sequence[Prepared]) -> list[ScoreResult]:
        """Score prepared requests together. An item's result does not depend on what else is in the batch."""

    def score(self, query: Text, items: Text | Sequence[Text], params: ScoringParams | None = None) -> ScoreResult:
        """Score one request now."""
