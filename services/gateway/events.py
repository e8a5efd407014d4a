"""The events of a streamed answer, as they go from the core to the edges."""

from __future__ import annotations

from dataclasses import dataclass

from services.gateway.receipts import Completion
from sluice.execution.v1 import execution_service_pb2


@dataclass(frozen=True, slots=True)
class Opened:
    """A candidate has begun to answer a stream."""

    operation_id: str
    request_id: str
    model: str
    """Catalogue id of the model that answers."""
    created: int
    """Unix seconds."""
    is_wire: bool
    """Whether the pieces come as bytes of the accepted wire format, else as DeltaBatch."""


StreamEvent = Opened | bytes | execution_service_pb2.DeltaBatch | Completion
