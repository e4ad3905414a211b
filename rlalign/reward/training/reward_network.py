"""The network of a reward model: a causal language model's body with one number on top, read at a sequence's last token.

N sequences, L padded length, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from rlalign.scoring.params import ScoringParams
from rlalign.scoring.sequences import Sequencer
from rlalign.trainer import attention_choice

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RewardNetwork(nn.Module):
    """Token ids to rewards. `model` is what transformers saves and loads: a sequence classifier with one label."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_NL: Tensor, lengths_N: Tensor) -> Tensor:
        """Rewards [N] float32. lengths_N: tokens of each sequence; what lies to the right of them is padding.

        The last token is found by its place: transformers looks for the pad id, and finds the wrong token in models whose
        pad and end tokens are one.
        """
        place_L = torch.arange(ids_NL.shape[1], device=ids_NL.device)
        mask_NL = place_L < lengths_N[:, None]
        states = self.model.base_model(input_ids=ids_NL, attention_mask=mask_NL.long(), use_cache=False)
        last_ND = states.last_hidden_state[torch.arange(len(ids_NL), device=ids_NL.device), lengths_N - 1]
        with torch.autocast(ids_NL.device.type, enabled=False):
            return self.model.score(last_ND.float())[:, 0]


def load(path: Path, *, seed: int) -> tuple[RewardNetwork, PreTrainedTokenizerBase]:
    """A reward model to go on with, or a causal language model that gets a new head, in float32.

    Raises ValueError where the folder is neither, or the architecture has no score head on its last token.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is not a Hugging Face folder (no config.json there)")
    shown = logging.get_verbosity()
    logging.set_verbosity_error()  # that the head is new is what was asked for
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # of the new head
            model = AutoModelForSequenceClassification.from_pretrained(
                path, num_labels=1, dtype=torch.float32, attn_implementation=attention_choice.of_folder(path).name
            )
    except ValueError as error:
        raise ValueError(f"{path}: transformers has no sequence classifier of this architecture ({error})") from error
    finally:
        logging.set_verbosity(shown)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise ValueError(
            f"{path}: {type(model).__name__} has no linear score head on the last token; start from a decoder (Llama, Qwen, ...)"
        )
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{path}: the tokenizer has neither a pad nor an eos token; batches cannot be padded")
    model.config.pad_token_id = tokenizer.pad_token_id
    return RewardNetwork(model), tokenizer


def tokenised(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, str]], *, max_length: int, chat: bool, model: str
) -> list[list[int] | None]:
    """Token ids of (prompt, completion), exactly as HFScorer reads them; None for those longer than max_length.

    chat: through the tokenizer's chat template. Nothing is cut: a model that has learned from halves of answers scores halves.
    Raises ValueError where there is no template.
    """
    if chat and tokenizer.chat_template is None:
        raise ValueError(f"{model}: its tokenizer has no chat template; train on plain text, or add one")
    sequencer = Sequencer(tokenizer, pairs=False, max_length=None, model=model)
    found: list[list[int] | None] = []
    for prompt, completion in texts:
        if chat:
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            (sequence,) = sequencer.sequences(prompt, [completion], ScoringParams())
            ids = [*sequence.shared, *sequence.own]
        found.append(ids if len(ids) <= max_length else None)
    return found


def padded(sequences: Sequence[list[int]], *, pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """ids [N, L] padded on the right, and lengths [N]."""
    ids_NL = torch.full((len(sequences), max(map(len, sequences))), pad_token_id)
    for row, ids in enumerate(sequences):
        ids_NL[row, : len(ids)] = torch.tensor(ids)
    return ids_NL.to(device), torch.tensor([len(ids) for ids in sequences], device=device)
