"""Calls between processes: late, lost, doubled, cut off.

It behaves as the links of the mesh do (`services.runtime.link`): a broken connection fails the calls that are open on it, methods whose
contract says that they are idempotent are then sent once more, a call whose caller has gone is cancelled. Requests and replies of
different calls overtake each other. What was sent again may be carried out twice, the first time last.
"""

from __future__ import annotations

import asyncio
import enum
import re
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from services.runtime.call import Call, Caller, CallerKind
from services.runtime.dispatch import Binding, Method, Table, build_table
from services.runtime.errors import Failure, NotSent, deadline_exceeded, unavailable
from services.runtime.inproc import BoundedStream
from services.runtime.interceptors import Chain, Deadline, ErrorMapping, Messages, RequestId
from services.runtime.retries import is_idempotent
from services.runtime.status import failure_from_status, status_from_failure
from tests.simulation.universe import Killed, Loop, Universe

_WAIT_READY = 0.5
"""Seconds that a call waits for a replica to come up; as the links do."""
_DEFAULT_TIMEOUT = 60.0
Metadata = Iterable[tuple[str, str]]


class Fate(enum.Enum):
    """What the network does to a call."""

    ARRIVES = "arrives"
    LOST = "lost"
    """The request never arrives; the caller sees a broken connection."""
    SILENT = "silent"
    """The request never arrives, and nothing tells the caller."""
    BROKEN = "broken"
    """The connection breaks while the call is under way."""
    MUTE = "mute"
    """The answer never arrives, and nothing tells the caller."""
    TWICE = "twice"
    """The request arrives a second time, later; for methods that may be repeated."""
    SLOW = "slow"
    """The request, or the answer, takes seconds."""


_TROUBLES = tuple(fate for fate in Fate if fate is not Fate.ARRIVES)


_OPERATION: Final = re.compile(rb"[0-9A-HJKMNP-TV-Z]{26}")


class _LinkLost(Exception):
    """The connection broke before the call ended."""


