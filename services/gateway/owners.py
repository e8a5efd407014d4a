"""Requests with a request id, at whichever gateway they come in: one gateway owns each id, runs the operation and shares it.

The owner is the replica with the highest hash of (its address, the id): every gateway finds the same one without asking anybody, and when
one goes only its own ids move. What comes in elsewhere is passed on to it, so that callers join and replay across replicas as they do at
one. A gateway that can't be reached is passed over: who owned it next runs what it had under way once more, since what ran there ended
with it. Passed on once, a request is run where it arrives: replicas that see each other differently for a moment can't send it in a circle.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final, Protocol

from services.gateway.events import Opened, StreamEvent
from services.gateway.operations import moment_of
from services.gateway.principals import Principal
from services.gateway.receipts import Completion, RemoteCompletion
from services.runtime.errors import Failure, Reason, deadline_exceeded
from services.runtime.link import Replica
from sluice.execution.v1 import execution_service_pb2
from sluice.inference.v1 import answer_pb2, inference_service_pb2
from sluice.inference.v1.inference_service_pb2_grpc import InferenceServiceStub

PASSED_ON: Final = "x-sluice-passed-on"
"""Metadata of a call by which a gateway passes a request on to its owner."""
GATEWAY: Final = "gateway"
_FULL: Final = inference_service_pb2.RECEIPT_VIEW_FULL
Metadata = tuple[tuple[str, str], ...]


class Replicas(Protocol):
    """The processes of a service."""

    @property
    def replicas(self) -> Sequence[Replica]:
        """Those that take calls now."""

    def only(self, endpoint: str) -> Any:
        """A channel to one of them."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Another gateway, which owns a request id."""

    endpoint: str
    stub: Any
    """Of InferenceService; calls raise Failure."""


def owner_among(members: Sequence[Replica], name: str, passed_over: Collection[str] = ()) -> Replica | None:
    """The member with the highest hash of (its address, `name`), of those that aren't `passed_over` (addresses); None: there is none."""
    best, weight = None, b""
    ending = name.encode()
    for member in members:
        if member.endpoint in passed_over:
            continue
        its = blake2b(member.endpoint.encode() + ending, digest_size=8).digest()
        if its >= weight:
            best, weight = member, its
    return best


class Owners:
    """Finds the owner of a request id among the gateways that take calls now, this one included. None: it is the only one."""

    def __init__(self, gateways: Replicas | None, replica_id: str) -> None:
        self._gateways = gateways
        self._me = replica_id
        self._stubs: dict[str, Any] = {}

    def find(self, scope: str, request_id: str, passed_over: Collection[str] = ()) -> Owner | None:
        """The owner among those that aren't `passed_over` (addresses); None: this process."""
        gateways = self._gateways
        if gateways is None:
            return None
        best = owner_among(gateways.replicas, f"\0{scope}\0{request_id}", passed_over)
        if best is None or best.replica_id == self._me:
            return None
        stub = self._stubs.get(best.endpoint)
        if stub is None:
            stub = self._stubs[best.endpoint] = InferenceServiceStub(gateways.only(best.endpoint))
        return Owner(best.endpoint, stub)


