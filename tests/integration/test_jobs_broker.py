"""The whole of batching on a real nats-server: what is accepted is run, once in the table, whatever is killed meanwhile."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from google.protobuf.timestamp_pb2 import Timestamp

from services.runtime.errors import Code, Failure, Reason
from services.runtime.status import failure_from_status
from sluice.jobs.v1 import job_service_pb2 as pb2
from sluice.metering.v1 import tenancy_service_pb2
from tests.conformance.jobs.broker import Broker, broker
from tests.integration.jobs_mesh import Gateway, Mesh, key_digest, mesh
from tests.unit.batching.examples import generate_request, generate_response, refused
from tests.unit.batching.test_service import MALFORMED

ROOT = Path(__file__).resolve().parents[2]


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[Broker]:
    async with broker(tmp_path) as made:
        yield made


async def dead_letters(running: Mesh) -> list[pb2.DeadLetter]:
    jetstream = (await running.process.nats()).jetstream()
    last = (await jetstream.stream_info("SLUICE_DEAD")).state.last_seq
    stored = [await jetstream.get_msg("SLUICE_DEAD", sequence) for sequence in range(1, last + 1)]
    return [pb2.DeadLetter.FromString(message.data or b"") for message in stored]


async def test_submit_get_watch_and_list(server: Broker) -> None:
    async with mesh(server.url) as running:
        job = await running.submit()
        assert job.state == pb2.JOB_STATE_QUEUED
        told = await running.watch(job.id)
        states = [change.state for change in told]
        assert states[-1] == pb2.JOB_STATE_SUCCEEDED
        assert set(states[:-1]) <= {pb2.JOB_STATE_QUEUED, pb2.JOB_STATE_RUNNING}
        assert (told[-1].response, told[-1].attempt_count) == (generate_response("answer to hello"), 1)
        assert await running.get(job.id) == told[-1]
        listed = (await running.raw("ListJobs", pb2.ListJobsRequest())).jobs
        assert [(row.id, row.state) for row in listed] == [(job.id, pb2.JOB_STATE_SUCCEEDED)]
        assert not (await running.raw("ListJobs", pb2.ListJobsRequest(), "other")).jobs
        with refused(Reason.RESOURCE_NOT_FOUND, Code.NOT_FOUND):
            await running.get(job.id, "other")
        await running.queue_is_empty()


async def test_the_gateway_is_called_for_the_owner_of_the_key(server: Broker) -> None:
    async with mesh(server.url) as running:
        job = await running.submit(tenant="other")
        await running.ended(job.id, "other")
        (run,) = running.gateway.runs
        assert run.request_id == f"{job.id}.0"
        given = {name: run.metadata[f"x-sluice-{name}"] for name in ("project", "key", "allowed-models", "cache-namespace")}
        assert given == {
            "project": "other-project",
            "key": "other-key",
            "allowed-models": "model/a,model/b",
            "cache-namespace": "shop",
        }
        assert (run.tenant, 0 < run.seconds_left <= 300) == ("other", True)


async def test_many_submits_of_one_id_are_one_job(server: Broker) -> None:
    async with mesh(server.url) as running:
        jobs = await asyncio.gather(*(running.submit() for _ in range(20)))
        (job_id,) = {job.id for job in jobs}
        await running.ended(job_id)
        assert (await running.submit()).state == pb2.JOB_STATE_SUCCEEDED
        await running.queue_is_empty()
        assert running.gateway.count("hello") == 1
        with refused(Reason.REQUEST_ID_REUSED, Code.ALREADY_EXISTS, request_id="r1"):
            await running.submit(text="another")


async def test_of_two_bodies_that_race_under_one_id_the_accepted_one_runs(server: Broker) -> None:
    async with mesh(server.url) as running:
        for number in range(10):
            name = f"race{number}"
            results = await asyncio.gather(
                *(running.submit(name, text) for text in ("one", "two", "three")), return_exceptions=True
            )
            (accepted,) = [result for result in results if isinstance(result, pb2.Job)]
            losers = [result for result in results if isinstance(result, Failure)]
            assert [loser.reason for loser in losers] == [Reason.REQUEST_ID_REUSED] * 2
            ended = await running.ended(accepted.id)
            assert (ended.state, ended.request) == (pb2.JOB_STATE_SUCCEEDED, accepted.request)


async def test_one_id_of_two_tenants_is_two_jobs(server: Broker) -> None:
    async with mesh(server.url) as running:
        mine, theirs = await running.submit(), await running.submit(tenant="other")
        assert (await running.ended(mine.id)).key_id == "acme-key"
        assert (await running.ended(theirs.id, "other")).key_id == "other-key"
        assert sorted(run.tenant for run in running.gateway.runs) == ["acme", "other"]


async def test_one_id_is_one_job_after_the_broker_forgot_it(server: Broker) -> None:
    """M4: on a work queue the broker's own deduplication is gone after a restart."""
    async with mesh(server.url) as running:
        job = await running.submit()
        await running.ended(job.id)
        await running.queue_is_empty()
        await server.kill()
        await server.start()
        client = await running.process.nats()
        await running.until(lambda: client.is_connected)
        again = await running.submit()
        assert (again.id, again.state) == (job.id, pb2.JOB_STATE_SUCCEEDED)
        after = await running.submit("after", "after")
        await running.ended(after.id)
        assert running.gateway.count("hello") == 1


