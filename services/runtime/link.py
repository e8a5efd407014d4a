"""The calling side of links: many calls to another process on one long-lived gRPC stream, `sluice.link.v1`.

Everything that becomes ready in one turn of the event loop travels in one message, so that the price of a gRPC message is
shared. Generated stubs take a `LinkChannel` like any channel; it keeps one link to every endpoint of a service and goes
round those that are SERVING.

Errors are raised as `Failure`. A call whose link is lost fails with DEPENDENCY_UNAVAILABLE, unless the method is idempotent
(`retries.py`) or the other side is known not to have begun it: then it is sent once more, over another link where there is one.
"""

from __future__ import annotations

import asyncio
import collections
import ipaddress
import random
import socket
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.runtime.call import DEFAULT_TIMEOUT_SECONDS, Metadata
from services.runtime.errors import Failure, NotSent, Reason, deadline_exceeded, unavailable
from services.runtime.frames import MAX_OUTBOX_BYTES, REPLICA_KEY, Outbox, link_options
from services.runtime.inproc import MetadataLike
from services.runtime.interceptors import Log
from services.runtime.retries import is_idempotent
from services.runtime.status import failure_from_rpc, failure_from_status
from sluice.link.v1 import link_service_pb2, link_service_pb2_grpc

_CREDIT_STEP: Final = 32
_MAX_OPEN_CALLS: Final = 4096
_OPEN_SECONDS: Final = 2.0
_FIRST_BACKOFF: Final = 0.05
_LONGEST_BACKOFF: Final = 1.0
_STEADY_SECONDS: Final = 5.0
"""A link that lived this long has proved its endpoint: the next dial comes at once."""
_RESOLVE_SECONDS: Final = 5.0
_WAIT_READY_SECONDS: Final = 0.5
_SUSPECT_SECONDS: Final = 2.0
_SILENCE_SECONDS: Final = 0.5


class _LinkLostError(Exception):
    """The link broke while the call was open."""


class _Unary:
    """An open unary call, seen from the calling side."""

    __slots__ = ("future",)

    def __init__(self, future: asyncio.Future[bytes]) -> None:
        self.future = future

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class _Stream:
    """An open streaming call, seen from the calling side."""

    __slots__ = ("ended", "error", "items", "waiter")

    def __init__(self) -> None:
        self.items: collections.deque[bytes] = collections.deque()
        self.ended = False
        self.error: Exception | None = None
        self.waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        waiter = self.waiter
        if waiter is not None:
            self.waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def fail(self, error: Exception) -> None:
        self.error = error
        self.ended = True
        self.wake()