class Passing:
    """Passes requests on to their owners; `clock` is the loop's."""

    def __init__(self, owners: Owners, clock: Callable[[], float]) -> None:
        self._owners = owners
        self._clock = clock
        self.passed_count = 0
        """Requests that went to another gateway."""
        self.lost_count = 0
        """Owners that were lost while a request was there."""

    async def generate(
        self,
        scope: str,
        principal: Principal,
        request: inference_service_pb2.GenerateRequest,
        deadline: float,
        forward: Metadata,
    ) -> Completion | None:
        """The owner's answer; None: this process is the owner. The owner's failures."""
        passed_over: set[str] = set()
        while (owner := self._owners.find(scope, request.request_id, passed_over)) is not None:
            wanted = inference_service_pb2.GenerateRequest()
            wanted.CopyFrom(request)
            wanted.receipt_view = _FULL
            self.passed_count += 1
            try:
                response = await owner.stub.Generate(
                    wanted, timeout=self._left(deadline), metadata=(*forward, *_acting(principal))
                )
            except Failure as failure:
                self._pass_over(owner, failure, passed_over)
                continue
            return RemoteCompletion(
                response.operation_id, request.request_id, response.answer, response.cost_nano_usd, response.receipt
            )
        return None

    async def embed(
        self,
        scope: str,
        principal: Principal,
        request: inference_service_pb2.EmbedRequest,
        deadline: float,
        forward: Metadata,
    ) -> inference_service_pb2.EmbedResponse | None:
        """As `generate`."""
        passed_over: set[str] = set()
        while (owner := self._owners.find(scope, request.request_id, passed_over)) is not None:
            self.passed_count += 1
            try:
                response: inference_service_pb2.EmbedResponse = await owner.stub.Embed(
                    request, timeout=self._left(deadline), metadata=(*forward, *_acting(principal))
                )
            except Failure as failure:
                self._pass_over(owner, failure, passed_over)
                continue
            return response
        return None

    async def stream(
        self,
        scope: str,
        principal: Principal,
        request: inference_service_pb2.GenerateRequest,
        deadline: float,
        forward: Metadata,
    ) -> AsyncGenerator[StreamEvent, None]:
        """The events of the owner's stream, from its first piece; none at all: this process is the owner.

        The owner's failures; DEPENDENCY_UNAVAILABLE when the owner is lost after the first piece: nothing is begun again then, since a
        second answer may say something else.
        """
        passed_over: set[str] = set()
        while (owner := self._owners.find(scope, request.request_id, passed_over)) is not None:
            wanted = inference_service_pb2.StreamGenerateRequest.FromString(request.SerializeToString())
            wanted.receipt_view = _FULL
            self.passed_count += 1
            began = False
            try:
                replies = owner.stub.StreamGenerate(
                    wanted, timeout=self._left(deadline), metadata=(*forward, *_acting(principal))
                )
                async with contextlib.aclosing(replies):
                    model, operation_id = "", ""
                    async for reply in replies:
                        began = True
                        kind = reply.WhichOneof("event")
                        if kind == "delta":
                            yield execution_service_pb2.DeltaBatch(deltas=(reply.delta,))
                        elif kind == "opened":
                            opened = reply.opened
                            operation_id, model = opened.operation_id, opened.model
                            yield Opened(operation_id, request.request_id, model, int(moment_of(operation_id)), False)
                        elif kind == "closed":
                            closed = reply.closed
                            answer = answer_pb2.Answer(model=model, finish_reason=closed.finish_reason, usage=closed.usage)
                            yield RemoteCompletion(
                                operation_id, request.request_id, answer, closed.cost_nano_usd, closed.receipt
                            )
            except Failure as failure:
                if began:
                    raise
                self._pass_over(owner, failure, passed_over)
                continue
            return

    def _left(self, deadline: float) -> float:
        left = deadline - self._clock()
        if left <= 0:
            raise deadline_exceeded("the gateway that runs this request id")
        return left

    def _pass_over(self, owner: Owner, failure: Failure, passed_over: set[str]) -> None:
        """Raises the failure unless it says that the owner itself is gone."""
        gone = failure.reason is Reason.DEPENDENCY_UNAVAILABLE and failure.metadata.get("dependency") == GATEWAY
        if not gone and failure.reason is not Reason.DRAINING:
            raise failure
        self.lost_count += 1
        passed_over.add(owner.endpoint)


def _acting(principal: Principal) -> Metadata:
    """Whom the call is made for, as InferenceService takes it from a service of the mesh."""
    metadata: Metadata = (
        ("x-sluice-tenant", principal.tenant_id),
        ("x-sluice-project", principal.project_id),
        ("x-sluice-key", principal.key_id),
        (PASSED_ON, "1"),
    )
    if principal.allowed_models:
        metadata += (("x-sluice-allowed-models", ",".join(principal.allowed_models)),)
    if principal.cache_namespace:
        metadata += (("x-sluice-cache-namespace", principal.cache_namespace),)
    return metadata
