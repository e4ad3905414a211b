"""rlalign doctor: is this run set up right? Every check says ok, problem or unknown, what it found, and what to do.

The cheap checks read the configuration and the environment; the rest start the configured engine and the trainer's model, and
look at what they really do. A check that fails never hides the ones after it.

    check         what an answer is, the report, groups that fail alone
    installation  packages, the plugin, versions known to work and known to break (known_versions)
    machine       disks, clock, memory for the fp32 head
    claims        what the checkpoint asks of head and attention
    tokens        tokenizer, chat template, special tokens, prompt lengths
    live          the engine and the trainer's model: settings, heads, weights, agreement
    foreign       the same of an engine that another stack started, from outside
"""

from rlalign.diagnose.doctor.check import Check, as_json, report
from rlalign.diagnose.doctor.examine import examine
from rlalign.diagnose.doctor.foreign import examine_engine

__all__ = ["Check", "as_json", "examine", "examine_engine", "report"]
