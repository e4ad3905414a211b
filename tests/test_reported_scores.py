"""Scores that were others than the model's own on reported inputs; the right value is transformers' on the same folder."""

import json
import logging

import msgspec
import numpy as np
import pytest
import torch

from rlalign.scoring import HFScorer, ScoringParams
from rlalign.scoring.result import Answer, classification_scores, score_result
from rlalign.tiny_policy.tokenizer import byte_tokenizer
from tests.reward_models import model_of, pair_tokenizer, reference, saved, scorer_of

QUERY, LONG = "What is the capital of California?", "Sacramento is the capital of California." + 6 * " Filler words."


def close(got, expected):
    np.testing.assert_allclose(np.asarray(got, np.float64), np.asarray(expected, np.float64), rtol=1e-5, atol=1e-5)


def written(folder, name, content):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))


# --- a truncated pair ---


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keep", [12, 40, 128])
def test_a_pair_is_cut_on_the_side_of_its_tokenizer_or_as_asked(side, keep):
    tokenizer = pair_tokenizer()
    tokenizer.truncation_side = side
    expected = tokenizer(QUERY, LONG, truncation=True, max_length=keep)
    score = reference("bert", expected["input_ids"], expected["token_type_ids"]).logits[0]
    own_side = HFScorer.wrap(model_of("bert"), tokenizer, id="own")
    close(own_side.score(QUERY, LONG, ScoringParams(truncate_prompt_tokens=keep)).scores[0], score)
    asked = ScoringParams(truncate_prompt_tokens=keep, truncation_side=side)
    close(scorer_of("bert").score(QUERY, LONG, asked).scores[0], score)


def test_a_sequence_can_be_cut_on_the_right():
    query, item = [5, 6, 7], [8, 9, 10, 11]
    params = ScoringParams(truncate_prompt_tokens=5, truncation_side="right")
    close(
        scorer_of("one_label").score(query, [item], params).scores[0], reference("one_label", [5, 6, 7, 8, 9]).logits[0]
    )


@pytest.mark.parametrize(
    ("kind", "keep", "side"), [("bert", 4, "right"), ("bert", 4, "left"), ("one_label", 10, "right")]
)
def test_items_without_a_token_of_their_own_are_refused(kind, keep, side):
    with pytest.raises(ValueError, match="no token of its own, and every such item would score alike"):
        scorer_of(kind).score(
            QUERY, ["Sacramento", "Paris"], ScoringParams(truncate_prompt_tokens=keep, truncation_side=side)
        )


# --- what a folder says about itself ---


@pytest.fixture
def cross(tmp_path):
    return tmp_path, saved("bert", tmp_path)


def test_a_cross_encoder_s_own_activation_is_read(cross):
    folder, path = cross
    written(folder, "config_sentence_transformers.json", {"activation_fn": "torch.nn.modules.linear.Identity"})
    result = HFScorer(path).score(QUERY, ["a"], ScoringParams(use_activation=True))
    close(result.scores, result.logits)
    written(folder, "config_sentence_transformers.json", {"activation_fn": "torch.nn.modules.activation.Tanh"})
    with pytest.raises(ValueError, match=r"Tanh.*is not known"):
        HFScorer(path)


def test_a_prompt_that_a_cross_encoder_would_put_first_is_refused(cross):
    folder, path = cross
    stated = {"model_type": "CrossEncoder", "prompts": {"ask": "Judge: "}, "default_prompt_name": "ask"}
    written(folder, "config_sentence_transformers.json", stated)
    with pytest.raises(ValueError, match="default_prompt_name='ask' puts 'Judge: '"):
        HFScorer(path)


def test_the_length_that_a_folder_states_is_the_limit(cross):
    folder, path = cross
    written(folder, "sentence_bert_config.json", {"max_seq_length": 60})
    assert HFScorer(path).info.max_length == 60
    with pytest.raises(ValueError, match="reads at most 60"):
        HFScorer(path).score(QUERY, LONG)


@pytest.fixture
def embedder(tmp_path):
    path = saved("bert_embedder", tmp_path)
    modules = [{"path": "", "type": "st.models.Transformer"}, {"path": "1_Pooling", "type": "st.models.Pooling"}]
    written(tmp_path, "modules.json", modules)
    written(tmp_path, "1_Pooling/config.json", {"embedding_dimension": 32, "pooling_mode": "mean"})
    return tmp_path, path, modules


def test_the_newer_pooling_format_and_the_default_prompt_are_read(embedder):
    folder, path, _ = embedder
    written(folder, "config_sentence_transformers.json", {"prompts": {"p": "passage: "}, "default_prompt_name": "p"})
    encoded = pair_tokenizer()("passage: a text")
    states = reference("bert_embedder", encoded["input_ids"], encoded["token_type_ids"]).last_hidden_state[0]
    close(HFScorer(path).score("", "a text").scores[0], states.mean(0))
    written(folder, "1_Pooling/config.json", {"pooling_mode": ["mean", "cls"]})
    with pytest.raises(ValueError, match="1_Pooling asks for"):
        HFScorer(path)


def test_a_layer_behind_the_pooling_is_refused_by_name(embedder):
    folder, path, modules = embedder
    written(folder, "modules.json", [*modules, {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}])
    with pytest.raises(ValueError, match=r"2_Dense \(Dense\), which this scorer does not compute"):
        HFScorer(path)


