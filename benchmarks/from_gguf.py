"""A GGUF file as a bf16 Hugging Face folder, so that a model which is only at hand as GGUF can be measured.

The quantised weights are unpacked and rounded to bf16: a model of its own, with the distributions of the one it came from.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

QUESTION = "What is the capital of France?"
ROUND_TRIP = "Hello, world! 12 + 34 = 46; the naïve café isn't open.\n\tdef f(x): return x"


def convert(file: Path, folder: Path) -> dict[str, str]:
    """Write `folder` from `file`, once, and say what the new model answers to a question.

    The folder appears whole or not at all. Raises ValueError for a file that is no GGUF, a folder that is there, a missing
    `gguf` package, and a tokenizer that does not give a text back.
    """
    _require_usable(file, folder)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    begins = _begins_with_bos(file)
    if begins:
        tokenizer.add_bos_token = True  # transformers leaves the file's word for it out, and Gemma is lost without
    network = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    ).to(torch.bfloat16)
    _forget_quantisation(network)
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    network.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    answer = _checked(unfinished, begins)
    unfinished.rename(folder)
    return answer


def _require_usable(file: Path, folder: Path) -> None:
    if not file.is_file():
        raise ValueError(f"--from-gguf {file}: no such file")
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError(f"--from-gguf {file}: not a GGUF file (its first four bytes are not GGUF)")
    if folder.exists():
        raise ValueError(f"--from-gguf: {folder} is there already; remove it, or measure it without --from-gguf")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("--from-gguf needs the package that reads the format: pip install gguf")


def _forget_quantisation(network: object) -> None:
    """The weights are plain now, and a config that still names the GGUF would be loaded as one."""
    network.hf_quantizer = None
    network.is_quantized = False
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config


def _begins_with_bos(file: Path) -> bool:
    """What the file says of its own tokenizer."""
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("tokenizer.ggml.add_bos_token")
    return field is not None and bool(field.contents())


def _checked(folder: Path, begins: bool) -> dict[str, str]:
    """Load the folder as anyone will, encode and decode a text, complete a question greedily."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if "quantization_config" in json.loads((folder / "config.json").read_text()):
        raise ValueError(f"{folder}: the config still names the GGUF; this transformers keeps it in another place")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    back = tokenizer.decode(tokenizer.encode(ROUND_TRIP, add_special_tokens=False))
    if back != ROUND_TRIP:
        raise ValueError(f"{folder}: the tokenizer gives {back!r} back for {ROUND_TRIP!r}; it was not read right")
    if begins != (tokenizer.encode(QUESTION)[:1] == [tokenizer.bos_token_id]):
        raise ValueError(
            f"{folder}: the GGUF {'wants' if begins else 'wants no'} bos token first; the saved tokenizer differs"
        )
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    text = QUESTION
    if tokenizer.chat_template:
        message = [{"role": "user", "content": QUESTION}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
    written = network.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return {"question": text, "answer": tokenizer.decode(written, skip_special_tokens=True)}
