from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from services.batching.errors import TooLarge
from services.batching.job import Job, Retries, State
from services.batching.ports import QueueName, Row, Ticket
from services.batching.submission import Jobs
from services.batching.worker import Worker
from services.runtime.errors import Reason
from tests.unit.batching.examples import BUSY, NOW, WRONG, Clock, generate_response, job
from tests.unit.batching.memory import MemoryQueues, MemoryTable

ANSWER = generate_response()


class Rig:
    """A worker on queues in memory; `answers` decides what an attempt brings, by default it waits at the gate."""

    def __init__(
        self, *, concurrency: int = 4, tenant_concurrency: int = 4, ack_wait: float = 30.0, poll: float = 0.01
    ) -> None:
        self.table = MemoryTable()
        self.queues = MemoryQueues()
        self.clock = Clock()
        self.runs: list[tuple[Job, float]] = []
        self.running_ids: set[str] = set()
        self.most_running = 0
        self.most_of: Counter[str] = Counter()
        self.gate = asyncio.Event()
        self.answers: list[object] = []
        self.finished_jobs: list[Job] = []
        self.retried_jobs: list[Job] = []
        self.faults: list[Exception] = []
        self._changed = asyncio.Event()
        self.worker = Worker(
            self.table,
            self.queues,
            self._generate,
            self,
            retries=Retries(3, 1.0, 300.0),
            concurrency=concurrency,
            tenant_concurrency=tenant_concurrency,
            attempt_timeout=300.0,
            ack_wait=ack_wait,
            poll_interval=poll,
            clock=self.clock,
        )

    async def _generate(self, job: Job, seconds: float) -> object:
        self.runs.append((job, seconds))
        self.running_ids.add(f"{job.tenant_id}/{job.id}")
        self.most_running = max(self.most_running, len(self.running_ids))
        tenants = Counter(name.split("/")[0] for name in self.running_ids)
        self.most_of |= tenants
        self._changed.set()
        try:
            if self.answers:
                answer = self.answers.pop(0)
                if isinstance(answer, Exception):
                    raise answer
                return answer
            await self.gate.wait()
            return ANSWER
        finally:
            self.running_ids.discard(f"{job.tenant_id}/{job.id}")

    def finished(self, job: Job) -> None:
        self.finished_jobs.append(job)
        self._changed.set()

    def retried(self, job: Job) -> None:
        self.retried_jobs.append(job)
        self._changed.set()

    def failed(self, what: str, error: Exception) -> None:
        self.faults.append(error)
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.01):
                        await self._changed.wait()

    async def settled(self) -> None:
        """Until every ticket that was taken is done."""
        await self.until(lambda: not self.queues.taken and not any(self.queues.queues.values()) and not self.worker.running)

    async def put(self, made: Job, attempt: int = 1, *, row: bool = True) -> Job:
        if row:
            self.table.put(made)
        await self.queues.put(Ticket(made, attempt))
        self.worker.wake()
        return made

    @contextlib.asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.worker.run())
        try:
            yield
            assert not task.done(), "the worker ended by itself, which ends the process"
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def test_a_job_is_run_recorded_and_removed() -> None:
    rig = Rig()
    rig.answers = [ANSWER]
    async with rig.working():
        made = await rig.put(job())
        await rig.settled()
    done = rig.table.job(made.id)
    assert (done.state, done.attempts, done.response, done.start_time) == (State.SUCCEEDED, 1, ANSWER, NOW)
    assert rig.finished_jobs == [done]
    assert [run.state for run, _ in rig.runs] == [State.RUNNING]


async def test_a_ticket_alone_is_enough() -> None:
    rig = Rig()
    rig.answers = [ANSWER]
    async with rig.working():
        made = await rig.put(job(), row=False)
        await rig.settled()
    assert (rig.table.job(made.id).state, rig.table.job(made.id).attempts) == (State.SUCCEEDED, 1)


