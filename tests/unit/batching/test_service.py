from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import pytest_asyncio

from services.batching.job import Job, State
from services.batching.keys import Identity, Keys
from services.batching.service import JobServicer
from services.batching.submission import Jobs, Owner
from services.runtime.call import Call
from services.runtime.errors import Code, Failure, Reason
from sluice.jobs.v1 import job_service_pb2 as pb2
from tests.unit.batching.examples import BUSY, NOW, Clock, generate_request, generate_response, job, refused
from tests.unit.batching.memory import MemoryQueues, MemoryTable


def call(tenant: str | None = "acme") -> Call:
    """A call with the key of a tenant; None: without a key."""
    metadata = {} if tenant is None else {"authorization": f"Bearer {tenant}"}
    return Call("/sluice.jobs.v1.JobService/SubmitJob", deadline=1e12, metadata=metadata)


class Rig:
    """A servicer on memory. The secret of a tenant's key is its name; `outsider` has no scope."""

    def __init__(self) -> None:
        self.table = MemoryTable()
        self.queues = MemoryQueues()
        self.clock = Clock()
        names = {hashlib.sha256(name.encode()).digest(): name for name in ("acme", "other", "outsider")}

        async def authenticate(digest: bytes) -> Identity:
            if digest not in names:
                raise Failure(Reason.KEY_INVALID, "no such key")
            name = names[digest]
            owner = Owner(name, f"{name}-project", f"{name}-key", ("model/a",), "shop")
            return Identity(owner, frozenset({"usage"} if name == "outsider" else {"jobs"}), 30.0)

        self.servicer = JobServicer(
            Jobs(self.table, self.queues, lambda _: None, lifetime=60.0, clock=self.clock),
            Keys(authenticate, self.clock),
            classes=("default", "slow"),
            lifetime=60.0,
            max_request_bytes=2000,
            clock=self.clock,
        )

    async def submit(self, request: pb2.SubmitJobRequest | None = None, tenant: str = "acme") -> pb2.Job:
        response = await self.servicer.SubmitJob(request or submit_request(), call(tenant))
        return response.job


def submit_request(request_id: str = "r1", text: str = "hello") -> pb2.SubmitJobRequest:
    """A well-formed submit."""
    return pb2.SubmitJobRequest(request_id=request_id, request=generate_request(text))


@pytest_asyncio.fixture
async def rig() -> Rig:
    return Rig()


async def test_a_job_belongs_to_who_holds_the_key(rig: Rig) -> None:
    made = await rig.submit()
    assert (made.state, made.key_id, made.job_class) == (pb2.JOB_STATE_QUEUED, "acme-key", "default")
    assert (made.create_time.ToSeconds(), made.deadline_time.ToSeconds()) == (NOW, NOW + 60)
    kept = rig.table.job(made.id)
    assert (kept.tenant_id, kept.project_id, kept.allowed_models) == ("acme", "acme-project", ("model/a",))
    assert (kept.cache_namespace, kept.request) == ("shop", generate_request())


async def test_the_id_inside_the_request_is_ignored(rig: Rig) -> None:
    request = submit_request()
    request.request.request_id = "mine"
    first = await rig.submit(request)
    request.request.request_id = "another"
    assert (await rig.submit(request)).id == first.id
    assert first.request.request_id == ""


async def test_the_same_id_twice_is_one_job_and_per_tenant(rig: Rig) -> None:
    first = await rig.submit()
    rig.clock.time += 5
    assert await rig.submit() == first
    assert (await rig.submit(tenant="other")).id != first.id
    assert (await rig.submit(submit_request(""))).id != (await rig.submit(submit_request(""))).id
    assert len(rig.table.rows) == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda request: request.request.conversation.messages[0].parts[0].__setattr__("text", "other"),
        lambda request: request.__setattr__("job_class", "slow"),
        lambda request: request.deadline_time.FromSeconds(int(NOW) + 10),
        lambda request: request.not_before_time.FromSeconds(int(NOW) + 10),
    ],
)
async def test_the_same_id_with_another_body_is_refused(rig: Rig, change: Callable[[pb2.SubmitJobRequest], None]) -> None:
    await rig.submit()
    request = submit_request()
    change(request)
    with refused(Reason.REQUEST_ID_REUSED, Code.ALREADY_EXISTS, request_id="r1"):
        await rig.submit(request)