class Log:
    """What a process's interceptors log: an unexpected error is one of the product's."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def debug(self, event: str, **values: Any) -> None:
        """Nothing is kept."""

    def warning(self, event: str, **values: Any) -> None:
        """Nothing is kept."""

    def error(self, event: str, **values: Any) -> None:
        """A fault of ours, unless the process was just killed."""
        info = values.get("exc_info")
        if self._loop.alive and not (isinstance(info, tuple) and isinstance(info[1], Killed)):
            self._loop.universe.complain(f"{self._loop.name}: {event}: {values!r}")


@dataclass(eq=False, slots=True)
class Node:
    """One process: its loop, what it serves, and which calls it takes part in."""

    name: str
    service: str
    """Its kind: `gateway`, `execution`, `metering`, `peers`, `callers`."""
    loop: Loop
    barrier: Callable[[], None] = lambda: None
    table: Table = field(default_factory=lambda: Table(()))
    serving: bool = False
    exchanges: dict[_Exchange, None] = field(default_factory=dict)

    def serve(self, bindings: Iterable[Binding]) -> None:
        """Takes calls from now on."""
        chain = Chain([RequestId(), Deadline()], ErrorMapping(Log(self.loop)))
        self.table = build_table(bindings, (chain, Messages()))
        self.serving = True


@dataclass(slots=True)
class Network:
    """All connections."""

    universe: Universe
    trouble: float = 0.0
    """Probability that a call meets with something."""
    reliable: frozenset[str] = frozenset()
    """Services that are always reached."""
    nodes: list[Node] = field(default_factory=list)
    count: int = 0
    watch: Callable[[Node, str, Any, bool], None] = lambda *_: None
    """Is told of each call when it is sent (False) and of each unary one when its answer has come (True): client, method, request."""
    again: Callable[[str, bytes], None] = lambda *_: None
    """Is told of each request that arrives a second time: method, request."""

    def pick(self, service: str) -> Node | None:
        """A process that serves."""
        ready = [node for node in self.nodes if node.service == service and node.serving]
        return ready[int(self.universe.rng.random() * len(ready))] if ready else None

    def fate(self, service: str, method: str, *, streaming: bool) -> Fate:
        """What becomes of a call."""
        if service in self.reliable or not self.universe.may(self.trouble):
            return Fate.ARRIVES
        fate = self.universe.rng.choice(_TROUBLES)
        if fate is Fate.TWICE and (streaming or not is_idempotent(method)):
            return Fate.BROKEN
        return fate

    def died(self, node: Node) -> None:
        """A process is gone. Who was connected with it finds out, mostly."""
        self.nodes.remove(node)
        for exchange in list(node.exchanges):
            other = exchange.client if exchange.server is node else exchange.server
            if not other.loop.alive:
                continue
            if exchange.server is not node:
                other.loop.call_later(self.universe.pause(), exchange.hang_up)
                continue
            if self.universe.may(0.9):
                other.loop.call_later(self.universe.pause(), exchange.broke)


class _Exchange:
    """One call on its way, there and back."""

    def __init__(
        self, network: Network, client: Node, server: Node, method: str, data: bytes, timeout: float, metadata: Metadata
    ) -> None:
        self.network = network
        self.client = client
        self.server = server
        self.method = method
        self.data = data
        self.timeout = timeout
        self.metadata = dict(metadata)
        self.number = network.count = network.count + 1
        found = _OPERATION.search(data)
        self.about = f" {found[0].decode()}" if found is not None else ""
        self.fate = Fate.ARRIVES
        self.open = True
        """The caller still waits."""
        self.items: deque[bytes] = deque()
        self.result: bytes | None = None
        self.error: BaseException | None = None
        self.ended = False
        self.waiter: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._hung_up = False
        self._call: Call | None = None
        self._there = self._back = 0.0
        client.exchanges[self] = None
        server.exchanges[self] = None

    def __repr__(self) -> str:
        return f"{self.client.name} -> {self.server.name} {self.method.rpartition('/')[2]} [{self.number}]{self.about}"

    # The caller's side.

    def send(self, *, streaming: bool) -> None:
        """Puts the request on its way."""
        network, universe, loop = self.network, self.network.universe, self.client.loop
        loop.check()
        self.fate = fate = network.fate(self.server.service, self.method, streaming=streaming)
        universe.log(f"{self!r}{'' if fate is Fate.ARRIVES else ' ' + fate.value}")
        delay = universe.pause()
        if fate is Fate.SILENT:
            return
        if fate is Fate.LOST:
            loop.call_later(delay, self.broke)
            return
        if fate is Fate.SLOW:
            delay += 5.0 * universe.rng.random() ** 3
        self._to_server(delay, self._arrive)
        if fate is Fate.BROKEN:
            later = delay + universe.pause() + universe.rng.random() ** 4
            loop.call_later(later, self.broke)
            self.server.loop.call_later(later + universe.pause(), self.hang_up)
        if fate is Fate.TWICE:
            later = delay + 3.0 * universe.rng.random() ** 2
            # Whoever carries it doesn't belong to either: both may have gone by then.
            universe_loop = next(node.loop for node in network.nodes if node.service == "callers")
            universe_loop.call_later(later, self._again)

    def _again(self) -> None:
        server = self.network.pick(self.server.service)
        if server is not None:
            copy = _Exchange(self.network, self.client, server, self.method, self.data, self.timeout, self.metadata.items())
            copy.open = False
            self.network.universe.log(f"{copy!r} again")
            copy._to_server(0.0, copy._arrive)
            self.network.again(self.method, self.data)

    def _to_server(self, delay: float, callback: Callable[[], None]) -> None:
        # What is sent on one call arrives in order.
        self._there = max(self._there, self.network.universe.now + delay)
        self.server.loop.call_at(self._there, callback)

    def cancel(self) -> None:
        """The caller no longer waits."""
        if self.open:
            self.open = False
            self.client.exchanges.pop(self, None)
            if self.client.loop.alive:
                self._to_server(self.network.universe.pause(), self.called_off)

    def expire(self) -> None:
        """The call's time is over, on the caller's clock."""
        if self.open and not self.ended and self.error is None:
            self.fail(deadline_exceeded(self.server.service))
            self.cancel()

    def broke(self) -> None:
        """The caller sees that the connection is gone."""
        if self.open:
            self.fail(_LinkLost())
            self.open = False
            self.client.exchanges.pop(self, None)

    def fail(self, error: BaseException) -> None:
        """Ends the call, on the caller's side."""
        if self.error is None and not self.ended:
            self.error = error
            self._wake()

    def _wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def wait(self) -> None:
        """Until something has come."""
        self.waiter = self.client.loop.create_future()
        await self.waiter

    # The server's side.

    def _arrive(self) -> None:
        method = self.server.table.get(self.method)
        if self._hung_up or method is None or not self.server.serving:
            self._reply(self.broke)
            return
        deadline = self.server.loop.time() + self.timeout
        caller = Caller(CallerKind.SERVICE, self.client.service)
        call = self._call = Call(self.method, deadline, self.metadata, caller)
        run = self._unary if method.unary is not None else self._stream
        self._task = self.server.loop.create_task(run(method, call))

    def called_off(self) -> None:
        """The server is told that the caller no longer waits."""
        self._end()

    def hang_up(self) -> None:
        """The server sees that the connection to the caller is gone."""
        if self._call is not None:
            self._call.is_lost = True
        self._end()

    def _end(self) -> None:
        self._hung_up = True
        self.server.exchanges.pop(self, None)
        if self._task is not None:
            self._task.cancel()

    async def _unary(self, method: Method, call: Call) -> None:
        handler = method.unary
        assert handler is not None
        try:
            reply = (await handler(self.data, call)).SerializeToString()
        except Failure as failure:
            self._finish(failure)
        else:
            self._outbox(lambda: self._take_result(reply))
        finally:
            self._task = None

    async def _stream(self, method: Method, call: Call) -> None:
        handler = method.stream
        assert handler is not None
        replies = BoundedStream(handler(self.data, call), call.deadline, self.method)
        failure: Failure | None = None
        try:
            try:
                async for reply in replies:
                    self._outbox(self._item(reply.SerializeToString()))
            finally:
                await replies.aclose()
        except Failure as raised:
            failure = raised
        finally:
            self._task = None
        self._finish(failure)

    def _item(self, data: bytes) -> Callable[[], None]:
        def take() -> None:
            self.items.append(data)
            self._wake()

        return take

    def _finish(self, failure: Failure | None) -> None:
        if failure is None:
            self._outbox(self._take_end)
        else:
            status = status_from_failure(failure)
            self._outbox(lambda: self.fail(failure_from_status(status)))

    def _outbox(self, deliver: Callable[[], None]) -> None:
        # Written in a turn of its own, as a link's outbox is.
        self.server.loop.call_soon(self._leave, deliver)

    def _leave(self, deliver: Callable[[], None]) -> None:
        self.server.loop.check()
        self.server.barrier()
        self._reply(deliver)

    def _reply(self, deliver: Callable[[], None]) -> None:
        if not self.open or self.fate is Fate.MUTE:
            return
        universe = self.network.universe
        delay = universe.pause()
        if self.fate is Fate.SLOW:
            delay += 2.0 * universe.rng.random() ** 3
        self._back = max(self._back, universe.now + delay)
        self.client.loop.call_at(self._back, self._deliver, deliver)

    def _deliver(self, deliver: Callable[[], None]) -> None:
        if self.open:
            deliver()

    def _take_result(self, data: bytes) -> None:
        self.result = data
        self._take_end()

    def _take_end(self) -> None:
        self.ended = True
        self.client.exchanges.pop(self, None)
        self.server.exchanges.pop(self, None)
        self._wake()


