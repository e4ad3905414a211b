"""Engines that somebody else started: attach(), and the handle it returns."""

from rlalign.rollout.attached.attached_engine import AttachedEngine, VerifyReport, attach

__all__ = ["AttachedEngine", "VerifyReport", "attach"]
