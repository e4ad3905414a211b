"""How a run ends when nobody chose the end, and the exit codes that tell a scheduler."""

INTERRUPTED = 130  # Ctrl-C
REQUEUE = 75  # EX_TEMPFAIL: saved, go on later


class Preempted(KeyboardInterrupt):
    """A signal ended the run after a whole step and its checkpoint: an interruption to carry on from, exit code REQUEUE."""
