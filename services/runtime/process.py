"""What a service is given and what it gives back: the seam between a service's `app.py` and the process that runs it."""

from __future__ import annotations

import asyncio
import contextlib
import types
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import grpc
from nats.aio.client import Client as NatsClient

from services.runtime.barrier import Barrier
from services.runtime.call import Caller, CallerKind
from services.runtime.dispatch import Binding, Interceptor, Method, Table, build_table
from services.runtime.errors import unavailable
from services.runtime.inproc import InprocChannel
from services.runtime.interceptors import inner_chain
from services.runtime.link import LinkChannel
from services.runtime.logs import Redactor, RequestLog
from services.runtime.metrics import Registry
from services.runtime.settings import MeshSettings
from services.runtime.telemetry import Telemetry

_NATS_WAIT_SECONDS: Final = 2.0
_NO_ADDRESSES: Final[Mapping[str, str]] = types.MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Service:
    """A service that is open: what `open_service` yields."""

    name: str
    """`routing`."""
    bindings: tuple[Binding, ...]
    """What it serves."""
    pings: Mapping[str, Callable[[], Awaitable[None]]]
    """Readiness: each returns when a needed dependency is there and raises when it isn't. Called every few seconds, bounded."""
    workers: tuple[Callable[[], Coroutine[Any, Any, None]], ...] = ()
    """Run from the start to the stop of the process, then cancelled. One that raises ends the process."""
    drain: Callable[[], Awaitable[None]] | None = None
    """Called at SIGTERM when clients have turned away and before transports stop: finish what runs, flush what is held."""
    addresses: Mapping[str, str] = field(default_factory=lambda: _NO_ADDRESSES)
    """Further addresses to report, say the gateway's `{"http": "http://127.0.0.1:8080"}`."""


