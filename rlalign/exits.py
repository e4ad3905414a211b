"""How a run ends when nobody chose the end, and the exit codes that tell a scheduler."""

INTERRUPTED = 130  # Ctrl-C
REQUEUE = 75  # EX_TEMPFAIL: saved, go on later
LOST = 69  # EX_UNAVAILABLE: a process the run needs died; go on from the last checkpoint


class Preempted(KeyboardInterrupt):
    """A signal ended the run after a whole step and its checkpoint: an interruption to carry on from, exit code REQUEUE."""


class Lost(RuntimeError):
    """An engine or the last server died: nothing that was saved is lost, and trying again may help. Exit code LOST."""
