"""HTTP/1.1 for a server: strict, bounded in time and size, in order.

One `Connection` per socket over llhttp (httptools). Whoever serves gives an `Application`; each request is an `Exchange`, which
carries the answer too. What llhttp does not refuse by itself is refused here: transfer codings other than `chunked`, other
versions, a missing or doubled Host. Requests of one connection are answered one after the other in the order of their arrival.

Time limits are kept by one sweep over all connections, not by a timer per request: a timer costs more than the request's parsing.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import re
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from email.utils import formatdate
from typing import Any, Final, NamedTuple, Protocol, cast

import httptools

from services.gateway.edge.config import EdgeConfig
from services.gateway.edge.errors import EdgeError
from services.runtime.errors import Failure, Reason

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_SINGLE: Final = frozenset(
    {b"host", b"content-length", b"transfer-encoding", b"authorization", b"x-api-key", b"content-type", b"idempotency-key"}
)
_HOP_HEADERS: Final = frozenset({b"connection", b"upgrade", b"http2-settings"})
_SETTLE_SECONDS: Final = 1.0
"""Time for handlers that were cut off to end."""
_FRAMING_FACTOR: Final = 8
"""A body in chunks of one byte, the finest there are, takes six bytes per byte. More than this is chunk extensions, or worse."""
_WHOLE_WRITE: Final = 65_536
"""Bodies up to this many bytes are joined with their head: one copy is cheaper than a second write. More than this waits for no turn's end."""


_MOST_DIGITS: Final = 10
_MOST_HEADS: Final = 3
"""Heads of a connection that are remembered in the hope of a repetition, one after the other."""
_LENGTH_LINE: Final = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]+)(?=[ \t]*\r\n)", re.IGNORECASE)
_NEVER_REPEATED: Final = (b"transfer-encoding", b"expect", b"upgrade")


class Application(Protocol):
    """Answers exchanges."""

    def handle(self, exchange: Exchange) -> Coroutine[Any, Any, None] | None:
        """Answers `exchange` at once and returns None, or returns the coroutine that will. The coroutine answers every error itself.

        It is cancelled when the client goes away, and when `exchange.expire_at` passes: then `exchange.expired` is set. One that
        ends without having answered costs the client its connection.
        """
        ...

    def refuse(self, exchange: Exchange, failure: Failure) -> None:
        """Answers a request that broke the protocol or a limit; parts of it may be missing."""
        ...


class _Stage(enum.Enum):
    IDLE = enum.auto()
    HEAD = enum.auto()
    BODY = enum.auto()
    LINGER = enum.auto()


_IDLE: Final = _Stage.IDLE
_HEAD: Final = _Stage.HEAD
_BODY: Final = _Stage.BODY
_LINGER: Final = _Stage.LINGER


