"""VLLMScorer: the reward model runs in vLLM's offline engine, in this process or in workers of its own.

    scorer = VLLMScorer.start("my/reward-model")
    result = scorer.score("What is 2 + 2? ", ["4", "5"], ScoringParams(return_pooled_hidden_states=True))

Requests are checked and tokenised here (`vllm_scorer`), states before the head come from a hook on the workers
(`pooling_worker`).
"""

from rlalign.scoring.vllm.vllm_scorer import PreparedVLLM, VLLMScorer

__all__ = ["PreparedVLLM", "VLLMScorer"]