class Channel:
    """A process's way to a service. Generated stubs take it like any channel."""

    def __init__(self, network: Network, client: Node, service: str) -> None:
        self._network = network
        self._client = client
        self._service = service

    async def _available(self, deadline: float, *, sent: bool) -> Node:
        loop = self._client.loop
        limit = min(deadline, loop.time() + _WAIT_READY)
        while (server := self._network.pick(self._service)) is None:
            if loop.time() >= limit:
                if loop.time() >= deadline:
                    raise self._late(sent=sent)
                failure = unavailable(self._service, f"no replica of {self._service} can be reached")
                raise failure if sent else NotSent.of(failure)
            await asyncio.sleep(0.01)
        return server

    def _late(self, *, sent: bool) -> Failure:
        failure = deadline_exceeded(self._service)
        return failure if sent else NotSent.of(failure)

    async def _open(
        self, method: str, request: Any, deadline: float, metadata: Metadata, *, streaming: bool, sent: bool = False
    ) -> _Exchange:
        self._client.loop.check()
        server = await self._available(deadline, sent=sent)
        left = deadline - self._client.loop.time()
        if left <= 0:
            raise self._late(sent=sent)
        exchange = _Exchange(self._network, self._client, server, method, request.SerializeToString(), left, metadata)
        self._network.watch(self._client, method, request, False)
        exchange.send(streaming=streaming)
        return exchange

    def unary_unary(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Callable[..., Awaitable[Any]]:
        """The multi-callable of a unary method."""
        loop = self._client.loop

        async def call(request: Any, *, timeout: float | None = None, metadata: Metadata | None = None, **_: Any) -> Any:
            deadline = loop.time() + (_DEFAULT_TIMEOUT if timeout is None else timeout)
            retried = False
            while True:
                exchange = await self._open(method, request, deadline, metadata or (), streaming=False, sent=retried)
                timer = loop.call_at(deadline, exchange.expire)
                try:
                    while exchange.error is None and not exchange.ended:
                        await exchange.wait()
                except asyncio.CancelledError:
                    exchange.cancel()
                    raise
                finally:
                    timer.cancel()
                if exchange.error is None:
                    self._network.watch(self._client, method, request, True)
                    return response_deserializer(exchange.result)
                if not isinstance(exchange.error, _LinkLost):
                    exchange.open = False
                    raise exchange.error
                if not is_idempotent(method) or retried:
                    raise unavailable(self._service, f"the connection to {self._service} was lost during the call")
                retried = True

        return call

    def unary_stream(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Callable[..., AsyncIterator[Any]]:
        """The multi-callable of a server-streaming method."""
        loop = self._client.loop

        async def call(
            request: Any, *, timeout: float | None = None, metadata: Metadata | None = None, **_: Any
        ) -> AsyncIterator[Any]:
            deadline = loop.time() + (_DEFAULT_TIMEOUT if timeout is None else timeout)
            exchange = await self._open(method, request, deadline, metadata or (), streaming=True)
            timer = loop.call_at(deadline, exchange.expire)
            try:
                while True:
                    while exchange.items:
                        yield response_deserializer(exchange.items.popleft())
                    if exchange.ended or exchange.error is not None:
                        break
                    await exchange.wait()
            finally:
                timer.cancel()
                exchange.cancel()
            if isinstance(exchange.error, _LinkLost):
                raise unavailable(self._service, f"the connection to {self._service} was lost during the call")
            if exchange.error is not None:
                raise exchange.error

        return call
