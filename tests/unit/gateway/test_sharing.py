"""Callers of one request id, each with its own deadline."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from services.gateway.core import Completion
from services.gateway.events import Opened
from services.runtime.errors import Failure, Reason
from sluice.execution.v1 import execution_service_pb2
from sluice.inference.v1 import inference_service_pb2
from tests.unit.gateway.fakes import PRINCIPAL, World, generate


async def under_way(world: World, method: str) -> None:
    """Waits until execution was called."""
    async with asyncio.timeout(1):
        while not world.execution.asked(method):
            await asyncio.sleep(0.001)


async def timed_out(work: Any) -> Failure:
    """The failure of a call whose deadline passes."""
    async with asyncio.timeout(1):
        with pytest.raises(Failure) as caught:
            await work
    assert caught.value.reason is Reason.DEADLINE_EXCEEDED
    return caught.value


async def test_who_joins_waits_no_longer_than_its_own_deadline_and_the_operation_goes_on() -> None:
    world = World()
    world.execution.gate = asyncio.Event()
    first = asyncio.create_task(world.generate(generate(request_id="r1")))
    await under_way(world, "Complete")
    began = world.loop.time()
    await timed_out(world.generate(generate(request_id="r1"), seconds=0.05))
    assert 0.04 < world.loop.time() - began < 0.5
    assert world.execution.cancelled_count == 0
    world.execution.gate.set()
    completion = await first
    replayed = await world.generate(generate(request_id="r1"), seconds=0.05)
    assert replayed.operation_id == completion.operation_id
    assert len(world.execution.asked("Complete")) == 1


async def test_who_joins_an_embedding_waits_no_longer_than_its_own_deadline() -> None:
    world = World()
    world.execution.gate = asyncio.Event()
    request = inference_service_pb2.EmbedRequest(request_id="r1", model="a/one", inputs=["abc"])
    first = asyncio.create_task(world.core.embed(PRINCIPAL, request, deadline=world.soon()))
    await under_way(world, "Embed")
    await timed_out(world.core.embed(PRINCIPAL, request, deadline=world.soon(0.05)))
    world.execution.gate.set()
    assert (await first).operation_id == (await world.core.embed(PRINCIPAL, request, deadline=world.soon())).operation_id
    assert len(world.execution.asked("Embed")) == 1


async def test_who_joins_a_stream_waits_no_longer_than_its_own_deadline() -> None:
    world = World()
    world.execution.piece_gate = asyncio.Event()
    request = generate(request_id="r1")
    first = asyncio.create_task(world.stream(request))
    await under_way(world, "StreamComplete")
    joined = world.core.stream(PRINCIPAL, request, accepted_wire=0, deadline=world.soon(0.05))
    assert isinstance(await anext(joined), Opened)
    assert isinstance(await anext(joined), execution_service_pb2.DeltaBatch)
    await timed_out(anext(joined))
    await timed_out(world.generate(request, seconds=0.05))
    world.execution.piece_gate.set()
    assert isinstance((await first)[-1], Completion)
    assert (await world.generate(request)).operation_id == (await first)[-1].operation_id
    assert len(world.execution.asked("StreamComplete")) == 1


async def test_a_stream_that_is_read_slowly_ends_at_its_readers_deadline() -> None:
    """The next piece is always there: its reader never waits, and is refused all the same."""
    world = World()
    world.execution.pieces = ["a", "b", "c"]
    world.execution.piece_gate = asyncio.Event()
    request = generate(request_id="r1")
    first = asyncio.create_task(world.stream(request))
    await under_way(world, "StreamComplete")
    joined = world.core.stream(PRINCIPAL, request, accepted_wire=0, deadline=world.soon(0.05))
    assert isinstance(await anext(joined), Opened)
    await asyncio.sleep(0.1)
    await timed_out(anext(joined))
    world.execution.piece_gate.set()
    assert len(await first) == 5


async def test_who_would_wait_longer_than_the_operation_may_run_begins_anew_when_it_asks_again() -> None:
    """The operation has the deadline that execution was given; the joiner learns of it at once, not at its own deadline."""
    world = World()
    world.execution.gate = asyncio.Event()
    first = asyncio.create_task(world.generate(generate(request_id="r1"), seconds=0.1))
    await under_way(world, "Complete")
    began = world.loop.time()
    await timed_out(world.generate(generate(request_id="r1"), seconds=30))
    assert world.loop.time() - began < 0.5
    await timed_out(first)
    world.execution.gate.set()
    assert (await world.generate(generate(request_id="r1"))).answer.message.parts
    assert len(world.execution.asked("Complete")) == 2


async def test_the_deadline_of_whoever_waits_longest_ends_the_operation_when_it_is_the_earlier_one() -> None:
    """Nobody is left to wait: the operation is cancelled and not run to its own deadline for no one."""
    world = World()
    world.execution.gate = asyncio.Event()
    first = asyncio.create_task(world.generate(generate(request_id="r1")))
    await under_way(world, "Complete")
    joined = asyncio.create_task(world.generate(generate(request_id="r1"), seconds=0.05))
    await asyncio.sleep(0.01)
    first.cancel()
    await timed_out(joined)
    await asyncio.sleep(0.01)
    assert world.execution.cancelled_count == 1
    assert not world.requests.running()


async def test_who_leaves_and_comes_back_in_time_joins_what_it_began() -> None:
    world = World(linger=0.2)
    world.execution.gate = asyncio.Event()
    first = asyncio.create_task(world.generate(generate(request_id="r1")))
    await under_way(world, "Complete")
    for _ in range(3):
        # Each time the operation lingers from the last leaving on.
        first.cancel()
        await asyncio.sleep(0.1)
        first = asyncio.create_task(world.generate(generate(request_id="r1")))
        await asyncio.sleep(0.01)
    world.execution.gate.set()
    assert (await first).answer.message.parts
    assert (len(world.execution.asked("Complete")), world.execution.cancelled_count) == (1, 0)


async def test_a_stream_that_was_left_is_given_from_its_first_piece_to_who_comes_back() -> None:
    world = World(linger=5.0)
    world.execution.pieces = ["a", "b", "c"]
    world.execution.piece_gate = asyncio.Event()
    request = generate(request_id="r1")
    events = world.core.stream(PRINCIPAL, request, accepted_wire=0, deadline=world.soon())
    assert isinstance(await anext(events), Opened)
    assert isinstance(await anext(events), execution_service_pb2.DeltaBatch)
    await events.aclose()
    joined = asyncio.create_task(world.stream(request))
    await asyncio.sleep(0.01)
    world.execution.piece_gate.set()
    assert "".join(delta.text for event in (await joined)[1:-1] for delta in event.deltas) == "abc"
    assert len(world.execution.asked("StreamComplete")) == 1


async def test_what_nobody_comes_back_to_is_cancelled_when_it_has_lingered() -> None:
    world = World(linger=0.05)
    world.execution.gate = asyncio.Event()
    first = asyncio.create_task(world.generate(generate(request_id="r1")))
    await under_way(world, "Complete")
    first.cancel()
    await asyncio.sleep(0.01)
    assert world.execution.cancelled_count == 0
    await asyncio.sleep(0.1)
    assert world.execution.cancelled_count == 1
    assert not world.requests.running()
    # Who comes later begins another one; nobody's timer ends that.
    second = asyncio.create_task(world.generate(generate(request_id="r1")))
    await asyncio.sleep(0.1)
    world.execution.gate.set()
    assert (await second).answer.message.parts
    assert len(world.execution.asked("Complete")) == 2
