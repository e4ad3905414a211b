"""A reward model without a network for the tests of the server: a score is a hash of what was asked, so every answer can be
checked against its own question, and faults can be planted."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import uvicorn
from starlette.testclient import TestClient

from rlalign.scoring.params import ModelInfo, ScoringParams
from rlalign.scoring.result import ScoreResult, classification_scores, label_scores
from rlalign.scoring.scorer import RewardScorer, Text, checked_inputs
from rlalign.serve import ServerSettings, create_app


def fingerprint(query: Text, item: Text, column: int = 0) -> float:
    """The logit of an item, in [-4, 4), exact in float32; equal for equal questions only."""
    digest = hashlib.sha256(
        repr(
            (query if isinstance(query, str) else list(query), item if isinstance(item, str) else list(item), column)
        ).encode()
    ).digest()
    return (int.from_bytes(digest[:3], "big") - 2**23) / 2**21


@dataclass(frozen=True, slots=True)
class Question:
    query: Text
    items: list[Text]
    params: ScoringParams
    num_tokens: int


def classifier(labels: int = 1, **changes) -> ModelInfo:
    activation = "sigmoid" if labels == 1 else "softmax"
    known = {
        "id": "tests/hash-reward", "architecture": "HashForSequenceClassification", "tasks": ("classify",), "vocab_size": 1000,
        "hidden_size": 8, "num_labels": labels, "activation": activation, "max_length": 4096, "head_dtype": "float32",
        "exposes_hidden_states": True,
    }  # fmt: skip
    return ModelInfo(**(known | changes))


def judge(**changes) -> ModelInfo:
    known = {"architecture": "HashForCausalLM", "tasks": ("generative",), "num_labels": 0, "activation": "identity",
             "exposes_hidden_states": False, "hidden_states_reason": "a CausalLM has no pooled state"}  # fmt: skip
    return classifier(**(known | changes))


@dataclass
class HashScorer:
    """seconds: how long a batch takes; 0 is at once. NaN for items that contain "nan"; "poison" makes `run` raise."""

    info: ModelInfo = field(default_factory=classifier)
    seconds: float = 0.0
    batches: list[int] = field(default_factory=list)
    release: threading.Event | None = None  # a batch waits for it

    def prepare(self, query: Text, items: Text | Sequence[Text], params: ScoringParams | None = None) -> Question:
        resolved = (params or ScoringParams()).verify(self.info)
        query, listed = checked_inputs(query, items, self.info.vocab_size)
        return Question(query, listed, resolved, sum(len(query) + len(item) for item in listed))

    def run(self, requests: Sequence[Question]) -> list[ScoreResult]:
        self.batches.append(len(requests))
        if self.release is not None:
            self.release.wait(30)
        time.sleep(self.seconds)
        if any("poison" in item for request in requests for item in request.items if isinstance(item, str)):
            raise ZeroDivisionError("a fault in the model")
        return [self._answer(request) for request in requests]

    def score(self, query: Text, items: Text | Sequence[Text], params: ScoringParams | None = None) -> ScoreResult:
        return self.run([self.prepare(query, items, params)])[0]

    def logits(self, query: Text, item: Text) -> np.ndarray:
        columns = range(self.info.num_labels)
        row = np.array([fingerprint(query, item, k) for k in columns], dtype=np.float32)
        return np.full_like(row, np.nan) if isinstance(item, str) and "nan" in item else row

    def logprobs(self, query: Text, item: Text, labels: Sequence[int]) -> np.ndarray:
        return np.array([-3 - fingerprint(query, item, k) / 4 for k in labels], dtype=np.float32)

    def _answer(self, request: Question) -> ScoreResult:
        params, items = request.params, request.items
        generative = params.task == "generative"
        if generative:
            ids = params.label_ids(len(items))
            logits = [self.logprobs(request.query, item, k) for item, k in zip(items, ids, strict=True)]
            scored = [label_scores(row, params) for row in logits]
            low = [mass < params.min_label_mass for _, mass in scored]
            scores = [row for row, _ in scored]
        else:
            logits = [self.logits(request.query, item) for item in items]
            scores = [classification_scores(row, params, self.info) for row in logits]
            low = [False] * len(items)
        states = [torch.full((self.info.hidden_size,), fingerprint(request.query, item)) for item in items]
        return ScoreResult(
            logits=logits,
            scores=scores,
            prompt_tokens=[len(request.query) + len(item) for item in items],
            errors=["low_label_mass" if bad else None for bad in low],
            model=self.info.id,
            pooled_hidden_states=states if params.return_pooled_hidden_states else None,
            token_logprobs=logits if params.return_token_logprobs else None,
            label_mass=[mass for _, mass in scored] if generative else None,
        )


@contextmanager
def serving(scorer: RewardScorer, **settings) -> Iterator[str]:
    """A real uvicorn in a thread, on a free port; its base URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        app = create_app(scorer, ServerSettings(port=port, **settings))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                time.sleep(0.005)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def client(scorer: RewardScorer, calibration: dict[str, object] | None = None, **settings) -> Iterator[TestClient]:
    """The application in this process, one request at a time."""
    with TestClient(create_app(scorer, ServerSettings(**settings), calibration)) as test_client:
        yield test_client
