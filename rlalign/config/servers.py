"""Where completions are sampled: by vLLM inside the run, or by vLLM's own HTTP servers, started here or already running."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlalign.config.checks import positive, require

BACKENDS = ("embedded", "server")


@dataclass(kw_only=True)
class ServersConfig:
    backend: str = "embedded"  # embedded: vLLM inside the first trainer rank | server: vLLM's HTTP servers
    start: int = 0  # servers that the run starts on its own machine, on free ports, and ends with itself
    servers: list[str] = field(default_factory=list)  # urls of servers that `rlalign rollout-server` started
    server_folder: str = ""  # where such servers say that they are ready, instead of urls
    wait_for: int = 0  # servers to wait for in server_folder; those that come later join at the next publish
    concurrency: int = 0  # completions in flight at one server; 0: twice max_num_seqs, so that it never runs dry
    samples_per_request: int = (
        0  # completions asked for at once; 0: the whole group, whose prompt is then computed once
    )
    start_timeout_s: float = 1800.0  # until every server is ready
    request_timeout_s: float = 7200.0  # of one request, pauses included; afterwards the server counts as hung
    pause_timeout_s: float = 900.0  # of one update of the weights, for which completions wait
    health_every_s: float = 5.0  # three missed answers in a row: the server is down

    def __post_init__(self) -> None:
        positive(
            self, "rollout", "start_timeout_s", "request_timeout_s", "pause_timeout_s", "health_every_s"
        )  # fmt: skip
        require(
            self.backend in BACKENDS, f"rollout.backend={self.backend!r}: choose one of {', '.join(BACKENDS)}"
        )  # fmt: skip
        for name in ("start", "wait_for", "concurrency", "samples_per_request"):
            require(getattr(self, name) >= 0, f"rollout.{name}={getattr(self, name)}: must not be negative")
        self._require_one_source()

    def _require_one_source(self) -> None:
        given = {
            "rollout.start": bool(self.start),
            "rollout.servers": bool(self.servers),
            "rollout.server_folder": bool(self.server_folder),
        }
        chosen = [name for name, there in given.items() if there]
        if self.backend == "embedded":
            require(not chosen, f"{' and '.join(chosen)} with rollout.backend=embedded: set rollout.backend=server")
            require(not self.wait_for, "rollout.wait_for with rollout.backend=embedded: set rollout.backend=server")
            return
        require(
            len(chosen) == 1,
            f"rollout.backend=server needs exactly one of {', '.join(given)}, got {' and '.join(chosen) or 'none'}: servers "
            "that the run starts, the urls of running ones, or the folder in which they announce themselves",
        )
        require(
            bool(self.wait_for) == bool(self.server_folder),
            f"rollout.wait_for={self.wait_for} with rollout.server_folder={self.server_folder!r}: the folder needs the number "
            "of servers to wait for, and nothing else does",
        )
        for url in self.servers:
            require(
                url.startswith(("http://", "https://")),
                f"rollout.servers: {url!r} is no url; write http://HOST:PORT, as `rlalign rollout-server` prints it",
            )
        require(len(set(self.servers)) == len(self.servers), "rollout.servers names a server twice")