async def test_the_order_of_a_map_is_no_other_body(rig: Rig) -> None:
    pairs = [(f"k{number}", "v") for number in range(16)]
    one, two = submit_request(), submit_request()
    for key, value in pairs:
        one.request.metadata[key] = value
    for key, value in reversed(pairs):
        two.request.metadata[key] = value
    assert (await rig.submit(one)).id == (await rig.submit(two)).id


def _set(field: str, seconds: int, nanos: int = 0) -> Callable[[pb2.SubmitJobRequest], None]:
    def change(request: pb2.SubmitJobRequest) -> None:
        moment = getattr(request, field)
        moment.seconds, moment.nanos = seconds, nanos

    return change


MALFORMED: list[tuple[str, Callable[[pb2.SubmitJobRequest], None]]] = [
    ("request_id", lambda request: setattr(request, "request_id", "x" * 129)),
    ("request_id", lambda request: setattr(request, "request_id", "ä")),
    ("request_id", lambda request: setattr(request, "request_id", "a\nb")),
    ("request.conversation", lambda request: request.ClearField("request")),
    ("request.conversation", lambda request: request.request.ClearField("conversation")),
    ("request.conversation", lambda request: request.request.conversation.ClearField("messages")),
    ("job_class", lambda request: setattr(request, "job_class", "fast")),
    ("job_class", lambda request: setattr(request, "job_class", "a.>")),
    ("deadline_time", _set("deadline_time", int(NOW))),
    ("deadline_time", _set("deadline_time", 0)),
    ("deadline_time", _set("deadline_time", -5)),
    ("deadline_time", _set("deadline_time", 10**15)),
    ("deadline_time", _set("deadline_time", int(NOW) + 5, -3)),
    ("deadline_time", _set("deadline_time", int(NOW) + 5, 2 * 10**9)),
    ("not_before_time", _set("not_before_time", -(10**15))),
    ("not_before_time", _set("not_before_time", int(NOW) + 5, -3)),
    ("not_before_time", _set("not_before_time", int(NOW) + 60)),
]


@pytest.mark.parametrize(("field", "change"), MALFORMED)
async def test_a_malformed_submit_names_the_field(rig: Rig, field: str, change: Callable[[pb2.SubmitJobRequest], None]) -> None:
    request = submit_request()
    change(request)
    with refused(Reason.REQUEST_INVALID, Code.INVALID_ARGUMENT, field=field):
        await rig.submit(request)
    assert (rig.table.rows, rig.queues.queues) == ({}, {})


async def test_bounds_are_within(rig: Rig) -> None:
    request = submit_request("x" * 128)
    request.job_class = "slow"
    request.deadline_time.FromSeconds(int(NOW) + 1)
    request.not_before_time.FromSeconds(int(NOW) - 10)
    made = await rig.submit(request)
    assert (made.job_class, made.deadline_time.ToSeconds()) == ("slow", NOW + 1)


async def test_a_job_that_is_too_large_is_refused(rig: Rig) -> None:
    fits = submit_request()
    fits.request.conversation.messages[0].parts[0].text = "x" * (2000 - fits.ByteSize() - 10)
    await rig.submit(fits)
    with refused(Reason.REQUEST_TOO_LARGE, Code.RESOURCE_EXHAUSTED, limit="2000"):
        await rig.submit(submit_request("r2", "x" * 2000))


