"""Translation of the metering port."""

from __future__ import annotations

import time

from services.gateway.adapters.metering import grant_from_proto, principal_from_proto
from services.gateway.ports import LimitState
from sluice.metering.v1 import metering_service_pb2
from tests.unit.gateway.fakes import World


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
    await world.port.void(hold.hold_id, timeout=1.0)
    await world.port.give_back("lease-1", 5, timeout=1.0)
    assert world.metering.asked("ReturnLease")[0].owed_nano_usd == 5
