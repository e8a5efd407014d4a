"""A small scripted service, and servers and channels around it, on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import grpc

from services.runtime.admission import Admission
from services.runtime.authentication import Authenticator
from services.runtime.barrier import Barrier
from services.runtime.call import Call, Caller, CallerKind
from services.runtime.channels import open_channel
from services.runtime.dispatch import Binding, build_table
from services.runtime.errors import Failure, Reason
from services.runtime.grpcserver import GrpcServer
from services.runtime.inproc import InprocChannel
from services.runtime.interceptors import border_chain, inner_chain
from services.runtime.link import LinkChannel
from services.runtime.metrics import Registry
from services.runtime.settings import MeshSettings
from services.runtime.status import failure_from_rpc
from sluice.jobs.v1 import job_service_pb2
from sluice.tokenization.v1 import tokenization_service_pb2

TOKENIZATION = "sluice.tokenization.v1.TokenizationService"
JOBS = "sluice.jobs.v1.JobService"
SERVICE_TOKEN = "a-service-token-of-the-tests"
ADMIN_KEY = "an-admin-key-of-the-tests"
IDENTITY = (("x-sluice-service", "tester"), ("authorization", f"Bearer {SERVICE_TOKEN}"))
SETTINGS = MeshSettings(
    service_token=SERVICE_TOKEN,
    admin_key_sha256=hashlib.sha256(ADMIN_KEY.encode()).hexdigest(),
    max_message_bytes=1024 * 1024,
)
BUDGET = Failure(
    Reason.BUDGET_EXHAUSTED,
    "the key's budget doesn't cover it; raise it",
    metadata={"level": "key", "remaining_nano_usd": "7"},
    retry_delay=1.5,
)


class Lines:
    """A log that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, Any]]] = []

    def debug(self, event: str, **values: Any) -> None:
        self.lines.append(("debug", event, values))

    def info(self, event: str, **values: Any) -> None:
        self.lines.append(("info", event, values))

    def warning(self, event: str, **values: Any) -> None:
        self.lines.append(("warning", event, values))

    def error(self, event: str, **values: Any) -> None:
        self.lines.append(("error", event, values))

    def events(self, level: str) -> list[str]:
        return [event for got, event, _ in self.lines if got == level]


NO_BARRIER = Barrier()


@dataclass
class Script:
    """What the scripted service saw."""

    calls: list[Call] = field(default_factory=list)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    produced: int = 0


class Unsendable:
    """An answer that no transport can carry."""

    def SerializeToString(self) -> bytes:
        raise ValueError("this can't be sent")


class Tokenizer:
    """CountTexts does what its model says; the rest answers at once."""

    def __init__(self, script: Script) -> None:
        self._script = script

    async def Count(self, request: Any, call: Call) -> Any:
        return tokenization_service_pb2.CountResponse()

    async def CountTexts(self, request: Any, call: Call) -> Any:
        script = self._script
        script.calls.append(call)
        script.begun.set()
        model = request.model
        if model == "budget":
            raise BUDGET
        if model == "crash":
            raise ValueError("the inside of an engine")
        if model.startswith("sleep"):
            try:
                await asyncio.sleep(float(model.removeprefix("sleep") or 60))
            except asyncio.CancelledError:
                script.cancelled.set()
                raise
        if model == "unsendable":
            return Unsendable()
        response = tokenization_service_pb2.CountTextsResponse()
        for _ in request.texts:
            response.counts.add()
        return response

    async def Fit(self, request: Any, call: Call) -> Any:
        return tokenization_service_pb2.FitResponse(dropped_message_count=3)

    async def Calibrate(self, request: Any, call: Call) -> Any:
        self._script.calls.append(call)
        await asyncio.sleep(60)
        return tokenization_service_pb2.CalibrateResponse()

    async def ListTokenizers(self, request: Any, call: Call) -> Any:
        return tokenization_service_pb2.ListTokenizersResponse()


class Jobs:
    """WatchJob sends what its id says: `COUNT`, `COUNT:fail`, `COUNT:hang` or `COUNT:crash`."""

    def __init__(self, script: Script) -> None:
        self._script = script

    async def SubmitJob(self, request: Any, call: Call) -> Any:
        self._script.calls.append(call)
        return job_service_pb2.SubmitJobResponse()

    async def GetJob(self, request: Any, call: Call) -> Any:
        return job_service_pb2.GetJobResponse()

    async def ListJobs(self, request: Any, call: Call) -> Any:
        return job_service_pb2.ListJobsResponse()

    async def CancelJob(self, request: Any, call: Call) -> Any:
        return job_service_pb2.CancelJobResponse()

    async def RedriveJob(self, request: Any, call: Call) -> Any:
        return job_service_pb2.RedriveJobResponse()

    async def WatchJob(self, request: Any, call: Call) -> AsyncIterator[Any]:
        script = self._script
        script.calls.append(call)
        count, _, then = request.job_id.partition(":")
        for index in range(int(count)):
            script.produced += 1
            yield job_service_pb2.WatchJobResponse(job=job_service_pb2.Job(attempt_count=index))
        if then == "fail":
            # One that is raised again keeps the frames of every time.
            raise Failure(BUDGET.reason, BUDGET.message, metadata=BUDGET.metadata, retry_delay=BUDGET.retry_delay)
        if then == "crash":
            raise ValueError("the inside of an engine")
        if then == "hang":
            script.begun.set()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                script.cancelled.set()
                raise


