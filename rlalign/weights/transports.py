"""From the configuration to a transport: the one place that knows them all."""

from __future__ import annotations

from pathlib import Path

from rlalign.config.sections import FILE_TRANSPORTS, WeightsConfig
from rlalign.weights.bucket import MIB
from rlalign.weights.file_transport import FileTransport
from rlalign.weights.receiver import Transport


def open_transport(config: WeightsConfig) -> Transport:
    """The transport of a run, for every publish of it; close it at the end. Raises ValueError for what this host cannot do."""
    size = config.bucket_mib * MIB
    if config.transport in FILE_TRANSPORTS:
        durable = config.transport == "folder"
        return FileTransport(Path(config.shared), bucket_bytes=size, timeout_s=config.timeout_s, durable=durable)
    from rlalign.weights.wire_transport import WireTransport

    transport = WireTransport(
        config.transport, bucket_bytes=size, timeout_s=config.timeout_s, address=config.address, port=config.port
    )
    transport.prepare()
    return transport
