"""The serving side of links: runs the calls of a method table that arrive over `LinkService.Exchange`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc
from google.rpc import status_pb2

from services.runtime.admission import Admission
from services.runtime.authentication import Authenticator, check
from services.runtime.call import DEFAULT_TIMEOUT_SECONDS, Call, Caller
from services.runtime.deadlines import bounded
from services.runtime.dispatch import Method, Table
from services.runtime.errors import Failure, Reason
from services.runtime.frames import FIRST_CREDITS, LINK_SERVICE, MAX_OUTBOX_BYTES, REPLICA_KEY, Outbox
from services.runtime.inproc import BoundedStream
from services.runtime.interceptors import Log
from services.runtime.status import status_from_failure
from sluice.link.v1 import link_service_pb2

_MAX_METADATA: Final = 64
_STATUS_OK: Final = status_pb2.Status()


class LinkServer:
    """Serves a method table (whose handlers take serialised requests) over links."""

    def __init__(
        self,
        table: Table,
        authenticator: Authenticator,
        admission: Admission,
        *,
        replica_id: str,
        barrier: Callable[[], None],
        log: Log,
    ) -> None:
        """`replica_id` is what the other side is told to be talking to; `barrier` is called before frames are sent."""
        self._greeting = ((REPLICA_KEY, replica_id),)
        self._barrier = barrier
        self._table = table
        self._authenticator = authenticator
        self._admission = admission
        self._log = log
        self._sessions: set[_Session] = set()
        self._draining = False

    async def exchange(self, _: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """The handler of LinkService.Exchange."""
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        caller = self._authenticator.caller(metadata)
        check(LINK_SERVICE, caller)
        await context.send_initial_metadata(self._greeting)
        session = _Session(self._table, self._admission, caller, self._barrier, self._log)
        session.draining = self._draining
        self._sessions.add(session)
        try:
            await session.run(context)
        finally:
            self._sessions.discard(session)

    async def drain(self, grace: float) -> None:
        """Refuses new calls as DRAINING, gives open ones `grace` seconds to end, then closes the links."""
        self._draining = True
        for session in self._sessions:
            session.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                while any(session.busy for session in self._sessions):
                    await asyncio.sleep(0.01)
        for session in self._sessions:
            session.close()


class _Session:
    """One link, seen from the serving side."""

    def __init__(self, table: Table, admission: Admission, caller: Caller, barrier: Callable[[], None], log: Log) -> None:
        self._barrier = barrier
        self._log = log
        self._table = table
        self._admission = admission
        self._caller = caller
        self._loop = asyncio.get_running_loop()
        self._outbox = Outbox(link_service_pb2.ExchangeResponse)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._calls: dict[int, Call] = {}
        self._credits: dict[int, _Credits] = {}
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self.draining = False

    @property
    def busy(self) -> bool:
        """Whether a call is open or a reply unsent."""
        return bool(self._tasks) or self._outbox.byte_count > 0

    def close(self) -> None:
        """Ends the link."""
        if not self._closed.done():
            self._closed.set_result(None)

    async def run(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Until the other side ends the link, it breaks, or `close`."""
        reader = asyncio.create_task(self._read(context))

        def write(frames: Any) -> Awaitable[None]:
            self._barrier()
            return context.write(frames)

        writer = asyncio.create_task(self._outbox.write_to(write))
        try:
            await asyncio.wait((reader, writer, self._closed), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for call in self._calls.values():
                call.is_lost = True
            ending = [reader, writer, *self._tasks.values()]
            for task in ending:
                task.cancel()
            await asyncio.gather(*ending, return_exceptions=True)

    async def _read(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        while True:
            request = await context.read()
            if request is grpc.aio.EOF:
                return
            for frame in request.frames:
                kind = frame.WhichOneof("kind")
                if kind == "open":
                    self._open(frame.call_id, frame.open)
                elif kind == "cancel":
                    task = self._tasks.get(frame.call_id)
                    if task is not None:
                        task.cancel()
                elif kind == "credit":
                    room = self._credits.get(frame.call_id)
                    if room is not None:
                        room.give(frame.credit.message_count)
            if self._outbox.byte_count > MAX_OUTBOX_BYTES:
                # A caller that sends and doesn't read must not fill our memory with answers.
                await self._outbox.room()

    def _open(self, call_id: int, opened: Any) -> None:
        path = opened.method
        try:
            if self.draining:
                raise Failure(Reason.DRAINING, "this replica is stopping; call another one", retry_delay=0.5)
            method = self._table.get(path)
            if method is None:
                raise Failure(Reason.ROUTE_NOT_FOUND, f"nothing here serves {path!r}")
            if call_id in self._tasks:
                raise Failure(Reason.REQUEST_INVALID, f"call {call_id} is open already", metadata={"field": "call_id"})
            pairs = opened.metadata
            if len(pairs) > _MAX_METADATA or len(pairs) % 2:
                raise Failure(Reason.REQUEST_INVALID, "metadata must be at most 32 pairs", metadata={"field": "metadata"})
            self._admission.enter()
        except Failure as failure:
            self._end(call_id, failure)
            return
        timeout = opened.timeout_micros
        deadline = self._loop.time() + (timeout / 1e6 if timeout > 0 else DEFAULT_TIMEOUT_SECONDS)
        metadata = dict(zip(pairs[::2], pairs[1::2], strict=True)) if pairs else {}
        call = Call(path, deadline, metadata, self._caller)
        self._calls[call_id] = call
        run = self._unary if method.unary is not None else self._stream
        self._tasks[call_id] = self._loop.create_task(run(call_id, method, opened.request, call))

    def _end(self, call_id: int, failure: Failure | None) -> None:
        status = _STATUS_OK if failure is None else status_from_failure(failure)
        frame = self._outbox.add(status.ByteSize() + 16)
        frame.call_id = call_id
        frame.end.CopyFrom(status)

    def _unsendable(self, call: Call, error: Exception) -> Failure:
        self._log.error("unsendable answer", method=call.method, exc_info=error)
        return Failure(Reason.INTERNAL, f"{call.method} gave an answer that can't be sent")

    async def _unary(self, call_id: int, method: Method, data: bytes, call: Call) -> None:
        handler = method.unary
        assert handler is not None
        try:
            reply = (await handler(data, call)).SerializeToString()
        except Failure as failure:
            self._end(call_id, failure)
        # A message boundary: the chain lets out nothing but Failure, so this is an answer that can't be serialised.
        except Exception as error:  # noqa: BLE001
            self._end(call_id, self._unsendable(call, error))
        else:
            frame = self._outbox.add(len(reply) + 16)
            frame.call_id = call_id
            frame.unary = reply
        finally:
            del self._tasks[call_id], self._calls[call_id]
            self._admission.leave()

    async def _stream(self, call_id: int, method: Method, data: bytes, call: Call) -> None:
        handler = method.stream
        assert handler is not None
        room = self._credits[call_id] = _Credits()
        outbox = self._outbox
        failure: Failure | None = None
        try:
            replies = BoundedStream(handler(data, call), call.deadline, call.method)
            async with contextlib.aclosing(replies):
                async for reply in replies:
                    if not room.left:
                        await room.wait(call.deadline, call.method)
                    room.left -= 1
                    item = reply.SerializeToString()
                    frame = outbox.add(len(item) + 16)
                    frame.call_id = call_id
                    frame.item = item
        except Failure as raised:
            failure = raised
        except Exception as error:  # noqa: BLE001
            failure = self._unsendable(call, error)
        finally:
            del self._tasks[call_id], self._calls[call_id]
            del self._credits[call_id]
            self._admission.leave()
        self._end(call_id, failure)
        # Its traceback has this frame.
        del failure


class _Credits:
    """How many replies a streaming call may send."""

    __slots__ = ("_waiter", "left")

    def __init__(self) -> None:
        self.left = FIRST_CREDITS
        self._waiter: asyncio.Future[None] | None = None

    def give(self, count: int) -> None:
        self.left += max(0, count)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self, deadline: float, what: str) -> None:
        await bounded(self._given(), deadline, what)

    async def _given(self) -> None:
        while not self.left:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
