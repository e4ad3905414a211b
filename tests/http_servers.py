"""Small real HTTP servers that answer in each dialect's documented shapes, over one made-up reward model.

The model's raw logit of a sequence is `logit(ids)`; text becomes ids by its code points. A server counts its requests and can be
told to misbehave: `script` holds what the next requests to the scoring path get instead of an answer.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer

SCORING = ("/pooling", "/score", "/generative_scoring", "/v1/score", "/predict", "/rerank", "/get_reward")


def logit(ids: list[int]) -> float:
    """Depends on every token and on their order."""
    value = 0
    for token in ids:
        value = (value * 31 + token + 7) % 100_003
    return value / 25_000.75 - 2.0


def codes(text: str) -> list[int]:
    return [ord(c) for c in text]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


class _Listener(ThreadingTCPServer):
    """HTTPServer would look up its own name first, which can take long."""

    daemon_threads, request_queue_size, allow_reuse_address = True, 128, True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that left is no error. Printing its traceback parses code, which CPython 3.11 cannot do in two threads at once
        ("AST constructor recursion depth mismatch", python/cpython#106905) and another test's parse would fail.
        """
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Server:
    """`answer(path, body)` gives (status, JSON). Used as a context manager."""

    def __init__(self, answer: Callable[[str, dict | None], tuple[int, object]], port: int = 0) -> None:
        self.answer, self.script, self.seen, self._open = answer, [], [], []
        self._http = _Listener(("127.0.0.1", port), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> Server:
        threading.Thread(target=self._http.serve_forever, daemon=True, kwargs={"poll_interval": 0.01}).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        for connection in self._open:  # kept alive by clients
            with contextlib.suppress(OSError):
                connection.shutdown(2)

    def scored(self) -> int:
        """How many scoring requests have come in."""
        return sum(path in SCORING for path, _, _ in self.seen)

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

            def setup(self) -> None:
                server._open.append(self.request)
                super().setup()

            def log_message(self, *args: object) -> None: ...

            def do_GET(self) -> None:
                self._serve(None)

            def do_POST(self) -> None:
                self._serve(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _serve(self, body: dict | None) -> None:
                path = self.path.partition("?")[0]
                server.seen.append((path, body, dict(self.headers)))
                if path in SCORING and server.script:
                    server.script.pop(0)(self)
                else:
                    send(self, *server.answer(path, body))

        return Handler


def send(handler: BaseHTTPRequestHandler, status: int, content: object, headers: dict[str, str] | None = None) -> None:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(raw)), **(headers or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(raw)


# --- ways to misbehave, for `script` ---


def status(code: int, content: object = None, **headers: str) -> Callable:
    return lambda handler: send(
        handler, code, content if content is not None else {"error": {"message": "busy"}}, headers
    )


def body(content: object) -> Callable:
    return lambda handler: send(handler, 200, content)


def silence(seconds: float) -> Callable:
    return lambda handler: time.sleep(seconds)


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
    handler.connection.shutdown(2)


def drip(handler: BaseHTTPRequestHandler) -> None:
    """A byte now and then: no single read ever times out."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        time.sleep(0.05)


# --- dialects ---


def vllm(*, mean: float | None = None, sigma: float | None = None, development: bool = False) -> Callable:
    def scores(inputs: list, activated: bool) -> list[float]:
        raw = [logit(codes(x) if isinstance(x, str) else x) for x in inputs]
        raw = [(x - (mean or 0.0)) / (sigma or 1.0) for x in raw]
        return [sigmoid(x) for x in raw] if activated else raw

    def answer(path: str, sent: dict | None) -> tuple[int, object]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "rm", "owned_by": "vllm", "max_model_len": 64}]}
        if path == "/server_info" and development:
            config = {"logit_mean": mean, "logit_sigma": sigma, "seq_pooling_type": "LAST"}
            return 200, {"vllm_config": {"model_config": {"pooler_config": config}}}
        if path == "/pooling" and sent["task"] == "classify":
            found = enumerate(scores(sent["input"], sent["use_activation"]))
            return 200, {"data": [{"index": i, "object": "pooling", "data": [x]} for i, x in found]}
        if path == "/score":
            found = enumerate(scores([sent["queries"] + d for d in sent["documents"]], sent["use_activation"]))
            return 200, {"data": [{"index": i, "object": "score", "score": x} for i, x in found]}
        return (400 if path == "/pooling" else 404), {"error": {"message": "Try switching the model's pooling_task"}}

    return answer


def vllm_judge(path: str, sent: dict | None) -> tuple[int, object]:
    """Returns the first label's probability only, as vLLM does. Label t has probability 1 / (t + 2)."""
    if path == "/v1/models":
        return 200, {"data": [{"id": "judge", "owned_by": "vllm", "max_model_len": 64}]}
    if path == "/generative_scoring" and not sent["apply_softmax"]:
        p = 1 / (sent["label_token_ids"][0] + 2)
        return 200, {"data": [{"index": i, "object": "score", "score": p} for i, _ in enumerate(sent["items"])]}
    return 404, {"detail": "Not Found"}


def sglang(*, hidden: bool = True, generative: bool = False) -> Callable:
    def answer(path: str, sent: dict | None) -> tuple[int, object]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "rm", "owned_by": "sglang", "max_model_len": 64}]}
        if path != "/v1/score":
            return 404, {"detail": "Not Found"}
        if generative and not sent.get("label_token_ids"):
            return 400, {"message": "label_token_ids is required"}
        joined = [sent["query"] + item for item in sent["items"]]
        raw = [logit(codes(x) if isinstance(x, str) else x) for x in joined]
        scores = [[1 / (t + 2) for t in sent["label_token_ids"]] if generative else [x] for x in raw]
        asked = sent.get("return_pooled_hidden_states") and hidden
        return 200, {"scores": scores, "pooled_hidden_states": [[x, -x, 1.0] for x in raw] if asked else None}

    return answer


