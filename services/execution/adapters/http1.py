"""An HTTP/1.1 client for the request path: a pool of kept connections to one origin.

Own code because the path needs it an order of magnitude faster than a kept client is (performance.md): one protocol object per
connection over llhttp, one write per request, one future per answer. It does what providers' APIs need and nothing else: POST and
GET with a body in memory, answers by length, chunks or end of connection, no redirects, no cookies, no content encodings.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import httptools

from services.execution.errors import AttemptFailed, ConnectionStale
from services.runtime.errors import Failure, Reason

_MAX_HEADERS: Final = 64 * 1024
_PAUSE_ABOVE: Final = 256 * 1024
"""Unread bytes of a streamed answer above which the socket is not read: a slow caller slows its provider, memory stays bounded."""


Gate = Callable[[], None]
"""Called right before the first byte of a request is sent; raises when none may be."""


class Response:
    """The head of an answer."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: dict[bytes, bytes]) -> None:
        self.status = status
        self.headers = headers
        """Names in lower case."""
        self.body = b""


class _Connection(asyncio.Protocol):
    """One connection. Carries one request at a time."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._parser: Any = None
        self.transport: asyncio.Transport | None = None
        self.used = False
        self.idle_since = 0.0
        self._waiter: asyncio.Future[Response] | None = None
        """The head of a streamed answer, or the whole of another one."""
        self._streaming = False
        self._response: Response | None = None
        self._header_bytes = 0
        self._headers: dict[bytes, bytes] = {}
        self._parts: list[bytes] = []
        self._size = 0
        self._complete = False
        self._error: Failure | None = None
        self._more: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._expires = 0.0
        self._paused = False
        self._started = False
        self._keep = False
        self.closed = False

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # a stream transport, by how it was made

    def data_received(self, data: bytes) -> None:
        if self._complete or self._parser is None:
            # Bytes that nobody asked for: the connection can't be trusted any more.
            self.close()
            return
        self._started = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._fail(AttemptFailed(Reason.PROVIDER_MALFORMED, "the provider's answer is not HTTP"))
            return
        self._wake()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._pool.forget(self)
        if self._waiter is None and not self._streaming:
            return
        if self._response is not None and not self._complete and error is None and self._until_close():
            self.on_message_complete()
            self._wake()
            return
        if not self._complete:
            if self.used and not self._started:
                # What ended this kept connection, a restart say, has likely ended the others too.
                self._pool.close_idle()
                self._fail(ConnectionStale())
            else:
                reason = Reason.PROVIDER_STREAM_BROKEN if self._size else Reason.PROVIDER_UNAVAILABLE
                self._fail(
                    AttemptFailed(
                        reason, "the provider closed the connection in the middle of its answer", was_read=self._started
                    )
                )

    def _until_close(self) -> bool:
        return b"content-length" not in self._headers and b"transfer-encoding" not in self._headers

    # httptools callbacks

    def on_message_begin(self) -> None:
        if self._complete:
            # A second answer behind the first, in the same packet: nobody asked for it.
            self._keep = False
            self._headers = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > _MAX_HEADERS:
            raise httptools.HttpParserError("headers too large")
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        if self._complete:
            return
        status = self._parser.get_status_code()
        if status < 200:
            # 100 Continue and the like: the answer proper follows.
            self._headers = {}
            return
        self._keep = self._parser.should_keep_alive()
        self._response = Response(status, self._headers)
        if self._streaming and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(self._response)

    def on_body(self, body: bytes) -> None:
        if self._complete:
            return
        self._size += len(body)
        if self._size > self._pool.max_answer_bytes and not self._streaming:
            self._fail(
                AttemptFailed(Reason.PROVIDER_MALFORMED, f"the answer is larger than {self._pool.max_answer_bytes} bytes")
            )
            return
        self._parts.append(body)
        if self._streaming and not self._paused and sum(map(len, self._parts)) > _PAUSE_ABOVE and self.transport is not None:
            self._paused = True
            self.transport.pause_reading()

    def on_message_complete(self) -> None:
        response = self._response
        if response is None or self._complete:
            return
        self._complete = True
        if not self._streaming:
            response.body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
            waiter = self._waiter
            if waiter is not None and not waiter.done():
                waiter.set_result(response)

    # requests

    def _begin(self, streaming: bool) -> asyncio.Future[Response]:
        if self._parser is None:
            # Once: a connection is kept only when its answer ended, and then the parser stands before the next one.
            self._parser = httptools.HttpResponseParser(self)
        self._streaming = streaming
        self._response = None
        self._headers = {}
        self._header_bytes = 0
        self._parts = []
        self._size = 0
        self._complete = self._paused = self._started = self._keep = False
        self._error = None
        waiter = self._waiter = self._loop.create_future()
        return waiter

    def send(self, request: bytes, gate: Gate) -> None:
        """Sends the request, if somebody still waits for its answer and the gate is open."""
        waiter = self._waiter
        if self.transport is None or self.closed or waiter is None or waiter.done():
            return
        try:
            gate()
        except Failure as failure:
            self._fail(failure)
        else:
            self.transport.write(request)

    def fail_unsent(self) -> None:
        """The request could not be sent: its caller is told so, and that nothing was read."""
        self._fail(AttemptFailed(Reason.PROVIDER_UNAVAILABLE, "the connection to the provider took no bytes"))

    async def exchange(self, request: bytes, deadline: float, gate: Gate) -> Response:
        """One request and its whole answer."""
        waiter = self._begin(streaming=False)
        self._pool.send_soon(self, request, gate)
        self._limit(deadline)
        try:
            response = await waiter
        except BaseException:
            # Cancelled or failed: what the provider may still send has no reader, so the socket goes.
            self.close()
            raise
        finally:
            self._waiter = None
        self.used = True
        self._pool.release(self, self._keep)
        return response

    async def open_stream(self, request: bytes, deadline: float, gate: Gate) -> Response:
        """One request and the head of its answer; the body follows by `pieces`."""
        waiter = self._begin(streaming=True)
        self._pool.send_soon(self, request, gate)
        self._limit(deadline)
        try:
            return await waiter
        except BaseException:
            self.close()
            raise

    async def pieces(self, idle_seconds: float, deadline: float, *, keep: bool = True) -> AsyncIterator[bytes]:
        """The body as it comes; what arrived together comes together. Leaving early closes the connection, `keep` or not."""
        done = False
        try:
            while True:
                if self._parts:
                    parts, self._parts = self._parts, []
                    if self._paused and self.transport is not None and not self.closed:
                        self._paused = False
                        self.transport.resume_reading()
                    yield parts[0] if len(parts) == 1 else b"".join(parts)
                    continue
                if self._error is not None:
                    raise self._error
                if self._complete:
                    done = True
                    return
                self._more = self._loop.create_future()
                self._limit(min(deadline, self._loop.time() + idle_seconds))
                try:
                    await self._more
                finally:
                    self._more = None
        finally:
            self._waiter = None
            self._streaming = False
            if done and not self.closed:
                self.used = True
                self._pool.release(self, self._keep and keep)
            else:
                self.close()

    def _limit(self, moment: float) -> None:
        """Lets what is waited for now fail at `moment` of the loop's clock.

        Setting a timer and cancelling it costs more than all else that is done for a piece of a stream, so the one that runs is left
        alone unless it would come too late.
        """
        self._expires = moment
        timer = self._timer
        if timer is not None:
            if timer.when() <= moment:
                return
            timer.cancel()
        self._timer = self._loop.call_at(moment, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._more is None and (self._waiter is None or self._waiter.done()):
            return
        if self._loop.time() >= self._expires:
            self._expire()
        else:
            self._timer = self._loop.call_at(self._expires, self._look)

    def _wake(self) -> None:
        more = self._more
        if more is not None and not more.done():
            more.set_result(None)

    def _expire(self) -> None:
        self._fail(AttemptFailed(Reason.PROVIDER_TIMEOUT, "the provider did not answer in time", was_read=True))

    def _fail(self, error: Failure) -> None:
        if self._error is None:
            self._error = error
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_exception(error)
        self._wake()
        self.close()

    def close(self) -> None:
        """Closes the socket at once."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self.closed:
            self.closed = True
            self._pool.forget(self)
            if self.transport is not None:
                self.transport.abort()