def test_weights_that_the_model_has_no_place_for_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    path = saved("one_label", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"score.bias": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has no place for the checkpoint's score.bias"):
        HFScorer(path)


def test_labels_have_the_names_of_the_config(tmp_path):
    path = saved("three_labels", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    names = {"0": "bad", "1": "fair", "2": "good"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": names, "label2id": {}}))
    assert HFScorer(path).info.labels == ("bad", "fair", "good")


# --- a head that its model uses in its own way ---


def test_a_model_that_pools_in_its_own_way_is_refused():
    from transformers import LlamaForSequenceClassification
    from transformers.modeling_outputs import SequenceClassifierOutputWithPast

    class LlamaBidirectionalForSequenceClassification(LlamaForSequenceClassification):
        def forward(self, input_ids=None, attention_mask=None, **more):
            states = self.model(input_ids, attention_mask=attention_mask, **more).last_hidden_state
            return SequenceClassifierOutputWithPast(logits=self.score(states.mean(1)))

    torch.manual_seed(0)
    model = LlamaBidirectionalForSequenceClassification(model_of("three_labels").config)
    with pytest.raises(ValueError, match="differ from its head's on the last token"):
        HFScorer.wrap(model, None, id="mean")


@pytest.mark.parametrize(("name", "config", "more"), [
    ("ModernBertDecoderForSequenceClassification", "ModernBertDecoderConfig", {"num_labels": 1, "head_dim": 8}),
    ("GPTNeoXForTokenClassification", "GPTNeoXConfig", {"num_labels": 2}),
])  # fmt: skip
def test_a_head_of_another_name_is_run_as_the_model_runs_it(name, config, more):
    import transformers

    torch.manual_seed(0)
    fields = {"vocab_size": 268, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "max_position_embeddings": 128, "pad_token_id": 0, "initializer_range": 0.3}  # fmt: skip
    model = getattr(transformers, name)(getattr(transformers, config)(**fields, **more)).eval()
    scorer = HFScorer.wrap(model, None, id=name)
    assert not scorer.info.packs and "run whole" in scorer.info.packing_reason
    result = scorer.score([5, 6], [[7, 8], [9, 10, 11]])
    with torch.no_grad():
        for ids, score in zip(([5, 6, 7, 8], [5, 6, 9, 10, 11]), result.scores, strict=True):
            close(score, model(input_ids=torch.tensor([ids])).logits[0])


# --- special tokens and joins ---


def bos_tokenizer():
    """Adds <bos> in front, as Llama's does."""
    from tokenizers import processors

    tokenizer = byte_tokenizer(2048)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }};{% endfor %}"
    tokenizer.bos_token = "<bos>"
    return tokenizer


def test_a_text_that_brings_its_special_tokens_gets_no_second_ones():
    tokenizer = bos_tokenizer()
    scorer = HFScorer.wrap(model_of("one_label"), tokenizer, id="bos")
    chat = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[0] == 1
    right = reference("one_label", ids).logits[0]
    close(scorer.score("", text).scores[0], right)
    close(scorer.score_conversations([text[:6]], [text[6:]]).scores[0], right)
    close(scorer.score_conversations([chat[:1]], [chat[1:]]).scores[0], right)


@pytest.mark.parametrize("kind", ["bert", "xlmr"])
def test_an_empty_query_is_the_empty_first_text_of_a_pair(kind):
    pair, single = pair_tokenizer()("", "an item"), pair_tokenizer()("an item")
    for params, encoded in ((ScoringParams(), pair), (ScoringParams(alone=True), single)):
        score = scorer_of(kind).score("", "an item", params).scores[0]
        close(score, reference(kind, encoded["input_ids"], encoded["token_type_ids"]).logits[0])
    with pytest.raises(ValueError, match="alone=True is for items without a query"):
        scorer_of(kind).score("q", "an item", ScoringParams(alone=True))


def metaspace_tokenizer():
    """SentencePiece's manner: a space is a token's first character, and a text gets one in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "▁", *"0123456789+=", *(f"▁{c}" for c in "0123456789+="), "46", "▁46"]
    core = Tokenizer(models.Unigram([(p, -float(2 - len(p) / 9)) for p in pieces], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


@pytest.mark.parametrize("items", [["46"], ["46", "7", "46+1"]])
def test_an_item_is_read_as_in_the_joined_text(items):
    tokenizer = metaspace_tokenizer()
    scorer = HFScorer.wrap(model_of("one_label"), tokenizer, id="pieces")
    result = scorer.score("12 + 34 =", items)
    for item, score in zip(items, result.scores, strict=True):
        joined = tokenizer("12 + 34 =" + item)["input_ids"]
        assert tokenizer(item)["input_ids"] != joined[-len(tokenizer(item)["input_ids"]) :]  # a stray space alone
        close(score, reference("one_label", joined).logits[0])


def test_texts_whose_tokens_change_when_they_are_joined_are_told_once(caplog):
    tokenizer = metaspace_tokenizer()
    scorer = HFScorer.wrap(model_of("one_label"), tokenizer, id="pieces")
    with caplog.at_level(logging.WARNING, "rlalign.scoring"):
        for _ in range(2):
            close(scorer.score("4", "6").scores[0], reference("one_label", tokenizer("46")["input_ids"]).logits[0])
    assert ["tokenised differently" in record.message for record in caplog.records] == [True]


# --- decisions ---


def test_probabilities_near_one_keep_their_order():
    info = msgspec.structs.replace(scorer_of("one_label").info, activation="sigmoid")
    params = ScoringParams(use_activation=True).verify(info)
    one, other = (classification_scores(np.float32([x]), params, info)[0] for x in (18, 20))
    assert one < other < 1


def test_a_label_mass_at_its_limit_is_enough():
    params, info = ScoringParams(label_token_ids=[1, 2], min_label_mass=0.8), scorer_of("judge").info
    logarithms = np.log(np.float64([0.7, 0.1])).astype(np.float32)
    assert np.exp(logarithms.astype(np.float64)).sum() < 0.8  # by the rounding of the logarithms
    assert score_result([Answer(values=logarithms)], params.verify(info), info).errors == [None]
