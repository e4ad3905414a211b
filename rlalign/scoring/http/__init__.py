"""HTTPScorer: one client for the reward servers that people run.

    scorer = HTTPScorer("http://127.0.0.1:8000", tokenizer="my/reward-model")      # finds out which server it is
    result = scorer.score("What is 2 + 2? ", ["4", "5"])
    result.errors                                                                  # None, or why an item has no score

dialect     endpoint                          token ids   tasks                                    scores arrive
vllm        /pooling /score                   yes         classify token_classify embed token_embed   raw, but mean and sigma act
            /generative_scoring               yes         generative                               probabilities of all tokens
sglang      /v1/score (also rlalign serve)    yes         classify, generative                     raw
tei         /predict /rerank                  no          classify                                 raw
infinity    /rerank                           no          classify, one label                      raw
openrlhf    /get_reward                       no          classify, one label                      whatever the model's config does

`transport` sends, retries and gives up; `http_scorer` finds the dialect; `engine_dialects` and `text_dialects` speak.
"""

from rlalign.scoring.http.http_scorer import HTTPScorer, KnownLogits
from rlalign.scoring.http.transport import RequestFailed

__all__ = ["HTTPScorer", "KnownLogits", "RequestFailed"]
