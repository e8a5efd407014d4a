"""The core of the gateway: one order of calls for every spelling of the public API.

The HTTP edge and the gRPC servicer both use `Core` and nothing behind it. Errors are raised as `services.runtime.errors.Failure`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from sluice.execution.v1 import execution_service_pb2
from sluice.inference.v1 import answer_pb2, inference_service_pb2, receipt_pb2

from services.runtime.call import Metadata


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls: what a key stands for."""

    tenant_id: str
    project_id: str
    key_id: str
    scopes: tuple[str, ...]
    """What the key may do: `inference`, `jobs`, `usage`."""
    allowed_models: tuple[str, ...]
    """Catalogue ids or `policy/<name>`; empty: all."""
    cache_namespace: str
    """Cache namespace when the request names none; empty: `default`."""
    expire_time: float | None
    """Unix seconds; None: never."""


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


class Completion:
    """One finished answer."""

    __slots__ = ("answer", "cache_status", "cost_nano_usd", "created", "operation_id", "request_id")

    operation_id: str
    request_id: str
    answer: answer_pb2.Answer
    cost_nano_usd: int
    created: int
    """Unix seconds."""
    cache_status: int
    """A value of `receipt_pb2.CacheStatus`."""

    def receipt(self) -> receipt_pb2.Receipt:
        """What happened, built when asked for."""
        raise NotImplementedError


class Core:
    """The order of calls. Deadlines are moments of the running loop's clock."""

    def known(self, secret: str) -> Principal | None:
        """The principal of a key that was checked lately; None: ask `authenticate`. Hot path, no waiting."""
        raise NotImplementedError

    async def authenticate(self, secret: str | None) -> Principal:
        """The principal of a key. Failure KEY_MISSING, KEY_INVALID, DEPENDENCY_UNAVAILABLE."""
        raise NotImplementedError

    async def generate(
        self,
        principal: Principal,
        request: inference_service_pb2.GenerateRequest,
        *,
        deadline: float,
        forward: Metadata = (),
    ) -> Completion:
        """Answers a conversation."""
        raise NotImplementedError

    def stream(
        self,
        principal: Principal,
        request: inference_service_pb2.GenerateRequest,
        *,
        accepted_wire: int,
        deadline: float,
        forward: Metadata = (),
    ) -> AsyncIterator[Opened | bytes | execution_service_pb2.DeltaBatch | Completion]:
        """Answers a conversation piece by piece: first Opened, then bytes (only with `is_wire`) or DeltaBatch, last Completion.

        Closing the iterator (`aclose`) cancels the operation.
        """
        raise NotImplementedError

    async def embed(
        self,
        principal: Principal,
        request: inference_service_pb2.EmbedRequest,
        *,
        deadline: float,
        forward: Metadata = (),
    ) -> inference_service_pb2.EmbedResponse:
        """Turns texts into vectors."""
        raise NotImplementedError

    async def count_tokens(
        self,
        principal: Principal,
        request: inference_service_pb2.CountTokensRequest,
        *,
        deadline: float,
        forward: Metadata = (),
    ) -> inference_service_pb2.CountTokensResponse:
        """Counts a prompt."""
        raise NotImplementedError

    async def list_models(
        self,
        principal: Principal,
        request: inference_service_pb2.ListModelsRequest,
        *,
        deadline: float,
        forward: Metadata = (),
    ) -> inference_service_pb2.ListModelsResponse:
        """Lists what the key may use."""
        raise NotImplementedError