async def beginning(pieces: AsyncIterator[bytes], most: int = 64 * 1024) -> bytes:
    """The first `most` bytes of a body, or a little more: enough of an error, however long it goes on."""
    parts: list[bytes] = []
    size = 0
    async for piece in pieces:
        parts.append(piece)
        size += len(piece)
        if size >= most:
            break
    return b"".join(parts)


class Pool:
    """Connections to one origin."""

    def __init__(
        self,
        base_url: str,
        *,
        connect_timeout: float,
        max_connections: int,
        keep_alive: float,
        max_answer_bytes: int,
    ) -> None:
        parts = urlsplit(base_url)
        assert parts.hostname is not None
        self._host = parts.hostname
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self.prefix = parts.path.rstrip("/")
        """Path under which the API lives."""
        self._connect_timeout = connect_timeout
        self._max = max_connections
        self._keep_alive = keep_alive
        self.max_answer_bytes = max_answer_bytes
        self._idle: deque[_Connection] = deque()
        self._all: set[_Connection] = set()
        self._connecting = 0
        self._unsent: list[tuple[_Connection, bytes, Gate]] = []
        # A pool lives and ends with its loop; asking which one is running costs a system call.
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.time

    def head(self, method: str, path: str, headers: Mapping[str, str]) -> bytes:
        """The part of a request that never changes; ends within the headers, the body's length is to follow."""
        default = 443 if self._tls else 80
        host = self._host if self._port == default else f"{self._host}:{self._port}"
        lines = [
            f"{method} {self.prefix}{path} HTTP/1.1",
            f"host: {host}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        return ("\r\n".join(lines) + "\r\n").encode("latin-1")

    async def acquire(self) -> _Connection:
        """A connection nobody uses. Raises AttemptFailed."""
        oldest = self._now() - self._keep_alive
        while self._idle:
            connection = self._idle.pop()
            if connection.closed:
                continue
            if connection.idle_since < oldest:
                # Old ones are the likeliest to be closed by the other side just now.
                connection.close()
                continue
            return connection
        if len(self._all) + self._connecting >= self._max:
            raise AttemptFailed(Reason.OVERLOADED, f"all {self._max} connections to the provider are in use", retry_delay=1.0)
        self._connecting += 1
        try:
            async with asyncio.timeout(self._connect_timeout):
                _, connection = await self._loop.create_connection(
                    lambda: _Connection(self),
                    self._host,
                    self._port,
                    ssl=self._tls,
                    server_hostname=self._host if self._tls else None,
                )
        except TimeoutError:
            raise AttemptFailed(Reason.PROVIDER_TIMEOUT, "the provider could not be connected to in time") from None
        except (OSError, ssl.SSLError) as error:
            raise AttemptFailed(
                Reason.PROVIDER_UNAVAILABLE, f"the provider can't be connected to: {type(error).__name__}"
            ) from None
        finally:
            self._connecting -= 1
        if connection.closed:
            # Its end came before anybody waited on it: a call on it would wait for its whole deadline.
            raise AttemptFailed(Reason.PROVIDER_UNAVAILABLE, "the provider closed the connection at once")
        self._all.add(connection)
        return connection

    def exchange(self, head: bytes, body: bytes, deadline: float, gate: Gate) -> Coroutine[Any, Any, Response]:
        """One request and its whole answer. Raises AttemptFailed, and what `gate` raises, which is called before a byte is sent."""
        request = b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body)
        idle = self._idle
        if idle and not idle[-1].closed and idle[-1].idle_since >= self._now() - self._keep_alive:
            return idle.pop().exchange(request, deadline, gate)
        return self._exchange_anew(request, deadline, gate)

    async def _exchange_anew(self, request: bytes, deadline: float, gate: Gate) -> Response:
        connection = await self.acquire()
        return await connection.exchange(request, deadline, gate)

    async def open_stream(self, head: bytes, body: bytes, deadline: float, gate: Gate) -> tuple[_Connection, Response]:
        """One request and the head of its answer. Raises as `exchange`."""
        connection = await self.acquire()
        request = b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body)
        return connection, await connection.open_stream(request, deadline, gate)

    def send_soon(self, connection: _Connection, request: bytes, gate: Gate) -> None:
        """Sends at the end of this turn of the loop, together with the other requests of it: a provider on this machine, or a proxy
        before it, that is woken for each of them costs more than they do."""
        if not self._unsent:
            self._loop.call_soon(self._send)
        self._unsent.append((connection, request, gate))

    def _send(self) -> None:
        unsent, self._unsent = self._unsent, []
        for connection, request, gate in unsent:
            try:
                connection.send(request, gate)
            # A transport that refuses its bytes must not keep the requests of others.
            except Exception:  # noqa: BLE001
                connection.fail_unsent()

    def release(self, connection: _Connection, keep: bool) -> None:
        """The connection's request is over."""
        if not keep or connection.closed or not self._keep_alive:
            connection.close()
            return
        connection.idle_since = self._now()
        self._idle.append(connection)

    def forget(self, connection: _Connection) -> None:
        """The connection is gone."""
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def close_idle(self) -> None:
        """Closes the connections that nobody uses."""
        for connection in list(self._idle):
            connection.close()

    def close(self) -> None:
        """Closes every connection."""
        for connection in list(self._all):
            connection.close()
        self._idle.clear()