class Process:
    """One per OS process; in the compact topology shared by all services. An async context manager."""

    def __init__(
        self,
        name: str,
        settings: MeshSettings,
        *,
        log: Any,
        metrics: Registry | None = None,
        redact: Redactor | None = None,
        hosts: Iterable[str] = (),
    ) -> None:
        """`hosts` are the services that live here or will, so that calls to them never leave the process."""
        self.name = name
        incarnation = uuid.uuid4().hex[:12]
        self.replica_id = f"{settings.replica}.{incarnation}" if settings.replica else f"{name}-{incarnation}"
        """Unique per start; the part before the last dot, if there is one, is the same after a restart."""
        self.settings = settings
        self.log = log
        self.metrics = Registry() if metrics is None else metrics
        self.redact = Redactor() if redact is None else redact
        self.telemetry = Telemetry(settings.otlp_endpoint, name, self.replica_id, settings.trace_ratio)
        self.barrier = Barrier()
        """To be passed before anything leaves the process."""
        self._methods: dict[str, Method] = {}
        self._table = Table(())
        self._served = set(hosts)
        self._links: dict[str, LinkChannel] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._nats: NatsClient | None = None
        self._nats_up: asyncio.Event | None = None
        self._request_log: RequestLog | None = None

    async def __aenter__(self) -> Process:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        client = self._nats
        if client is not None:
            # Drain waits for pending publishes and subscriptions; a server that is gone must not hold us.
            with contextlib.suppress(Exception):
                async with asyncio.timeout(_NATS_WAIT_SECONDS):
                    await (client.drain() if client.is_connected else client.close())
        if self._request_log is not None:
            await asyncio.to_thread(self._request_log.close)
        await asyncio.to_thread(self.telemetry.close)

    def serve(self, service: str, bindings: Iterable[Binding]) -> None:
        """Makes `service` callable through `channel` within this process. For the bootstrap and tests."""
        chain: tuple[Interceptor, ...] = inner_chain(
            log=self.log,
            registry=self.metrics,
            slow_seconds=self.settings.slow_call,
            trace=self.telemetry.stage(),
        )
        self._methods.update(build_table(bindings, chain))
        self._table = Table(self._methods.values())
        self._served.add(service)

    def channel(self, service: str) -> grpc.aio.Channel:
        """A channel to `service`, for generated stubs; the same object at every call.

        In-process when the service lives here or no peer of that name is configured, else links to `settings.peers[service]`.
        """
        endpoints = self.settings.peers.get(service, ())
        if service in self._served or not endpoints:
            # Typed as what generated stubs expect; of a channel they only use the two methods that ours have.
            return cast(grpc.aio.Channel, InprocChannel(lambda: self._table, Caller(CallerKind.SERVICE, self.name)))
        return cast(grpc.aio.Channel, self._linked(service, endpoints))

    def replicas(self, service: str) -> LinkChannel | None:
        """A channel to the processes of `service`, this one included, for who needs a certain one of them; the same at every call.

        None where no peer of that name is configured: this process is the only one.
        """
        endpoints = self.settings.peers.get(service, ())
        return self._linked(service, endpoints) if endpoints else None

    def _linked(self, service: str, endpoints: Sequence[str]) -> LinkChannel:
        channel = self._links.get(service)
        if channel is None:
            channel = self._links[service] = LinkChannel(
                service,
                endpoints,
                identity=self.identity,
                max_message_bytes=self.settings.max_message_bytes,
                log=self.log,
            )
            self._own(channel.run(), f"links to {service}")
        return channel

    @property
    def identity(self) -> tuple[tuple[str, str], ...]:
        """The metadata by which this process proves to be of the mesh."""
        token = self.settings.service_token
        named = ("x-sluice-service", self.name)
        return (named, ("authorization", f"Bearer {token}")) if token else (named,)

    async def nats(self) -> NatsClient:
        """The shared NATS client, connected at the first call and reconnecting for ever.

        Raises Failure DEPENDENCY_UNAVAILABLE when it isn't connected within 2 s. A client got once stays usable across outages.
        """
        up = self._nats_up
        if up is None:
            up = self._nats_up = asyncio.Event()
            self._own(self._connect_nats(up), "nats")
        if not up.is_set():
            try:
                async with asyncio.timeout(_NATS_WAIT_SECONDS):
                    await up.wait()
            except TimeoutError:
                raise unavailable("nats", "NATS can't be reached; check mesh.nats_url and that the server runs") from None
        assert self._nats is not None
        return self._nats

    def state_dir(self, service: str) -> Path:
        """The directory for what `service` keeps; made if it isn't there, for this user alone."""
        path = self.settings.state_dir / service
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path

    def request_log(self) -> RequestLog:
        """The log of one line per request, on standard output."""
        if self._request_log is None:
            dropped = self.metrics.counter("request_log_dropped", "Request log lines dropped because writing was too slow.")
            self._request_log = RequestLog(self.redact, dropped)
        return self._request_log

    def _own(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.log.error("background task ended", task=task.get_name(), exc_info=error)

    async def _connect_nats(self, up: asyncio.Event) -> None:
        connected = self.metrics.gauge("nats_connected", "1 while NATS is connected.")
        last = ""

        # nats-py wants coroutine functions as callbacks.
        async def on_error(error: Exception) -> None:
            nonlocal last
            text = type(error).__name__
            if text != last:
                last = text
                self.log.warning("nats error", error=text, message=str(error)[:200])

        async def on_disconnect() -> None:
            if up.is_set():
                self.log.warning("nats disconnected")
            up.clear()
            connected.set(0)

        async def on_connect() -> None:
            nonlocal last
            last = ""
            up.set()
            connected.set(1)
            self.log.info("nats connected")

        # Typed as whole seconds by nats-py, which takes any.
        options: dict[str, Any] = {"reconnect_time_wait": 0.5}
        if self.settings.nats_credentials is not None:
            options["user_credentials"] = str(self.settings.nats_credentials)
        client = _NatsClient(self.barrier)
        await client.connect(
            servers=[server.strip() for server in self.settings.nats_url.split(",")],
            name=self.replica_id,
            # Without these nats-py gives up after two minutes, and notices a dead server after four.
            max_reconnect_attempts=-1,
            ping_interval=10,
            max_outstanding_pings=2,
            connect_timeout=2,
            error_cb=on_error,
            disconnected_cb=on_disconnect,
            reconnected_cb=on_connect,
            **options,
        )
        self._nats = client
        await on_connect()


class _NatsClient(NatsClient):
    """A client whose messages pass the barrier: each way of its library to send one goes through `publish`."""

    def __init__(self, barrier: Barrier) -> None:
        super().__init__()
        self._barrier = barrier

    async def publish(self, subject: str, payload: bytes = b"", reply: str = "", headers: dict[str, str] | None = None) -> None:
        """See the library's."""
        self._barrier()
        await super().publish(subject, payload, reply, headers)
