"""What is read off vLLM's completions: their texts, the set each token was sampled from, routed experts, and ids no text has."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlalign.rollout.engine.surface import kv_spans
from rlalign.types import Rollout

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase
    from vllm.logprobs import FlatLogprobs
    from vllm.outputs import CompletionOutput

__all__ = ["RoutedExperts", "UnknownIds", "core_of", "kept_sets", "rollout_of", "said", "texts"]

REPLACEMENT = "\ufffd"  # stands for bytes that are no UTF-8, or not yet
Ask = Callable[[str], list[dict]]


def core_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """What `texts` decodes with; None for a tokenizer written in Python, whose texts vLLM had better make itself."""
    from transformers import PreTrainedTokenizerFast

    return tokenizer.backend_tokenizer if isinstance(tokenizer, PreTrainedTokenizerFast) else None


def said(tokens: Sequence[int], finish_reason: str) -> Sequence[int]:
    """The tokens that become text: vLLM leaves out the one that stopped the completion."""
    return tokens[:-1] if finish_reason == "stop" else tokens


def texts(
    tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], sampled: Sequence[Sequence[Sequence[int]]]
) -> list[list[str]]:
    """The text of every completion `sampled[i][j]` of `prompts[i]`, without special tokens: what follows the prompt's own text.

    Made of all at once: vLLM decodes each token as it comes, and for every token's logprob entry once more, a tenth of the time of
    `generate`. A character whose last bytes were not sampled is left out.
    """
    prompts = [list(prompt) for prompt in prompts]
    heads = tokenizer.decode_batch(prompts, skip_special_tokens=True)
    together = [[*prompt, *tokens] for prompt, of_prompt in zip(prompts, sampled, strict=True) for tokens in of_prompt]
    wholes = iter(tokenizer.decode_batch(together, skip_special_tokens=True))
    return [
        [_after(tokenizer, head, next(wholes), prompt, tokens) for tokens in of_prompt]
        for head, prompt, of_prompt in zip(heads, prompts, sampled, strict=True)
    ]


def _after(tokenizer: Tokenizer, head: str, whole: str, prompt: list[int], tokens: Sequence[int]) -> str:
    text = whole[len(head) :]
    if whole.startswith(head) and REPLACEMENT not in text:
        return text
    return _step_by_step(tokenizer, [] if head.endswith(REPLACEMENT) else prompt, tokens)


def _step_by_step(tokenizer: Tokenizer, prompt: list[int], tokens: Sequence[int]) -> str:
    """As vLLM does it: nothing of a token is kept before its bytes end in a whole character.

    Bytes that take back a character that was whole (byte fallback decodes a run of bytes all or nothing) begin anew.
    """
    from tokenizers.decoders import DecodeStream

    stream, found = DecodeStream(ids=prompt, skip_special_tokens=True), []
    for token in tokens:
        try:
            found.append(stream.step(tokenizer, token))
        except Exception as error:  # tokenizers raises nothing more particular
            if not str(error).startswith("Invalid prefix encountered"):
                raise
            stream = DecodeStream(skip_special_tokens=True)
            found.append(stream.step(tokenizer, token))
    return "".join(text for text in found if text is not None)


def kept_sets(flat: FlatLogprobs, reported: int) -> tuple[array, array]:
    """(ids, how many each token has) of one completion, as `Rollout.kept_ids` and `kept_counts`; both empty for reported 0.

    reported: ids asked for with each token, the likeliest first; the sampled token precedes them. Where all of them are finite the
    set may go on, and 0 is said. Raises RuntimeError when vLLM reported another number of ids.
    """
    if not reported:
        return array("i"), array("q")
    tokens = len(flat.start_indices)
    if len(flat.token_ids) != tokens * (reported + 1):
        raise RuntimeError(
            f"vLLM reported {len(flat.token_ids)} ids for {tokens} tokens, expected {reported + 1} for each: the kept sets cannot "
            "be told apart; run with rollout.capture_ids=0, with which the trainer computes them"
        )
    shape = (tokens, reported + 1)
    ids_TK = np.asarray(flat.token_ids, dtype=np.int32).reshape(shape)[:, 1:]
    inside_TK = np.asarray(flat.logprobs, dtype=np.float64).reshape(shape)[:, 1:] > -np.inf
    inside_TK &= ~inside_TK.all(1, keepdims=True)
    return array("i", ids_TK[inside_TK].tobytes()), array("q", inside_TK.sum(1, dtype=np.int64).tobytes())


def rollout_of(
    prompt: Sequence[int],
    completion: CompletionOutput,
    *,
    prompt_id: int,
    group_id: int,
    version: int | None,
    text: str = "",
    reported: int = 0,
    experts: array | None = None,
    experts_shape: tuple[int, int] = (0, 0),
) -> Rollout:
    """What vLLM sampled behind a prompt, with flat logprobs, as a rollout.

    version: that sampled it whole; None: vLLM says which version sampled which token. reported: ids asked for with each token.
    Raises RuntimeError where the logprobs are those of other tokens.
    """
    tokens, flat, start = list(completion.token_ids), completion.logprobs, len(prompt)
    if [flat.token_ids[first] for first in flat.start_indices] != tokens:
        raise RuntimeError(f"vLLM gave logprobs of other tokens than it sampled for prompt {prompt_id}")
    if version is None:
        spans = [(start + s.start, start + s.end, int(s.version)) for s in completion.weight_versions]
    else:
        spans = [(start, start + len(tokens), version)]
    kept_ids, kept_counts = kept_sets(flat, reported)
    return Rollout(
        token_ids=[*prompt, *tokens],
        loss_mask=[False] * start + [True] * len(tokens),
        rollout_logprobs=[0.0] * start + [flat.logprobs[first] for first in flat.start_indices],
        prompt_id=prompt_id,
        group_id=group_id,
        finish_reason=completion.finish_reason,
        version_spans=spans,
        kv_spans=kv_spans(spans),
        text=text,
        kept_ids=kept_ids,
        kept_counts=kept_counts,
        experts=array("B") if experts is None else experts,
        experts_shape=experts_shape,
    )


@dataclass(frozen=True, slots=True)
class UnknownIds:
    """first: the id from which on the tokenizer has none; behind: rows from there on; between: ids missing before."""

    first: int
    behind: int
    between: int

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase, rows: int) -> UnknownIds:
        """rows: of the model's vocabulary."""
        known = {i for i in tokenizer.get_vocab().values() if i < rows}
        first = max(known, default=-1) + 1
        return UnknownIds(first=first, behind=rows - first, between=first - len(known))

    def describe(self, rows: int) -> str:
        """One line, for the doctor."""
        if not self.behind and not self.between:
            return f"each of the model's {rows} rows is an id of the tokenizer"
        where = f"{self.behind} from id {self.first} on" + (
            f", {self.between} between the others" if self.between else ""
        )
        return f"{self.behind + self.between} of the model's {rows} rows are ids that no text has ({where})"

    def bar(self) -> int:
        """The number of ids to sample from. Raises ValueError where ids in between would stay."""
        if self.between:
            raise ValueError(
                f"rollout.bar_unknown_ids: {self.between} ids below the tokenizer's last one belong to no token, and only ids "
                "behind it can be left out on both sides; use a tokenizer without holes, or bar_unknown_ids=false"
            )
        return self.first if self.behind else 0


