"""Requests that a careless or hostile client might send: valid ones with pieces exchanged, and bytes that are no request at all.

Seeded: number i is always the same request.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

Json = dict | list | str | int | float | bool | None

VALID: dict[str, tuple[str, list[dict]]] = {
    "/v1/score": ("POST", [
        {"query": "q", "items": ["a", "b"], "model": "default"},
        {"query": [1, 2], "items": [[3], [4, 5]], "return_pooled_hidden_states": True, "encoding_format": "base64"},
        {"query": "q", "items": "a", "apply_softmax": True, "temperature": 2.0, "label_token_ids": [1, 2]},
        {"query": "", "items": ["nan"], "calibrate": None, "truncate_prompt_tokens": 5, "policy_version": 3, "task": "classify"},
        {"query": "q", "items": ["a"], "use_activation": True, "item_first": True, "max_tokens_per_item": 1, "step_tag_id": None},
    ]),
    "/score": ("POST", [
        {"queries": "q", "documents": ["a", "b"], "use_activation": False},
        {"text_1": ["q", "r"], "text_2": ["a", "b"], "truncate_prompt_tokens": -1, "user": "me"},
    ]),
    "/rerank": ("POST", [{"query": "q", "documents": ["a", "b"], "top_n": 1}]),
    "/classify": ("POST", [{"input": ["a", "b"]}, {"input": [1, 2, 3], "use_activation": True}]),
    "/get_reward": ("POST", [{"query": ["a", "b"], "prompts": ["x", "y"], "labels": [None, "4"]}]),
    "/v1/labels": ("POST", [{"labels": [{"id": "score-1/0", "label": 1}, {"logit": 0.5, "label": 0, "weight": 2.0}]}]),
}  # fmt: skip
JUNK: tuple[Json, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**40, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "a", "\x00", "\ud800",
    "nan", "default", "/etc/passwd", "../../etc/passwd", "file:///etc/passwd", "cos\nsystem\n(S'true'\ntR.", "{}", "x" * 5000, [],
    {}, [[]], [None], [True], [{}], ["a", 1], [1, "a"], [[1, 2], ["a"]], [0.5], ["a"] * 70, [1] * 70, {"content": "a"},
    {"a": {"b": []}},
)  # fmt: skip
NAMES = (
    "query",
    "items",
    "model",
    "temperature",
    "__class__",
    "constructor",
    "",
    "\ud800",
    "task",
    "softmax",
    "params",
    "embed",
)


@dataclass(frozen=True)
class Hostile:
    """One request, ready to send."""

    method: str
    path: str
    body: bytes
    content_type: str | None


def hostile_requests(count: int, *, calibration: dict | None = None, seed: int = 0) -> Iterator[Hostile]:
    """The first `count` requests. calibration: a valid calibration document; its mutations are put, with their digest mended."""
    paths = dict(VALID)
    if calibration is not None:
        paths["/v1/calibration"] = ("PUT", [calibration])
    for i in range(count):
        rng = random.Random(f"{seed}/{i}")
        path = rng.choice(sorted(paths))
        method, bodies = paths[path]
        body = copy.deepcopy(rng.choice(bodies))
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            body = _mutated(body, rng)
        if path == "/v1/calibration" and isinstance(body, dict):
            body = _sealed(body)
        text = json.dumps(body).encode()
        kind = "application/json"
        if rng.random() < 0.15:
            text = _broken(text, rng)
        if rng.random() < 0.03:
            kind = rng.choice(
                (None, "text/plain", "application/x-www-form-urlencoded", "application/octet-stream", "a/b/c;=")
            )
        if rng.random() < 0.03:
            method = rng.choice(("GET", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"))
        yield Hostile(method, path, text, kind)


def _mutated(value: Json, rng: random.Random) -> Json:
    """One place of the value exchanged, dropped, added or multiplied."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        name = rng.choice(sorted(value))
        what = rng.random()
        if what < 0.15:
            del value[name]
        elif what < 0.3:
            value[rng.choice(NAMES)] = copy.deepcopy(rng.choice(JUNK))
        else:
            value[name] = _mutated(value[name], rng)
        return value
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        if rng.random() < 0.2:
            return value * rng.choice((0, 2, 30))
        value[at] = _mutated(value[at], rng)
        return value
    if rng.random() < 0.05:
        deep: Json = 1
        for _ in range(rng.choice((10, 300))):
            deep = [deep] if rng.random() < 0.5 else {"a": deep}
        return deep
    return copy.deepcopy(rng.choice(JUNK))


def _broken(text: bytes, rng: random.Random) -> bytes:
    """Bytes that are no JSON, or nearly."""
    at = rng.randrange(len(text) + 1)
    return rng.choice((
        b"", text[:at], text + text, text[:at] + bytes([rng.randrange(256)]) + text[at:], b"[" * 20_000, b'{"a":' * 5000,
        b"9" * 6000, b"\xff\xfe" + text, text.replace(b'"', b"'"), rng.randbytes(200), b"null", b"NaN", b'"text"',
    ))  # fmt: skip


def _sealed(document: dict) -> dict:
    """With the digest that fits, so that what is behind the digest's check is reached too."""
    try:
        content = {name: value for name, value in document.items() if name != "digest"}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return document
    return content | {"digest": hashlib.sha256(text.encode()).hexdigest()}
