"""The servicer of `sluice.jobs.v1.JobService`."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import math
from collections.abc import AsyncIterator, Callable, Collection
from typing import Final, Literal

from services.batching.job import Job, job_id
from services.batching.keys import Keys
from services.batching.proto import job_to_proto, seconds_of, state_from_proto
from services.batching.submission import Jobs
from services.runtime.call import Call
from services.runtime.errors import Failure, Reason, invalid
from sluice.jobs.v1 import job_service_pb2 as pb2

MAX_REQUEST_ID: Final = 128
MAX_PAGE: Final = 1000
DEFAULT_PAGE: Final = 100


class JobServicer:
    """Authenticates, translates, makes one call, translates."""

    def __init__(
        self,
        jobs: Jobs,
        keys: Keys,
        *,
        classes: Collection[str],
        lifetime: float,
        max_request_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self._jobs = jobs
        self._keys = keys
        self._classes = classes
        self._lifetime = lifetime
        self._max_request_bytes = max_request_bytes
        self._clock = clock

    async def SubmitJob(self, request: pb2.SubmitJobRequest, call: Call) -> pb2.SubmitJobResponse:
        """See the proto."""
        owner = await self._keys.owner(call.metadata.get("authorization"))
        if len(request.request_id) > MAX_REQUEST_ID or not request.request_id.isascii() or not request.request_id.isprintable():
            raise invalid("request_id", f"must be at most {MAX_REQUEST_ID} printable ASCII characters")
        if not request.HasField("request") or not request.request.conversation.messages:
            raise invalid("request.conversation", "must have at least one message")
        if request.ByteSize() > self._max_request_bytes:
            raise Failure(
                Reason.REQUEST_TOO_LARGE,
                f"the job has {request.ByteSize()} bytes, and at most {self._max_request_bytes} are taken",
                metadata={"limit": str(self._max_request_bytes)},
            )
        job_class = request.job_class or "default"
        if job_class not in self._classes:
            raise invalid("job_class", f"{job_class!r} is not one of {', '.join(sorted(self._classes))}")
        now = self._clock()
        deadline = _moment(request, "deadline_time", now + self._lifetime)
        if deadline <= now:
            raise invalid("deadline_time", "has passed")
        not_before = _moment(request, "not_before_time", 0.0)
        if not_before >= deadline:
            raise invalid("not_before_time", "must be earlier than deadline_time, or the job could never start")
        body = pb2.SubmitJobRequest()
        body.CopyFrom(request)
        body.request.request_id = ""
        job = Job(
            id=job_id(owner.tenant_id, request.request_id),
            tenant_id=owner.tenant_id,
            project_id=owner.project_id,
            key_id=owner.key_id,
            job_class=job_class,
            request=body.request,
            submit_sha256=hashlib.sha256(body.SerializeToString(deterministic=True)).digest(),
            create_time=now,
            not_before_time=not_before,
            deadline_time=deadline,
            allowed_models=owner.allowed_models,
            cache_namespace=owner.cache_namespace,
        )
        return pb2.SubmitJobResponse(job=job_to_proto(await self._jobs.submit(job, request.request_id), full=True))

    async def GetJob(self, request: pb2.GetJobRequest, call: Call) -> pb2.GetJobResponse:
        """See the proto."""
        owner = await self._keys.owner(call.metadata.get("authorization"))
        job = await self._jobs.get(owner.tenant_id, _job_id(request.job_id))
        return pb2.GetJobResponse(job=job_to_proto(job, full=True))

    async def ListJobs(self, request: pb2.ListJobsRequest, call: Call) -> pb2.ListJobsResponse:
        """See the proto."""
        owner = await self._keys.owner(call.metadata.get("authorization"))
        if not 0 <= request.page_size <= MAX_PAGE:
            raise invalid("page_size", f"must be 0 to {MAX_PAGE}, got {request.page_size}")
        size = request.page_size or DEFAULT_PAGE
        state = state_from_proto(request.state)
        if request.state and state is None:
            raise invalid("state", f"{request.state} is no state")
        jobs = await self._jobs.list(owner.tenant_id, state)
        if request.page_token:
            after = _page_key(request.page_token)
            jobs = [job for job in jobs if (-job.create_time, job.id) > after]
        page = jobs[:size]
        return pb2.ListJobsResponse(
            jobs=[job_to_proto(job, full=False) for job in page],
            next_page_token=_page_token(page[-1]) if len(jobs) > size else "",
        )

    async def WatchJob(self, request: pb2.WatchJobRequest, call: Call) -> AsyncIterator[pb2.WatchJobResponse]:
        """See the proto."""
        owner = await self._keys.owner(call.metadata.get("authorization"))
        async with contextlib.aclosing(self._jobs.watch(owner.tenant_id, _job_id(request.job_id))) as changes:
            async for job in changes:
                yield pb2.WatchJobResponse(job=job_to_proto(job, full=True))

    async def CancelJob(self, request: pb2.CancelJobRequest, call: Call) -> pb2.CancelJobResponse:
        """See the proto."""
        owner = await self._keys.owner(call.metadata.get("authorization"))
        job = await self._jobs.cancel(owner.tenant_id, _job_id(request.job_id))
        return pb2.CancelJobResponse(job=job_to_proto(job, full=True))

    async def RedriveJob(self, request: pb2.RedriveJobRequest, call: Call) -> pb2.RedriveJobResponse:
        """See the proto."""
        owner = await self._keys.owner(call.metadata.get("authorization"))
        job = await self._jobs.redrive(owner.tenant_id, _job_id(request.job_id))
        return pb2.RedriveJobResponse(job=job_to_proto(job, full=True))


def _moment(request: pb2.SubmitJobRequest, field: Literal["deadline_time", "not_before_time"], absent: float) -> float:
    """The timestamp in `field` as Unix seconds, or `absent`."""
    if not request.HasField(field):
        return absent
    try:
        return seconds_of(getattr(request, field))
    except ValueError:
        raise invalid(field, "is no valid Timestamp: 0001-01-01 to 9999-12-31, nanos 0 to 999,999,999") from None


def _job_id(value: str) -> str:
    if not value or len(value) > 128 or not value.isascii() or not value.replace("_", "a").replace("-", "a").isalnum():
        raise invalid("job_id", f"{value[:40]!r} is no job id")
    return value


def _page_token(job: Job) -> str:
    return base64.urlsafe_b64encode(f"{job.create_time!r} {job.id}".encode()).decode()


def _page_key(page_token: str) -> tuple[float, str]:
    try:
        created, found = base64.urlsafe_b64decode(page_token.encode()).decode().split(" ")
        if not math.isfinite(float(created)):
            raise ValueError(created)
        return -float(created), found
    except (ValueError, binascii.Error):
        raise invalid("page_token", "is not one that ListJobs gave") from None
