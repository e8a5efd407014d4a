"""Plans: reuse, single flight, outages."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from services.gateway.holds import Tariff
from services.gateway.plans import PlanKey, plan_request_to_proto, round_up, tariff_from_proto
from services.runtime.errors import Failure, Reason
from tests.unit.gateway.fakes import World, candidate, down, price


def key(**fields: Any) -> PlanKey:
    """A key."""
    plain = PlanKey("acme", "", 0, ("chat",), "", None, (), False, 0, 0, 64, 0, 0, 0, -1)
    return plain._replace(**fields)


async def test_a_plan_is_reused_for_its_time() -> None:
    world = World()
    world.routing.plan.reuse_duration.FromMilliseconds(50)
    assert world.plans.get(key()) is None
    plan, is_old = await world.plans.fetch(key(), 1.0, ())
    assert not is_old
    assert world.plans.get(key()) is plan
    await asyncio.sleep(0.06)
    assert world.plans.get(key()) is None
    assert world.plans.policy_version == "v1"


async def test_many_ask_once() -> None:
    world = World()
    world.routing.delays["Plan"] = 0.02
    plans = await asyncio.gather(*(world.plans.fetch(key(), 1.0, ()) for _ in range(10)))
    assert len({id(plan) for plan, _ in plans}) == 1
    assert len(world.routing.asked("Plan")) == 1


async def test_a_renewal_is_waited_for_by_one_only() -> None:
    world = World()
    world.routing.plan.reuse_duration.FromMilliseconds(1)
    old, _ = await world.plans.fetch(key(), 1.0, ())
    await asyncio.sleep(0.005)
    world.routing.gate = asyncio.Event()
    renewal = asyncio.create_task(world.plans.fetch(key(), 1.0, ()))
    await asyncio.sleep(0)
    assert await world.plans.fetch(key(), 1.0, ()) == (old, False)
    world.routing.gate.set()
    assert (await renewal)[0] is not old


async def test_the_last_good_plan_stands_in_for_an_equal_and_for_a_similar_request() -> None:
    world = World()
    world.routing.plan.reuse_duration.FromMilliseconds(1)
    plan, _ = await world.plans.fetch(key(), 1.0, ())
    await asyncio.sleep(0.005)
    world.routing.failures["Plan"] = down("routing")
    assert await world.plans.fetch(key(), 1.0, ()) == (plan, True)
    assert await world.plans.fetch(key(input_token_bound=4096), 1.0, ()) == (plan, True)
    with pytest.raises(Failure):
        await world.plans.fetch(key(tenant_id="globex"), 1.0, ())
    with pytest.raises(Failure):
        await world.plans.fetch(key(needs=("chat", "tools")), 1.0, ())


async def test_a_dead_routing_is_not_asked_by_every_request() -> None:
    world = World()
    world.routing.failures["Plan"] = down("routing")
    for _ in range(10):
        with pytest.raises(Failure):
            await world.plans.fetch(key(), 1.0, ())
    assert len(world.routing.asked("Plan")) == 3


async def test_an_unknown_model_is_an_answer_not_an_outage() -> None:
    world = World()
    world.routing.failures["Plan"] = Failure(Reason.MODEL_NOT_FOUND, "no such model")
    for _ in range(10):
        with pytest.raises(Failure) as caught:
            await world.plans.fetch(key(model="x/y"), 1.0, ())
        assert caught.value.reason is Reason.MODEL_NOT_FOUND
    assert len(world.routing.asked("Plan")) == 10


async def test_candidates_that_the_key_may_not_use_are_left_out() -> None:
    world = World()
    world.routing.plan.candidates.append(candidate("b/two"))
    plan, _ = await world.plans.fetch(key(allowed_models=("b/two",)), 1.0, ())
    assert [chosen.model for chosen in plan.candidates] == ["b/two"]
    plan, _ = await world.plans.fetch(key(allowed_models=("policy/default",)), 1.0, ())
    assert [chosen.model for chosen in plan.candidates] == ["a/one", "b/two"]


async def test_what_execution_does_not_read_is_not_sent_to_it() -> None:
    world = World()
    plan, _ = await world.plans.fetch(key(), 1.0, ())
    assert not plan.messages[0].scores
    assert plan.response.candidates[0].scores


def test_the_request_says_all_of_the_key() -> None:
    request = plan_request_to_proto(
        key(model="m", task_type=2, region="eu", allow_fallback=False, max_latency_ns=1_500_000_000)
    )
    assert (request.model, request.task_type, request.region, request.allow_fallback) == ("m", 2, "eu", False)
    assert (request.max_latency.seconds, request.max_latency.nanos) == (1, 500_000_000)
    assert not plan_request_to_proto(key()).HasField("allow_fallback")
    assert not plan_request_to_proto(key()).HasField("max_latency")


def test_the_dearest_price_counts() -> None:
    tariff = tariff_from_proto(
        price(cache_write_nano_usd_per_million=1_250_000_000, reasoning_nano_usd_per_million=3_000_000_000)
    )
    assert tariff == Tariff(1_250_000_000, 3_000_000_000, 0, 0)


def test_rounding() -> None:
    assert [round_up(count) for count in (0, 1, 2, 3, 1024, 1025)] == [1, 1, 2, 4, 1024, 2048]
