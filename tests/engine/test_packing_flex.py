"""Packing through FlexAttention, compiled: the same scores as SDPA's dense mask and as items alone."""

import numpy as np

from rlalign.reward import HFScorer
from tests.reward_models import saved, scorer_of, words


def test_flex_attention_gives_the_same_scores(tmp_path, compiling):
    flex = HFScorer(saved("one_label", tmp_path), attention="flex_attention")
    assert flex.info.packs, flex.info.packing_reason
    query, items = words(23, 1), [words(1 + i % 7, i) for i in range(9)]
    packed = flex.prepare(query, items)
    assert packed.num_tokens == 23 + sum(map(len, items))
    found = np.concatenate(flex.run([packed])[0].scores)
    for packing in ("always", "never"):
        expected = np.concatenate(scorer_of("one_label", packing).score(query, items).scores)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
