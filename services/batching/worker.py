"""Runs jobs: takes tickets fairly from the tenants' queues, calls the gateway, records every change by compare-and-set.

What makes this safe: an acknowledgement is no fence (reliability.md M10), so a worker owns an attempt only by having counted it
in the job table. A ticket that comes again finds the job as it is: finished ones are only acknowledged, running ones whose
worker died are started again, and the attempt counter there, not the broker's, decides when a job is dead (M9).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final, Protocol

from services.batching.cancellation import checkpoint
from services.batching.errors import BatchingError, Conflict, TooLarge
from services.batching.job import Job, Retries, State, may_succeed_later
from services.batching.ports import Delivery, JobTable, QueueName, Queues, Row, Ticket
from services.runtime.errors import Failure, Reason

Clock = Callable[[], float]
Generate = Callable[[Job, float], Awaitable[object]]
"""Runs a job's request within so many seconds and returns the response; raises Failure."""

_PAUSE_AFTER_FAILURE: Final = 0.5


class Observer(Protocol):
    """Told what happens, for metrics and logs."""

    def finished(self, job: Job) -> None:
        """A job reached a final state."""

    def retried(self, job: Job) -> None:
        """An attempt failed and another one is due."""

    def failed(self, what: str, error: Exception) -> None:
        """Something of ours went wrong; the ticket comes again."""


