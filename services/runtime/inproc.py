"""The in-process channel of the compact topology.

Generated stubs take it like any channel. A call goes to the wrapped handler of the method table without serialisation: same
interceptors, which also keep the deadline of a unary call, same metadata and errors as over a socket. The one difference callers must know: messages are shared, so
neither side may change a message that it has handed over.

Errors are raised as `Failure`, as the link does; `asyncio.CancelledError` only when the calling task is cancelled.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Mapping
from typing import Any, Final

from google.protobuf.message import Message

from services.runtime.call import DEFAULT_TIMEOUT_SECONDS, FORWARDED, Call, Caller, Metadata
from services.runtime.deadlines import carried
from services.runtime.dispatch import Method, StreamHandler, Table
from services.runtime.errors import NotSent, Reason, deadline_exceeded
from services.runtime.interceptors import Ended, StagedStream

MetadataLike = Iterable[tuple[str, str]]

_EMPTY: Final[Mapping[str, str]] = types.MappingProxyType({})


def _forwarded(pairs: Metadata) -> Metadata:
    """What of the metadata travels on. What arrives is mostly the caller's own `call.forward`, which is taken as it is."""
    for pair in pairs:
        if pair[0] not in FORWARDED:
            return tuple([pair for pair in pairs if pair[0] in FORWARDED])
    return pairs


_latest: tuple[MetadataLike, Mapping[str, str], Metadata] = ((), _EMPTY, ())


def _seen(metadata: MetadataLike) -> tuple[MetadataLike, Mapping[str, str], Metadata]:
    """`metadata`, as a mapping, and what of it travels on. Remembered: one request makes several calls with the same, mostly in one go."""
    global _latest  # noqa: PLW0603  # replaced as a whole, so any thread may
    pairs = metadata if type(metadata) is tuple else tuple(metadata)
    _latest = (pairs, dict(pairs), _forwarded(pairs))
    return _latest


class InprocChannel:
    """A channel to services of this process.

    `table` is called at each first use of a method, so that services may be wired in any order; a method that is not in the
    table yet is UNAVAILABLE. `caller` is who the callee sees.
    """

    def __init__(self, table: Callable[[], Table], caller: Caller) -> None:
        self._table = table
        self._caller = caller

    def _method(self, path: str) -> Method:
        method = self._table().get(path)
        if method is None:
            raise NotSent(
                Reason.DEPENDENCY_UNAVAILABLE,
                f"nothing in this process serves {path!r}",
                metadata={"dependency": path},
                retry_delay=1.0,
            )
        return method

    def unary_unary(self, method: str, *_: Any, **__: Any) -> Callable[..., Awaitable[Any]]:
        """The multi-callable of a unary method: `await callable(request, timeout=…, metadata=…)`."""
        handler: Callable[[Any, Call], Awaitable[Any]] | None = None
        caller = self._caller
        # A channel lives and ends with its loop; asking which one is running costs a system call.
        now = asyncio.get_running_loop().time

        # Not a coroutine of its own: each one more is one more frame at every step of the call.
        def call(
            request: Message, *, timeout: float | None = None, metadata: MetadataLike | None = None, **_: Any
        ) -> Awaitable[Any]:
            nonlocal handler
            if handler is None:
                handler = self._method(method).unary
                assert handler is not None, f"{method} is streaming"
            if timeout is None:
                timeout = DEFAULT_TIMEOUT_SECONDS
            elif timeout <= 0:
                raise deadline_exceeded(method)
            deadline = now() + timeout
            if not metadata:
                context = Call(method, deadline, _EMPTY, caller)
            else:
                known = _latest if _latest[0] is metadata else _seen(metadata)
                context = Call(method, deadline, known[1], caller, known[2])
            return handler(request, context)

        return call

    def unary_stream(self, method: str, *_: Any, **__: Any) -> Callable[..., AsyncIterator[Any]]:
        """The multi-callable of a server-streaming method: `async for reply in callable(request, timeout=…, metadata=…)`.

        The iterator must be read to its end or closed (`contextlib.aclosing`); closing it cancels the call.
        """
        handler: StreamHandler | None = None

        def call(
            request: Message, *, timeout: float | None = None, metadata: MetadataLike | None = None, **_: Any
        ) -> AsyncIterator[Any]:
            nonlocal handler
            if handler is None:
                handler = self._method(method).stream
                assert handler is not None, f"{method} is unary"
            deadline = asyncio.get_running_loop().time() + (DEFAULT_TIMEOUT_SECONDS if timeout is None else timeout)
            if metadata:
                seen = _seen(metadata)
                context = Call(method, deadline, seen[1], self._caller, seen[2])
            else:
                context = Call(method, deadline, _EMPTY, self._caller)
            if isinstance(handler, StagedStream):
                replies, ended = handler.open(request, context)
                return BoundedStream(replies, deadline, method, ended)
            return BoundedStream(handler(request, context), deadline, method)

        return call


