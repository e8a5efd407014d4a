"""Wiring of the batching service."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.message import DecodeError

from services.batching.adapters.jetstream import CANCELLED, WAKE, JetStream, JetStreamQueues, JetStreamTable
from services.batching.config import Config
from services.batching.job import Job, Retries
from services.batching.keys import Identity, Keys
from services.batching.service import JobServicer
from services.batching.submission import Jobs, Owner
from services.batching.worker import Worker
from services.runtime.dispatch import Binding
from services.runtime.errors import Failure
from services.runtime.metrics import Registry
from services.runtime.process import Process, Service
from sluice.inference.v1 import inference_service_pb2
from sluice.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from sluice.jobs.v1 import job_service_pb2
from sluice.metering.v1 import metering_service_pb2, tenancy_service_pb2
from sluice.metering.v1.metering_service_pb2_grpc import MeteringServiceStub

if TYPE_CHECKING:
    # Exist for type checkers only.
    from sluice.inference.v1.inference_service_pb2_grpc import InferenceServiceAsyncStub
    from sluice.metering.v1.metering_service_pb2_grpc import MeteringServiceAsyncStub

NAME: Final = "batching"
KEYS_REVOKED: Final = "sluice.keys.revoked"
_AUTHENTICATE_SECONDS: Final = 5.0


class _Observer:
    """Counts and logs what happens to jobs."""

    def __init__(self, log: Any, metrics: Registry) -> None:
        self._log = log
        self._finished = metrics.counter("sluice_jobs_finished_total", "Jobs by final state", ["state"])
        self._retried = metrics.counter("sluice_jobs_retried_total", "Failed attempts that are tried again")
        self._faults = metrics.counter("sluice_jobs_faults_total", "Tickets that were left for redelivery")

    def finished(self, job: Job) -> None:
        """See worker.Observer."""
        self._finished.labels(job.state.value).inc()
        self._log.info("job_finished", job=job.id, tenant=job.tenant_id, state=job.state.value, attempts=job.attempts)

    def retried(self, job: Job) -> None:
        """See worker.Observer."""
        self._retried.inc()
        reason = job.failure.reason.value if job.failure is not None else ""
        self._log.info("job_retried", job=job.id, tenant=job.tenant_id, attempts=job.attempts, reason=reason)

    def failed(self, what: str, error: Exception) -> None:
        """See worker.Observer."""
        self._faults.inc()
        if isinstance(error, Failure):
            self._log.warning("job_fault", what=what, reason=error.reason.value, message=error.message)
        else:
            self._log.error("job_fault", what=what, exc_info=error)


def _authenticator(stub: MeteringServiceAsyncStub) -> Any:
    async def authenticate(digest: bytes) -> Identity:
        response = await stub.Authenticate(
            metering_service_pb2.AuthenticateRequest(key_sha256=digest), timeout=_AUTHENTICATE_SECONDS
        )
        found = response.identity
        owner = Owner(found.tenant_id, found.project_id, found.key_id, tuple(found.allowed_models), found.cache_namespace)
        return Identity(owner, frozenset(found.scopes), response.reuse_duration.ToNanoseconds() / 1e9)

    return authenticate


def _generator(stub: InferenceServiceAsyncStub) -> Any:
    async def generate(job: Job, seconds: float) -> object:
        assert isinstance(job.request, inference_service_pb2.GenerateRequest)
        request = inference_service_pb2.GenerateRequest()
        request.CopyFrom(job.request)
        # Repeated attempts of one job are one operation to the gateway: it joins or replays what another worker began.
        request.request_id = f"{job.id}.{job.generation}"
        metadata = [
            ("x-sluice-tenant", job.tenant_id),
            ("x-sluice-project", job.project_id),
            ("x-sluice-key", job.key_id),
        ]
        if job.allowed_models:
            metadata.append(("x-sluice-allowed-models", ",".join(job.allowed_models)))
        if job.cache_namespace:
            metadata.append(("x-sluice-cache-namespace", job.cache_namespace))
        return await stub.Generate(request, timeout=seconds, metadata=tuple(metadata))

    return generate


@contextlib.asynccontextmanager
async def open_service(config: Config, process: Process) -> AsyncIterator[Service]:
    """Opens the service. NATS may come later: until then a submit is UNAVAILABLE and the worker waits."""
    streams = JetStream(process.nats, capacity=config.queue_capacity, retention=config.retention, replicas=config.replicas)
    table = JetStreamTable(streams)
    queues = JetStreamQueues(
        streams, process.nats, capacity=config.queue_capacity, ack_wait=config.ack_wait, idle=config.idle_queue
    )
    metering = MeteringServiceStub(process.channel("metering"))
    inference = InferenceServiceStub(process.channel("gateway"))
    keys = Keys(_authenticator(metering))
    observer = _Observer(process.log, process.metrics)
    worker = Worker(
        table,
        queues,
        _generator(inference),
        observer,
        retries=Retries(config.max_retries, config.first_backoff, config.longest_backoff),
        concurrency=config.concurrency,
        tenant_concurrency=config.tenant_concurrency,
        attempt_timeout=config.attempt_timeout,
        ack_wait=config.ack_wait,
        poll_interval=config.poll_interval,
        clock=time.time,
    )
    process.metrics.gauge("sluice_jobs_running", "Jobs that run in this process").set_function(lambda: float(worker.running))
    jobs = Jobs(table, queues, worker.cancel, lifetime=config.lifetime, clock=time.time)
    servicer = JobServicer(
        jobs,
        keys,
        classes=config.classes,
        lifetime=config.lifetime,
        max_request_bytes=config.max_request_bytes,
        clock=time.time,
    )

    async def listen() -> None:
        """Takes announcements over core NATS; they only make things faster."""

        async def on_cancel(message: Any) -> None:
            worker.cancel(message.data.decode(errors="replace"))

        async def on_wake(_: Any) -> None:
            worker.wake()

        async def on_revoked(message: Any) -> None:
            try:
                revoked = tenancy_service_pb2.KeyInvalidation.FromString(message.data)
            except DecodeError:
                return
            keys.forget(revoked.key_sha256)

        while True:
            try:
                client = await process.nats()
            except Failure:
                await asyncio.sleep(1.0)
                continue
            await client.subscribe(CANCELLED, cb=on_cancel)
            await client.subscribe(WAKE, cb=on_wake)
            await client.subscribe(KEYS_REVOKED, cb=on_revoked)
            await asyncio.Event().wait()

    async def nats_there() -> None:
        await streams.context()

    async def drain() -> None:
        await worker.drain(process.settings.drain_grace)

    descriptor = job_service_pb2.DESCRIPTOR.services_by_name["JobService"]
    try:
        yield Service(
            name=NAME,
            bindings=(Binding(servicer, descriptor),),
            pings={"nats": nats_there},
            workers=(worker.run, queues.move_due, listen),
            drain=drain,
        )
    finally:
        await queues.close()