class _Link:
    """The calling side of one link: to one endpoint, dialled again whenever it is lost."""

    def __init__(
        self,
        service: str,
        endpoint: str,
        identity: Metadata,
        options: Sequence[tuple[str, int]],
        on_change: Callable[[], None],
    ) -> None:
        self._service = service
        self.endpoint = endpoint
        self._identity = identity
        self._options = options
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._outbox = Outbox(link_service_pb2.ExchangeRequest)
        self._open: dict[int, _Unary | _Stream] = {}
        self._next_id = 0
        self._connected = False
        self._serving = False
        self._received = 0.0
        self.suspect_until = 0.0
        self.replica_id = ""
        """What the process at the other end calls itself; another after each of its starts."""

    @property
    def ready(self) -> bool:
        """Whether calls may be sent."""
        return self._connected and self._serving

    async def run(self, log: Log) -> None:
        """Keeps the link, until cancelled."""
        backoff = _FIRST_BACKOFF
        reported = False
        while True:
            began = self._loop.time()
            try:
                await self._session()
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                # Not ours: gRPC raises it where a call was cancelled from within.
                log.warning("link lost", service=self._service, endpoint=self.endpoint, reason="cancelled by gRPC")
            # Whatever ends a session mustn't end the link: without it every call fails until the process is started again. gRPC raises
            # InvalidStateError, for one, where the writer finds the call over before the reader does.
            except Exception as error:  # noqa: BLE001
                failure = error if isinstance(error, Failure) else None
                if isinstance(error, grpc.aio.AioRpcError):
                    failure = failure_from_rpc(error, self._service)
                if not reported:
                    log.warning(
                        "link lost",
                        service=self._service,
                        endpoint=self.endpoint,
                        reason=failure.reason.value if failure is not None else type(error).__name__,
                        message=failure.message if failure is not None else "",
                    )
                    reported = True
            if self._loop.time() - began > _STEADY_SECONDS:
                backoff = _FIRST_BACKOFF
                reported = False
            await asyncio.sleep(backoff * random.uniform(0.7, 1.3))  # noqa: S311  # spreads dials; nothing secret
            backoff = min(backoff * 2, _LONGEST_BACKOFF)

    async def _session(self) -> None:
        async with grpc.aio.insecure_channel(self.endpoint, options=self._options) as channel:
            stub: Any = link_service_pb2_grpc.LinkServiceStub(channel)
            exchange = stub.Exchange(metadata=self._identity)
            tasks: list[asyncio.Task[None]] = []
            try:
                async with asyncio.timeout(_OPEN_SECONDS):
                    greeting = await exchange.initial_metadata()
                if exchange.done():
                    # A refusal ends the call before it began.
                    await exchange.read()
                self._outbox = Outbox(link_service_pb2.ExchangeRequest)
                self.replica_id = next((str(value) for key, value in greeting or () if key == REPLICA_KEY), "")
                self._connected = True
                self.suspect_until = 0.0
                tasks = [
                    asyncio.create_task(self._read(exchange)),
                    asyncio.create_task(self._outbox.write_to(exchange.write)),
                    asyncio.create_task(self._watch(channel)),
                ]
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                self._connected = self._serving = False
                self._on_change()
                lost, self._open = self._open, {}
                for pending in lost.values():
                    pending.fail(_LinkLostError())
                exchange.cancel()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self, channel: grpc.aio.Channel) -> None:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        async for answer in stub.Watch(health_pb2.HealthCheckRequest(service=self._service)):
            self._serving = answer.status == health_pb2.HealthCheckResponse.SERVING
            self._on_change()

    async def _read(self, exchange: Any) -> None:
        opened = self._open
        while True:
            response = await exchange.read()
            if response is grpc.aio.EOF:
                return
            self._received = self._loop.time()
            self.suspect_until = 0.0
            for frame in response.frames:
                call_id = frame.call_id
                kind = frame.WhichOneof("kind")
                if kind == "item":
                    pending = opened.get(call_id)
                    if type(pending) is _Stream:
                        pending.items.append(frame.item)
                        if pending.waiter is not None:
                            pending.wake()
                    continue
                pending = opened.pop(call_id, None)
                if pending is None:
                    continue
                if kind == "unary" and type(pending) is _Unary:
                    if not pending.future.done():
                        pending.future.set_result(frame.unary)
                elif kind == "end" and type(pending) is _Stream and frame.end.code == 0:
                    pending.ended = True
                    pending.wake()
                elif kind == "end" and frame.end.code != 0:
                    pending.fail(failure_from_status(frame.end))
                else:
                    pending.fail(Failure(Reason.INTERNAL, f"{self._service} answered in a way that its contract doesn't allow"))

    def start(self, pending: _Unary | _Stream, path: str, data: bytes, timeout: float, metadata: MetadataLike | None) -> int:
        """Sends the call; returns its id. Raises Failure OVERLOADED when too much is open or unsent."""
        outbox = self._outbox
        if len(self._open) >= _MAX_OPEN_CALLS or outbox.byte_count > MAX_OUTBOX_BYTES:
            raise Failure(Reason.OVERLOADED, f"too many calls to {self._service} are under way", retry_delay=0.2)
        self._next_id = call_id = self._next_id + 1
        self._open[call_id] = pending
        frame = outbox.add(len(data) + 64)
        frame.call_id = call_id
        opened = frame.open
        opened.method = path
        opened.request = data
        opened.timeout_micros = max(1, int(timeout * 1e6))
        if metadata:
            opened.metadata.extend([text for pair in metadata for text in pair])
        return call_id

    def cancel(self, call_id: int) -> None:
        """Ends the call from this side; nothing happens when it has ended."""
        if self._open.pop(call_id, None) is not None:
            frame = self._outbox.add(16)
            frame.call_id = call_id
            frame.cancel.SetInParent()

    def expire(self, call_id: int, sent: float) -> None:
        """Ends a call whose deadline has passed; suspects the link when nothing at all has come since it was sent."""
        pending = self._open.get(call_id)
        if pending is None:
            return
        self.cancel(call_id)
        now = self._loop.time()
        if self._received < sent and now - sent > _SILENCE_SECONDS:
            self.suspect_until = now + _SUSPECT_SECONDS
        pending.fail(deadline_exceeded(self._service))

    def credit(self, call_id: int, count: int) -> None:
        """Lets the other side send `count` more replies."""
        if call_id in self._open:
            frame = self._outbox.add(16)
            frame.call_id = call_id
            frame.credit.message_count = count