class BoundedStream:
    """`replies`, each awaited no longer than until `deadline` (Failure DEADLINE_EXCEEDED). Close it (`aclose`) or read it to its end.

    An async iterator by hand: the deadline is the same for every reply, so one timer serves them all, and it costs a chunk of a
    stream nothing but a look.
    """

    __slots__ = ("_deadline", "_ended", "_expired", "_loop", "_replies", "_step", "_task", "_timer", "_what")

    def __init__(self, replies: AsyncIterator[Any], deadline: float, what: str, ended: Ended | None = None) -> None:
        """`ended` is told the end of the replies: None, or what was raised, and returns what to raise instead."""
        self._replies = replies
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._step = replies.__anext__
        self._deadline = deadline
        self._what = what
        self._task: asyncio.Task[Any] | None = None
        """Who waits for a reply."""
        self._timer: asyncio.TimerHandle | None = None
        self._expired = False

    def __aiter__(self) -> BoundedStream:
        return self

    def __anext__(self) -> Awaitable[Any]:
        return self._next()

    @types.coroutine
    def _next(self) -> Generator[Any, Any, Any]:
        if self._expired:
            raise deadline_exceeded(self._what)
        work: Any = self._step()
        try:
            pending = work.send(None)
        except StopIteration as done:
            return done.value
        except BaseException as error:  # noqa: BLE001  # raised again, or as what it stands for
            self._rest()
            failure = self._end(error)
            try:
                if failure is error:
                    raise
                raise failure from None
            finally:
                # An error that this frame holds holds the frame, and all that the error came through: the call's context among them, and
                # with that its place among the streams of its connection, until the next look for cycles.
                del failure
        loop = self._loop
        task = self._task = asyncio.current_task(loop)
        assert task is not None, "a call needs a running task"
        if self._timer is None:
            self._timer = loop.call_at(self._deadline, self._expire)
        try:
            result = yield from carried(work, pending)
        except asyncio.CancelledError as error:
            self._rest()
            self._end(error)
            if self._expired and task.uncancel() == 0:
                raise deadline_exceeded(self._what) from None
            raise
        except BaseException as error:  # noqa: BLE001  # raised again, or as what it stands for
            self._rest()
            if self._expired:
                task.uncancel()
            failure = self._end(error)
            try:
                if failure is error:
                    raise
                raise failure from None
            finally:
                del failure
        else:
            if self._expired and task.uncancel() > 0:
                raise asyncio.CancelledError
            return result
        finally:
            self._task = None

    def _end(self, error: BaseException) -> BaseException:
        """Tells of the end, once; returns what to raise."""
        ended, self._ended = self._ended, None
        if ended is None:
            return error
        return ended(None if isinstance(error, StopAsyncIteration) else error) or error

    def _expire(self) -> None:
        self._expired = True
        if self._task is not None:
            self._task.cancel()

    def _rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def aclose(self) -> None:
        """Cancels the call."""
        self._rest()
        close = getattr(self._replies, "aclose", None)
        if close is not None:
            await close()
        self._end(GeneratorExit())
