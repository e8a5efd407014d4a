from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
import pytest_asyncio

from services.batching.errors import JobIdReused, JobNotFound, JobState, QueueFull, QueueUnavailable
from services.batching.job import Job, State
from services.batching.ports import QueueName, Ticket
from services.batching.submission import Jobs
from services.runtime.errors import Code, Reason
from tests.unit.batching.examples import BUSY, NOW, Clock, generate_response, job, refused
from tests.unit.batching.memory import MemoryQueues, MemoryTable

QUEUE = QueueName("acme", "default")


@dataclass
class Rig:
    """Jobs in memory."""

    table: MemoryTable = field(default_factory=MemoryTable)
    queues: MemoryQueues = field(default_factory=lambda: MemoryQueues(capacity=2))
    clock: Clock = field(default_factory=Clock)
    cancelled: list[str] = field(default_factory=list)

    @property
    def jobs(self) -> Jobs:
        return Jobs(self.table, self.queues, self._cancel, lifetime=60.0, clock=self.clock)

    def _cancel(self, job_id: str) -> None:
        self.cancelled.append(job_id)

    @property
    def tickets(self) -> list[Ticket]:
        return list(self.queues.queues.get(QUEUE, ()))


@pytest_asyncio.fixture
async def rig() -> Rig:
    return Rig()


async def test_an_accepted_job_is_in_the_queue_and_in_the_table(rig: Rig) -> None:
    accepted = await rig.jobs.submit(job(), "r1")
    assert accepted == job()
    assert rig.tickets == [Ticket(job(), 1)]
    assert rig.table.job(accepted.id) == accepted


async def test_a_repeated_submit_is_one_job(rig: Rig) -> None:
    first = await rig.jobs.submit(job(), "r1")
    again = await rig.jobs.submit(job(now=NOW + 5), "r1")
    assert again == first
    assert len(rig.tickets) == 1


async def test_another_body_under_the_id_is_refused(rig: Rig) -> None:
    await rig.jobs.submit(job(), "r1")
    with refused(Reason.REQUEST_ID_REUSED, Code.ALREADY_EXISTS, request_id="r1"):
        await rig.jobs.submit(job(text="other"), "r1")
    assert len(rig.tickets) == 1


async def test_the_id_of_another_tenant_is_no_business_of_ours(rig: Rig) -> None:
    mine = await rig.jobs.submit(job(), "r1")
    theirs = await rig.jobs.submit(job(tenant="other", text="other"), "r1")
    assert mine.id != theirs.id
    assert len(rig.table.rows) == 2


async def test_of_two_submits_that_race_the_table_decides(rig: Rig) -> None:
    winner = job(text="winner")
    rig.table.before_write = lambda _: rig.table.put(winner)
    with pytest.raises(JobIdReused):
        await rig.jobs.submit(job(text="loser"), "r1")
    rig.table.rows.clear()
    rig.table.before_write = lambda _: rig.table.put(job().started(NOW))
    assert (await rig.jobs.submit(job(), "r1")).state is State.RUNNING


async def test_without_a_queue_nothing_is_accepted(rig: Rig) -> None:
    rig.queues.down = True
    with pytest.raises(QueueUnavailable) as caught:
        await rig.jobs.submit(job(), "r1")
    assert caught.value.code is Code.UNAVAILABLE
    assert caught.value.retry_delay
    assert not rig.table.rows


async def test_a_full_queue_accepts_nothing_and_a_known_job_is_still_found(rig: Rig) -> None:
    await rig.jobs.submit(job("r1"), "r1")
    await rig.jobs.submit(job("r2"), "r2")
    with pytest.raises(QueueFull) as caught:
        await rig.jobs.submit(job("r3"), "r3")
    assert (caught.value.code, caught.value.metadata["limit"]) == (Code.RESOURCE_EXHAUSTED, "2")
    assert len(rig.table.rows) == 2
    assert (await rig.jobs.submit(job("r1"), "r1")).id == job("r1").id
    await rig.jobs.submit(job("r3", tenant="other"), "r3")


async def test_a_job_of_later_waits_elsewhere(rig: Rig) -> None:
    later = job("later", not_before_time=NOW + 10)
    await rig.jobs.submit(later, "later")
    assert not rig.tickets
    assert rig.queues.later == [(NOW + 10, Ticket(later, 1))]
    rig.clock.time = NOW + 11
    await rig.jobs.submit(job("past", not_before_time=NOW + 10), "past")
    assert len(rig.tickets) == 1


