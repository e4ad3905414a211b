"""Prompts of the user's own for the diagnosis: a text file with one a line, or JSONL with a field `prompt` or `token_ids`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlalign.run.assembly import encode
from rlalign.tasks.rows import cell, jsonl_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase, *, chat: bool, limit: int) -> list[list[int]]:
    """Token ids of the first `limit` prompts. Raises ValueError naming file and line for what cannot be used."""
    if path.suffix != ".jsonl":
        if not path.is_file():
            raise ValueError(f"prompt file {path} does not exist")
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = [encode(tokenizer, line, chat=chat) for line in lines[:limit]]
    else:
        found = []
        for where, row in jsonl_rows(path):
            if len(found) == limit:
                break
            if "token_ids" in row:
                found.append(_ids(row["token_ids"], where, len(tokenizer)))
            else:
                found.append(encode(tokenizer, cell(row, "prompt", where), chat=chat))
    if not found:
        raise ValueError(f"prompt file {path} holds no prompts")
    return found


def _ids(value: Any, where: str, vocabulary: int) -> list[int]:
    right = isinstance(value, list) and value and all(type(i) is int and 0 <= i < vocabulary for i in value)
    if not right:
        raise ValueError(f"{where}: token_ids must be a list of ids below {vocabulary}, got {str(value)[:60]}")
    return value
