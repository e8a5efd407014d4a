"""The metering port over MeteringService."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from services.gateway.owners import Replicas, owner_among
from services.gateway.ports import Authentication, Grant, HoldGrant, LeaseWish, LimitState
from services.gateway.principals import Principal
from services.gateway.receipts import timestamp
from services.runtime.errors import Failure, Reason
from sluice.metering.v1 import metering_service_pb2
from sluice.metering.v1.metering_service_pb2_grpc import MeteringServiceStub

if TYPE_CHECKING:
    from sluice.metering.v1.metering_service_pb2_grpc import MeteringServiceAsyncStub


class MeteringClient:
    """Translates between the port and the contract. Errors are `Failure` already: channels of the mesh raise nothing else."""

    def __init__(self, stub: MeteringServiceAsyncStub, replica_id: str, replicas: Replicas | None = None) -> None:
        """`stub` calls any metering process, `replicas` knows them one by one; None: there is one."""
        self._stub = stub
        self._replica_id = replica_id
        self._replicas = replicas
        self._stubs: dict[str, MeteringServiceAsyncStub] = {}

    async def authenticate(self, key_sha256: bytes, *, timeout: float) -> Authentication:
        """As the port says."""
        response = await self._stub.Authenticate(
            metering_service_pb2.AuthenticateRequest(key_sha256=key_sha256), timeout=timeout
        )
        reuse = response.reuse_duration
        return Authentication(principal_from_proto(response.identity), reuse.seconds + reuse.nanos / 1e9)

    async def acquire(self, wish: LeaseWish, *, timeout: float) -> Grant:
        """As the port says."""
        request = metering_service_pb2.AcquireLeaseRequest(
            replica_id=self._replica_id,
            sequence=wish.sequence,
            key_id=wish.key_id,
            lease_id=wish.lease_id,
            wanted_request_count=wish.request_count,
            wanted_token_count=wish.token_count,
            wanted_concurrency=wish.concurrency,
            wanted_nano_usd=wish.nano_usd,
            left_request_count=wish.left_request_count,
            left_token_count=wish.left_token_count,
            model=wish.model,
        )
        return grant_from_proto(await self._of_tenant(wish.tenant_id, "AcquireLease", request, timeout))

    async def end_reservations(self, *, timeout: float) -> None:
        """As the port says."""
        request = metering_service_pb2.EndReservationsRequest(replica_id=self._replica_id)
        await self._stub.EndReservations(request, timeout=timeout)

    async def give_back(self, tenant_id: str, lease_id: str, owed_nano_usd: int, *, timeout: float) -> None:
        """As the port says."""
        request = metering_service_pb2.ReturnLeaseRequest(lease_id=lease_id, owed_nano_usd=owed_nano_usd)
        await self._of_tenant(tenant_id, "ReturnLease", request, timeout)

    async def _of_tenant(self, tenant_id: str, method: str, request: Any, timeout: float) -> Any:
        """Calls the metering process that counts the tenant's rates and concurrency: all gateways call the same one, so that a limit is one
        limit whatever the number of processes. Where that one is gone, who counts next is called."""
        replicas = self._replicas
        passed_over: set[str] = set()
        while replicas is not None and len(replicas.replicas) > 1:
            owner = owner_among(replicas.replicas, tenant_id, passed_over)
            if owner is None:
                break
            stub = self._stubs.get(owner.endpoint)
            if stub is None:
                stub = self._stubs[owner.endpoint] = MeteringServiceStub(replicas.only(owner.endpoint))
            try:
                return await getattr(stub, method)(request, timeout=timeout)
            except Failure as failure:
                if failure.reason not in (Reason.DEPENDENCY_UNAVAILABLE, Reason.DRAINING):
                    raise
                passed_over.add(owner.endpoint)
        return await getattr(self._stub, method)(request, timeout=timeout)

    async def hold(
        self,
        operation_id: str,
        key_id: str,
        amount_nano_usd: int,
        min_amount_nano_usd: int,
        expire_time: float,
        *,
        timeout: float,
    ) -> HoldGrant:
        """As the port says."""
        response = await self._stub.Hold(
            metering_service_pb2.HoldRequest(
                operation_id=operation_id,
                key_id=key_id,
                amount_nano_usd=amount_nano_usd,
                min_amount_nano_usd=min_amount_nano_usd,
                expire_time=timestamp(int(expire_time * 1e9)),
                replica_id=self._replica_id,
            ),
            timeout=timeout,
        )
        before = response.budget_before_nano_usd if response.HasField("budget_before_nano_usd") else None
        return HoldGrant(response.hold_id, response.amount_nano_usd, before, response.budget_level)

    async def void(self, hold_id: str, *, may_have_run: bool, timeout: float) -> None:
        """As the port says."""
        request = metering_service_pb2.VoidHoldRequest(hold_id=hold_id, may_have_run=may_have_run)
        await self._stub.VoidHold(request, timeout=timeout)


def principal_from_proto(identity: metering_service_pb2.Identity) -> Principal:
    """The principal of an identity."""
    expire_time = None
    if identity.HasField("expire_time"):
        expire_time = identity.expire_time.seconds + identity.expire_time.nanos / 1e9
    return Principal(
        tenant_id=identity.tenant_id,
        project_id=identity.project_id,
        key_id=identity.key_id,
        scopes=tuple(identity.scopes),
        allowed_models=tuple(sorted(identity.allowed_models)),
        cache_namespace=identity.cache_namespace,
        expire_time=expire_time,
        limited_models=frozenset(identity.limited_models),
    )


def grant_from_proto(response: metering_service_pb2.AcquireLeaseResponse) -> Grant:
    """The grant of a response; of several limits of a kind the tightest is kept."""
    tightest: dict[int, LimitState] = {}
    for limit in response.limits:
        known = tightest.get(limit.kind)
        if known is None or limit.remaining < known.remaining:
            tightest[limit.kind] = LimitState(limit.level, limit.limit, limit.remaining)
    retry_delay = None
    if response.HasField("retry_delay"):
        retry_delay = response.retry_delay.seconds + response.retry_delay.nanos / 1e9
    expire_time = time.time() + 60.0
    if response.HasField("expire_time"):
        expire_time = response.expire_time.seconds + response.expire_time.nanos / 1e9
    return Grant(
        lease_id=response.lease_id,
        expire_time=expire_time,
        request_count=response.granted_request_count,
        token_count=response.granted_token_count,
        concurrency=response.granted_concurrency,
        nano_usd=response.granted_nano_usd,
        retry_delay=retry_delay,
        request_limit=tightest.get(metering_service_pb2.LIMIT_KIND_REQUESTS_PER_MINUTE),
        token_limit=tightest.get(metering_service_pb2.LIMIT_KIND_TOKENS_PER_MINUTE),
        concurrency_limit=tightest.get(metering_service_pb2.LIMIT_KIND_CONCURRENCY),
        budget=tightest.get(metering_service_pb2.LIMIT_KIND_BUDGET),
    )
