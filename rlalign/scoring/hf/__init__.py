"""HFScorer: reward models through transformers, in this process; nothing else has to run.

    scorer = HFScorer("my/reward-model")
    result = scorer.score("What is 2 + 2? ", ["4", "5"])          # raw logits; vLLM would apply a sigmoid
    result.rewards()

`model_loading` makes a checkpoint something that scores, `describe` its ModelInfo, `sequences` its tokens, `forward_pass` its
logits and answers; items that share a query share its computation where that is exact.
"""

from rlalign.scoring.hf.hf_scorer import HFRequest, HFScorer

__all__ = ["HFRequest", "HFScorer"]
