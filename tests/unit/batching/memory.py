"""Job table and queues in memory, for tests of what stands on them; the conformance suites hold them to what JetStream does."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from services.batching.errors import Conflict, QueueFull, QueueUnavailable
from services.batching.job import Job
from services.batching.ports import Delivery, QueueName, Row, Ticket
from services.runtime.errors import Failure


class MemoryTable:
    """JobTable. `down` makes every call raise QueueUnavailable."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], Row] = {}
        self.down = False
        self.before_write: Callable[[Job], None] | None = None
        """Called once, before the next write: what another process does in between."""
        self._revision = 0
        self._changed = asyncio.Condition()

    async def get(self, tenant_id: str, job_id: str) -> Row | None:
        """See JobTable."""
        await self._there()
        return self.rows.get((tenant_id, job_id))

    async def create(self, job: Job) -> int:
        """See JobTable."""
        return await self._write(job, 0)

    async def replace(self, job: Job, revision: int) -> int:
        """See JobTable."""
        return await self._write(job, revision)

    async def list(self, tenant_id: str) -> AsyncIterator[Job]:
        """See JobTable."""
        await self._there()
        for (tenant, _), row in list(self.rows.items()):
            if tenant == tenant_id:
                yield row.job

    async def watch(self, tenant_id: str, job_id: str) -> AsyncGenerator[Job, None]:
        """See JobTable."""
        seen = 0
        while True:
            async with self._changed:
                while self._revision_of(tenant_id, job_id) == seen:
                    await self._changed.wait()
                row = self.rows[tenant_id, job_id]
            seen = row.revision
            yield row.job

    def _revision_of(self, tenant_id: str, job_id: str) -> int:
        row = self.rows.get((tenant_id, job_id))
        return 0 if row is None else row.revision

    async def _write(self, job: Job, revision: int) -> int:
        await self._there()
        meddle, self.before_write = self.before_write, None
        if meddle is not None:
            meddle(job)
        if self._revision_of(job.tenant_id, job.id) != revision:
            raise Conflict
        self.put(job)
        async with self._changed:
            self._changed.notify_all()
        return self._revision

    def put(self, job: Job) -> None:
        """Writes whatever is there."""
        self._revision += 1
        self.rows[job.tenant_id, job.id] = Row(job, self._revision)

    def job(self, job_id: str) -> Job:
        """The only job of this id."""
        (found,) = (row.job for (_, known), row in self.rows.items() if known == job_id)
        return found

    async def _there(self) -> None:
        # A real store never answers within one step of the loop.
        await asyncio.sleep(0)
        if self.down:
            raise QueueUnavailable


class MemoryQueues:
    """Queues. `taken` are handed out and not done; `hand_back` is what the ack wait does."""

    def __init__(self, capacity: int = 1000) -> None:
        self.queues: dict[QueueName, deque[Ticket]] = {}
        self.taken: dict[int, tuple[QueueName, Ticket]] = {}
        self.later: list[tuple[float, Ticket]] = []
        self.dead: list[tuple[Ticket, Failure, float]] = []
        self.cancels: list[tuple[str, str]] = []
        self.extended: list[str] = []
        self.down = False
        self.looks = 0
        self.extended_one = asyncio.Event()
        self._capacity = capacity
        self._deliveries = 0

    async def put(self, ticket: Ticket) -> None:
        """See Queues."""
        await self._there()
        name = QueueName(ticket.job.tenant_id, ticket.job.job_class)
        queue = self.queues.setdefault(name, deque())
        if self._held(name) >= self._capacity:
            raise QueueFull(self._capacity)
        queue.append(ticket)

    def _held(self, name: QueueName) -> int:
        return len(self.queues.get(name, ())) + sum(queue == name for queue, _ in self.taken.values())

    async def put_later(self, ticket: Ticket, at: float) -> None:
        """See Queues."""
        await self._there()
        self.later.append((at, ticket))

    async def move_due(self, now: float) -> None:
        """What the scheduler does by the time `now`."""
        due = [entry for entry in self.later if entry[0] <= now]
        self.later = [entry for entry in self.later if entry[0] > now]
        for _, ticket in due:
            await self.put(ticket)

    async def bury(self, ticket: Ticket, failure: Failure, now: float) -> None:
        """See Queues."""
        await self._there()
        self.dead.append((ticket, failure, now))

    async def waiting(self) -> dict[QueueName, int]:
        """See Queues."""
        self.looks += 1
        await self._there()
        names = {*self.queues, *(queue for queue, _ in self.taken.values())}
        return {name: held for name in names if (held := self._held(name))}

    async def take(self, queue: QueueName, most: int) -> list[Delivery]:
        """See Queues."""
        await self._there()
        tickets = self.queues.get(queue, deque())
        return [self._deliver(queue, tickets.popleft()) for _ in range(min(most, len(tickets)))]

    def _deliver(self, queue: QueueName, ticket: Ticket) -> Delivery:
        self._deliveries += 1
        number = self._deliveries
        self.taken[number] = (queue, ticket)

        async def extend() -> None:
            await self._there()
            self.extended.append(ticket.job.id)
            self.extended_one.set()

        async def done() -> None:
            await self._there()
            self.taken.pop(number, None)

        return Delivery(ticket, extend, done)

    def hand_back(self) -> None:
        """Everything that was handed out waits again, to be delivered once more."""
        for queue, ticket in self.taken.values():
            self.queues.setdefault(queue, deque()).append(ticket)
        self.taken.clear()

    async def announce_cancel(self, tenant_id: str, job_id: str) -> None:
        """See Queues."""
        self.cancels.append((tenant_id, job_id))

    async def _there(self) -> None:
        await asyncio.sleep(0)
        if self.down:
            raise QueueUnavailable