async def test_jobs_of_others_are_not_found(rig: Rig) -> None:
    made = await rig.jobs.submit(job(), "r1")
    with pytest.raises(JobNotFound):
        await rig.jobs.get("other", made.id)
    with pytest.raises(JobNotFound):
        await rig.jobs.cancel("other", made.id)
    with pytest.raises(JobNotFound):
        await rig.jobs.redrive("other", made.id)
    with pytest.raises(JobNotFound):
        await anext(rig.jobs.watch("other", made.id))
    assert await rig.jobs.list("other", None) == []
    assert rig.table.job(made.id).state is State.QUEUED


async def test_lists_are_newest_first_and_by_state(rig: Rig) -> None:
    for number in range(3):
        rig.table.put(job(f"r{number}", now=NOW + number))
    rig.table.put(job("r3", now=NOW + 1).started(NOW + 1))
    found = [row.create_time for row in await rig.jobs.list("acme", None)]
    assert found == [NOW + 2, NOW + 1, NOW + 1, NOW]
    assert [row.id for row in await rig.jobs.list("acme", State.RUNNING)] == [job("r3").id]


async def test_cancel_before_the_run(rig: Rig) -> None:
    made = await rig.jobs.submit(job(), "r1")
    rig.clock.time = NOW + 3
    cancelled = await rig.jobs.cancel("acme", made.id)
    assert (cancelled.state, cancelled.end_time) == (State.CANCELLED, NOW + 3)
    assert rig.table.job(made.id) == cancelled
    assert rig.cancelled == [made.id]
    assert rig.queues.cancels == [("acme", made.id)]


async def test_cancel_of_what_has_ended_changes_nothing(rig: Rig) -> None:
    done = job().started(NOW).succeeded(generate_response(), NOW)
    rig.table.put(done)
    assert await rig.jobs.cancel("acme", done.id) == done
    assert rig.queues.cancels == []


async def test_cancel_that_races_the_end_says_how_it_ended(rig: Rig) -> None:
    running = job().started(NOW)
    rig.table.put(running)
    rig.table.before_write = lambda _: rig.table.put(running.succeeded(generate_response(), NOW))
    assert (await rig.jobs.cancel("acme", running.id)).state is State.SUCCEEDED
    assert rig.cancelled == []


async def test_a_dead_job_is_run_again(rig: Rig) -> None:
    dead = job().started(NOW).ended(State.DEAD, NOW, BUSY)
    rig.table.put(dead)
    rig.clock.time = NOW + 1000
    again = await rig.jobs.redrive("acme", dead.id)
    assert (again.state, again.attempts, again.generation, again.deadline_time) == (State.QUEUED, 0, 1, NOW + 1060)
    assert rig.tickets == [Ticket(again, 1)]
    assert rig.table.job(dead.id) == again


@pytest.mark.parametrize("state", [state for state in State if state is not State.DEAD])
async def test_only_a_dead_job_is_run_again(rig: Rig, state: State) -> None:
    rig.table.put(job(state=state))
    with pytest.raises(JobState) as caught:
        await rig.jobs.redrive("acme", job().id)
    assert (caught.value.code, caught.value.metadata["state"]) == (Code.FAILED_PRECONDITION, state.value)
    assert not rig.tickets


async def test_a_redrive_into_a_full_queue_leaves_the_job_dead(rig: Rig) -> None:
    dead = job().started(NOW).ended(State.DEAD, NOW, BUSY)
    rig.table.put(dead)
    await rig.jobs.submit(job("r2"), "r2")
    await rig.jobs.submit(job("r3"), "r3")
    with pytest.raises(QueueFull):
        await rig.jobs.redrive("acme", dead.id)
    assert rig.table.job(dead.id) == dead


async def test_a_redrive_whose_ticket_was_taken_at_once_returns_what_runs(rig: Rig) -> None:
    dead = job().started(NOW).ended(State.DEAD, NOW, BUSY)
    rig.table.put(dead)
    rig.table.before_write = lambda written: rig.table.put(written.started(NOW))
    again = await rig.jobs.redrive("acme", dead.id)
    assert (again.state, again.generation) == (State.RUNNING, 1)


async def test_watch_tells_every_change_and_ends(rig: Rig) -> None:
    made = await rig.jobs.submit(job(), "r1")
    seen: list[State] = []
    first = asyncio.Event()

    async def watch() -> None:
        async for change in rig.jobs.watch("acme", made.id):
            seen.append(change.state)
            first.set()

    watching = asyncio.create_task(watch())
    async with asyncio.timeout(5):
        await first.wait()
        await rig.jobs.cancel("acme", made.id)
        await watching
    assert seen == [State.QUEUED, State.CANCELLED]


async def test_watch_of_what_has_ended_tells_it_once(rig: Rig) -> None:
    done: Job = job().started(NOW).succeeded(generate_response(), NOW)
    rig.table.put(done)
    async with asyncio.timeout(5):
        assert [change async for change in rig.jobs.watch("acme", done.id)] == [done]
