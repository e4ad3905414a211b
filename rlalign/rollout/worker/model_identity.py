"""Which model a server runs, as its workers tell it; the same digests are taken of the run's own model folder."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import uuid
from pathlib import Path

LIFE = uuid.uuid4().hex[:12]  # of this process: a restarted server has another
VOLATILE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}  # say nothing about the model


class IdentityExtension:
    """The RPCs of one worker that handshakes ask: of rollout.backend=server, and of `rlalign.attach`."""

    rlalign_owner: str | None = None  # the handle that is attached
    rlalign_sampled_steps: int = 0  # engine steps that sampled, since the start

    def rlalign_claim(self, owner: str | None) -> dict[str, object]:
        """Note the handle that this engine is attached to; None: to none."""
        self.rlalign_owner = owner
        return {"rank": self.rank, "owner": owner}

    def rlalign_identity(self) -> dict[str, object]:
        """Host, process, model and the settings that decide what its numbers mean."""
        model, parallel = self.vllm_config.model_config, self.vllm_config.parallel_config
        return {
            "rank": self.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "life": LIFE,
            "model": str(model.model),
            **digests(Path(model.model)),
            "vocab_size": model.get_vocab_size(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_model_len": model.max_model_len,
            "logprobs_mode": str(model.logprobs_mode),
            "kv_cache_dtype": str(self.vllm_config.cache_config.cache_dtype),
            "device": self.vllm_config.device_config.device_type,
            "ranks": parallel.world_size,  # of this engine
            "sampling_defaults": dict(model.get_diff_sampling_param()),  # where a request leaves settings out
            "owner": self.rlalign_owner,
            "sampled_steps": self.rlalign_sampled_steps,
        }


def digests(folder: Path) -> dict[str, str | None]:
    """{"config", "tokenizer"}: of config.json without what differs between equal models, and of tokenizer.json; None: no file."""
    config, tokenizer = folder / "config.json", folder / "tokenizer.json"
    found: dict[str, str | None] = {"config": None, "tokenizer": None}
    if config.is_file():
        settings = {name: value for name, value in json.loads(config.read_text()).items() if name not in VOLATILE}
        found["config"] = _digest(json.dumps(settings, sort_keys=True).encode())
    if tokenizer.is_file():
        found["tokenizer"] = _digest(tokenizer.read_bytes())
    return found


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=6).hexdigest()