async def test_a_job_is_taken_over_when_its_worker_was_killed(server: Broker) -> None:
    async with mesh(server.url, work=False) as running:
        worker = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.integration.jobs_mesh", server.url),
            cwd=ROOT,
            env={"PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            job = await running.submit(text="hang")
            assert worker.stdout is not None
            async with asyncio.timeout(30):
                assert await worker.stdout.readline() == f"started {job.id}.0\n".encode()
            assert (await running.get(job.id)).attempt_count == 1
        finally:
            worker.kill()
            await worker.wait()
        gateway = Gateway()
        gateway.release.set()
        async with mesh(server.url, gateway=gateway) as other:
            ended = await other.ended(job.id)
            assert (ended.state, ended.attempt_count) == (pb2.JOB_STATE_SUCCEEDED, 2)
            # The same operation to the gateway: it joins or replays what the dead worker began.
            assert [run.request_id for run in gateway.runs] == [f"{job.id}.0"]
            await other.queue_is_empty()


async def test_a_running_job_is_not_taken_by_another_worker(server: Broker) -> None:
    async with mesh(server.url) as first:
        job = await first.submit(text="hang")
        await first.until(lambda: first.gateway.count("hang") == 1)
        async with mesh(server.url) as second:
            jetstream = (await first.process.nats()).jetstream()
            (consumer,) = await jetstream.consumers_info("SLUICE_JOBS")
            assert consumer.config.ack_wait == 1.0
            # Longer than two ack waits.
            await asyncio.sleep(2.2)
            assert (second.gateway.runs, first.gateway.count("hang")) == ([], 1)
            first.gateway.release.set()
            assert (await first.ended(job.id)).attempt_count == 1


async def test_three_retries_by_schedule_then_dead_then_redriven(server: Broker) -> None:
    async with mesh(server.url) as running:
        job = await running.submit(text="fail:4")
        told = await running.watch(job.id)
        dead = told[-1]
        assert (dead.state, dead.attempt_count) == (pb2.JOB_STATE_DEAD, 4)
        assert failure_from_status(dead.error).reason is Reason.PROVIDER_UNAVAILABLE
        runs = [run.time for run in running.gateway.runs]
        assert len(runs) == 4
        waits = {change.attempt_count: change for change in told if change.state == pb2.JOB_STATE_RETRYING}
        assert sorted(waits) == [1, 2, 3]
        for attempt, change in waits.items():
            due = change.next_attempt_time.ToMicroseconds() / 1e6
            assert due - runs[attempt - 1] >= 0.75 * 0.1 * 2 ** (attempt - 1)
            assert runs[attempt] >= due
        (letter,) = await dead_letters(running)
        assert (letter.message.job_id, letter.message.tenant_id, letter.attempt_count) == (job.id, "acme", 4)
        assert failure_from_status(letter.error).reason is Reason.PROVIDER_UNAVAILABLE
        await running.queue_is_empty()

        again = (await running.raw("RedriveJob", pb2.RedriveJobRequest(job_id=job.id))).job
        assert again.attempt_count == 0
        ended = await running.ended(job.id)
        assert (ended.state, ended.attempt_count) == (pb2.JOB_STATE_SUCCEEDED, 1)
        assert running.gateway.runs[-1].request_id == f"{job.id}.1"


async def test_a_retry_waits_in_the_broker_not_in_the_worker(server: Broker) -> None:
    async with mesh(server.url) as first:
        job = await first.submit(text="fail:1")
        client = await first.process.nats()
        await first.until(lambda: first.gateway.count("fail:1") == 1)
        async with asyncio.timeout(10):
            while (await first.get(job.id)).state == pb2.JOB_STATE_RUNNING:
                await asyncio.sleep(0.01)
        stored = await client.jetstream().get_last_msg("SLUICE_LATER", "sluice.later.*.acme.default.>")
        assert (stored.headers or {}).get("Nats-Schedule", "").startswith("@at ")
    gateway = Gateway()
    async with mesh(server.url, gateway=gateway) as second:
        # This gateway has its own count, and fails it once more.
        ended = await second.ended(job.id)
        assert (ended.state, ended.attempt_count) == (pb2.JOB_STATE_SUCCEEDED, 3)


async def test_the_callers_fault_fails_at_once(server: Broker) -> None:
    async with mesh(server.url) as running:
        ended = await running.ended((await running.submit(text="wrong")).id)
        assert (ended.state, ended.attempt_count) == (pb2.JOB_STATE_FAILED, 1)
        failure = failure_from_status(ended.error)
        assert (failure.reason, dict(failure.metadata)) == (Reason.REQUEST_INVALID, {"field": "x"})
        assert await dead_letters(running) == []


async def test_each_tenant_has_its_subject_and_its_turn(server: Broker) -> None:
    async with mesh(server.url, work=False) as running:
        for number in range(30):
            await running.submit(f"r{number}", f"acme{number}")
        few = {
            tenant: [await running.submit(f"r{number}", tenant=tenant) for number in range(3)] for tenant in ("other", "third")
        }
        jetstream = (await running.process.nats()).jetstream()
        info = await jetstream.stream_info("SLUICE_JOBS", subjects_filter=">")
        assert info.state.subjects == {
            "sluice.jobs.acme.default": 30,
            "sluice.jobs.other.default": 3,
            "sluice.jobs.third.default": 3,
        }
    async with mesh(server.url, concurrency=1) as running:
        for tenant, jobs in few.items():
            for job in jobs:
                await running.ended(job.id, tenant)
        await running.queue_is_empty()
        order = [run.tenant for run in running.gateway.runs]
        assert len(order) == 36
        # In turn: by the time that each tenant with few has had its three, nobody has had more than four or so.
        assert max(at for at, tenant in enumerate(order) if tenant != "acme") <= 12


async def test_cancel_before_the_run(server: Broker) -> None:
    async with mesh(server.url, work=False) as running:
        job = await running.submit(text="cancelled")
        cancelled = (await running.raw("CancelJob", pb2.CancelJobRequest(job_id=job.id))).job
        assert cancelled.state == pb2.JOB_STATE_CANCELLED
        assert (await running.raw("CancelJob", pb2.CancelJobRequest(job_id=job.id))).job == cancelled
    async with mesh(server.url) as running:
        await running.queue_is_empty()
        assert running.gateway.runs == []
        assert await running.get(job.id) == cancelled


async def test_cancel_during_the_run_by_this_process(server: Broker) -> None:
    async with mesh(server.url, ack_wait=60.0) as running:
        job = await running.submit(text="hang")
        await running.until(lambda: running.gateway.count("hang") == 1)
        await running.raw("CancelJob", pb2.CancelJobRequest(job_id=job.id))
        await running.until(lambda: running.gateway.ended == ["hang"])
        # Well before the ack wait: the ticket was acknowledged, not left to come again.
        await running.queue_is_empty()
        assert (await running.get(job.id)).state == pb2.JOB_STATE_CANCELLED


async def test_cancel_during_the_run_by_another_process(server: Broker) -> None:
    async with mesh(server.url, ack_wait=60.0) as running, mesh(server.url, work=False) as other:
        job = await other.submit(text="hang")
        await running.until(lambda: running.gateway.count("hang") == 1)
        await other.raw("CancelJob", pb2.CancelJobRequest(job_id=job.id))
        await running.until(lambda: running.gateway.ended == ["hang"])
        await running.queue_is_empty()
        assert (await running.ended(job.id)).state == pb2.JOB_STATE_CANCELLED


async def test_cancel_while_a_retry_is_due(server: Broker) -> None:
    async with mesh(server.url, first_backoff=1.0) as running:
        job = await running.submit(text="fail")
        async with asyncio.timeout(10):
            while (await running.get(job.id)).state != pb2.JOB_STATE_RETRYING:
                await asyncio.sleep(0.01)
        await running.raw("CancelJob", pb2.CancelJobRequest(job_id=job.id))
        jetstream = (await running.process.nats()).jetstream()
        async with asyncio.timeout(10):
            while (await jetstream.stream_info("SLUICE_LATER")).state.messages:
                await asyncio.sleep(0.05)
        await running.queue_is_empty()
        assert running.gateway.count("fail") == 1
        assert (await running.get(job.id)).state == pb2.JOB_STATE_CANCELLED


async def test_the_broker_is_killed_and_keeps_what_was_accepted(server: Broker) -> None:
    async with mesh(server.url, work=False) as running:
        jobs = [await running.submit(f"r{number}", f"text{number}") for number in range(5)]
        client = await running.process.nats()
        await server.kill()
        await running.until(lambda: not client.is_connected)
        with pytest.raises(Failure) as caught:
            async with asyncio.timeout(8):
                await running.submit("while dead")
        assert (caught.value.code, caught.value.reason) == (Code.UNAVAILABLE, Reason.DEPENDENCY_UNAVAILABLE)
        assert caught.value.retry_delay
        await server.start()
        await running.until(lambda: client.is_connected)
        listed = (await running.raw("ListJobs", pb2.ListJobsRequest())).jobs
        assert {job.id for job in listed} == {job.id for job in jobs}
    async with mesh(server.url) as running:
        for number, job in enumerate(jobs):
            ended = await running.ended(job.id)
            assert (ended.state, ended.response) == (pb2.JOB_STATE_SUCCEEDED, generate_response(f"answer to text{number}"))
        assert len(running.gateway.runs) == 5


async def test_the_broker_is_killed_while_a_job_runs(server: Broker) -> None:
    """M11: an acknowledgement to a dead server seems to succeed; the table and the redelivery decide."""
    async with mesh(server.url) as running:
        job = await running.submit(text="hang")
        await running.until(lambda: running.gateway.count("hang") == 1)
        client = await running.process.nats()
        await server.kill()
        await running.until(lambda: not client.is_connected)
        running.gateway.release.set()
        await server.start()
        await running.until(lambda: client.is_connected)
        ended = await running.ended(job.id)
        assert ended.state == pb2.JOB_STATE_SUCCEEDED
        assert ended.attempt_count <= 2
        await running.queue_is_empty()


async def test_a_broker_that_comes_late_is_used(tmp_path: Path) -> None:
    late = Broker(tmp_path)
    async with mesh(late.url) as running:
        with refused(Reason.DEPENDENCY_UNAVAILABLE, Code.UNAVAILABLE, dependency="nats"):
            await running.submit()
        await late.start()
        try:
            client = await running.process.nats()
            await running.until(lambda: client.is_connected)
            assert (await running.ended((await running.submit()).id)).state == pb2.JOB_STATE_SUCCEEDED
        finally:
            await late.kill()


async def test_a_full_queue_is_resource_exhausted_and_loses_nothing(server: Broker) -> None:
    async with mesh(server.url, work=False, queue_capacity=3) as running:
        jobs = [await running.submit(f"r{number}") for number in range(3)]
        with refused(Reason.QUEUE_FULL, Code.RESOURCE_EXHAUSTED, limit="3"):
            await running.submit("over")
        assert len((await running.raw("ListJobs", pb2.ListJobsRequest())).jobs) == 3
        assert (await running.submit("r0")).id == jobs[0].id
        theirs = await running.submit("over", tenant="other")
    async with mesh(server.url, queue_capacity=3) as running:
        for job in jobs:
            assert (await running.ended(job.id)).state == pb2.JOB_STATE_SUCCEEDED
        assert (await running.ended(theirs.id, "other")).state == pb2.JOB_STATE_SUCCEEDED
        await running.queue_is_empty()
        # A refused id is not used up.
        assert (await running.ended((await running.submit("over")).id)).state == pb2.JOB_STATE_SUCCEEDED


async def test_malformed_requests_are_invalid_and_nothing_is_kept(server: Broker) -> None:
    async with mesh(server.url) as running:
        for field, change in MALFORMED:
            request = pb2.SubmitJobRequest(request_id="r1", request=generate_request())
            change(request)
            with refused(Reason.REQUEST_INVALID, Code.INVALID_ARGUMENT):
                # Times of the table are relative to another now; what each one names is the unit test's.
                if field in ("deadline_time", "not_before_time"):
                    request.deadline_time.CopyFrom(Timestamp(seconds=10**15))
                await running.raw("SubmitJob", request)
        for job_id in ("", "a.b", "*", ">"):
            for method in ("GetJob", "CancelJob", "RedriveJob"):
                with refused(Reason.REQUEST_INVALID, Code.INVALID_ARGUMENT, field="job_id"):
                    await running.raw(method, getattr(pb2, f"{method}Request")(job_id=job_id))
            with refused(Reason.REQUEST_INVALID, Code.INVALID_ARGUMENT, field="job_id"):
                await running.watch(job_id)
        assert not (await running.raw("ListJobs", pb2.ListJobsRequest())).jobs
        await running.queue_is_empty()


async def test_poison_blocks_nobody_and_ends_no_worker(server: Broker) -> None:
    async with mesh(server.url) as running:
        await running.ended((await running.submit("first", "first")).id)
        jetstream = (await running.process.nats()).jetstream()
        for subject in (
            "sluice.jobs.acme.default",
            "sluice.jobs.other.default",
            "sluice.jobs.=!!.x",
            "sluice.later.due.acme.default",
        ):
            await jetstream.publish(subject, b"\xff\xff\xff")
        for tenant in ("acme", "other"):
            fine = await running.submit("fine", "fine", tenant)
            assert (await running.ended(fine.id, tenant)).state == pb2.JOB_STATE_SUCCEEDED
        later = Timestamp()
        later.FromSeconds(int(time.time()) + 1)
        due = await running.submit("later", "later", not_before_time=later)
        assert (await running.ended(due.id)).state == pb2.JOB_STATE_SUCCEEDED
        assert next(run.time for run in running.gateway.runs if run.text == "later") >= later.seconds
        assert len(await dead_letters(running)) == 3


async def test_a_revoked_key_is_checked_again_at_once(server: Broker) -> None:
    async with mesh(server.url) as running:
        await running.submit("r1")
        await running.submit("r2")
        assert running.metering.asked == ["acme"]
        client = await running.process.nats()
        revoked = tenancy_service_pb2.KeyInvalidation(key_sha256=key_digest("acme"))
        async with asyncio.timeout(10):
            while len(running.metering.asked) < 2:
                await client.publish("sluice.keys.revoked", revoked.SerializeToString())
                await client.publish("sluice.keys.revoked", b"\xff")
                await client.flush()
                await running.raw("ListJobs", pb2.ListJobsRequest())
