"""What every job table and every set of queues does. Tests get `table` and `queues` from the class that stands for the engine."""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import abstractmethod
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import pytest

from services.batching.errors import Conflict, QueueFull
from services.batching.job import Job, State
from services.batching.ports import Delivery, JobTable, QueueName, Queues, Ticket
from tests.unit.batching.examples import BUSY, generate_response, job

CAPACITY = 3


@dataclass(frozen=True)
class Store:
    """An engine that is open. `queues` hold at most CAPACITY tickets each."""

    table: JobTable
    queues: Queues


def new(request_id: str = "r1", **changes: Any) -> Job:
    """A job of now: engines look at the real clock."""
    return job(request_id, now=round(time.time(), 3), **changes)


async def take(queues: Queues, queue: QueueName, count: int) -> list[Delivery]:
    """`count` deliveries, waited for."""
    found: list[Delivery] = []
    async with asyncio.timeout(10):
        while len(found) < count:
            found += await queues.take(queue, count - len(found))
    return found


class TableSuite:
    """A JobTable."""

    @abstractmethod
    def open(self) -> AbstractAsyncContextManager[Store]:
        """Opens the engine, empty."""

    async def test_what_is_written_is_read(self) -> None:
        async with self.open() as store:
            made = new(allowed_models=("a",), cache_namespace="shop")
            revision = await store.table.create(made)
            row = await store.table.get("acme", made.id)
            assert row is not None
            assert (row.job, row.revision) == (made, revision)
            done = made.started(made.create_time + 1).succeeded(generate_response(), made.create_time + 2)
            await store.table.replace(done, revision)
            row = await store.table.get("acme", made.id)
            assert row is not None
            assert row.job == done
            assert row.revision != revision

    async def test_nothing_is_nothing(self) -> None:
        async with self.open() as store:
            assert await store.table.get("acme", "job_x") is None
            assert [found async for found in store.table.list("acme")] == []

    async def test_only_one_of_two_writers_wins(self) -> None:
        async with self.open() as store:
            made = new()
            revision = await store.table.create(made)
            with pytest.raises(Conflict):
                await store.table.create(made)
            await store.table.replace(made.started(1.0), revision)
            with pytest.raises(Conflict):
                await store.table.replace(made.ended(State.CANCELLED, 1.0), revision)
            with pytest.raises(Conflict):
                await store.table.replace(new("unknown"), 1)
            row = await store.table.get("acme", made.id)
            assert row is not None
            assert row.job.state is State.RUNNING

    async def test_of_many_writers_at_once_one_wins(self) -> None:
        async with self.open() as store:
            made = new()
            revision = await store.table.create(made)
            writes = [store.table.replace(made.started(float(number + 1)), revision) for number in range(10)]
            results = await asyncio.gather(*writes, return_exceptions=True)
            assert sum(isinstance(result, int) for result in results) == 1
            assert sum(isinstance(result, Conflict) for result in results) == 9

    @pytest.mark.parametrize(
        ("one", "two"), [("acme", "acm"), ("a", "a.b"), ("a*", "ab"), (">", "x"), ("A", "a"), ("ä", "=w6Q")]
    )
    async def test_tenants_see_their_own(self, one: str, two: str) -> None:
        async with self.open() as store:
            jobs = {tenant: new(tenant=tenant) for tenant in (one, two)}
            for made in jobs.values():
                await store.table.create(made)
            for tenant in (one, two):
                assert [found async for found in store.table.list(tenant)] == [jobs[tenant]]
            assert await store.table.get(one, jobs[two].id) is None

    async def test_a_list_that_is_read_while_jobs_change_misses_none(self) -> None:
        async with self.open() as store:
            jobs = [new(f"r{number}") for number in range(150)]
            revisions = [await store.table.create(made) for made in jobs]
            found: list[Job] = []
            async for listed in store.table.list("acme"):
                if not found:
                    for made, revision in zip(jobs, revisions, strict=True):
                        await store.table.replace(made.started(made.create_time), revision)
                found.append(listed)
            assert {listed.id for listed in found} == {made.id for made in jobs}

    async def test_a_list_has_each_job_once_as_it_is_now(self) -> None:
        async with self.open() as store:
            expected = {}
            for number in range(20):
                made = new(f"r{number}")
                revision = await store.table.create(made)
                expected[made.id] = made
                if number % 2:
                    expected[made.id] = made.started(made.create_time)
                    await store.table.replace(expected[made.id], revision)
            found = [listed async for listed in store.table.list("acme")]
            assert len(found) == 20
            assert {listed.id: listed for listed in found} == expected

    async def test_a_watch_tells_now_and_every_change(self) -> None:
        async with self.open() as store:
            made = new()
            revision = await store.table.create(made)
            await store.table.create(new("another"))
            async with contextlib.aclosing(store.table.watch("acme", made.id)) as changes, asyncio.timeout(10):
                assert await anext(changes) == made
                running = made.started(made.create_time)
                revision = await store.table.replace(running, revision)
                assert await anext(changes) == running
                await store.table.replace(running.ended(State.CANCELLED, made.create_time), revision)
                assert (await anext(changes)).state is State.CANCELLED


