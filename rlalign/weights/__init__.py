"""publish(): carry the trainer's weights to every rollout worker, and do not return before each has proved it computes with them.

Two phases: every rank loads and verifies; only when all have answered without a problem is the version acknowledged and
generation allowed again. Whatever goes wrong in between leaves the receiver marked unusable until a later publish succeeds.
The weights travel in buckets (`rlalign.weights.bucket`), by one of the transports (`file_transport`, `wire_transport`): while
the workers take one, the next is filled.
"""

from rlalign.weights.bucket import Receiver, Transport
from rlalign.weights.digest import digest
from rlalign.weights.publishing import (
    MASTER_WEIGHT,
    SHARED_MEMORY,
    PublishReport,
    open_transport,
    publish,
    publish_from_ranks,
)

__all__ = [
    "MASTER_WEIGHT",
    "SHARED_MEMORY",
    "PublishReport",
    "Receiver",
    "Transport",
    "digest",
    "open_transport",
    "publish",
    "publish_from_ranks",
]
