"""What naive re-rendering does to sampled ids, over real tokenizers with their own chat templates. Writes results/rerendering.md.

python -m benchmarks.rerendering NAME=FOLDER ... [--sample NAME=FOLDER]   (folders with tokenizer.json; --sample: with weights, too)
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jinja2.exceptions import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from rlalign.tasks.prefix_law import Breach, check_prefix_law, extend

CONVERSATIONS, TURNS = 50, 4
OUT = Path(__file__).parent / "results" / "rerendering.md"
KINDS = {
    "plain": "answers of one line",
    "thinking": "each answer begins with <think>...</think>",
    "spaces": "answers that begin or end with a line break",
    "tools": "each answer is followed by a message of the role tool",
    "split": "plain answers, one token of each sampled as two that spell the same text",
}


def conversation(kind: str, draw: random.Random) -> list[dict[str, str]]:
    """TURNS questions and answers of arithmetic, and a last question."""
    messages = []
    for _ in range(TURNS):
        a, b = draw.randint(10, 999), draw.randint(10, 999)
        messages.append({"role": "user", "content": f"What is {a} + {b}?"})
        if kind == "tools" and len(messages) > 1:
            messages[-1]["role"] = "tool"
        answer = f"{a} plus {b} makes {a + b}."
        before = {"thinking": f"<think>\n{a} + {b}: carry where needed.\n</think>\n\n", "spaces": "\n"}.get(kind, "")
        messages.append({"role": "assistant", "content": before + answer + ("\n" if kind == "spaces" else "")})
    return [*messages, {"role": "tool" if kind == "tools" else "user", "content": "Thanks. Once more?"}]


def split(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], draw: random.Random) -> list[int]:
    """The same text with one token as two; as it is where none can be split."""
    vocabulary = tokenizer.get_vocab()
    names = tokenizer.convert_ids_to_tokens(list(ids))
    ways = [
        (at, vocabulary[name[:cut]], vocabulary[name[cut:]])
        for at, name in enumerate(names)
        for cut in range(1, len(name))
        if name[:cut] in vocabulary and name[cut:] in vocabulary
    ]
    if not ways:
        return list(ids)
    at, first, second = draw.choice(ways)
    return [*ids[:at], first, second, *ids[at + 1 :]]


def cell(tokenizer: PreTrainedTokenizerBase, kind: str) -> str:
    """Turns whose next prompt is another, of all; the ids behind the first difference; the cause."""
    draw, found, turns = random.Random(0), [], 0
    for _ in range(CONVERSATIONS):
        messages = conversation(kind, draw)
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        plain = {i: tokenizer.encode(messages[i]["content"], add_special_tokens=False) for i in answers}
        sampled = {i: split(tokenizer, ids, draw) for i, ids in plain.items()} if kind == "split" else None
        try:
            breaches = check_prefix_law(tokenizer, messages, sampled=sampled)
        except TemplateError as error:
            return f"refused: {str(error)[:40]}"
        require_extended(tokenizer, messages, sampled or plain, breaches)
        found += breaches
        turns += len(answers)
    if not found:
        return "holds"
    causes = Counter(b.cause for b in found).most_common()
    lost = 1.0 - sum(b.share for b in found) / len(found)
    return f"{len(found) / turns:.0%}, {lost:.0%}: {', '.join(name for name, _ in causes)}"


def require_extended(
    tokenizer: PreTrainedTokenizerBase, messages: list, sampled: dict, breaches: Sequence[Breach]
) -> None:
    """`extend` never changes an id, and is the whole rendering where the law holds."""
    turns = sorted(sampled)
    broken = {b.turn for b in breaches}
    options = {"add_generation_prompt": True, "return_dict": False}
    for turn, end in zip(turns, [*turns[1:], len(messages)], strict=True):
        before = [*tokenizer.apply_chat_template(messages[:turn], **options), *sampled[turn]]
        longer = extend(tokenizer, before, messages[:end])
        assert longer[: len(before)] == before
        rendered = tokenizer.apply_chat_template(messages[:end], **options)
        assert turn in broken or longer == list(rendered), (turn, longer, rendered)


def resampled(name: str, folder: Path, *, answers: int = 96, tokens: int = 64) -> str:
    """Of answers sampled from the model itself: those whose text encodes to other ids."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    rows = []
    for temperature in (0.7, 1.0, 1.3):
        differ = 0
        for at in range(0, answers, 32):
            text = f"Tell me about the number {at + 7}."
            options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
            message = [{"role": "user", "content": text}]
            inputs = (
                tokenizer.apply_chat_template(message, **options)
                if tokenizer.chat_template
                else tokenizer(text, return_tensors="pt")
            )
            drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "max_new_tokens": tokens}
            given = model.generate(**inputs, **drawn, num_return_sequences=32)[:, inputs["input_ids"].shape[1] :]
            for row in given.tolist():
                ids = row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row[:-4]
                again = tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False)
                differ += again[: len(ids)] != ids
        rows.append(f"| {name} | {temperature} | {answers} x {tokens} | {differ / answers:.0%} |")
    return "\n".join(rows)


ABOUT = """\
# What re-rendering a conversation does to its ids

For each turn the whole conversation is rendered and encoded again, as stacks without ids from turn to turn do, and compared with
the ids that the policy saw (`rlalign.tasks.prefix_law.check_prefix_law`). A cell: turns whose next prompt is not the last prompt
and the sampled ids, the share of those ids behind the first difference, and the causes. `extend` kept every id in every cell and
equalled the rendering wherever the law holds (asserted).
"""
SAMPLED = """
## How often a policy samples ids that its text does not encode to

Answers sampled from the model itself, decoded and encoded again.

| model | temperature | answers x tokens | encode to other ids |
|---|--:|--:|--:|
"""


def page(rows: Sequence[str], of_models: Sequence[str]) -> str:
    """The results as Markdown."""
    kinds = "\n".join(f"- **{name}**: {what}." for name, what in KINDS.items())
    table = f"| tokenizer and template | {' | '.join(KINDS)} |\n|---{'|---' * len(KINDS)}|\n" + "\n".join(rows)
    said = f"{CONVERSATIONS} conversations of {TURNS} turns each. Written by benchmarks/rerendering.py."
    return "\n".join([ABOUT, said, "", kinds, "", table, *([SAMPLED + "\n".join(of_models)] if of_models else []), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizers", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--sample", nargs="*", default=[], metavar="NAME=FOLDER")
    args = parser.parse_args()
    rows = []
    for name, _, folder in (item.partition("=") for item in args.tokenizers):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        rows.append(f"| {name} | " + " | ".join(cell(tokenizer, kind) for kind in KINDS) + " |")
    of_models = [resampled(name, Path(f)) for name, _, f in (item.partition("=") for item in args.sample)]
    OUT.write_text(page(rows, of_models))
    print(OUT.read_text())


if __name__ == "__main__":
    main()