class Exchange:
    """One request and its answer.

    `target` is the path with its query, undecoded. `headers` has names in lower case; lines of the same name are joined by `, `.
    """

    __slots__ = (
        "_chunked",
        "body",
        "closed",
        "connection",
        "expire_at",
        "expired",
        "headers",
        "is_old",
        "keep_alive",
        "method",
        "opened",
        "refusal",
        "target",
        "task",
    )  # fmt: skip

    def __init__(
        self,
        connection: Connection,
        method: bytes,
        target: bytes,
        headers: dict[bytes, bytes],
        body: bytes | bytearray,
        keep_alive: bool,
        is_old: bool,
    ) -> None:
        self.connection = connection
        self.method = method
        self.target = target
        self.headers = headers
        self.body = body
        self.keep_alive = keep_alive
        self.is_old = is_old
        """Whether the client speaks HTTP/1.0."""
        self.refusal: Failure | None = None
        self.task: asyncio.Task[None] | None = None
        self.expire_at = 0.0
        """Moment of the loop's clock at which the task is cancelled; 0: never."""
        self.expired = False
        self.opened = False
        """Whether bytes of the answer were written."""
        self.closed = False
        """Whether the answer is complete, or can't be any more."""
        self._chunked = False

    def respond(self, head: bytes, body: bytes) -> None:
        """Answers whole. `head` is the status line and headers, each with its end of line."""
        if self.closed:
            return
        self.opened = self.closed = True
        connection = self.connection
        length = len(body)
        if self.method == b"HEAD":
            body = b""
        start = b"%b%bcontent-length: %d\r\n%b" % (head, connection.listener.date_line, length, self._persistence())
        if length <= _WHOLE_WRITE:
            connection.write(start + body)
        else:
            connection.write(start)
            connection.write(body)
        connection.advance_after(self)

    def open(self, head: bytes) -> None:
        """Begins an answer whose length isn't known yet. HEAD gets the head alone: what is sent after it is dropped."""
        if self.closed:
            return
        self.opened = True
        if self.is_old:
            # Without chunks the end of the connection is the end of the answer.
            self.keep_alive = False
        else:
            self._chunked = True
            head += b"transfer-encoding: chunked\r\n"
        self.connection.write(head + self.connection.listener.date_line + self._persistence())

    def send(self, data: bytes) -> bool:
        """Writes a piece, not empty. False: the client reads too slowly, await `writable` before the next."""
        connection = self.connection
        if self.closed or self.method == b"HEAD":
            return True
        connection.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        return not connection.is_stalled

    async def writable(self) -> None:
        """Returns when the client has caught up; bounded by the write timeout, after which the connection is cut off."""
        await self.connection.writable()

    def close(self) -> None:
        """Ends an opened answer."""
        if self.closed:
            return
        self.closed = True
        if self._chunked and self.method != b"HEAD":
            self.connection.write(b"0\r\n\r\n")
        self.connection.advance_after(self)

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Starts the handler."""
        connection = self.connection
        task = self.task = connection.loop.create_task(work)
        connection.listener.tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.connection.listener.tasks.discard(task)
        if not self.closed:
            # Nobody will answer any more, and requests behind this one must not wait for ever.
            self.connection.abort()
        if not task.cancelled() and (error := task.exception()) is not None:
            task.get_loop().call_exception_handler({"message": "a handler failed", "exception": error, "task": task})

    def _persistence(self) -> bytes:
        if not self.keep_alive or self.connection.listener.draining:
            self.keep_alive = False
            return b"connection: close\r\n\r\n"
        return b"connection: keep-alive\r\n\r\n" if self.is_old else b"\r\n"


class _Head(NamedTuple):
    """A head that llhttp has taken, to know it again: what stands before and behind the digits of its length, and what it says."""

    before: bytes
    behind: bytes
    digits: bytes
    method: bytes
    target: bytes
    headers: dict[bytes, bytes]


class Connection(asyncio.Protocol):
    """One socket of a client."""

    __slots__ = (
        "_admitted", "_advancing", "_body", "_config", "_continue", "_current", "_deadline", "_head", "_header_bytes", "_header_count", "_headers", "_heads_left",
        "_is_old", "_keep_alive", "_parser", "_queue", "_reading", "_refusal", "_size", "_spare", "_stage", "_stalled_since",
        "_stalled_size", "_target", "_timed", "_transport", "_unsent", "_unsent_size", "_waiter", "_wire", "_write", "is_stalled", "listener", "loop", "memory",
    )  # fmt: skip

    def __init__(self, listener: Listener, loop: asyncio.AbstractEventLoop) -> None:
        self.listener = listener
        self.memory: Any = None
        """What the application remembers from one request to the next."""
        self._config = listener.config
        self.loop = loop
        self._parser = httptools.HttpRequestParser(self)
        self._queue: deque[Exchange] = deque()
        self._current: Exchange | None = None
        self._admitted = True
        self._advancing = False
        self._reading = True
        self._stage = _IDLE
        self._timed: _Stage | None = None
        self._deadline = 0.0
        self._spare = 0
        self._wire = 0
        self._header_bytes = 0
        self._header_count = 0
        self._headers: dict[bytes, bytes] = {}
        self._head: _Head | None = None
        self._heads_left = _MOST_HEADS
        self._target = b""
        self._body: bytes | bytearray = b""
        self._size = 0
        self._is_old = False
        self._keep_alive = True
        self._continue = False
        self._refusal: Failure | None = None
        self._unsent: list[bytes] = []
        self._unsent_size = 0
        self.is_stalled = False
        self._stalled_since = 0.0
        self._stalled_size = 0
        self._waiter: asyncio.Future[None] | None = None

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not checked by isinstance: uvloop's transports are no subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._write = self._transport.write
        self._transport.set_write_buffer_limits(high=self._config.write_buffer_bytes)
        # Until its first request a connection has only as long as headers may take: silence costs the client nothing.
        self._deadline = self.loop.time() + self._config.header_timeout
        self._admitted = self.listener.admit(self)
        if not self._admitted:
            self._refuse(EdgeError(Reason.OVERLOADED, "too many connections are open; try again soon", retry_delay=1.0))

    def data_received(self, data: bytes) -> None:
        stage = self._stage
        if stage is _LINGER:
            return
        if stage is _IDLE and self._head is not None and self._repeats(self._head, data):
            self._advance()
            return
        begins = stage is _IDLE and self._heads_left and not self._queue
        self._spare += len(data)
        self._wire += len(data)
        self._parse(data)
        stage = self._stage
        if self._refusal is None:
            if begins and stage is _IDLE:
                self._remember(data)
            self._check_framing(stage)
        if self._refusal is not None:
            self._refuse(self._refusal)
            return
        if self._queue:
            # Also while another request is being answered: then reading stops here, or a client could fill the queue for ever.
            self._advance()
        if stage is _IDLE or self._stage is _LINGER:
            return
        if self._timed is not stage:
            self._timed = stage
            limit = self._config.header_timeout if stage is _HEAD else self._config.body_timeout
            self._deadline = self.loop.time() + limit
        if self._continue:
            self._invite()

    def eof_received(self) -> bool | None:
        # The transport closes itself now; what is written already goes out before.
        self.flush()
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self.listener.forget(self)
        self._unsent = []
        self._drop_body()
        current, self._current = self._current, None
        self._drop_queue()
        self._stage = _LINGER
        if current is not None:
            self.listener.release(len(current.body))
            current.closed = True
            if current.task is not None:
                current.task.cancel()
        # Whoever still waits, or asks in a `finally` whether to wait, must not wait for a client that is gone.
        self.is_stalled = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def pause_writing(self) -> None:
        self.is_stalled = True
        self._stalled_since = self.loop.time()
        self._stalled_size = self._transport.get_write_buffer_size()

    def resume_writing(self) -> None:
        self.is_stalled = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        self._waiter = None
        if self._stage is _LINGER:
            self._deadline = max(self._deadline, self.loop.time() + self._config.write_timeout)
        if self._current is None:
            self._advance()
            if self._current is None:
                self._await_client()

    # llhttp

    def on_message_begin(self) -> None:
        self._stage = _HEAD
        self._timed = None
        self._spare = 0
        self._header_bytes = 0
        self._header_count = 0
        self._headers = {}
        self._target = b""
        self._is_old = False
        self._keep_alive = True

    def on_url(self, url: bytes) -> None:
        if self._refusal is not None:
            return
        self._target = self._target + url if self._target else url
        if len(self._target) > self._config.max_target_bytes:
            self._target = self._target[: self._config.max_target_bytes]
            self._refusal = _too_large("the path and query", self._config.max_target_bytes)

    def on_header(self, name: bytes, value: bytes | None) -> None:
        if self._stage is not _HEAD or self._refusal is not None:
            # Trailers mean nothing to us.
            return
        if value is None:
            value = b""
        name = name.lower()
        headers = self._headers
        self._header_bytes += len(name) + len(value) + 4
        self._header_count += 1
        # Before lines of one name are joined: joining thousands of them costs the square of their number.
        if self._header_bytes > self._config.max_header_bytes:
            self._refusal = _too_large("the head of the request", self._config.max_header_bytes)
            return
        if self._header_count > self._config.max_header_count:
            self._refusal = EdgeError(
                Reason.REQUEST_TOO_LARGE,
                f"the request has more than {self._config.max_header_count} header lines; leave some out",
            )
            return
        if name in headers:
            if name in _SINGLE:
                self._refusal = EdgeError(
                    Reason.REQUEST_INVALID,
                    f"header {name.decode('latin-1')!r} is given twice",
                    metadata={"field": name.decode("latin-1")},
                )
                return
            headers[name] = headers[name] + b", " + value
        else:
            headers[name] = value

    def on_headers_complete(self) -> None:
        self._stage = _BODY
        self._spare = self._wire = 0
        if self._refusal is not None:
            return
        headers = self._headers
        if not self._target.startswith(b"/"):
            self._target = _origin_form(self._target)
        version = self._parser.get_http_version()
        self._is_old = version == "1.0"
        if version != "1.1" and not self._is_old:
            self._refusal = EdgeError(Reason.REQUEST_INVALID, f"HTTP/{version} is not spoken here; use HTTP/1.1")
        elif b"host" not in headers and not self._is_old:
            self._refusal = EdgeError(Reason.REQUEST_INVALID, "HTTP/1.1 needs a Host header", metadata={"field": "host"})
        coding = headers.get(b"transfer-encoding")
        if coding is not None and (self._is_old or coding.strip().lower() != b"chunked"):
            self._refusal = EdgeError(
                Reason.REQUEST_INVALID,
                "the only transfer coding spoken here is chunked, in HTTP/1.1",
                metadata={"field": "transfer-encoding"},
            )
        length = headers.get(b"content-length")
        if length is not None and int(length) > self._config.max_body_bytes:
            self._refusal = _too_large("the body", self._config.max_body_bytes)
        expectation = headers.get(b"expect")
        if expectation is not None and self._refusal is None:
            if expectation.lower() != b"100-continue":
                self._refusal = EdgeError(
                    Reason.REQUEST_INVALID, "the only expectation met here is 100-continue", metadata={"field": "expect"}
                )
            else:
                self._continue = not self._is_old

    def on_body(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        self._continue = False
        self._spare = 0
        size = self._size + len(data)
        if size > self._config.max_body_bytes:
            self._refusal = _too_large("the body", self._config.max_body_bytes)
            return
        if not self.listener.reserve(len(data)):
            self._refusal = EdgeError(
                Reason.OVERLOADED, "too many request bodies are being read; try again soon", retry_delay=1.0
            )
            return
        if self._size == 0:
            self._body = data
        elif type(self._body) is bytearray:
            self._body += data
        else:
            # One buffer: a list of pieces would let a sender of one-byte chunks fill the memory with object headers.
            self._body = bytearray(self._body) + data
        self._size = size

    def on_message_complete(self) -> None:
        self._continue = False
        keep_alive = self._keep_alive = self._parser.should_keep_alive()
        if self._refusal is not None or self._is_upgraded():
            return
        self._stage = _IDLE
        self._timed = None
        body, self._body = self._body, b""
        self._size = 0  # the exchange holds what was reserved
        self._queue.append(
            Exchange(self, self._parser.get_method(), self._target, self._headers, body, keep_alive, self._is_old)
        )

    # what an Exchange needs

    def write(self, data: bytes) -> None:
        """Sends bytes at the end of this turn of the loop, with what other connections have to send then: see Listener.flush_soon."""
        unsent = self._unsent
        if not unsent:
            self.listener.flush_soon(self)
        unsent.append(data)
        self._unsent_size += len(data)
        if self._unsent_size > _WHOLE_WRITE:
            # A handler that gives piece after piece without waiting must hear from the socket that it is full.
            self.flush()

    def flush(self) -> None:
        """Sends what was written in this turn of the loop now."""
        self.listener.barrier()
        self.hand_over()

    def hand_over(self) -> None:
        """Hands what was written to the socket. For the listener, which has passed the barrier."""
        unsent = self._unsent
        if unsent:
            self._unsent = []
            self._unsent_size = 0
            if len(unsent) == 1:
                self._write(unsent[0])
            else:
                self._transport.writelines(unsent)

    async def writable(self) -> None:
        """Returns when the write buffer is below its low mark."""
        if self.is_stalled:
            waiter = self._waiter = self.loop.create_future()
            await waiter

    def advance_after(self, exchange: Exchange) -> None:
        """Goes on after the answer of `exchange` has been handed over."""
        if self._current is not exchange:
            return
        self._current = None
        self.listener.release(len(exchange.body))
        exchange.body = b""
        if not exchange.keep_alive or self.listener.draining:
            self._end(exchange)
            return
        if self._queue:
            self._advance()
            return
        self._await_client()

    # the listener's

    def sweep(self, now: float) -> None:
        """Ends what has taken too long."""
        if self.is_stalled and self._is_stuck(now):
            self._transport.abort()
            return
        current = self._current
        if current is not None:
            if current.expire_at and now >= current.expire_at and not current.expired and current.task is not None:
                current.expired = True
                current.task.cancel()
            return
        # While we don't read, or wait for the client to read, the time isn't the client's.
        if now < self._deadline or self.is_stalled or not self._reading:
            return
        stage = self._stage
        if stage is _IDLE:
            self._shut()
        elif stage is _LINGER:
            self._transport.abort()
        elif stage is _HEAD:
            self._refuse(_too_slow("the head of the request", self._config.header_timeout))
        elif now >= self._deadline + self._size / self._config.body_minimum_rate:
            self._refuse(_too_slow("the body", self._config.body_timeout))

    def retire(self) -> None:
        """Closes the connection if nothing is going on; else the next answer says that it is the last."""
        if self._current is None and not self._queue and self._stage is _IDLE:
            self._shut()

    def expire(self) -> None:
        """Ends the request in flight as if its time were over."""
        current = self._current
        if current is not None and current.task is not None and not current.expired:
            current.expired = True
            current.task.cancel()

    def abort(self) -> None:
        """Cuts the client off."""
        self._transport.abort()

    # inner workings

    def _advance(self) -> None:
        """Starts the next request. A loop: hundreds of small requests may stand in one read, and each may be answered at once."""
        if self._advancing:
            return
        self._advancing = True
        try:
            while self._queue and self._current is None and not self.is_stalled:
                self._start(self._queue.popleft())
        finally:
            self._advancing = False
        if self._queue:
            if self._reading:
                self._reading = False
                self._transport.pause_reading()
        elif not self._reading and self._current is None:
            self._await_client()

    def _start(self, exchange: Exchange) -> None:
        self._current = exchange
        if exchange.refusal is not None:
            self.listener.application.refuse(exchange, exchange.refusal)
            return
        work = self.listener.application.handle(exchange)
        if work is not None:
            exchange.run(work)

    def _await_client(self) -> None:
        """Nothing is being answered: what the client does next begins its time now."""
        if not self._reading:
            self._resume()
        stage = self._stage
        config = self._config
        if stage is not _LINGER:
            limit = config.idle_timeout if stage is _IDLE else config.header_timeout if stage is _HEAD else config.body_timeout
            self._deadline = self.loop.time() + limit
            if self._continue:
                self._invite()

    def _remember(self, data: bytes) -> None:
        """Keeps the head of the one request that `data` is, if it is one, with a body of a length that it says."""
        if len(self._queue) != 1:
            return
        exchange = self._queue[0]
        headers = exchange.headers
        if not exchange.keep_alive or exchange.is_old or b"content-length" not in headers:
            return
        for name in _NEVER_REPEATED:
            if name in headers:
                return
        size = data.find(b"\r\n\r\n") + 4
        if size + len(exchange.body) != len(data):
            # llhttp skips line ends behind a body: where the head ends must not be told from the end of what was read.
            return
        head = data[:size]
        line = _LENGTH_LINE.search(head)
        if line is None or line.group(1) != headers[b"content-length"]:
            return
        # A client whose heads differ from request to request costs itself nothing but the first few.
        self._heads_left -= 1
        begin, end = line.span(1)
        self._head = _Head(head[:begin], head[end:], head[begin:end], exchange.method, exchange.target, headers)

    def _repeats(self, known: _Head, data: bytes) -> bool:
        """Takes `data` if it is one whole request with the head that is known, but for the number of its length.

        Most clients send the same head with every request of a connection. What llhttp found good once it needn't read again; whatever is
        not the same byte for byte goes to it.
        """
        if not data.startswith(known.before):
            return False
        begin = len(known.before)
        # Optional white space may stand behind the number.
        end = data.find(known.behind[:1], begin, begin + _MOST_DIGITS)
        digits = data[begin:end]
        if end < 0 or not digits.isdigit() or not data.startswith(known.behind, end):
            return False
        size = int(digits)
        at = end + len(known.behind)
        if len(data) - at != size or size > self._config.max_body_bytes or not self.listener.reserve(size):
            return False
        headers = known.headers if digits == known.digits else {**known.headers, b"content-length": digits}
        self._keep_alive = True
        self._queue.append(Exchange(self, known.method, known.target, headers, data[at:], True, False))
        return True

    def _resume(self) -> None:
        self._reading = True
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def _parse(self, data: bytes | memoryview) -> None:
        while True:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                if self._refusal is not None:
                    return
                if not self._is_upgraded():
                    # CONNECT: what follows is another protocol, which we don't speak.
                    self._leave()
                    return
                # A view: copying the rest once per request would cost the square of their number.
                data = memoryview(data)[upgrade.args[0] :]
                self._parse_plainly()
                if self._refusal is None:
                    continue
            except httptools.HttpParserError as error:
                if self._refusal is None and self._stage is _IDLE and not self._keep_alive:
                    # Bytes after a request that said `Connection: close`: the request is answered, the bytes are nobody's.
                    self._leave()
                elif self._refusal is None:
                    self._refusal = EdgeError(Reason.REQUEST_INVALID, f"this is not HTTP/1.1 as RFC 9112 has it: {error}")
            return

    def _is_upgraded(self) -> bool:
        return self._parser.should_upgrade() and self._parser.get_method() != b"CONNECT"

    def _parse_plainly(self) -> None:
        """Parses the head again without its wish for another protocol.

        RFC 9110, 7.8: a server may ignore Upgrade and go on in HTTP/1.1. Java's HttpClient wishes h2c with every first request, one
        with a body too, and httptools takes such a body for the other protocol's bytes.
        """
        method, headers, connection = self._parser.get_method(), self._headers, self._headers.get(b"connection", b"")
        lines = [b"%b %b HTTP/1.1\r\n" % (method, self._target)]
        lines += [b"%b: %b\r\n" % (name, value) for name, value in headers.items() if name not in _HOP_HEADERS]
        if b"close" in [token.strip().lower() for token in connection.split(b",")]:
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        self._parser = httptools.HttpRequestParser(self)
        try:
            self._parser.feed_data(b"".join(lines))
        except httptools.HttpParserError as error:
            self._refusal = EdgeError(Reason.REQUEST_INVALID, f"this is not HTTP/1.1 as RFC 9112 has it: {error}")

    def _check_framing(self, stage: _Stage) -> None:
        """Bounds what no callback counts: a head or trailer that never ends (llhttp hands over whole lines), chunk extensions."""
        config = self._config
        if stage is _HEAD:
            if self._spare > config.max_header_bytes + config.max_target_bytes:
                self._refusal = _too_large("the head of the request", config.max_header_bytes)
        elif stage is _BODY and max(self._spare, self._wire - _FRAMING_FACTOR * self._size) > config.max_header_bytes:
            self._refusal = _too_large("the framing of the body, its trailers included,", config.max_header_bytes)

    def _is_stuck(self, now: float) -> bool:
        """Whether the client has read less than a buffer's worth in the write timeout. A long answer may take long as a whole."""
        size = self._transport.get_write_buffer_size()
        if size > self._stalled_size:
            self._stalled_size = size
        elif size <= self._stalled_size - self._config.write_buffer_bytes:
            self._stalled_size = size
            self._stalled_since = now
        return now - self._stalled_since > self._config.write_timeout

    def _invite(self) -> None:
        if self._stage is _BODY and self._current is None and not self._queue and self._refusal is None:
            self._continue = False
            self.write(CONTINUE)

    def _refuse(self, failure: Failure) -> None:
        """Answers with `failure` after the requests that came before, then closes. Nothing more is parsed."""
        self._refusal = failure
        self._drop_body()
        self._stage = _LINGER
        # A method is known when a target is; to HEAD even a refusal has no body.
        method = self._parser.get_method() if self._target else b"GET"
        exchange = Exchange(self, method, self._target, self._headers, b"", False, self._is_old)
        exchange.refusal = failure
        self._queue.append(exchange)
        if self._current is None:
            self._advance()

    def _leave(self) -> None:
        """Parses nothing more; the last request that came whole is the last one answered."""
        self._drop_body()
        self._stage = _LINGER
        last = self._queue[-1] if self._queue else self._current
        if last is None:
            self._shut()
        else:
            last.keep_alive = False

    def _end(self, last: Exchange) -> None:
        """Closes after the last answer.

        A client that is still sending when it is refused would get a reset, which throws away the refusal before it is read. So our
        side is closed first, and what still comes is thrown away for a moment.
        """
        unread = self._stage is not _IDLE or not self._reading or bool(self._queue)
        self._drop_queue()
        if not unread or not self._admitted or self._config.linger_timeout == 0:
            self._shut()
            return
        self._stage = _LINGER
        self._drop_body()
        if not self._reading:
            self._resume()
        self.flush()
        unsent = self._transport.get_write_buffer_size()
        self._deadline = self.loop.time() + (self._config.write_timeout if unsent else self._config.linger_timeout)
        if not self._transport.is_closing() and self._transport.can_write_eof():
            self._transport.write_eof()

    def _shut(self) -> None:
        """Closes when the client has got what was written, or hasn't read it in time."""
        self._stage = _LINGER
        self._drop_body()
        self._reading = True
        self._deadline = self.loop.time() + self._config.write_timeout
        self.flush()
        self._transport.close()

    def _drop_queue(self) -> None:
        """Gives up requests that came after the last one that is answered: its answer has said so."""
        for exchange in self._queue:
            exchange.closed = True
            self.listener.release(len(exchange.body))
        self._queue.clear()

    def _drop_body(self) -> None:
        self.listener.release(self._size)
        self._size = 0
        self._body = b""