class QueuesSuite:
    """Queues."""

    @abstractmethod
    def open(self) -> AbstractAsyncContextManager[Store]:
        """Opens the engine, empty."""

    async def test_a_ticket_goes_round(self) -> None:
        async with self.open() as store:
            made = new(allowed_models=("a",), cache_namespace="shop", generation=2)
            queue = QueueName("acme", "default")
            await store.queues.put(Ticket(made, 3))
            assert await store.queues.waiting() == {queue: 1}
            (delivery,) = await take(store.queues, queue, 1)
            assert delivery.ticket == Ticket(made, 3)
            assert await store.queues.take(queue, 1) == []
            assert await store.queues.waiting() == {queue: 1}
            await delivery.extend()
            await delivery.done()
            assert await store.queues.waiting() == {}

    async def test_the_first_put_is_the_first_taken(self) -> None:
        async with self.open() as store:
            queue = QueueName("acme", "default")
            made = [new(f"r{number}") for number in range(CAPACITY)]
            for ticket in made:
                await store.queues.put(Ticket(ticket, 1))
            taken = await take(store.queues, queue, 2)
            taken += await take(store.queues, queue, 1)
            assert [delivery.ticket.job for delivery in taken] == made

    async def test_a_full_queue_refuses_and_others_are_free(self) -> None:
        async with self.open() as store:
            for number in range(CAPACITY):
                await store.queues.put(Ticket(new(f"r{number}"), 1))
            with pytest.raises(QueueFull) as caught:
                await store.queues.put(Ticket(new("over"), 1))
            assert caught.value.metadata["limit"] == str(CAPACITY)
            await store.queues.put(Ticket(new("over", tenant="other"), 1))
            await store.queues.put(Ticket(new("over", job_class="slow"), 1))
            queue = QueueName("acme", "default")
            (delivery, *_) = await take(store.queues, queue, 1)
            with pytest.raises(QueueFull):
                await store.queues.put(Ticket(new("over"), 1))
            await delivery.done()
            await store.queues.put(Ticket(new("over"), 1))
            assert (await store.queues.waiting())[queue] == CAPACITY

    @pytest.mark.parametrize(
        ("one", "two"),
        [
            (QueueName("a_b", "c"), QueueName("a", "b_c")),
            (QueueName("a", "b"), QueueName("a.b", "b")),
            (QueueName("*", "b"), QueueName("a", "b")),
            (QueueName("a", "b"), QueueName("a", "B")),
        ],
        ids=str,
    )
    async def test_each_queue_has_its_own_tickets(self, one: QueueName, two: QueueName) -> None:
        async with self.open() as store:
            jobs = {queue: new(tenant=queue.tenant_id, job_class=queue.job_class) for queue in (one, two)}
            for made in jobs.values():
                await store.queues.put(Ticket(made, 1))
            assert await store.queues.waiting() == {one: 1, two: 1}
            for queue in (one, two):
                (delivery,) = await take(store.queues, queue, 1)
                assert delivery.ticket.job == jobs[queue]
                assert await store.queues.take(queue, 1) == []

    async def test_tickets_of_one_job_that_differ_are_all_kept(self) -> None:
        """Two bodies under one id that race, a retry, a redrive: whichever the table takes, its ticket must be there."""
        async with self.open() as store:
            queue = QueueName("acme", "default")
            made = new()
            tickets = [Ticket(made, 1), Ticket(new(text="other"), 1), Ticket(new(generation=1), 1)]
            for ticket in tickets:
                await store.queues.put(ticket)
            taken = await take(store.queues, queue, 3)
            assert [(one.ticket.job.submit_sha256, one.ticket.job.generation) for one in taken] == [
                (ticket.job.submit_sha256, ticket.job.generation) for ticket in tickets
            ]

    async def test_a_burial_takes_no_place_in_the_queue(self) -> None:
        async with self.open() as store:
            await store.queues.bury(Ticket(new(), 4), BUSY, time.time())
            assert await store.queues.waiting() == {}