class RoutedExperts:
    """What the workers recorded, or vLLM's V2 runner returned. bytes_per_token: of every position that a rollout carries."""

    def __init__(self, ask: Ask) -> None:
        """Start recording on every rank. Raises what the workers raise: a model without experts, a runner that hides them."""
        about = ask("rlalign_routes_start")[0]
        self._ask, self._code, self._returned = ask, "H" if about["wide"] else "B", about["returned"]
        self.layers: list[int] = about["layers"]
        self.shape = (len(self.layers), about["k"])
        self.bytes_per_token = self.shape[0] * self.shape[1] * array(self._code).itemsize

    def forget(self) -> None:
        """Drop what was recorded so far: of requests that failed, or that were scored and not sampled."""
        if not self._returned:
            self._ask("rlalign_routes_take")

    def take(self, version: int) -> Callable[[CompletionOutput, int, int], array]:
        """A function from (a completion, its seed, its tokens) to its entries: of all positions but the last, only sampled.

        Raises RuntimeError for a completion without all of them, or with routes that another version's gates made.
        """
        if self._returned:
            return self._from_engine
        found = {int(seed): entry for seed, entry in self._ask("rlalign_routes_take")[0]["routes"].items()}

        def of(completion: CompletionOutput, seed: int, tokens: int) -> array:
            entry = found.get(seed, {"positions": 0, "versions": [], "data": b""})
            self._require(entry["positions"], tokens)
            if entry["versions"] != [version]:
                raise RuntimeError(
                    f"routed experts: made by the gates of versions {entry['versions']} for a completion of version {version}: a "
                    "prefix cache outlived its weights"
                )
            entries = array(self._code, entry["data"])
            return entries[: (tokens - 1) * self.shape[0] * self.shape[1]]

        return of

    def _from_engine(self, completion: CompletionOutput, seed: int, tokens: int) -> array:
        """vLLM's own [positions, decoder layers, K]. It keeps those of cached prompts beside the cache, and drops both together."""
        rows = completion.routed_experts
        self._require(0 if rows is None else len(rows), tokens)
        return array(self._code, rows[: tokens - 1, self.layers].tobytes())

    def _require(self, positions: int, tokens: int) -> None:
        if positions < tokens - 1:
            raise RuntimeError(
                f"routed experts: the engine recorded {positions} positions of a completion of {tokens} tokens; expected "
                f"{tokens - 1}. Report it with the model's name; rollout.replay_experts=off runs without"
            )