async def test_a_lost_table_gives_no_new_attempts() -> None:
    rig = Rig()
    rig.answers = [BUSY]
    async with rig.working():
        made = await rig.put(job(), attempt=4, row=False)
        await rig.settled()
    assert (rig.table.job(made.id).state, rig.table.job(made.id).attempts) == (State.DEAD, 4)


@pytest.mark.parametrize("state", [State.SUCCEEDED, State.FAILED, State.DEAD, State.CANCELLED, State.EXPIRED])
async def test_a_ticket_of_an_ended_job_is_only_removed(state: State) -> None:
    rig = Rig()
    async with rig.working():
        made = await rig.put(job(state=state))
        await rig.settled()
    assert (rig.runs, rig.table.job(made.id).state) == ([], state)


async def test_a_ticket_with_the_body_of_a_lost_race_is_only_removed() -> None:
    rig = Rig()
    winner = job(text="winner")
    rig.table.put(winner)
    async with rig.working():
        await rig.put(job(text="loser"), row=False)
        await rig.settled()
    assert (rig.runs, rig.table.job(winner.id)) == ([], winner)


async def test_a_failure_that_may_pass_is_tried_three_times_more_then_dead() -> None:
    rig = Rig()
    rig.answers = [BUSY] * 4
    delays = []
    async with rig.working():
        made = await rig.put(job())
        for attempt in range(1, 4):
            await rig.settled()
            waiting = rig.table.job(made.id)
            assert (waiting.state, waiting.attempts) == (State.RETRYING, attempt)
            assert waiting.failure is BUSY
            ((at, ticket),) = rig.queues.later
            assert (ticket.attempt, at) == (attempt + 1, waiting.next_attempt_time)
            delays.append(at - rig.clock())
            rig.clock.time = at
            await rig.queues.move_due(at)
            rig.worker.wake()
        await rig.settled()
    dead = rig.table.job(made.id)
    assert (dead.state, dead.attempts, dead.failure) == (State.DEAD, 4, BUSY)
    assert rig.queues.later == []
    assert all(0.75 * nominal <= delay <= 1.25 * nominal for delay, nominal in zip(delays, (1, 2, 4), strict=True))
    ((ticket, failure, at),) = rig.queues.dead
    assert (ticket.job.attempts, ticket.attempt, failure, at) == (4, 4, BUSY, rig.clock())
    assert len(rig.retried_jobs) == 3
    assert rig.finished_jobs == [dead]


async def test_the_callers_fault_is_not_tried_again() -> None:
    rig = Rig()
    rig.answers = [WRONG]
    async with rig.working():
        made = await rig.put(job())
        await rig.settled()
    failed = rig.table.job(made.id)
    assert (failed.state, failed.failure, rig.queues.later, rig.queues.dead) == (State.FAILED, WRONG, [], [])


async def test_the_callers_fault_in_the_last_attempt_is_a_failure_too() -> None:
    rig = Rig()
    rig.answers = [WRONG]
    async with rig.working():
        made = await rig.put(job(state=State.RETRYING, attempts=3), attempt=4)
        await rig.settled()
    assert (rig.table.job(made.id).state, rig.queues.dead) == (State.FAILED, [])


async def test_no_retry_is_promised_after_the_deadline() -> None:
    rig = Rig()
    rig.answers = [BUSY]
    async with rig.working():
        made = await rig.put(job(deadline_time=NOW + 0.5))
        await rig.settled()
    assert (rig.table.job(made.id).state, rig.queues.later) == (State.FAILED, [])


async def test_a_job_past_its_deadline_is_not_started() -> None:
    rig = Rig()
    async with rig.working():
        made = await rig.put(job(deadline_time=NOW))
        await rig.settled()
    expired = rig.table.job(made.id)
    assert expired.failure is not None
    assert (expired.state, expired.failure.reason, rig.runs) == (State.EXPIRED, Reason.DEADLINE_EXCEEDED, [])


