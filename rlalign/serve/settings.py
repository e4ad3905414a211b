"""What a server is started with, checked."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlalign.scoring.params import ScoringParams

__all__ = ["ServerSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Raises ValueError on an address that others can reach without an API key, and on limits below 1.

    model_name: what clients call the model; None: the scorer's own id. api_key: asked of every request but /health and the
    documentation, as `Authorization: Bearer KEY`. params: defaults of every request, such as a judge's label_token_ids.
    max_batch_tokens: budget of one forward pass; a single larger request still runs, alone. max_requests, max_queued_tokens:
    beyond these 429 (413 for one request of more tokens than may ever wait). max_items, max_body_bytes: beyond these 413.
    request_timeout_s: from the first byte of a request to its answer. drain_s: what requests in flight get after SIGTERM.
    drift_window, drift_min_labels: see DriftMonitor.
    """

    host: str = "127.0.0.1"
    port: int = 8090
    model_name: str | None = None
    api_key: str | None = field(default=None, repr=False)
    params: ScoringParams | None = None
    max_batch_tokens: int = 16_384
    max_requests: int = 1024
    max_queued_tokens: int = 1 << 20
    max_items: int = 1024
    max_body_bytes: int = 16 << 20
    request_timeout_s: float = 120.0
    drain_s: float = 30.0
    drift_window: int = 2000
    drift_min_labels: int = 200

    def __post_init__(self) -> None:
        for name in ("max_batch_tokens", "max_requests", "max_queued_tokens", "max_items", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("request_timeout_s", "drain_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number of seconds, got {getattr(self, name)}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port: expected 0 to 65535, got {self.port}")
        if self.api_key is not None and (not self.api_key.isascii() or len(self.api_key.strip()) < 8):
            raise ValueError("api_key: expected at least 8 ASCII characters")
        if self.api_key is None and not _loopback(self.host):
            raise ValueError(
                f"host {self.host!r} can be reached by others, and no API key is set: anyone could read scores and replace "
                "the calibration. Set RLALIGN_API_KEY (or --api-key-file), or bind to 127.0.0.1"
            )


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: whether others can reach it is not known
        return False