class Worker:
    """Takes and runs jobs until it is cancelled or drained."""

    def __init__(
        self,
        table: JobTable,
        queues: Queues,
        generate: Generate,
        observer: Observer,
        *,
        retries: Retries,
        concurrency: int,
        tenant_concurrency: int,
        attempt_timeout: float,
        ack_wait: float,
        poll_interval: float,
        clock: Clock,
    ) -> None:
        self._table = table
        self._queues = queues
        self._generate = generate
        self._observer = observer
        self._retries = retries
        self._concurrency = concurrency
        self._tenant_concurrency = tenant_concurrency
        self._attempt_timeout = attempt_timeout
        self._ack_wait = ack_wait
        self._poll_interval = poll_interval
        self._clock = clock
        self._running: dict[str, asyncio.Task[None]] = {}
        self._cancelled: set[str] = set()
        self._per_tenant: Counter[str] = Counter()
        self._per_queue: Counter[QueueName] = Counter()
        self._wake = asyncio.Event()
        self._draining = False
        self._last: QueueName | None = None

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    def cancel(self, job_id: str) -> None:
        """A job was cancelled: ends its attempt if it runs here."""
        task = self._running.get(job_id)
        # Told once by the submission and once by NATS: a second cancel would end the acknowledgement that follows the first.
        if task is not None and job_id not in self._cancelled:
            self._cancelled.add(job_id)
            task.cancel()

    @property
    def running(self) -> int:
        """Jobs that run here at the moment."""
        return len(self._running)

    async def run(self) -> None:
        """Works until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    checkpoint()
                    self._wake.clear()
                    took = 0
                    try:
                        took = await self._round(group)
                    except Exception as error:  # noqa: BLE001 - a worker that raises ends the whole process
                        self._observer.failed("taking jobs", error)
                        await asyncio.sleep(_PAUSE_AFTER_FAILURE)
                    if not took:
                        with contextlib.suppress(TimeoutError):
                            async with asyncio.timeout(self._poll_interval):
                                await self._wake.wait()
        finally:
            self._running.clear()

    async def drain(self, seconds: float) -> None:
        """Takes nothing more and waits for what runs; what isn't done by then is delivered again elsewhere."""
        self._draining = True
        tasks = list(self._running.values())
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)

    async def _round(self, group: asyncio.TaskGroup) -> int:
        """One ticket at a time from each queue in turn, so that a tenant with many jobs doesn't starve one with few."""
        if self._draining or len(self._running) >= self._concurrency:
            return 0
        waiting = await self._queues.waiting()
        order = sorted(waiting, key=lambda queue: (queue.tenant_id, queue.job_class))
        if self._last in order:
            # Goes on after the queue that was served last.
            cut = order.index(self._last) + 1
            order = order[cut:] + order[:cut]
        took = 0
        for queue in order:
            free = min(
                self._concurrency - len(self._running),
                self._tenant_concurrency - self._per_tenant[queue.tenant_id],
                waiting[queue] - self._per_queue[queue],
                max(1, self._concurrency // max(1, len(order))),
            )
            if free <= 0:
                continue
            for delivery in await self._queues.take(queue, free):
                took += 1
                self._last = queue
                self._start(group, queue, delivery)
        return took

    def _start(self, group: asyncio.TaskGroup, queue: QueueName, delivery: Delivery) -> None:
        job_id = delivery.ticket.job.id
        self._per_tenant[queue.tenant_id] += 1
        self._per_queue[queue] += 1
        task = group.create_task(self._guarded(delivery), name=f"job {job_id}")
        self._running[job_id] = task

        def finished(done: asyncio.Task[None]) -> None:
            self._per_tenant[queue.tenant_id] -= 1
            self._per_queue[queue] -= 1
            if not self._per_tenant[queue.tenant_id]:
                del self._per_tenant[queue.tenant_id]
            if not self._per_queue[queue]:
                del self._per_queue[queue]
            self._cancelled.discard(job_id)
            if self._running.get(job_id) is done:
                del self._running[job_id]
            self._wake.set()

        task.add_done_callback(finished)

    async def _guarded(self, delivery: Delivery) -> None:
        """One ticket; a fault of ours leaves it unacknowledged, so that it comes again."""
        try:
            await self._handle(delivery)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if delivery.ticket.job.id not in self._cancelled or task is None or task.uncancel() > 0:
                # The process ends: the ticket stays, another worker goes on.
                raise
            with contextlib.suppress(BatchingError):
                await self._acknowledge_ended(delivery)
        except BatchingError as error:
            self._observer.failed(f"job {delivery.ticket.job.id}", error)
        except Exception as error:  # noqa: BLE001 - a message boundary: one bad ticket must not end the worker
            self._observer.failed(f"job {delivery.ticket.job.id}", error)

    async def _acknowledge_ended(self, delivery: Delivery) -> None:
        """Removes the ticket only if the job has ended: else it is what saves the job when its present owner dies."""
        ticket = delivery.ticket
        row = await self._table.get(ticket.job.tenant_id, ticket.job.id)
        if row is not None and row.job.is_final:
            await delivery.done()

    async def _handle(self, delivery: Delivery) -> None:
        row = await self._begin(delivery.ticket)
        if row is None:
            await delivery.done()
            return
        job = row.job
        heartbeat = asyncio.create_task(self._extend(delivery), name=f"heartbeat {job.id}")
        try:
            checkpoint()
            try:
                response = await self._generate(job, min(self._attempt_timeout, max(0.001, job.deadline_time - self._clock())))
            except Failure as failure:
                owned = await self._after_failure(row, delivery.ticket, failure)
            else:
                owned = await self._succeed(row, response)
        finally:
            heartbeat.cancel()
        if owned:
            await delivery.done()
        else:
            # Cancelled, or taken over by another worker. The server would accept our acknowledgement all the same (M10).
            await self._acknowledge_ended(delivery)

    async def _succeed(self, row: Row, response: object) -> bool:
        """Records the answer; False as `_finish`."""
        now = self._clock()
        try:
            return await self._finish(row, row.job.succeeded(response, now))
        except TooLarge as failure:
            # To run it again would be paid again and as large.
            return await self._finish(row, row.job.ended(State.FAILED, now, failure))

    async def _begin(self, ticket: Ticket) -> Row | None:
        """Counts the attempt in the table and returns the running job; None when there is nothing to run."""
        wanted = ticket.job
        while True:
            row = await self._table.get(wanted.tenant_id, wanted.id)
            now = self._clock()
            try:
                if row is None:
                    # Accepted, but the table doesn't know: the submit died between its two writes, or the table was lost.
                    # Attempts before this ticket's were made, whatever became of their record.
                    rebuilt = replace(wanted, attempts=ticket.attempt - 1)
                    row = Row(rebuilt, await self._table.create(rebuilt))
                job = row.job
                if job.submit_sha256 != wanted.submit_sha256 or wanted.generation < job.generation:
                    return None
                if job.state is State.DEAD and wanted.generation > job.generation:
                    # The redrive died between its two writes.
                    job = wanted
                if job.is_final:
                    return None
                if job.state is State.RETRYING and ticket.attempt <= job.attempts:
                    # The attempt that this ticket asked for is over; the next one has its own.
                    return None
                if job.deadline_time <= now:
                    await self._finish(row, job.ended(State.EXPIRED, now, _expired(job)))
                    return None
                if job.attempts > self._retries.most:
                    failure = job.failure or _died(job)
                    await self._queues.bury(Ticket(job, ticket.attempt), failure, now)
                    await self._finish(row, job.ended(State.DEAD, now, failure))
                    return None
                started = job.started(now)
                return Row(started, await self._table.replace(started, row.revision))
            except Conflict:
                continue

    async def _after_failure(self, row: Row, ticket: Ticket, failure: Failure) -> bool:
        """Records a failed attempt; False as `_finish`."""
        job, now = row.job, self._clock()
        delay = self._retries.delay(job.attempts, failure)
        if delay is not None and now + delay < job.deadline_time:
            at = now + delay
            retrying = job.retrying(failure, at)
            # The next ticket is durable before the table promises it; one that comes too early is dropped by `_begin`.
            await self._queues.put_later(Ticket(retrying, job.attempts + 1), at)
            owned = await self._finish(row, retrying)
            if owned:
                self._observer.retried(retrying)
            return owned
        if job.attempts > self._retries.most and may_succeed_later(failure):
            await self._queues.bury(Ticket(job, ticket.attempt), failure, now)
            return await self._finish(row, job.ended(State.DEAD, now, failure))
        return await self._finish(row, job.ended(State.FAILED, now, failure))

    async def _finish(self, row: Row, changed: Job) -> bool:
        """Writes the job's new state; False when somebody, a cancel or a worker that took over, was faster."""
        try:
            await self._table.replace(changed, row.revision)
        except Conflict:
            return False
        if changed.is_final:
            self._observer.finished(changed)
        return True

    async def _extend(self, delivery: Delivery) -> None:
        while True:
            await asyncio.sleep(self._ack_wait / 3)
            with contextlib.suppress(BatchingError):
                await delivery.extend()


def _expired(job: Job) -> Failure:
    return Failure(Reason.DEADLINE_EXCEEDED, f"job {job.id!r} was not started before its deadline")


def _died(job: Job) -> Failure:
    return Failure(
        Reason.INTERNAL,
        f"the workers of {job.attempts} attempts ended without a word; the request may be what ends them",
        metadata={"attempts": str(job.attempts)},
    )