async def test_without_a_key_no_method_answers(rig: Rig) -> None:
    servicer = rig.servicer
    made = await rig.submit()
    for stranger, reason, code in (
        (call(None), Reason.KEY_MISSING, Code.UNAUTHENTICATED),
        (call("nobody"), Reason.KEY_INVALID, Code.UNAUTHENTICATED),
        (call("outsider"), Reason.PERMISSION_DENIED, Code.PERMISSION_DENIED),
    ):
        with refused(reason, code):
            await servicer.SubmitJob(submit_request("r2"), stranger)
        with refused(reason, code):
            await servicer.GetJob(pb2.GetJobRequest(job_id=made.id), stranger)
        with refused(reason, code):
            await servicer.ListJobs(pb2.ListJobsRequest(), stranger)
        with refused(reason, code):
            await servicer.CancelJob(pb2.CancelJobRequest(job_id=made.id), stranger)
        with refused(reason, code):
            await servicer.RedriveJob(pb2.RedriveJobRequest(job_id=made.id), stranger)
        with refused(reason, code):
            await anext(servicer.WatchJob(pb2.WatchJobRequest(job_id=made.id), stranger))
    assert rig.table.job(made.id).state is State.QUEUED


@pytest.mark.parametrize("job_id", ["", "a.b", "*", ">", "x" * 129, "a b", "ä", "a/b"])
async def test_what_is_no_job_id_is_refused(rig: Rig, job_id: str) -> None:
    servicer = rig.servicer
    with refused(Reason.REQUEST_INVALID, Code.INVALID_ARGUMENT, field="job_id"):
        await servicer.GetJob(pb2.GetJobRequest(job_id=job_id), call())
    with refused(Reason.REQUEST_INVALID, Code.INVALID_ARGUMENT, field="job_id"):
        await servicer.CancelJob(pb2.CancelJobRequest(job_id=job_id), call())
    with refused(Reason.REQUEST_INVALID, Code.INVALID_ARGUMENT, field="job_id"):
        await servicer.RedriveJob(pb2.RedriveJobRequest(job_id=job_id), call())
    with refused(Reason.REQUEST_INVALID, Code.INVALID_ARGUMENT, field="job_id"):
        await anext(servicer.WatchJob(pb2.WatchJobRequest(job_id=job_id), call()))


async def test_the_jobs_of_another_tenant_are_not_found(rig: Rig) -> None:
    made = await rig.submit()
    servicer = rig.servicer
    resource = f"jobs/{made.id}"
    with refused(Reason.RESOURCE_NOT_FOUND, Code.NOT_FOUND, resource=resource):
        await servicer.GetJob(pb2.GetJobRequest(job_id=made.id), call("other"))
    with refused(Reason.RESOURCE_NOT_FOUND, Code.NOT_FOUND, resource=resource):
        await servicer.CancelJob(pb2.CancelJobRequest(job_id=made.id), call("other"))
    with refused(Reason.RESOURCE_NOT_FOUND, Code.NOT_FOUND, resource=resource):
        await servicer.RedriveJob(pb2.RedriveJobRequest(job_id=made.id), call("other"))
    with refused(Reason.RESOURCE_NOT_FOUND, Code.NOT_FOUND, resource=resource):
        await anext(servicer.WatchJob(pb2.WatchJobRequest(job_id=made.id), call("other")))
    assert not (await servicer.ListJobs(pb2.ListJobsRequest(), call("other"))).jobs
    assert rig.table.job(made.id).state is State.QUEUED


