"""What any training loop puts around its own step: mirror(), the lag-0 check, a monitor of every step, files of tokens."""

from rlalign.loops.mirrors import LagZero, mirror, mirror_check
from rlalign.loops.step_monitor import Monitor
from rlalign.loops.token_dump import write_tokens

__all__ = ["LagZero", "Monitor", "mirror", "mirror_check", "write_tokens"]
