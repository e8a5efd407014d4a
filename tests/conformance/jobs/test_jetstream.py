"""The suites on a real nats-server, and what is JetStream's own."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from nats.aio.client import Client

from services.batching.adapters.jetstream import DEAD, JOBS, LATER, JetStream, JetStreamQueues, JetStreamTable
from services.batching.errors import QueueUnavailable, TooLarge
from services.batching.job import State
from services.batching.ports import Delivery, QueueName, Ticket
from services.runtime.errors import Code, Failure, Reason
from services.runtime.status import failure_from_status
from sluice.jobs.v1 import job_service_pb2 as pb2
from tests.conformance.jobs.broker import Broker, broker
from tests.conformance.jobs.suite import CAPACITY, QueuesSuite, Store, TableSuite, new, take
from tests.unit.batching.examples import BUSY

QUEUE = QueueName("acme", "default")


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[Broker]:
    async with broker(tmp_path) as made:
        yield made


@dataclass(frozen=True)
class Engine:
    """Table and queues on one connection."""

    client: Client
    table: JetStreamTable
    queues: JetStreamQueues


@contextlib.asynccontextmanager
async def engine(
    server: Broker, *, capacity: int = CAPACITY, ack_wait: float = 30.0, idle: float = 600.0
) -> AsyncIterator[Engine]:
    """What one process has."""
    async with server.client() as client:

        async def connect() -> Client:
            if not client.is_connected:
                raise Failure(Reason.DEPENDENCY_UNAVAILABLE, "not connected")
            return client

        streams = JetStream(connect, capacity=capacity, retention=3600.0, replicas=1)
        yield Engine(
            client, JetStreamTable(streams), JetStreamQueues(streams, connect, capacity=capacity, ack_wait=ack_wait, idle=idle)
        )


class _OnJetStream:
    @pytest.fixture(autouse=True)
    def _given(self, server: Broker) -> None:
        self._server = server

    def open(self) -> AbstractAsyncContextManager[Store]:
        return self._open()

    @contextlib.asynccontextmanager
    async def _open(self) -> AsyncIterator[Store]:
        async with engine(self._server) as opened:
            yield Store(opened.table, opened.queues)


class TestJetStreamTable(_OnJetStream, TableSuite):
    pass


async def test_a_list_has_the_rows_that_come_after_the_answers_about_them(
    server: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with engine(server) as opened:
        made = new()
        await opened.table.create(made)
        now, tasks = opened.client._process_msg, set()

        async def later(*message: Any) -> None:
            await asyncio.sleep(0.05)
            await now(*message)

        async def process(sid: int, subject: bytes, *rest: Any) -> None:
            if subject.startswith(b"$KV."):
                tasks.add(asyncio.create_task(later(sid, subject, *rest)))
            else:
                await now(sid, subject, *rest)

        # The server hands rows and answers to different queues, so that an answer may pass the rows that it counts as sent.
        monkeypatch.setattr(opened.client, "_process_msg", process)
        assert [found async for found in opened.table.list("acme")] == [made]
        assert tasks


async def test_lists_and_watches_leave_no_consumer_behind(server: Broker) -> None:
    async with engine(server) as opened:
        made = new()
        await opened.table.create(made)
        for _ in range(5):
            assert [found async for found in opened.table.list("acme")] == [made]
            async with contextlib.aclosing(opened.table.watch("acme", made.id)) as changes:
                assert await anext(changes) == made
        jetstream = opened.client.jetstream()
        left = await jetstream.consumers_info("KV_sluice-jobs")
        assert all(consumer.config.inactive_threshold == 5.0 for consumer in left), "nats-py's default is 5 minutes"
        assert len(left) <= 5


class TestJetStreamQueues(_OnJetStream, QueuesSuite):
    pass


@contextlib.asynccontextmanager
async def moving(queues: JetStreamQueues) -> AsyncIterator[None]:
    """Moves due tickets meanwhile, as a worker of the process: one that ends by itself ends the process."""
    task = asyncio.create_task(queues.move_due())
    try:
        yield
        assert not task.done(), "the mover ended by itself, which ends the process"
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def letters(client: Client) -> list[pb2.DeadLetter]:
    """All dead letters."""
    jetstream = client.jetstream()
    last = (await jetstream.stream_info(DEAD)).state.last_seq
    return [pb2.DeadLetter.FromString((await jetstream.get_msg(DEAD, seq)).data or b"") for seq in range(1, last + 1)]


async def test_a_ticket_not_done_comes_again_after_the_ack_wait(server: Broker) -> None:
    async with engine(server, ack_wait=1.0) as first, engine(server, ack_wait=1.0) as second:
        made = new()
        await first.queues.put(Ticket(made, 1))
        await take(first.queues, QUEUE, 1)
        (again,) = await take(second.queues, QUEUE, 1)
        assert again.ticket == Ticket(made, 1)
        await again.done()
        assert await second.queues.waiting() == {}


async def test_a_sign_of_life_keeps_the_ticket(server: Broker) -> None:
    async with engine(server, ack_wait=1.0) as mine, engine(server, ack_wait=1.0) as other:
        await mine.queues.put(Ticket(new("long"), 1))
        (delivery,) = await take(mine.queues, QUEUE, 1)
        await mine.queues.put(Ticket(new("silent"), 1))
        await take(mine.queues, QUEUE, 1)

        async def heartbeat() -> None:
            while True:
                await delivery.extend()
                await asyncio.sleep(0.2)

        beating = asyncio.create_task(heartbeat())
        # The silent one, taken later, is the clock: when it has come again, the long one would have come before.
        (first,) = await take(other.queues, QUEUE, 1)
        beating.cancel()
        assert first.ticket.job.id == new("silent").id


async def test_a_scheduled_ticket_is_kept_by_the_server_and_never_early(server: Broker) -> None:
    async with engine(server) as opened, moving(opened.queues):
        made = new()
        at = time.time() + 1.2
        await opened.queues.put_later(Ticket(made, 2), at)
        assert await opened.queues.waiting() == {}
        assert (await opened.client.jetstream().stream_info(LATER)).state.messages == 1
        async with asyncio.timeout(8):
            while not await opened.queues.waiting():
                await asyncio.sleep(0.02)
        assert time.time() >= at
        (delivery,) = await take(opened.queues, QUEUE, 1)
        assert delivery.ticket == Ticket(made, 2)


async def test_of_two_bodies_under_one_id_both_scheduled_tickets_are_kept(server: Broker) -> None:
    async with engine(server) as opened, moving(opened.queues):
        for made in (new(), new(text="other")):
            await opened.queues.put_later(Ticket(made, 1), time.time() - 10)
        taken = await take(opened.queues, QUEUE, 2)
        assert {delivery.ticket.job.submit_sha256 for delivery in taken} == {
            new().submit_sha256,
            new(text="other").submit_sha256,
        }


async def test_a_due_ticket_of_a_full_queue_holds_nobody_up(server: Broker) -> None:
    async with engine(server, capacity=1) as opened:
        await opened.queues.put(Ticket(new("first"), 1))
        await opened.queues.put_later(Ticket(new("second"), 1), time.time() - 10)
        await opened.queues.put_later(Ticket(new(tenant="other"), 1), time.time() - 10)
        jetstream = opened.client.jetstream()
        async with asyncio.timeout(10):
            # Both are due before the mover looks, so that it gets them in one fetch.
            while len((await jetstream.stream_info(LATER, subjects_filter="sluice.later.due.>")).state.subjects or ()) < 2:
                await asyncio.sleep(0.02)
        async with moving(opened.queues):
            other = QueueName("other", "default")
            async with asyncio.timeout(4):
                while other not in await opened.queues.waiting():
                    await asyncio.sleep(0.02)
            # The other one is not lost: it waits where it was, for room.
            state = (await jetstream.stream_info(LATER, subjects_filter="sluice.later.due.>")).state
            assert state.subjects == {"sluice.later.due.acme.default": 1}
            assert (await opened.queues.waiting())[QUEUE] == 1


_POISON: dict[str, bytes | pb2.JobMessage] = {
    "no message": b"\xff\xff\xff",
    "empty": b"",
    "no attempt": pb2.JobMessage(job_id="job_x", tenant_id="acme", submit=pb2.SubmitJobRequest(job_class="default")),
    "another tenant's": pb2.JobMessage(
        job_id="job_x", tenant_id="other", attempt_number=1, submit=pb2.SubmitJobRequest(job_class="default")
    ),
}


def _bytes(poison: bytes | pb2.JobMessage) -> bytes:
    return poison if isinstance(poison, bytes) else poison.SerializeToString()


@pytest.mark.parametrize("batch", [1, 2])
async def test_what_is_no_ticket_goes_to_the_dead_letters_and_blocks_nothing(server: Broker, batch: int) -> None:
    async with engine(server, capacity=10) as opened:
        await opened.queues.waiting()
        for poison in _POISON.values():
            await opened.client.jetstream().publish("sluice.jobs.acme.default", _bytes(poison))
        fine = new()
        await opened.queues.put(Ticket(fine, 1))
        found: list[Delivery] = []
        async with asyncio.timeout(10):
            while not found:
                found = await opened.queues.take(QUEUE, batch)
        assert [delivery.ticket.job for delivery in found] == [fine]
        assert await opened.queues.waiting() == {QUEUE: 1}
        buried = [failure_from_status(letter.error) for letter in await letters(opened.client)]
        assert [failure.metadata["subject"] for failure in buried] == ["sluice.jobs.acme.default"] * len(_POISON)
        assert all(failure.code is Code.INTERNAL for failure in buried)


async def test_what_is_no_ticket_among_the_due_blocks_nothing(server: Broker) -> None:
    async with engine(server, capacity=10) as opened:
        await opened.queues.waiting()
        for poison in _POISON.values():
            await opened.client.jetstream().publish("sluice.later.due.acme.default", _bytes(poison))
        async with moving(opened.queues):
            await opened.queues.put_later(Ticket(new(), 1), time.time() - 10)
            (delivery,) = await take(opened.queues, QUEUE, 1)
            assert delivery.ticket.job.id == new().id
        assert len(await letters(opened.client)) == len(_POISON)


async def test_a_subject_that_is_none_of_ours_blocks_nothing(server: Broker) -> None:
    async with engine(server) as opened:
        await opened.queues.put(Ticket(new(), 1))
        for foreign in ("=!!!", "=_w", "=YQ", "ä"):
            await opened.client.jetstream().publish(f"sluice.jobs.{foreign}.default", b"x")
        assert await opened.queues.waiting() == {QUEUE: 1}


async def test_each_death_of_a_job_has_one_letter(server: Broker) -> None:
    async with engine(server) as opened:
        made = replace(new(), attempts=4)
        for _ in range(2):
            await opened.queues.bury(Ticket(made, 4), BUSY, 1_800_000_000.0)
        (letter,) = await letters(opened.client)
        assert (letter.message.job_id, letter.attempt_count, letter.dead_time.seconds) == (made.id, 4, 1_800_000_000)
        assert failure_from_status(letter.error).reason is BUSY.reason
        await opened.queues.bury(Ticket(replace(made, generation=1), 4), BUSY, 1_800_000_100.0)
        assert [letter.message.generation for letter in await letters(opened.client)] == [0, 1]


async def test_a_queue_whose_consumer_was_removed_is_served_again(server: Broker) -> None:
    async with engine(server) as opened:
        jetstream = opened.client.jetstream()
        await opened.queues.put(Ticket(new("first"), 1))
        (delivery,) = await take(opened.queues, QUEUE, 1)
        await delivery.done()
        (consumer,) = await jetstream.consumers_info(JOBS)
        assert consumer.config.inactive_threshold == 600.0
        await jetstream.delete_consumer(JOBS, consumer.name)
        await opened.queues.put(Ticket(new("second"), 1))
        # Removal while idle is ordinary: `take` says nothing of it.
        (delivery,) = await take(opened.queues, QUEUE, 1)
        assert delivery.ticket.job.id == new("second").id


async def test_a_message_that_the_broker_would_not_take_is_refused_as_that(server: Broker) -> None:
    async with engine(server) as opened:
        large = new(text="x" * (8 * 1024 * 1024 - 8 * 1024))
        with pytest.raises(TooLarge) as caught:
            await opened.queues.put(Ticket(large, 1))
        assert caught.value.code is Code.RESOURCE_EXHAUSTED
        with pytest.raises(TooLarge):
            await opened.queues.put_later(Ticket(large, 1), time.time() + 5)
        with pytest.raises(TooLarge):
            await opened.table.create(new(text="x" * 8 * 1024 * 1024))
        assert await opened.queues.waiting() == {}


async def test_a_server_that_is_gone_is_unavailable_in_bounded_time(server: Broker) -> None:
    async with engine(server) as opened:
        await opened.queues.put(Ticket(new(), 1))
        (delivery,) = await take(opened.queues, QUEUE, 1)
        await server.kill()
        async with asyncio.timeout(20):
            for call in (
                opened.queues.put(Ticket(new("r2"), 1)),
                opened.queues.put_later(Ticket(new("r2"), 1), time.time()),
                opened.table.get("acme", new().id),
                opened.table.create(new("r2")),
                opened.queues.waiting(),
                opened.queues.take(QUEUE, 1),
                delivery.done(),
            ):
                with pytest.raises(QueueUnavailable):
                    await call


async def test_everything_accepted_outlives_kill_9(server: Broker) -> None:
    async with engine(server) as opened:
        made = new()
        revision = await opened.table.create(made)
        await opened.queues.put(Ticket(made, 1))
        await opened.queues.put_later(Ticket(new("later"), 1), time.time() + 3600)
        await opened.queues.bury(Ticket(new("dead"), 4), BUSY, time.time())
        await server.kill()
    await server.start()
    async with engine(server) as opened:
        row = await opened.table.get("acme", made.id)
        assert row is not None
        assert (row.job, row.revision) == (made, revision)
        (delivery,) = await take(opened.queues, QUEUE, 1)
        assert delivery.ticket.job == made
        assert (await opened.client.jetstream().stream_info(LATER)).state.messages == 1
        assert [letter.message.job_id for letter in await letters(opened.client)] == [new("dead").id]


async def test_a_schedule_that_came_due_while_the_server_was_dead_is_kept(server: Broker) -> None:
    async with engine(server) as opened:
        await opened.queues.put_later(Ticket(new(), 1), time.time())
        await server.kill()
    await asyncio.sleep(1.1)
    await server.start()
    async with engine(server) as opened, moving(opened.queues):
        (delivery,) = await take(opened.queues, QUEUE, 1)
        assert delivery.ticket.job.id == new().id


async def test_a_watch_goes_on_after_the_server_was_killed(server: Broker) -> None:
    """The consumer behind a watch lives in the server's memory."""
    async with engine(server) as opened:
        made = new()
        revision = await opened.table.create(made)
        async with contextlib.aclosing(opened.table.watch("acme", made.id)) as changes, asyncio.timeout(15):
            assert await anext(changes) == made
            await server.kill()
            await server.start()
            while not opened.client.is_connected:
                await asyncio.sleep(0.02)
            async with engine(server) as other:
                await other.table.replace(made.ended(State.CANCELLED, time.time()), revision)
            assert (await anext(changes)).state is State.CANCELLED