def bindings(script: Script) -> tuple[Binding, ...]:
    """The scripted service's two parts."""
    return (
        Binding(Tokenizer(script), tokenization_service_pb2.DESCRIPTOR.services_by_name["TokenizationService"]),
        Binding(Jobs(script), job_service_pb2.DESCRIPTOR.services_by_name["JobService"]),
    )


@dataclass
class Running:
    """A server that runs."""

    server: GrpcServer
    address: str
    script: Script
    log: Lines
    registry: Registry


@contextlib.asynccontextmanager
async def serve(
    settings: MeshSettings = SETTINGS,
    *,
    port: int = 0,
    serving: bool = True,
    limit: int = 1000,
    replica_id: str = "tokenization-1",
    barrier: Callable[[], None] = NO_BARRIER,
) -> AsyncIterator[Running]:
    """A gRPC server with the scripted service."""
    script, log, registry = Script(), Lines(), Registry()
    authenticator = Authenticator(settings.service_token, settings.admin_key_sha256)
    chain = border_chain(log=log, registry=registry, authenticator=authenticator, slow_seconds=5.0)
    table = build_table(bindings(script), chain)
    names = ("tokenization", TOKENIZATION, JOBS)
    server = GrpcServer(
        settings,
        table,
        names,
        authenticator=authenticator,
        admission=Admission(limit),
        replica_id=replica_id,
        barrier=barrier,
        log=log,
    )
    address = await server.start(port)
    await server.set_serving(serving)
    try:
        yield Running(server, address, script, log, registry)
    finally:
        await server.stop(0)


def inproc(script: Script, log: Lines, registry: Registry) -> InprocChannel:
    """A channel to the scripted service in this process."""
    table = build_table(bindings(script), inner_chain(log=log, registry=registry, slow_seconds=5.0))
    return InprocChannel(lambda: table, Caller(CallerKind.SERVICE, "tester"))


def link(address: str, log: Lines, identity: tuple[tuple[str, str], ...] = IDENTITY) -> LinkChannel:
    """A link channel to the scripted service, to be entered."""
    return LinkChannel("tokenization", (address,), identity=identity, max_message_bytes=1024 * 1024, log=log)


class FailingGrpc:
    """A plain gRPC channel whose errors are raised as Failure, so that tests can treat the three transports alike."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    def unary_unary(self, method: str, *arguments: Any, **named: Any) -> Any:
        inner: Any = self._channel.unary_unary(method, *arguments, **named)

        async def call(request: Any, *, metadata: Any = (), **options: Any) -> Any:
            try:
                return await inner(request, metadata=(*IDENTITY, *metadata), **options)
            except grpc.aio.AioRpcError as error:
                raise failure_from_rpc(error, "tokenization") from None

        return call

    def unary_stream(self, method: str, *arguments: Any, **named: Any) -> Any:
        inner: Any = self._channel.unary_stream(method, *arguments, **named)

        async def call(request: Any, *, metadata: Any = (), **options: Any) -> Any:
            replies = inner(request, metadata=(*IDENTITY, *metadata), **options)
            try:
                async for reply in replies:
                    yield reply
            except grpc.aio.AioRpcError as error:
                raise failure_from_rpc(error, "tokenization") from None
            finally:
                replies.cancel()

        return call


@dataclass
class Transport:
    """A channel to the scripted service over one of the transports."""

    name: str
    channel: grpc.aio.Channel
    script: Script
    log: Lines
    registry: Registry


@contextlib.asynccontextmanager
async def transport(name: str, barrier: Callable[[], None] = NO_BARRIER) -> AsyncIterator[Transport]:
    """`inproc`, `link` or `grpc`."""
    if name == "inproc":
        script, log, registry = Script(), Lines(), Registry()
        yield Transport(name, cast(Any, inproc(script, log, registry)), script, log, registry)
        return
    async with serve(barrier=barrier) as running:
        if name == "link":
            async with link(running.address, running.log) as channel:
                yield Transport(name, cast(Any, channel), running.script, running.log, running.registry)
        else:
            async with open_channel([running.address], [TOKENIZATION, JOBS], health_service="tokenization") as plain:
                yield Transport(name, cast(Any, FailingGrpc(plain)), running.script, running.log, running.registry)


async def eventually(check: Any, seconds: float = 5.0) -> None:
    """Waits until `check()` is true."""
    async with asyncio.timeout(seconds):
        while not check():
            await asyncio.sleep(0.01)


def parts(failure: Failure) -> tuple[Reason, str, Mapping[str, str], float | None]:
    """What two equal failures have equal."""
    return failure.reason, failure.message, dict(failure.metadata), failure.retry_delay
