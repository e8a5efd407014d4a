"""Lookups, and what waits behind the path."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from google.protobuf.duration_pb2 import Duration

from services.gateway.cache import CacheWriter, lookup_to_proto, may_store
from services.gateway.plans import Plan
from services.gateway.principals import Principal
from services.gateway.receipts import Facts
from services.runtime.errors import Code, Failure
from sluice.caching.v1 import caching_service_pb2
from sluice.inference.v1 import inference_service_pb2, receipt_pb2
from sluice.routing.v1 import routing_service_pb2
from tests.unit.gateway.fakes import PRINCIPAL, World, answer, down, generate


def facts_of(*, ticket: bytes = b"t", **fields: object) -> Facts:
    """Facts after a lookup."""
    facts = Facts("A" * 26, PRINCIPAL, generate(**fields), "generate", 1, 1)  # type: ignore[arg-type]
    facts.lookup = caching_service_pb2.LookupResponse(ticket=ticket)
    facts.plan = Plan(routing_service_pb2.PlanResponse(named_model=answer().model), (), 1e12)
    return facts


def stored(world: World) -> list[caching_service_pb2.StoreRequest]:
    """What the cache was asked to store."""
    return [store for batch in world.caching.asked("BatchStore") for store in batch.requests]


def test_the_lookup_has_everything_that_scopes_an_answer() -> None:
    request = generate(
        routing=inference_service_pb2.RoutingWishes(model="policy/fast", region="eu", allow_fallback=False),
        cache=inference_service_pb2.CacheWishes(cache_namespace="mine"),
        task_type=receipt_pb2.TASK_TYPE_CODE,
        metadata={"echo.b": "2", "team": "x", "echo.a": "1"},
    )
    lookup = lookup_to_proto(PRINCIPAL, request, "v1")
    assert (lookup.tenant_id, lookup.model, lookup.policy_version) == ("acme", "policy/fast", "v1")
    assert lookup.task_type == receipt_pb2.TASK_TYPE_CODE
    assert lookup.wishes.cache_namespace == "mine"
    assert lookup.routing_scope == "region=eu\nallow_fallback=False\necho.a=1\necho.b=2"
    assert lookup.conversation == request.conversation


def test_wishes_that_may_change_which_model_answers_are_a_part_of_the_scope() -> None:
    scopes = {
        lookup_to_proto(PRINCIPAL, generate(routing=routing), "v1").routing_scope
        for routing in (
            inference_service_pb2.RoutingWishes(),
            inference_service_pb2.RoutingWishes(max_cost_nano_usd=0),
            inference_service_pb2.RoutingWishes(max_cost_nano_usd=5),
            inference_service_pb2.RoutingWishes(max_latency=Duration(seconds=1)),
            inference_service_pb2.RoutingWishes(region="eu"),
        )
    }
    assert len(scopes) == 5


def test_auto_and_nothing_are_one_name() -> None:
    named = lookup_to_proto(PRINCIPAL, generate(routing=inference_service_pb2.RoutingWishes(model="auto")), "v1")
    assert named.model == lookup_to_proto(PRINCIPAL, generate(), "v1").model == ""


def test_the_keys_namespace_serves_when_the_request_names_none() -> None:
    principal = Principal("acme", "default", "key-1", ("inference",), (), "team", None)
    assert lookup_to_proto(principal, generate(), "v1").wishes.cache_namespace == "team"
    request = generate(cache=inference_service_pb2.CacheWishes(cache_namespace="mine"))
    assert lookup_to_proto(principal, request, "v1").wishes.cache_namespace == "mine"
    assert request.cache.cache_namespace == "mine"


@pytest.mark.parametrize(
    ("finish", "clamped", "ticket", "expected"),
    [(1, 0, b"t", True), (3, 0, b"t", True), (2, 0, b"t", True), (2, 45, b"t", False), (4, 0, b"t", False), (5, 0, b"t", False),
     (6, 0, b"t", False), (1, 0, b"", False)],
)  # fmt: skip
def test_only_complete_answers_are_stored(finish: int, clamped: int, ticket: bytes, expected: bool) -> None:
    facts = facts_of(ticket=ticket)
    facts.request.conversation.max_output_tokens = 50
    facts.max_output = clamped
    assert may_store(facts, answer(finish=finish)) is expected


def test_an_answer_cut_at_a_length_that_nobody_asked_for_is_not_stored() -> None:
    facts = facts_of()
    facts.request.conversation.ClearField("max_output_tokens")
    assert may_store(facts, answer(finish=2)) is False


def test_a_fallbacks_answer_serves_once() -> None:
    """Under the named model's key it would outlive the outage."""
    facts = facts_of()
    other = answer()
    other.model = "another/model"
    assert may_store(facts, answer()) is True
    assert may_store(facts, other) is False


