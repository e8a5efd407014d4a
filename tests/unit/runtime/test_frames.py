from __future__ import annotations

import asyncio
from typing import Any

from services.runtime.frames import MAX_BATCH_BYTES, MAX_OUTBOX_BYTES, Outbox
from sluice.link.v1.link_service_pb2 import ExchangeRequest


async def test_what_is_ready_in_one_turn_travels_in_one_message() -> None:
    outbox = Outbox(ExchangeRequest)
    written: list[Any] = []

    async def write(message: Any) -> None:
        written.append([frame.call_id for frame in message.frames])

    task = asyncio.create_task(outbox.write_to(write))
    await asyncio.sleep(0)
    for number in range(5):
        outbox.add(10).call_id = number
    await asyncio.sleep(0.01)
    outbox.add(10).call_id = 5
    await asyncio.sleep(0.01)
    task.cancel()
    assert written == [[0, 1, 2, 3, 4], [5]]
    assert outbox.byte_count == 0


async def test_messages_are_bounded_in_frames_and_bytes() -> None:
    outbox = Outbox(ExchangeRequest)
    written: list[int] = []

    async def write(message: Any) -> None:
        written.append(len(message.frames))

    for _ in range(2500):
        outbox.add(1)
    for _ in range(3):
        outbox.add(MAX_BATCH_BYTES)
    task = asyncio.create_task(outbox.write_to(write))
    await asyncio.sleep(0.01)
    task.cancel()
    assert written == [1024, 1024, 452, 1, 1, 1]


async def test_a_full_outbox_makes_producers_wait() -> None:
    outbox = Outbox(ExchangeRequest)
    outbox.add(MAX_OUTBOX_BYTES + 1)
    waiting = asyncio.create_task(outbox.room())
    await asyncio.sleep(0.01)
    assert not waiting.done()

    async def write(_: Any) -> None:
        return

    task = asyncio.create_task(outbox.write_to(write))
    await asyncio.wait_for(waiting, 1)
    task.cancel()