def tei(*, labels: tuple[str, ...] = ("LABEL_0",), reranker: bool = True) -> Callable:
    """Entries come sorted by score; a classifier's logits are the label's number further up."""

    def answer(path: str, sent: dict | None) -> tuple[int, object]:
        if path == "/info":
            label2id = {name: i for i, name in enumerate(labels)}
            kind = {"reranker" if reranker else "classifier": {"label2id": label2id}}
            return 200, {"model_id": "rm", "model_type": kind, "model_dtype": "float32", "max_input_length": 64,
                         "max_client_batch_size": 3, "model_sha": None}  # fmt: skip
        if path == "/rerank":
            raw = [logit(codes(sent["query"] + text)) for text in sent["texts"]]
            found = [{"index": i, "score": x if sent["raw_scores"] else sigmoid(x)} for i, x in enumerate(raw)]
            return 200, sorted(found, key=lambda entry: -entry["score"])
        if path == "/predict" and all(isinstance(text, list) for text in sent["inputs"]):
            raw = [[logit(codes("".join(texts))) + 0.5 * k for k in range(len(labels))] for texts in sent["inputs"]]
            shown = raw if sent["raw_scores"] else [_softmax(row) for row in raw]
            return 200, [
                sorted(({"label": n, "score": x} for n, x in zip(labels, row, strict=True)), key=lambda e: -e["score"])
                for row in shown
            ]
        return 404, {"error": "Not Found", "error_type": "Validation"}

    return answer


def infinity(path: str, sent: dict | None) -> tuple[int, object]:
    if path == "/models":
        return 200, {"data": [{"id": "rm", "owned_by": "infinity", "stats": {}}]}
    if path == "/rerank":
        raw = [logit(codes(sent["query"] + text)) for text in sent["documents"]]
        found = [{"index": i, "relevance_score": x if sent["raw_scores"] else sigmoid(x)} for i, x in enumerate(raw)]
        return 200, {"object": "rerank", "results": sorted(found, key=lambda entry: -entry["relevance_score"])}
    return 404, {"detail": "Not Found"}


def openrlhf(path: str, sent: dict | None) -> tuple[int, object]:
    if path == "/openapi.json":
        return 200, {"paths": {"/get_reward": {}}}
    if path == "/get_reward":
        rewards = [logit(codes(text)) for text in sent["query"]]
        return 200, {"rewards": rewards, "scores": rewards, "extra_logs": {}}
    return 404, {"detail": "Not Found"}


def _softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]