async def test_a_full_queue_drops_and_counts() -> None:
    world = World()
    for _ in range(12):
        world.writer.add(facts_of(), answer())
    assert world.writer.dropped_count == 2
    await world.writer.flush()
    assert len(stored(world)) == 10
    world.writer.add(facts_of(), answer("x" * 200_000))
    assert world.writer.dropped_count == 3


async def test_a_store_that_fails_is_counted_and_not_repeated() -> None:
    world = World()
    world.caching.failures["BatchStore"] = down("caching")
    for _ in range(2):
        world.writer.add(facts_of(), answer())
    await world.writer.flush()
    assert world.writer.failed_count == 2
    assert len(stored(world)) == 2


async def test_an_answer_that_is_refused_is_counted() -> None:
    world = World()
    world.caching.stored.status.code = Code.FAILED_PRECONDITION
    world.writer.add(facts_of(), answer())
    await world.writer.flush()
    assert world.writer.failed_count == 1


async def test_stores_are_sent_many_at_once_in_messages_of_bounded_size() -> None:
    world = World()
    writer = CacheWriter(world.caching_stub, max_count=1000, max_bytes=100 << 20, call_seconds=5.0)
    for number in range(250):
        writer.add(facts_of(), answer(str(number)))
    await writer.flush()
    assert [len(batch.requests) for batch in world.caching.asked("BatchStore")] == [100, 100, 50]
    assert [store.answer.answer.message.parts[0].text for store in stored(world)] == [str(number) for number in range(250)]
    world.caching.calls.clear()
    for size in (300_000, 200_000, 100_000, 900_000, 10, 10):
        writer.add(facts_of(), answer("x" * size))
    await writer.flush()
    assert [len(batch.requests) for batch in world.caching.asked("BatchStore")] == [2, 1, 1, 2]
    assert writer.failed_count == writer.dropped_count == 0


async def test_the_ttl_is_passed_on() -> None:
    world = World()
    world.writer.add(facts_of(cache=inference_service_pb2.CacheWishes(ttl=Duration(seconds=9))), answer())
    await world.writer.flush()
    assert stored(world)[0].ttl.seconds == 9


async def test_hits_wait_while_metering_is_down_and_are_posted_then() -> None:
    world = World()
    world.metering.failures["PostSettlements"] = down("metering")
    for _ in range(3):
        world.hits.add(facts_of())
    with pytest.raises(Failure):
        await world.hits.flush()
    world.metering.failures.clear()
    await world.hits.flush()
    assert len(world.metering.asked("PostSettlements")[-1].settlements) == 3


async def test_hits_are_bounded() -> None:
    world = World()
    world.metering.failures["PostSettlements"] = down("metering")
    for _ in range(105):
        world.hits.add(facts_of())
    with pytest.raises(Failure):
        await world.hits.flush()
    assert world.hits.dropped_count == 5


async def test_the_workers_work() -> None:
    world = World()
    tasks = [asyncio.create_task(world.writer.write_forever()), asyncio.create_task(world.hits.post_forever())]
    world.writer.add(facts_of(), answer())
    world.hits.add(facts_of())
    await asyncio.sleep(0.1)
    assert stored(world)
    assert world.metering.asked("PostSettlements")
    for task in tasks:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
