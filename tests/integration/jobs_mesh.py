"""The batching service with a real broker, between a scripted gateway and a scripted metering, in one process.

`python -m tests.integration.jobs_mesh URL` is a worker of its own that never ends a job: it tells `started` and waits to be killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from services.batching.app import open_service
from services.batching.config import Config
from services.runtime.call import Call
from services.runtime.dispatch import Binding
from services.runtime.errors import Failure, Reason
from services.runtime.process import Process
from services.runtime.settings import MeshSettings
from sluice.inference.v1 import inference_service_pb2
from sluice.jobs.v1 import job_service_pb2 as pb2
from sluice.jobs.v1.job_service_pb2_grpc import JobServiceStub
from sluice.metering.v1 import metering_service_pb2
from tests.unit.batching.examples import generate_request, generate_response
from tests.unit.runtime.fakes import Lines

TENANTS = ("acme", "other", "third")


@dataclass(frozen=True)
class Run:
    """One call of the gateway."""

    request_id: str
    text: str
    tenant: str
    metadata: dict[str, str]
    time: float
    """Unix time of its start."""
    seconds_left: float


@dataclass
class Gateway:
    """Answers by the text: `fail`, `wrong` and `hang` do so, `fail:2` fails twice and then answers; the rest is answered."""

    runs: list[Run] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    """Texts of calls that were cancelled."""
    release: asyncio.Event = field(default_factory=asyncio.Event)
    """Ends every `hang`."""
    on_run: Callable[[Run], None] = lambda _: None

    def count(self, text: str) -> int:
        """Runs with this text."""
        return sum(run.text == text for run in self.runs)

    async def Generate(
        self, request: inference_service_pb2.GenerateRequest, call: Call
    ) -> inference_service_pb2.GenerateResponse:
        text = request.conversation.messages[0].parts[0].text
        run = Run(
            request.request_id, text, call.metadata["x-sluice-tenant"], dict(call.metadata), time.time(), call.time_left()
        )
        self.runs.append(run)
        self.on_run(run)
        if text == "fail" or (text.startswith("fail:") and self.count(text) <= int(text.split(":")[1])):
            raise Failure(Reason.PROVIDER_UNAVAILABLE, "the provider is down")
        if text == "wrong":
            raise Failure(Reason.REQUEST_INVALID, "the request is wrong", metadata={"field": "x"})
        if text.startswith("hang"):
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                self.ended.append(text)
                raise
        return generate_response(f"answer to {text}")

    async def _unused(self, request: Any, call: Call) -> Any:
        raise AssertionError("batching calls Generate only")

    async def StreamGenerate(self, request: Any, call: Call) -> AsyncGenerator[Any, None]:
        raise AssertionError("batching calls Generate only")
        yield

    Embed = CountTokens = ListModels = Explain = ReportOutcome = _unused


@dataclass
class Metering:
    """Knows the keys `sk-sluice-<tenant>`."""

    asked: list[str] = field(default_factory=list)

    async def Authenticate(
        self, request: metering_service_pb2.AuthenticateRequest, call: Call
    ) -> metering_service_pb2.AuthenticateResponse:
        for tenant in TENANTS:
            if request.key_sha256 == key_digest(tenant):
                self.asked.append(tenant)
                response = metering_service_pb2.AuthenticateResponse()
                response.identity.tenant_id = tenant
                response.identity.project_id = f"{tenant}-project"
                response.identity.key_id = f"{tenant}-key"
                response.identity.scopes.append("jobs")
                response.identity.allowed_models.extend(["model/a", "model/b"])
                response.identity.cache_namespace = "shop"
                response.reuse_duration.FromSeconds(30)
                return response
        raise Failure(Reason.KEY_INVALID, "no such key")

    async def _unused(self, request: Any, call: Call) -> Any:
        raise AssertionError("batching calls Authenticate only")

    AcquireLease = EndReservations = ReturnLease = Hold = VoidHold = PostSettlements = _unused


def key_digest(tenant: str) -> bytes:
    """SHA-256 of the tenant's key."""
    return hashlib.sha256(f"sk-sluice-{tenant}".encode()).digest()


class Mesh:
    """What a test sees."""

    def __init__(self, process: Process, gateway: Gateway, metering: Metering, lines: Lines) -> None:
        self.process = process
        self.gateway = gateway
        self.metering = metering
        self.lines = lines
        self._stub: Any = JobServiceStub(process.channel("batching"))

    def _who(self, tenant: str) -> Any:
        return {"timeout": 20, "metadata": (("authorization", f"Bearer sk-sluice-{tenant}"),)}

    async def submit(self, request_id: str = "r1", text: str = "hello", tenant: str = "acme", **fields: Any) -> pb2.Job:
        """Submits and returns the job."""
        request = pb2.SubmitJobRequest(request_id=request_id, request=generate_request(text), **fields)
        return (await self._stub.SubmitJob(request, **self._who(tenant))).job  # type: ignore[no-any-return]

    async def raw(self, method: str, request: Any, tenant: str = "acme") -> Any:
        """Any unary call."""
        return await getattr(self._stub, method)(request, **self._who(tenant))

    async def get(self, job_id: str, tenant: str = "acme") -> pb2.Job:
        """The job as it is."""
        return (await self.raw("GetJob", pb2.GetJobRequest(job_id=job_id), tenant)).job  # type: ignore[no-any-return]

    async def watch(self, job_id: str, tenant: str = "acme") -> list[pb2.Job]:
        """Every change that was told, until the job has ended."""
        calls = self._stub.WatchJob(pb2.WatchJobRequest(job_id=job_id), **self._who(tenant))
        return [change.job async for change in calls]

    async def ended(self, job_id: str, tenant: str = "acme") -> pb2.Job:
        """The job when it has ended; watches again when NATS goes away meanwhile."""
        async with asyncio.timeout(30):
            while True:
                try:
                    return (await self.watch(job_id, tenant))[-1]
                except Failure as failure:
                    if failure.reason is not Reason.DEPENDENCY_UNAVAILABLE:
                        raise
                    await asyncio.sleep(0.1)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for what has no event of its own."""
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.01)

    async def queue_is_empty(self) -> None:
        """Until no ticket is left, those handed out included."""
        jetstream = (await self.process.nats()).jetstream()
        async with asyncio.timeout(10):
            while (await jetstream.stream_info("SLUICE_JOBS")).state.messages:
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def mesh(url: str, *, work: bool = True, gateway: Gateway | None = None, **config: Any) -> AsyncIterator[Mesh]:
    """One process of batching. Without `work` it takes submits and runs nothing."""
    settings: dict[str, Any] = {"ack_wait": 1.0, "first_backoff": 0.1, "poll_interval": 0.05, **config}
    lines, gateway, metering = Lines(), gateway or Gateway(), Metering()
    async with Process("batching", MeshSettings(nats_url=url), log=lines) as process:
        inference = inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"]
        process.serve("gateway", [Binding(gateway, inference)])
        process.serve("metering", [Binding(metering, metering_service_pb2.DESCRIPTOR.services_by_name["MeteringService"])])
        async with open_service(Config(**settings), process) as service:
            process.serve("batching", service.bindings)
            tasks = [asyncio.create_task(worker()) for worker in (service.workers if work else service.workers[2:])]
            try:
                yield Mesh(process, gateway, metering, lines)
                assert not any(task.done() for task in tasks), "a worker ended by itself, which ends the process"
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)


async def _never_ends(url: str) -> None:
    gateway = Gateway(on_run=lambda run: print("started", run.request_id, flush=True))
    async with mesh(url, gateway=gateway):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_never_ends(sys.argv[1]))
