"""Packing through FlexAttention, compiled: the same scores as SDPA's dense mask and as items alone, and refused where wrong."""

import numpy as np
import pytest
import torch

from rlalign.scoring import HFScorer
from rlalign.trainer import attention_choice
from tests.reward_models import KINDS, model_of, saved, scorer_of, words


def test_flex_attention_gives_the_same_scores(tmp_path, compiling, monkeypatch):
    name, config, fields = KINDS["one_label"]
    monkeypatch.setitem(KINDS, "wide_heads", (name, config, fields | {"head_dim": 32}))
    flex = HFScorer(saved("wide_heads", tmp_path / "model"), attention="flex_attention")
    assert flex.info.packs, flex.info.packing_reason
    query, items = words(23, 1), [words(1 + i % 7, i) for i in range(9)]
    packed = flex.prepare(query, items)
    assert packed.num_tokens == 23 + sum(map(len, items))
    found = np.concatenate(flex.run([packed])[0].scores)
    for packing in ("always", "never"):
        expected = np.concatenate(scorer_of("wide_heads", packing).score(query, items).scores)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_it_is_refused_exactly_where_torch_computes_it_wrongly(size, monkeypatch):
    """On AVX2 with small heads, on a CPU: everything else may have it."""
    model = {"hidden_size": 4 * size, "num_attention_heads": 4}
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda found=capability: found)
        if capability == "AVX2" and size < 24:
            with pytest.raises(ValueError, match=f"AVX2 is wrong for heads of {size} elements .*use auto"):
                attention_choice.choose(model, "flex_attention", on_cpu=True)
        else:
            assert attention_choice.choose(model, "flex_attention", on_cpu=True).name == "flex_attention"
        assert attention_choice.choose(model, "flex_attention", on_cpu=False).name == "flex_attention"
        assert attention_choice.choose(model, "auto", on_cpu=True).name is None


def test_a_scorer_on_this_host_is_refused_or_right(tmp_path):
    small_heads = saved("one_label", tmp_path)
    wrong = attention_choice.flex_fault(model_of("one_label").config.to_dict(), on_cpu=True)
    assert bool(wrong) == (torch.backends.cpu.get_cpu_capability() == "AVX2")
    if wrong:
        with pytest.raises(ValueError, match="attention=flex_attention: .*AVX2"):
            HFScorer(small_heads, attention="flex_attention")
    else:
        assert HFScorer(small_heads, attention="flex_attention").info.packs
