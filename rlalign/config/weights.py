"""Where and how published weights travel from the trainer to the rollout engines."""

from __future__ import annotations

from dataclasses import dataclass

from rlalign.config.checks import positive, require

FILE_TRANSPORTS = ("shared_memory", "folder")
WIRE_TRANSPORTS = ("gloo", "nccl")
MEMORY_OF_ONE_BOX = "/dev/shm"


@dataclass(kw_only=True)
class WeightsConfig:
    transport: str = "shared_memory"  # shared_memory (one box) | folder (a shared filesystem) | gloo (CPU) | nccl (GPU)
    shared: str = (
        MEMORY_OF_ONE_BOX  # shared_memory, folder: where buckets lie; every rollout rank must be able to read it
    )
    bucket_mib: int = (
        256  # MiB carried at once; a larger tensor is a bucket of its own. At most two exist at any moment
    )
    timeout_s: float = 120.0  # longest wait for one bucket, for a worker to join, for a file to be seen on another node
    address: str = ""  # gloo, nccl: the first trainer rank's host as the rollout nodes reach it; empty: found
    port: int = 0  # gloo, nccl: TCP port on that host where the workers meet; 0: any free one

    def __post_init__(self) -> None:
        positive(self, "weights", "bucket_mib", "timeout_s")
        require(
            self.transport in FILE_TRANSPORTS + WIRE_TRANSPORTS,
            f"weights.transport={self.transport!r}: choose one of {', '.join(FILE_TRANSPORTS + WIRE_TRANSPORTS)}",
        )
        require(
            self.transport != "folder" or self.shared != MEMORY_OF_ONE_BOX,
            f"weights.transport=folder with weights.shared={self.shared}: that is the memory of one box; name a folder of a "
            "filesystem that every node mounts, or use weights.transport=shared_memory",
        )
        require(0 <= self.port < 2**16, f"weights.port={self.port}: a TCP port is 1 to 65535; 0 takes any free one")
