"""The core of the gateway: one order of calls for every spelling of the public API.

The HTTP edge and the gRPC servicer both use `Core` and nothing behind it. Errors are raised as `services.runtime.errors.Failure`.

On the hot path nothing is awaited that needn't be: identity, limits, money and plan come from what was leased or learned before, and
what can be done after the answer is queued for workers. Requests with a request id take one more step (`_joined`), in which several
callers share one operation.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sluice.caching.v1 import caching_service_pb2
from sluice.execution.v1 import execution_service_pb2
from sluice.inference.v1 import answer_pb2, inference_service_pb2, receipt_pb2
from sluice.routing.v1 import routing_service_pb2
from sluice.tokenization.v1 import tokenization_service_pb2

from services.gateway import features, holds, needs, validation
from services.gateway.breakers import Breaker
from services.gateway.cache import CacheClient, CacheWriter, HitBook, may_store
from services.gateway.holds import Tariff
from services.gateway.identities import Identities
from services.gateway.journal import Journal
from services.gateway.leases import Leases
from services.gateway.operations import OperationIds, Requests, Shared, fingerprint
from services.gateway.outcomes import Outcomes, Report
from services.gateway.plans import Plan, PlanKey, PlannedCandidate, Plans, round_up
from services.gateway.ports import Metering
from services.gateway.principals import Principal
from services.gateway.receipts import Completion, Facts, receipt_to_proto
from services.gateway.voids import Voids
from services.runtime.call import Metadata
from services.runtime.errors import Failure, Reason, deadline_exceeded, invalid

if TYPE_CHECKING:
    from sluice.execution.v1.execution_service_pb2_grpc import ExecutionServiceAsyncStub
    from sluice.routing.v1.routing_service_pb2_grpc import RoutingServiceAsyncStub
    from sluice.tokenization.v1.tokenization_service_pb2_grpc import TokenizationServiceAsyncStub

__all__ = ["Completion", "Core", "Limits", "Opened", "Peers", "Principal"]

_IMAGE_TOKENS: Final = 2000
"""Tokens of one picture in the local estimate: more than any provider's published formula gives for its largest tile count."""
_MESSAGE_TOKENS: Final = 8
"""Tokens of a turn's frame in the local estimate."""
_ESTIMATE_BOUND: Final = 3.0
"""The local estimate is a quarter of the bytes; a tokenizer that works on bytes makes at most one token of each."""

_UNBILLED: Final = frozenset(
    (
        Reason.REQUEST_INVALID, Reason.REQUEST_TOO_LARGE, Reason.FIELD_UNSUPPORTED, Reason.MODEL_NOT_FOUND,
        Reason.CONTEXT_WINDOW_EXCEEDED, Reason.PERMISSION_DENIED, Reason.NO_CANDIDATE, Reason.PROVIDER_REJECTED,
        Reason.PROVIDER_AUTHENTICATION, Reason.PROVIDER_RATE_LIMITED, Reason.PROVIDER_OVERLOADED, Reason.BREAKER_OPEN,
        Reason.OVERLOADED, Reason.DRAINING,
    )  # fmt: skip
)
"""Failures of execution after which nothing can have been charged, even where it doesn't say the cost."""

Event = Opened_or_piece = Any


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