async def test_an_attempt_gets_what_is_left_until_the_deadline() -> None:
    rig = Rig()
    rig.answers = [ANSWER, ANSWER]
    async with rig.working():
        await rig.put(job("short", deadline_time=NOW + 7))
        await rig.settled()
        await rig.put(job("long"))
        await rig.settled()
    assert [seconds for _, seconds in rig.runs] == [7.0, 300.0]


async def test_a_job_whose_worker_died_is_started_again() -> None:
    rig = Rig()
    rig.answers = [ANSWER]
    async with rig.working():
        made = await rig.put(job().started(NOW))
        await rig.settled()
    assert (rig.table.job(made.id).state, rig.table.job(made.id).attempts) == (State.SUCCEEDED, 2)


async def test_a_job_that_killed_four_workers_is_dead_without_a_fifth() -> None:
    rig = Rig()
    async with rig.working():
        made = await rig.put(replace(job().started(NOW), attempts=4))
        await rig.settled()
    dead = rig.table.job(made.id)
    assert dead.failure is not None
    assert (dead.state, dead.failure.reason, rig.runs) == (State.DEAD, Reason.INTERNAL, [])
    ((ticket, _, _),) = rig.queues.dead
    assert ticket.job.attempts == 4


async def test_a_ticket_of_an_attempt_that_is_over_is_only_removed() -> None:
    rig = Rig()
    waiting = job().started(NOW).retrying(BUSY, NOW + 5)
    async with rig.working():
        await rig.put(waiting, attempt=1)
        await rig.settled()
    assert (rig.runs, rig.table.job(waiting.id)) == ([], waiting)


async def test_a_redriven_job_runs_by_its_own_ticket_only() -> None:
    rig = Rig()
    dead = job().started(NOW).ended(State.DEAD, NOW, BUSY)
    queued = dead.redriven(NOW, 60.0)
    rig.table.put(queued)
    async with rig.working():
        await rig.put(dead, row=False)
        await rig.settled()
        assert (rig.runs, rig.table.job(dead.id)) == ([], queued)
        rig.answers = [ANSWER]
        await rig.put(queued, row=False)
        await rig.settled()
    assert rig.table.job(dead.id).state is State.SUCCEEDED


async def test_a_redrive_that_died_between_its_writes_still_runs() -> None:
    rig = Rig()
    dead = replace(job().started(NOW), attempts=4).ended(State.DEAD, NOW, BUSY)
    rig.table.put(dead)
    rig.answers = [ANSWER]
    async with rig.working():
        await rig.put(dead.redriven(NOW, 60.0), row=False)
        await rig.settled()
    done = rig.table.job(dead.id)
    assert (done.state, done.attempts, done.generation) == (State.SUCCEEDED, 1, 1)


async def test_a_worker_that_lost_its_job_leaves_the_ticket_to_the_new_owner() -> None:
    rig = Rig()
    async with rig.working():
        made = await rig.put(job())
        await rig.until(lambda: len(rig.runs) == 1)
        rig.table.put(rig.table.job(made.id).started(NOW))
        rig.gate.set()
        await rig.until(lambda: not rig.worker.running)
        owned = rig.table.job(made.id)
    assert (owned.state, owned.attempts) == (State.RUNNING, 2)
    assert [ticket.job.id for _, ticket in rig.queues.taken.values()] == [made.id]
    assert rig.finished_jobs == []


async def test_a_fault_of_ours_leaves_the_ticket_and_the_worker() -> None:
    rig = Rig()
    rig.answers = [ValueError("a bug"), ANSWER]
    async with rig.working():
        broken = await rig.put(job("broken"))
        await rig.until(lambda: len(rig.faults) == 1 and not rig.worker.running)
        assert len(rig.queues.taken) == 1
        fine = await rig.put(job("fine"))
        await rig.until(lambda: len(rig.finished_jobs) == 1)
        assert rig.table.job(fine.id).state is State.SUCCEEDED
        rig.answers = [ANSWER]
        rig.queues.hand_back()
        await rig.settled()
    assert (rig.table.job(broken.id).state, rig.table.job(broken.id).attempts) == (State.SUCCEEDED, 2)


