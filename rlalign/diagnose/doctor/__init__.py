"""rlalign doctor: is this run set up right? Every check says ok, problem or unknown, what it found, and what to do.

The cheap checks read the configuration and the environment; the rest start the configured engine and the trainer's model, and
look at what they really do. A check that fails never hides the ones after it.

    check         what an answer is, the report, groups that fail alone
    machine       packages, the plugin, versions known to work and known to break, disks, clock, memory for the fp32 head
    tokens        tokenizer, chat template, special tokens, prompt lengths
    live          the engine and the trainer's model: settings, heads, weights, agreement
    examine       all of them in order, of a configuration or, from outside, of an engine that another stack started
"""

from rlalign.diagnose.doctor.check import Check, as_json, report
from rlalign.diagnose.doctor.examine import examine, examine_engine

__all__ = ["Check", "as_json", "examine", "examine_engine", "report"]
