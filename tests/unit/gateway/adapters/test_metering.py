"""Translation of the metering port."""

from __future__ import annotations

import time
from typing import Any

from services.gateway.adapters.metering import MeteringClient, grant_from_proto, principal_from_proto
from services.gateway.ports import LeaseWish, LimitState
from services.runtime.link import Replica
from sluice.metering.v1 import metering_service_pb2
from sluice.metering.v1.metering_service_pb2_grpc import MeteringServiceStub
from tests.unit.gateway.fakes import World, down


def test_identities() -> None:
    identity = metering_service_pb2.Identity(
        tenant_id="t", project_id="p", key_id="k", scopes=["jobs"], allowed_models=["b", "a"], cache_namespace="n"
    )
    principal = principal_from_proto(identity)
    assert principal.allowed_models == ("a", "b")
    assert principal.expire_time is None
    identity.expire_time.FromMilliseconds(1500)
    assert principal_from_proto(identity).expire_time == 1.5


def test_the_tightest_limit_of_a_kind_is_kept() -> None:
    response = metering_service_pb2.AcquireLeaseResponse(granted_nano_usd=-1)
    budget = metering_service_pb2.LIMIT_KIND_BUDGET
    response.limits.add(level="tenant", kind=budget, limit=100, remaining=50)
    response.limits.add(level="project", kind=budget, limit=40, remaining=5)
    grant = grant_from_proto(response)
    assert grant.budget == LimitState("project", 40, 5)
    assert grant.request_limit is None
    assert grant.retry_delay is None
    # A grant that doesn't say its end gets a minute.
    assert 50 < grant.expire_time - time.time() < 61


async def test_a_hold_and_its_end() -> None:
    world = World()
    world.metering.budget = 100
    hold = await world.port.hold("op", "key-1", 60, 0, time.time() + 60, timeout=1.0)
    assert (hold.amount_nano_usd, hold.budget_before_nano_usd, hold.budget_level) == (60, 100, "tenant")
    await world.port.void(hold.hold_id, may_have_run=True, timeout=1.0)
    (asked,) = world.metering.asked("Hold")
    assert asked.replica_id == "gateway-test"
    (voided,) = world.metering.asked("VoidHold")
    assert (voided.hold_id, voided.may_have_run) == (hold.hold_id, True)
    await world.port.give_back("acme", "lease-1", 5, timeout=1.0)
    assert world.metering.asked("ReturnLease")[0].owed_nano_usd == 5


class Processes:
    """Metering processes, each with a book of its own."""

    def __init__(self, *endpoints: str) -> None:
        self.worlds = {endpoint: World() for endpoint in endpoints}
        self.lost: set[str] = set()

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """All of them: that one is lost is noticed by a call."""
        return tuple(Replica(endpoint, f"metering-{endpoint}") for endpoint in self.worlds)

    def only(self, endpoint: str) -> Any:
        """The channel to one."""
        processes = self

        class Lossy:
            def unary_unary(self, method: str, **serializers: Any) -> Any:
                call = processes.worlds[endpoint].metering_channel.unary_unary(method, **serializers)

                async def over(request: Any, **options: Any) -> Any:
                    if endpoint in processes.lost:
                        raise down("metering")
                    return await call(request, **options)

                return over

            unary_stream = stream_unary = stream_stream = unary_unary

        return Lossy()

    def asked(self, method: str) -> list[str]:
        """Who was called, a name for each call."""
        return [name for name, world in self.worlds.items() for _ in world.metering.asked(method)]


async def test_the_limits_of_a_tenant_are_asked_of_one_process_by_every_gateway() -> None:
    processes = Processes("a:1", "b:1", "c:1")
    anybody = World().metering_channel
    owners = set()
    for number in range(12):
        tenant = f"tenant-{number}"
        for gateway in ("gateway-1", "gateway-2"):
            port = MeteringClient(MeteringServiceStub(anybody), gateway, processes)
            await port.acquire(wish(tenant), timeout=1.0)
            await port.give_back(tenant, "lease-1", 0, timeout=1.0)
        granted = set(processes.asked("AcquireLease"))
        assert granted == set(processes.asked("ReturnLease"))
        for world in processes.worlds.values():
            world.metering.calls.clear()
        assert len(granted) == 1
        owners |= granted
    assert owners == {"a:1", "b:1", "c:1"}


async def test_where_the_process_of_a_tenant_is_lost_the_next_one_is_asked() -> None:
    processes = Processes("a:1", "b:1")
    port = MeteringClient(MeteringServiceStub(World().metering_channel), "gateway-1", processes)
    await port.acquire(wish("t"), timeout=1.0)
    (owner,) = processes.asked("AcquireLease")
    processes.lost.add(owner)
    await port.acquire(wish("t"), timeout=1.0)
    assert sorted(processes.asked("AcquireLease")) == ["a:1", "b:1"]


def wish(tenant: str) -> LeaseWish:
    """Something that a tenant's key wants."""
    return LeaseWish(1, "key-1", "", 1, 1, 1, 0, 0, 0, tenant)
