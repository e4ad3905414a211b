"""Which setting, which weight, which layer, which side: the likely causes of a mismatch, most likely first.

Given a live engine, the trainer's model and the trainer's own scoring function, a few experiments are made that change nothing:

    case          the sides, and the trainer's model asked in the plainest way (each sequence alone)
    experiments   how the engine answers: logprobs mode, temperature, truncation, tokenizer, prefix cache, key/value cache;
                  how the trainer calls its model: temperature, head, padding and mask, positions;
                  what the engine holds: every weight on every rank, epsilons, rotary frequencies, adapters
    ranking       all of them and which step of which layer differs, from `rlalign.diagnose.attribution`, in order

Each gives causes with its evidence and a score as in `rlalign.mismatch.causes`; `rank` puts them in order.
"""

from rlalign.diagnose.suspects.case import Case
from rlalign.diagnose.suspects.ranking import rank, report

__all__ = ["Case", "rank", "report"]