async def test_a_broken_queue_does_not_end_the_worker() -> None:
    rig = Rig()
    take = rig.queues.waiting

    async def broken() -> dict[QueueName, int]:
        raise LookupError("not a failure that anybody foresaw")

    # The port's own errors are typed; this is what a bug in an adapter looks like.
    rig.queues.waiting = broken  # type: ignore[method-assign]
    rig.answers = [ANSWER]
    async with rig.working():
        made = await rig.put(job())
        await rig.until(lambda: len(rig.faults) == 1)
        rig.queues.waiting = take  # type: ignore[method-assign]
        await rig.settled()
    assert rig.table.job(made.id).state is State.SUCCEEDED


async def test_a_table_that_is_away_costs_no_job() -> None:
    rig = Rig()
    rig.answers = [ANSWER]
    async with rig.working():
        made = await rig.put(job())
        rig.table.down = True
        await rig.until(lambda: len(rig.faults) == 1)
        rig.table.down = False
        rig.queues.hand_back()
        await rig.settled()
    assert rig.table.job(made.id).state is State.SUCCEEDED


async def test_an_answer_that_is_too_large_to_keep_is_not_paid_twice() -> None:
    rig = Rig()
    rig.answers = [ANSWER]

    def refuse(written: Job) -> None:
        if written.state is State.SUCCEEDED:
            raise TooLarge(9, 8)
        rig.table.before_write = refuse

    async with rig.working():
        rig.table.before_write = refuse
        made = await rig.put(job())
        await rig.settled()
    failed = rig.table.job(made.id)
    assert failed.failure is not None
    assert (failed.state, failed.failure.reason, len(rig.runs)) == (State.FAILED, Reason.REQUEST_TOO_LARGE, 1)


async def test_cancel_during_the_run_ends_it_and_removes_the_ticket() -> None:
    rig = Rig()
    jobs = Jobs(rig.table, rig.queues, rig.worker.cancel, lifetime=60.0, clock=rig.clock)
    async with rig.working():
        made = await rig.put(job())
        await rig.until(lambda: len(rig.runs) == 1)
        await jobs.cancel("acme", made.id)
        # NATS tells the same process again.
        rig.worker.cancel(made.id)
        await rig.settled()
        assert rig.running_ids == set()
        rig.answers = [ANSWER]
        after = await rig.put(job("after"))
        await rig.settled()
    assert rig.table.job(made.id).state is State.CANCELLED
    assert rig.table.job(after.id).state is State.SUCCEEDED


async def test_a_false_cancel_leaves_the_ticket() -> None:
    rig = Rig()
    async with rig.working():
        made = await rig.put(job())
        await rig.until(lambda: len(rig.runs) == 1)
        rig.worker.cancel("job_unknown")
        rig.worker.cancel(made.id)
        await rig.until(lambda: not rig.worker.running)
        assert len(rig.queues.taken) == 1
        rig.answers = [ANSWER]
        rig.queues.hand_back()
        await rig.settled()
    assert rig.table.job(made.id).state is State.SUCCEEDED


async def test_a_cancel_that_the_worker_did_not_hear_wins_over_the_answer() -> None:
    rig = Rig()
    async with rig.working():
        made = await rig.put(job())
        await rig.until(lambda: len(rig.runs) == 1)
        rig.table.put(rig.table.job(made.id).ended(State.CANCELLED, NOW))
        rig.gate.set()
        await rig.settled()
    assert rig.table.job(made.id).state is State.CANCELLED
    assert rig.finished_jobs == []


async def test_a_long_attempt_gives_signs_of_life() -> None:
    rig = Rig(ack_wait=0.03)
    async with rig.working():
        made = await rig.put(job())
        async with asyncio.timeout(5):
            await rig.queues.extended_one.wait()
        rig.gate.set()
        await rig.settled()
    assert made.id in rig.queues.extended