class Listener:
    """A listening socket and its connections."""

    def __init__(self, config: EdgeConfig, application: Application, barrier: Callable[[], None]) -> None:
        """`barrier` is called before bytes are handed to a socket."""
        self.barrier = barrier
        self.config = config
        self.application = application
        self.draining = False
        self.date_line = b""
        """`date: …` with its end of line, at most one sweep old."""
        self.tasks: set[asyncio.Task[None]] = set()
        """Handlers at work; one that was cancelled is among them until it has ended."""
        self.port = 0
        self._connections: set[Connection] = set()
        self._unsent: list[Connection] = []
        self._buffered = 0
        self._server: asyncio.Server | None = None
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def connection_count(self) -> int:
        """Open connections."""
        return len(self._connections)

    @property
    def buffered_bytes(self) -> int:
        """Bytes of bodies that are held, those still coming in included."""
        return self._buffered

    def admit(self, connection: Connection) -> bool:
        """Counts a new connection; False: there are too many."""
        if len(self._connections) >= self.config.max_connections:
            return False
        self._connections.add(connection)
        self._empty.clear()
        return True

    def forget(self, connection: Connection) -> None:
        """A connection is gone."""
        self._connections.discard(connection)
        if not self._connections:
            self._empty.set()

    def flush_soon(self, connection: Connection) -> None:
        """Lets `connection` send at the end of this turn of the loop, together with the others that write in it.

        To send wakes whoever reads. A client on this machine that is woken for each of thirty answers costs us thirty wake-ups, which
        on a virtual machine take longer than the answers; of thirty sent in a row it sleeps through none.
        """
        if not self._unsent:
            connection.loop.call_soon(self._flush)
        self._unsent.append(connection)

    def _flush(self) -> None:
        connections, self._unsent = self._unsent, []
        try:
            self.barrier()
        except BaseException:
            # Better no answer, for which the client asks again, than one whose cost nobody has written down.
            for connection in connections:
                connection.abort()
            raise
        for connection in connections:
            try:
                connection.hand_over()
            # A transport that refuses its bytes must not keep the answers of others.
            except Exception:  # noqa: BLE001
                connection.abort()

    def reserve(self, size: int) -> bool:
        """Counts `size` bytes of a body; False: too many are held already."""
        buffered = self._buffered + size
        if buffered > self.config.max_buffered_bytes:
            return False
        self._buffered = buffered
        return True

    def release(self, size: int) -> None:
        """Gives back what was reserved."""
        self._buffered -= size

    async def drain(self) -> None:
        """Accepts nothing more, lets requests in flight end, and cuts off those that haven't after `drain_timeout`.

        Each answer from now on says `Connection: close`. Returns when every connection is gone and every handler has ended.
        """
        self.draining = True
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.retire()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), self.config.drain_timeout)
        # Those that haven't ended get to say so: a client must be able to tell a stream that was cut from one that is whole.
        for connection in list(self._connections):
            connection.expire()
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=_SETTLE_SECONDS)
        await self._cut_off()

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Listens while the context is open. OSError when the address is taken."""
        loop = asyncio.get_running_loop()
        self._sweep(loop.time())
        server = await loop.create_server(
            lambda: Connection(self, loop),
            self.config.host,
            self.config.port,
            backlog=self.config.backlog,
            family=socket.AF_INET6 if ":" in self.config.host else socket.AF_INET,
        )
        self._server = server
        self.port = server.sockets[0].getsockname()[1]
        sweeper = loop.create_task(self._sweep_for_ever())
        try:
            yield
        finally:
            server.close()
            await self._cut_off()
            sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sweeper

    async def _sweep_for_ever(self) -> None:
        config = self.config
        shortest = min(
            config.header_timeout, config.body_timeout, config.idle_timeout, config.write_timeout, config.linger_timeout or 1.0
        )
        interval = min(0.25, max(0.01, shortest / 8))
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(interval)
            self._sweep(loop.time())

    def _sweep(self, now: float) -> None:
        self.date_line = b"date: %b\r\n" % formatdate(usegmt=True).encode("ascii")
        for connection in list(self._connections):
            connection.sweep(now)

    async def _cut_off(self) -> None:
        for connection in list(self._connections):
            connection.abort()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), _SETTLE_SECONDS)
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=_SETTLE_SECONDS)


def _origin_form(target: bytes) -> bytes:
    """The path and query of an absolute address, as proxies send it (RFC 9112, 3.2.2); other forms as they are."""
    scheme, separator, rest = target.partition(b"://")
    if not separator or scheme.lower() not in (b"http", b"https"):
        return target
    end = min(position for position in (rest.find(b"/"), rest.find(b"?"), len(rest)) if position >= 0)
    path = rest[end:]
    return path if path.startswith(b"/") else b"/" + path


def _too_large(what: str, limit: int) -> EdgeError:
    return EdgeError(Reason.REQUEST_TOO_LARGE, f"{what} is larger than {limit} bytes", metadata={"limit_bytes": str(limit)})


def _too_slow(what: str, limit: float) -> EdgeError:
    return EdgeError(
        Reason.REQUEST_TOO_SLOW, f"{what} did not arrive within {limit:g} s", metadata={"limit_seconds": f"{limit:g}"}
    )
