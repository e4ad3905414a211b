"""The peer of benchmarks/loop.py: TRL's GRPOTrainer on the same model, prompts, rewards and sizes. Prints one JSON line.

Run by loop.py with the interpreter of an environment that has trl. Times are per optimizer step, from its own callback: on
the wall, and of the processor, which other programs on the machine hardly change.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from pathlib import Path


def reload_on_cpu(generation) -> None:
    """In the peer's favour: its own sync calls the model's load_weights, which fails on CPU, where vLLM has packed its weights.

    TRL 1.16 on vLLM 0.32: "'Parameter' object has no attribute 'weight_loader'". vLLM's own reload, all tensors at once, works.
    """

    def sync_weights() -> None:
        runner = generation.llm.llm_engine.model_executor.driver_worker.model_runner
        runner.reload_weights(weights_iterator=generation._iter_named_params())
        generation.llm.reset_prefix_cache()

    generation.sync_weights = sync_weights


def main(arguments: dict) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(arguments["threads"])
    tokenizer = AutoTokenizer.from_pretrained(arguments["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokens, ends, cpu_ends = [], [], []

    def reward(completions, answer, completion_ids, **_):
        tokens.append(sum(len(ids) for ids in completion_ids))
        return [float(text.strip() == wanted) for text, wanted in zip(completions, answer, strict=True)]

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())
            cpu_ends.append(time.process_time())

    rows = [json.loads(line) for line in Path(arguments["prompts"]).read_text().splitlines()]
    samples = arguments["prompts_per_step"] * arguments["group_size"]
    vllm = {"use_vllm": False}
    if arguments["vllm"]:
        vllm = {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_max_model_length": arguments["max_model_len"],
            "vllm_gpu_memory_utilization": 0.3,
        }
    config = GRPOConfig(
        output_dir=arguments["output"],
        use_cpu=True,
        bf16=arguments["precision"] == "autocast",
        model_init_kwargs={"dtype": "bfloat16" if arguments["precision"] == "bf16" else "float32"},
        gradient_checkpointing=False,
        per_device_train_batch_size=arguments["micro_batch_size"],
        gradient_accumulation_steps=samples // arguments["micro_batch_size"],
        num_generations=arguments["group_size"],
        max_completion_length=arguments["max_tokens"],
        temperature=1.0,
        learning_rate=arguments["lr"],
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        max_steps=arguments["steps"],
        beta=0.0,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        shuffle_dataset=False,
        dataloader_pin_memory=False,
        **vllm,
    )
    trainer = GRPOTrainer(
        model=arguments["model"],
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    if arguments["vllm"]:
        reload_on_cpu(trainer.vllm_generation)
    trainer.train()
    kept = [log for log in trainer.state.log_history if "reward" in log]
    steps, cpu = ([end - start for start, end in pairwise(times)] for times in (ends, cpu_ends))
    found = {"step_s": steps, "cpu_s": cpu, "tokens": tokens, "reward": [log["reward"] for log in kept]}
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