async def test_no_more_run_than_may() -> None:
    rig = Rig(concurrency=3, tenant_concurrency=2)
    async with rig.working():
        for number in range(6):
            await rig.put(job(f"r{number}"))
        await rig.until(lambda: len(rig.running_ids) == 2)
        for number in range(6):
            await rig.put(job(f"r{number}", tenant="other"))
        await rig.until(lambda: len(rig.running_ids) == 3)
        rig.gate.set()
        await rig.settled()
    assert (rig.most_running, max(rig.most_of.values()), len(rig.finished_jobs)) == (3, 2, 12)


async def test_a_tenant_with_many_jobs_starves_nobody() -> None:
    rig = Rig(concurrency=1, tenant_concurrency=1)
    rig.answers = [ANSWER] * 60
    for number in range(50):
        await rig.put(job(f"r{number}", tenant="greedy"))
    for tenant in ("a", "z"):
        for number in range(5):
            await rig.put(job(f"r{number}", tenant=tenant))
    async with rig.working():
        await rig.settled()
    order = [run.tenant_id for run, _ in rig.runs]
    assert len(order) == 60
    for tenant in ("a", "z"):
        assert max(at for at, name in enumerate(order) if name == tenant) < 15


async def test_classes_of_a_tenant_share_its_slots() -> None:
    rig = Rig(concurrency=4, tenant_concurrency=2)
    for number in range(4):
        await rig.put(job(f"r{number}", job_class=("default", "slow")[number % 2]))
    async with rig.working():
        await rig.until(lambda: len(rig.running_ids) == 2)
        rig.gate.set()
        await rig.settled()
    assert rig.most_of["acme"] == 2


async def test_a_drain_waits_for_what_runs_and_takes_nothing_more() -> None:
    rig = Rig()
    async with rig.working():
        first = await rig.put(job("first"))
        await rig.until(lambda: len(rig.runs) == 1)
        draining = asyncio.create_task(rig.worker.drain(5.0))
        await asyncio.sleep(0)
        second = await rig.put(job("second"))
        rig.gate.set()
        async with asyncio.timeout(5):
            await draining
        await rig.until(lambda: not rig.queues.taken)
    assert rig.table.job(first.id).state is State.SUCCEEDED
    assert rig.table.job(second.id).state is State.QUEUED


async def test_the_end_of_the_process_leaves_tickets_for_others() -> None:
    rig = Rig()
    async with rig.working():
        made = await rig.put(job())
        await rig.until(lambda: len(rig.runs) == 1)
    assert [ticket.job.id for _, ticket in rig.queues.taken.values()] == [made.id]
    assert rig.table.job(made.id).state is State.RUNNING


async def test_a_wake_is_faster_than_the_poll() -> None:
    rig = Rig(poll=3600.0)
    rig.answers = [ANSWER]
    async with rig.working():
        await rig.until(lambda: rig.queues.looks > 0)
        made = await rig.put(job())
        await rig.settled()
    assert rig.table.job(made.id).state is State.SUCCEEDED


async def test_a_cancellation_that_a_call_swallowed_still_ends_the_worker() -> None:
    """`asyncio.wait_for` of Python 3.11, under every call of nats-py, swallows one that comes together with the result."""
    rig = Rig()
    inside = asyncio.Event()
    waiting = rig.queues.waiting

    async def swallow() -> dict[QueueName, int]:
        inside.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        rig.queues.waiting = waiting  # type: ignore[method-assign]
        return {}

    rig.queues.waiting = swallow  # type: ignore[method-assign]
    task = asyncio.create_task(rig.worker.run())
    await inside.wait()
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=5)
    assert done
    assert task.cancelled()


async def test_a_cancellation_that_the_table_swallowed_starts_no_attempt() -> None:
    rig = Rig()
    inside = asyncio.Event()
    get = rig.table.get

    async def swallow(tenant_id: str, job_id: str) -> Row | None:
        inside.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return await get(tenant_id, job_id)

    rig.table.get = swallow  # type: ignore[method-assign]
    await rig.put(job())
    task = asyncio.create_task(rig.worker.run())
    await inside.wait()
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=5)
    assert done
    assert rig.runs == []
