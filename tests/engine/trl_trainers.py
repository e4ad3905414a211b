"""Trainers of TRL's released package on a tiny policy, for the tests of its adapter."""

import os
from contextlib import contextmanager

import pytest
from torch.utils.data import Dataset
from transformers import AutoTokenizer

import rlalign
from tests.peers import without_transport

STEPS, PROMPTS, GROUP, TOKENS = 3, 4, 4, 6
ROWS = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a in range(1, 9) for b in range(1, 9)]
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip


@contextmanager
def trl_loaded():
    """Inside: TRL and its adapter, and what TRL leaves in the environment for vLLM's process group is gone afterwards."""
    before = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        with without_transport():
            import trl
            import trl.trainer.grpo_trainer
            import trl.trainer.rloo_trainer  # lazily loaded otherwise, outside

            from rlalign.integrations import trl as adapter
        yield trl, adapter
    for name in set(os.environ) - set(before):
        os.environ.pop(name)


def rows(kind):
    """The prompts as what TRL takes for a datasets.Dataset here: the real one, or the placeholder of tests.peers."""
    if hasattr(kind, "from_list"):
        return kind.from_list(ROWS)
    indexed = {"__len__": lambda self: len(ROWS), "__getitem__": lambda self, index: ROWS[index]}
    return type("Rows", (kind, Dataset), indexed)()


def make(trl, folder, output, *, kind="GRPO", aligned=True, peft_config=None, dtype="float32", **changes):
    """A trainer, aligned or as TRL makes it; changes: of its configuration."""
    package, adapter = trl
    options = {
        "output_dir": str(output), "use_cpu": True, "bf16": dtype == "float32", "model_init_kwargs": {"dtype": dtype},
        "gradient_checkpointing": False, "per_device_train_batch_size": PROMPTS * GROUP, "num_generations": GROUP,
        "max_completion_length": TOKENS, "temperature": 0.9, "learning_rate": 1e-3, "max_steps": STEPS, "beta": 0.0,
        "save_strategy": "no", "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False,
        "use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 64, "vllm_gpu_memory_utilization": 0.3,
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def reward(completions, answer, **_):
        """Right ones, and short ones: groups without a reward of either sign would move nothing."""
        right = [text.strip() == wanted for text, wanted in zip(completions, answer, strict=True)]
        return [float(is_right) - 0.1 * len(text) for is_right, text in zip(right, completions, strict=True)]

    owner, extra = (
        (adapter, {"rlalign_vllm": {"enforce_eager": True, "dtype": "bfloat16"}}) if aligned else (package, {})
    )
    return getattr(owner, f"{'Aligned' if aligned else ''}{kind}Trainer")(
        model=str(folder), reward_funcs=reward, args=getattr(package, f"{kind}Config")(**(options | changes)),
        train_dataset=rows(getattr(package.trainer, f"{kind.lower()}_trainer").Dataset), processing_class=tokenizer,
        peft_config=peft_config, **extra,
    )  # fmt: skip


@contextmanager
def on_engine(adapter, llm=None):
    """Trainers built inside take this engine, which has sampled for others before; llm: None for a server's."""
    with pytest.MonkeyPatch.context() as patch:
        used = {"after_generation": True, "take_over": True}
        patch.setattr(adapter, "attach", lambda engine, **given: rlalign.attach(engine, **given, **used))
        if llm is not None:
            patch.setattr(adapter.vllm_generation, "LLM", lambda **given: llm)
        yield
