"""The rollout engine: what is sampled, and how vLLM is started."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from rlalign.config.sections import not_negative, one_of, positive, require

BACKENDS = ("embedded", "server")
REPLAY_EXPERTS = ("off", "all", "known")


@dataclass(kw_only=True)
class ServersConfig:
    backend: str = "embedded"  # embedded: vLLM inside the first trainer rank | server: vLLM's HTTP servers
    start: int = 0  # servers that the run starts on its own machine, on free ports, and ends with itself
    servers: list[str] = field(default_factory=list)  # urls of servers that `rlalign rollout-server` started
    server_folder: str = ""  # where such servers say that they are ready, instead of urls
    wait_for: int = 0  # servers to wait for in server_folder; those that come later join at the next publish
    concurrency: int = 0  # completions in flight at one server; 0: twice max_num_seqs, so that it never runs dry
    # completions asked for at once; 0: the whole group, whose prompt is then computed once
    samples_per_request: int = 0
    start_timeout_s: float = 1800.0  # until every server is ready
    request_timeout_s: float = 7200.0  # of one request, pauses included; afterwards the server counts as hung
    pause_timeout_s: float = 900.0  # of one update of the weights, for which completions wait
    health_every_s: float = 5.0  # three missed answers in a row: the server is down

    def __post_init__(self) -> None:
        positive(self, "rollout", "start_timeout_s", "request_timeout_s", "pause_timeout_s", "health_every_s")
        one_of(self, "rollout", "backend", BACKENDS)
        not_negative(self, "rollout", "start", "wait_for", "concurrency", "samples_per_request")
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


@dataclass(kw_only=True)
class RolloutConfig(ServersConfig):
    prompts_per_step: int = 16
    group_size: int = 8  # completions of one prompt
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    bar_unknown_ids: bool = False  # never sample ids behind the tokenizer's last one (embedded engine)
    capture_ids: int = 128  # largest kept set the embedded engine reports; 0: the trainer computes them all
    # of mixtures: off | all (every token's, or an error) | known (else the trainer's own choice)
    replay_experts: str = "off"
    max_tokens: int = 512  # sampled tokens of one completion
    max_model_len: int = 2048  # prompt + completion, tokens
    max_num_seqs: int = 128  # sequences the engine decodes at once
    # tokens of one engine step; 0: vLLM's choice. Below max_model_len prefills are chunked
    max_num_batched_tokens: int = 0
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.4  # the trainer shares the device
    cpu_kv_cache_gib: int = 1
    enforce_eager: bool = False
    prefix_caching: bool = True
    head_mode: str = "auto"  # auto | native | cached: how vLLM reaches float32 logits

    def over_all_ids(self) -> RolloutConfig:
        """The same without truncation and barred ids: what a diagnosis compares that forces given tokens."""
        return replace(self, top_p=1.0, top_k=0, min_p=0.0, bar_unknown_ids=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(
            self,
            "rollout",
            "prompts_per_step",
            "group_size",
            "max_tokens",
            "max_model_len",
            "max_num_seqs",
            "tensor_parallel_size",
        )
        require(
            self.temperature > 0,
            f"rollout.temperature={self.temperature}: must be positive; greedy rollouts carry no exploration and no usable ratio",
        )
        require(
            0.0 < self.top_p <= 1.0 and self.top_k >= 0 and 0.0 <= self.min_p < 1.0,
            f"rollout.top_p={self.top_p}, top_k={self.top_k}, min_p={self.min_p}: top_p must lie in (0, 1], top_k be 0 (off) or "
            "more, min_p lie in [0, 1)",
        )
        require(
            not (self.bar_unknown_ids and self.backend == "server"),
            "rollout.bar_unknown_ids with rollout.backend=server: each request would carry the vocabulary; use embedded",
        )
        require(
            0 <= self.capture_ids < 4096,
            f"rollout.capture_ids={self.capture_ids}: must lie in 0..4095; the trainer computes larger kept sets from its own "
            "logits",
        )
        one_of(self, "rollout", "replay_experts", REPLAY_EXPERTS)
        require(
            self.replay_experts == "off" or self.backend == "embedded",
            f"rollout.replay_experts={self.replay_experts} with rollout.backend={self.backend}: routes are read off the embedded "
            "engine's workers; use rollout.backend=embedded",
        )
        require(
            self.replay_experts == "off" or self.enforce_eager,
            f"rollout.replay_experts={self.replay_experts} with rollout.enforce_eager=false: captured graphs hide the routes; use "
            "rollout.enforce_eager=true",
        )
        require(
            self.max_tokens < self.max_model_len,
            f"rollout.max_tokens={self.max_tokens} leaves no room for a prompt in rollout.max_model_len={self.max_model_len}",
        )
        one_of(self, "rollout", "head_mode", ("auto", "native", "cached"))