class _Caller(ABC):
    """The calls of a channel, each over the link that `_pick` gives."""

    _service: str
    _max_message_bytes: int

    @abstractmethod
    def _pick(self) -> _Link | None:
        """A link that takes calls now; None: there is none."""

    @abstractmethod
    async def _available(self, deadline: float, *, sent: bool) -> _Link:
        """A link that takes calls, waiting for one if that may help. Raises NotSent, or Failure when the call was `sent` before."""

    def _late(self, *, sent: bool) -> Failure:
        failure = deadline_exceeded(self._service)
        return failure if sent else NotSent.of(failure)

    def _serialised(self, request: Any) -> bytes:
        data: bytes = request.SerializeToString()
        if len(data) > self._max_message_bytes:
            raise Failure(
                Reason.REQUEST_TOO_LARGE,
                f"the request to {self._service} has {len(data)} bytes, more than {self._max_message_bytes}",
                metadata={"limit_bytes": str(self._max_message_bytes)},
            )
        return data

    def unary_unary(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Callable[..., Awaitable[Any]]:
        """The multi-callable of a unary method: `await callable(request, timeout=…, metadata=…)`."""
        idempotent = is_idempotent(method)
        parse = response_deserializer

        async def call(request: Any, *, timeout: float | None = None, metadata: MetadataLike | None = None, **_: Any) -> Any:
            loop = asyncio.get_running_loop()
            now = loop.time()
            deadline = now + (DEFAULT_TIMEOUT_SECONDS if timeout is None else timeout)
            data = self._serialised(request)
            retried = sent = False
            while True:
                link = self._pick() or await self._available(deadline, sent=sent)
                now = loop.time()
                if deadline <= now:
                    raise self._late(sent=sent)
                future: asyncio.Future[bytes] = loop.create_future()
                call_id = link.start(_Unary(future), method, data, deadline - now, metadata)
                timer = loop.call_at(deadline, link.expire, call_id, now)
                try:
                    return parse(await future)
                except _LinkLostError:
                    if not idempotent or retried:
                        raise unavailable(
                            self._service, f"the connection to {self._service} was lost during the call"
                        ) from None
                    sent = True
                except Failure as failure:
                    # A replica that drains hasn't begun the call.
                    if failure.reason is not Reason.DRAINING or retried:
                        raise
                except asyncio.CancelledError:
                    link.cancel(call_id)
                    raise
                finally:
                    timer.cancel()
                retried = True

        return call

    def unary_stream(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Callable[..., AsyncIterator[Any]]:
        """The multi-callable of a server-streaming method; its iterator must be read to the end or closed."""
        parse = response_deserializer

        async def call(
            request: Any, *, timeout: float | None = None, metadata: MetadataLike | None = None, **_: Any
        ) -> AsyncIterator[Any]:
            loop = asyncio.get_running_loop()
            deadline = loop.time() + (DEFAULT_TIMEOUT_SECONDS if timeout is None else timeout)
            data = self._serialised(request)
            retried = False
            while True:
                link = self._pick() or await self._available(deadline, sent=False)
                now = loop.time()
                if deadline <= now:
                    raise self._late(sent=False)
                pending = _Stream()
                call_id = link.start(pending, method, data, deadline - now, metadata)
                timer = loop.call_at(deadline, link.expire, call_id, now)
                items = pending.items
                taken = 0
                try:
                    while True:
                        while items:
                            yield parse(items.popleft())
                            taken += 1
                            if taken % _CREDIT_STEP == 0:
                                link.credit(call_id, _CREDIT_STEP)
                        if pending.ended:
                            break
                        pending.waiter = loop.create_future()
                        await pending.waiter
                finally:
                    timer.cancel()
                    link.cancel(call_id)
                error = pending.error
                if error is None:
                    return
                if isinstance(error, _LinkLostError):
                    raise unavailable(self._service, f"the connection to {self._service} was lost during the call") from None
                if not (isinstance(error, Failure) and error.reason is Reason.DRAINING and not taken) or retried:
                    raise error
                retried = True

        return call


@dataclass(frozen=True, slots=True)
class Replica:
    """A process behind a channel that takes calls now."""

    endpoint: str
    """Address, the same after a restart."""
    replica_id: str
    """What it calls itself."""


class LinkChannel(_Caller):
    """A channel to a service of another process. Runs inside `async with`, or as long as `run` runs."""

    def __init__(
        self,
        service: str,
        endpoints: Iterable[str],
        *,
        identity: Metadata = (),
        max_message_bytes: int = 16 * 1024 * 1024,
        log: Log,
    ) -> None:
        self._service = service
        self._endpoints = tuple(endpoints)
        self._identity = identity
        self._options = link_options(max_message_bytes)
        self._max_message_bytes = max_message_bytes
        self._log = log
        self._links: dict[str, tuple[_Link, asyncio.Task[None]]] = {}
        self._ready: list[_Link] = []
        self._turn = 0
        self._waiters: set[asyncio.Future[None]] = set()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> LinkChannel:
        self._task = asyncio.create_task(self.run(), name=f"links to {self._service}")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def run(self) -> None:
        """Keeps a link to every address of every endpoint, until cancelled."""
        try:
            while True:
                addresses = await _resolve(self._endpoints)
                for address in [known for known in self._links if addresses and known not in addresses]:
                    _, task = self._links.pop(address)
                    task.cancel()
                for address in addresses:
                    if address not in self._links or self._links[address][1].done():
                        link = _Link(self._service, address, self._identity, self._options, self._changed)
                        self._links[address] = (link, asyncio.create_task(link.run(self._log), name=f"link to {address}"))
                self._changed()
                await asyncio.sleep(_RESOLVE_SECONDS)
        finally:
            tasks = [task for _, task in self._links.values()]
            self._links.clear()
            self._changed()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def ready_endpoints(self) -> tuple[str, ...]:
        """Addresses that take calls now."""
        return tuple(link.endpoint for link in self._ready)

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """Processes that take calls now."""
        return tuple(Replica(link.endpoint, link.replica_id) for link in self._ready)

    def only(self, endpoint: str) -> OneLink:
        """A channel to the process at one address alone; its calls fail at once while that takes none."""
        return OneLink(self._service, self._max_message_bytes, lambda: self._ready_at(endpoint))

    def _ready_at(self, endpoint: str) -> _Link | None:
        for link in self._ready:
            if link.endpoint == endpoint:
                return link
        return None

    def _changed(self) -> None:
        self._ready = [link for link, _ in self._links.values() if link.ready]
        if self._ready:
            waiters, self._waiters = self._waiters, set()
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    def _pick(self) -> _Link | None:
        ready = self._ready
        count = len(ready)
        if count == 1:
            return ready[0]
        if not count:
            return None
        self._turn += 1
        link = ready[self._turn % count]
        if link.suspect_until:
            now = asyncio.get_running_loop().time()
            for offset in range(1, count):
                if link.suspect_until < now:
                    break
                link = ready[(self._turn + offset) % count]
        return link

    async def _available(self, deadline: float, *, sent: bool) -> _Link:
        """A link that takes calls; waits a moment for one, since replicas are restarted quickly."""
        loop = asyncio.get_running_loop()
        limit = min(deadline, loop.time() + _WAIT_READY_SECONDS)
        while (link := self._pick()) is None:
            waiter: asyncio.Future[None] = loop.create_future()
            self._waiters.add(waiter)
            try:
                async with asyncio.timeout_at(limit):
                    await waiter
            except TimeoutError:
                if loop.time() >= deadline:
                    raise self._late(sent=sent) from None
                failure = unavailable(self._service, f"no replica of {self._service} can be reached")
                raise (failure if sent else NotSent.of(failure)) from None
            finally:
                self._waiters.discard(waiter)
        return link


class OneLink(_Caller):
    """A channel to one process of a service."""

    def __init__(self, service: str, max_message_bytes: int, find: Callable[[], _Link | None]) -> None:
        self._service = service
        self._max_message_bytes = max_message_bytes
        self._find = find

    def _pick(self) -> _Link | None:
        return self._find()

    async def _available(self, deadline: float, *, sent: bool) -> _Link:
        failure = unavailable(self._service, f"the replica of {self._service} that was asked for can't be reached")
        raise failure if sent else NotSent.of(failure)


async def _resolve(endpoints: Iterable[str]) -> list[str]:
    """Every address behind `endpoints`. A name that can't be resolved now stands for nothing."""
    loop = asyncio.get_running_loop()
    addresses: dict[str, None] = {}
    for endpoint in endpoints:
        host, _, port = endpoint.rpartition(":")
        host = host.strip("[]")
        try:
            ipaddress.ip_address(host)
        except ValueError:
            pass
        else:
            addresses[endpoint] = None
            continue
        try:
            async with asyncio.timeout(_OPEN_SECONDS):
                rows = await loop.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
        except (OSError, TimeoutError):
            continue
        for family, _, _, _, address in rows:
            text = str(address[0])
            addresses[f"[{text}]:{port}" if family == socket.AF_INET6 else f"{text}:{port}"] = None
    return list(addresses)