async def test_get_cancel_redrive_and_watch_answer_with_the_job(rig: Rig) -> None:
    servicer = rig.servicer
    done = job().started(NOW).succeeded(generate_response(), NOW)
    dead = job("dead").started(NOW).ended(State.DEAD, NOW, BUSY)
    for row in (done, dead):
        rig.table.put(row)
    got = (await servicer.GetJob(pb2.GetJobRequest(job_id=done.id), call())).job
    assert (got.response, got.request) == (generate_response(), generate_request())
    assert [change.job async for change in servicer.WatchJob(pb2.WatchJobRequest(job_id=done.id), call())] == [got]
    assert (await servicer.CancelJob(pb2.CancelJobRequest(job_id=done.id), call())).job == got
    again = (await servicer.RedriveJob(pb2.RedriveJobRequest(job_id=dead.id), call())).job
    assert (again.state, again.HasField("error")) == (pb2.JOB_STATE_QUEUED, False)
    with refused(Reason.STATE_CONFLICT, Code.FAILED_PRECONDITION, state="queued"):
        await servicer.RedriveJob(pb2.RedriveJobRequest(job_id=dead.id), call())


async def _pages(rig: Rig, size: int, state: pb2.JobState.ValueType = pb2.JOB_STATE_UNSPECIFIED) -> list[list[str]]:
    pages: list[list[str]] = []
    token = ""
    while True:
        request = pb2.ListJobsRequest(page_size=size, page_token=token, state=state)
        response = await rig.servicer.ListJobs(request, call())
        assert not any(found.HasField("request") for found in response.jobs)
        pages.append([found.id for found in response.jobs])
        token = response.next_page_token
        if not token:
            return pages


async def test_pages_hold_every_job_once_newest_first(rig: Rig) -> None:
    rows: list[Job] = [job(f"r{number}", now=NOW + number // 3) for number in range(9)]
    for row in rows:
        rig.table.put(row)
    rig.table.put(job(tenant="other"))
    expected = [row.id for row in sorted(rows, key=lambda row: (-row.create_time, row.id))]
    for size, sizes in ((4, [4, 4, 1]), (9, [9]), (3, [3, 3, 3]), (1000, [9]), (0, [9])):
        pages = await _pages(rig, size)
        assert [len(page) for page in pages] == sizes
        assert [job_id for page in pages for job_id in page] == expected


async def test_a_job_that_comes_between_two_pages_moves_nothing(rig: Rig) -> None:
    for number in range(4):
        rig.table.put(job(f"r{number}", now=NOW + number))
    first = await rig.servicer.ListJobs(pb2.ListJobsRequest(page_size=2), call())
    rig.table.put(job("new", now=NOW + 100))
    rest = await rig.servicer.ListJobs(pb2.ListJobsRequest(page_size=2, page_token=first.next_page_token), call())
    assert [found.id for found in rest.jobs] == [job("r1").id, job("r0").id]
    assert rest.next_page_token == ""


async def test_lists_by_state(rig: Rig) -> None:
    rig.table.put(job("queued"))
    rig.table.put(replace(job("running"), state=State.RUNNING))
    assert await _pages(rig, 10, pb2.JOB_STATE_RUNNING) == [[job("running").id]]


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("page_size", pb2.ListJobsRequest(page_size=-1)),
        ("page_size", pb2.ListJobsRequest(page_size=1001)),
        ("page_token", pb2.ListJobsRequest(page_token="x")),
        ("page_token", pb2.ListJobsRequest(page_token="ä")),
        ("page_token", pb2.ListJobsRequest(page_token=base64.urlsafe_b64encode(b"1.0").decode())),
        ("page_token", pb2.ListJobsRequest(page_token=base64.urlsafe_b64encode(b"x y").decode())),
        ("page_token", pb2.ListJobsRequest(page_token=base64.urlsafe_b64encode(b"nan y").decode())),
        ("page_token", pb2.ListJobsRequest(page_token=base64.urlsafe_b64encode(b"\xff y").decode())),
        ("state", pb2.ListJobsRequest(state=99)),  # type: ignore[arg-type]  # what a newer client may send
    ],
)
async def test_a_malformed_list_names_the_field(rig: Rig, field: str, request_: pb2.ListJobsRequest) -> None:
    with refused(Reason.REQUEST_INVALID, Code.INVALID_ARGUMENT, field=field):
        await rig.servicer.ListJobs(request_, call())
