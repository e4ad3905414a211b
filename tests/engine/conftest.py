"""Real vLLM engines in this process (2 s each) over small random models. One engine per kind for the whole session."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from rlalign.config import RolloutConfig
from rlalign.tiny_policy.tokenizer import byte_tokenizer

ROLLOUT = RolloutConfig(max_tokens=12, max_model_len=256, max_num_seqs=32, enforce_eager=True)
PROMPTS = [[1, 40, 41, 42], [1, 60], [1, 70, 71]]


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.engine)


@pytest.fixture(autouse=True, scope="session")
def quick_starts():
    """Start a tiny engine in this process in a quarter of the time, without changing what it computes.

    vLLM collects garbage seven times while an engine starts and ends, through everything that was ever imported: here what is
    alive is frozen when an engine starts, and thawed when the next one does, so that the last one's garbage goes then. It looks
    for kernels to replace in every module at each start: here at the first. It fills a GiB of KV cache with zeros: here 512 blocks.
    """
    from vllm.platforms import current_platform
    from vllm.v1.engine.core import EngineCore

    own_start, own_thaw = EngineCore.__init__, gc.unfreeze

    def start(self, vllm_config, *args, **kwargs):
        own_thaw()
        gc.collect()
        gc.freeze()
        if vllm_config.cache_config.num_gpu_blocks_override is None:
            vllm_config.cache_config.num_gpu_blocks_override = 512
        own_start(self, vllm_config, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineCore, "__init__", start)
        patch.setattr(gc, "unfreeze", lambda: None)
        replace_kernels = cache(type(current_platform).register_triton_kernel_overrides)
        patch.setattr(type(current_platform), "register_triton_kernel_overrides", lambda *_: replace_kernels())
        yield


def build_model(folder: Path, *, tied: bool, seed: int = 0, logit_scale: float = 6.0) -> Path:
    """A random Qwen3 with realistic logits: an untied head is scaled up, since random ones give logits near zero."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(256)
    config = Qwen3Config(
        vocab_size=288, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    if not tied:
        model.lm_head.weight.data.mul_(logit_scale)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def untied(tmp_path_factory) -> Path:
    return build_model(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture(scope="session")
def tied(tmp_path_factory) -> Path:
    return build_model(tmp_path_factory.mktemp("tied"), tied=True)


def start(folder: Path, *, dtype: str = "bfloat16", head_dtype: str = "float32", rollout: RolloutConfig = ROLLOUT):
    from rlalign.rollout.engine.embedded import VLLMEngine

    return VLLMEngine(folder, rollout, dtype=dtype, head_dtype=head_dtype, seed=0)


def perturbed(folder: Path, *, seed: int, dtype: torch.dtype = torch.bfloat16, size: float = 0.02) -> Qwen3ForCausalLM:
    """The model after a made-up optimizer step that moves every weight."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype) * size)
    return model


def on_two_ranks(module: str, model: Path, folder: Path, *more: str) -> Path:
    """`module` by torchrun, which leaves its results in the folder."""
    from rlalign.ranks import environment_without_launcher

    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", module, model, folder,
         *more],
        cwd=Path(__file__).parents[2], env=environment_without_launcher() | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def sample(engine, seed: int = 3, samples: int = 4):
    return engine.generate(PROMPTS, prompt_ids=range(len(PROMPTS)), samples=samples, seed=seed)


def logprobs_of(rollouts) -> list[list[float]]:
    return [r.rollout_logprobs for r in rollouts]


@pytest.fixture
def fp32_copies(monkeypatch) -> None:
    """As on hosts whose bf16 products need an fp32 copy of the weight: the cache is in use."""
    from rlalign.rollout.head import logits_processor

    monkeypatch.setattr(logits_processor, "reads_weight_directly", lambda hidden, weight: False)


def bare_engine(folder: Path, *, head_dtype: str = "float32", mode: str = "auto", **arguments):
    """vLLM's own LLM with our plugin and worker extension, for what VLLMEngine does not offer (LoRA, drafts, transports)."""
    import os

    from rlalign.rollout import SETTINGS_KEY
    from rlalign.rollout.engine.embedded import EMBEDDED_ENVIRONMENT

    for name, value in EMBEDDED_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    defaults = {
        "dtype": "bfloat16", "max_model_len": 256, "max_num_seqs": 32, "enforce_eager": True, "enable_prefix_caching": False,
        "logprobs_mode": "processed_logprobs", "disable_log_stats": True, "use_tqdm_on_load": False, "generation_config": "vllm",
        "worker_extension_cls": "rlalign.rollout.worker.extension.WorkerExtension",
        "additional_config": {SETTINGS_KEY: {"head_dtype": head_dtype, "mode": mode}},
    }  # fmt: skip
    return LLM(model=str(folder), **(defaults | arguments))


def worker_of(llm):
    return llm.llm_engine.model_executor.driver_worker.worker


def logits_through(llm, hidden: torch.Tensor, folder: Path, *, batch: int = 16) -> torch.Tensor:
    """Hidden states [N, D] through the head of a bare engine."""
    from safetensors.torch import load_file, save_file

    file = folder / "hidden.safetensors"
    save_file({"hidden_ND": hidden}, file)
    return load_file(llm.collective_rpc("rlalign_head_logits", args=(str(file), batch))[0]["file"])["logits_NV"]


class TwoServers:
    """Two real vLLM servers on the untied model in float32, started side by side; `restart` brings a killed one back."""

    def __init__(self, model: Path, logs: Path) -> None:
        from rlalign.rollout.server.launching import Launch, start_all

        rollout = replace(ROLLOUT, max_num_seqs=16)
        self.launch = Launch(model=model, config=rollout, dtype="float32", head_dtype="float32", seed=0)
        before = time.monotonic()
        self.processes = start_all(self.launch, 2, logs=logs)
        self.patience_s = 60 + 5 * (
            time.monotonic() - before
        )  # what to wait for on this machine, as loaded as it is now
        self.urls = [process.url for process in self.processes]
        self._logs = logs

    def pool(self, *urls: str, model: Path | None = None, **settings: object):
        """A pool over both, or over these; nothing is published to it yet."""
        from rlalign.rollout.server.pool import ServerPool

        config = replace(
            ROLLOUT,
            backend="server",
            servers=list(urls or self.urls),
            health_every_s=0.5,
            start_timeout_s=self.patience_s,
        )
        config = replace(config, **settings)
        wanted = replace(self.launch, model=model or self.launch.model, config=config)
        return ServerPool(config.servers, wanted, count=len(config.servers))

    def restart(self, index: int) -> None:
        from rlalign.rollout.server.launching import ServerProcess

        old = self.processes[index]
        old.stop()
        log = self._logs / f"server-{index}-again.log"
        self.processes[index] = ServerProcess(self.launch, host="127.0.0.1", port=old.port, key=None, log=log)
        self.processes[index].wait_ready(time.monotonic() + self.patience_s)


@pytest.fixture(scope="session")
def two_servers(untied, tmp_path_factory):
    """Shared by all tests of rollout.backend=server: about 40 s to start on two cores."""
    from rlalign.rollout.server.launching import stop_all

    servers = TwoServers(untied, tmp_path_factory.mktemp("servers"))
    yield servers
    stop_all(servers.processes)
