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
