"""A loopback HTTP/1.1 server that plays a provider: it records what it is asked and answers as the test scripts it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from services.execution.adapters.http1 import Pool

PATIENCE: Final = 10.0
"""Seconds after which an event that a test awaits is taken for one that never comes."""


class Exchange:
    """One request, and the means to answer it."""

    def __init__(
        self, connection: int, method: str, path: str, headers: Mapping[str, str], body: bytes, upstream: Upstream
    ) -> None:
        self.connection = connection
        """Number of the connection, from 0 in the order in which they were accepted."""
        self.method = method
        self.path = path
        self.headers = headers
        """Names in lower case."""
        self.body = body
        self.upstream = upstream
        self._reader, self.writer = upstream.streams[connection]

    @property
    def document(self) -> Any:
        """The body as JSON."""
        return orjson.loads(self.body)

    async def send(self, *pieces: bytes) -> None:
        """Sends the pieces one by one; on loopback each is read before the next is sent."""
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            # One turn of the loop for the other side's socket, one for whom it wakes.
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def gone(self) -> None:
        """Returns when the other side has closed this connection."""
        async with asyncio.timeout(PATIENCE):
            with contextlib.suppress(ConnectionError):
                while await self._reader.read(65536):
                    pass

    def reset(self) -> None:
        """Closes the connection at once, without a word."""
        self.writer.transport.abort()


Script = Callable[[Exchange], Awaitable[None]]
"""Answers one request. The connection is kept after it unless it was closed."""


class Upstream:
    """The server. `scripts` are used up in order; the last one stays."""

    def __init__(self) -> None:
        self.scripts: deque[Script] = deque()
        self.exchanges: list[Exchange] = []
        self.streams: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.ended: list[asyncio.Event] = []
        """One per connection: set when it is over."""
        self.asked = asyncio.Event()
        """Set when a request has been read."""
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """Its base URL."""
        return f"http://127.0.0.1:{self.port}"

    def plays(self, *scripts: Script) -> None:
        """What it answers from now on."""
        self.scripts = deque(scripts)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        number = len(self.streams)
        self.streams.append((reader, writer))
        self.ended.append(asyncio.Event())
        try:
            while not writer.is_closing():
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, path, _ = head[0].split(" ")
                pairs = (line.split(": ", 1) for line in head[1:] if line)
                headers = {name.lower(): value for name, value in pairs}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                exchange = Exchange(number, method, path, headers, body, self)
                self.exchanges.append(exchange)
                script = self.scripts.popleft() if len(self.scripts) > 1 else self.scripts[0]
                self.asked.set()
                await script(exchange)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            # Cancelled by `close`; asyncio's own callback can't bear a cancelled handler.
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()
            self.ended[number].set()

    async def close(self) -> None:
        """Ends every connection."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def upstream(*scripts: Script) -> AsyncIterator[Upstream]:
    """A running upstream."""
    made = Upstream()
    made.plays(*scripts)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
        await made.close()


@contextlib.asynccontextmanager
async def pool_to(url: str, **options: Any) -> AsyncIterator[Pool]:
    """A pool to `url` that is closed at the end."""
    settings: dict[str, Any] = {
        "connect_timeout": 5.0,
        "max_connections": 64,
        "keep_alive": 60.0,
        "max_answer_bytes": 1024 * 1024,
        **options,
    }
    pool = Pool(url, **settings)
    try:
        yield pool
    finally:
        pool.close()


@dataclass(frozen=True, slots=True)
class Reply:
    """Parts of a scripted answer."""

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()

    def head(self, *more: tuple[str, str]) -> bytes:
        """Status line and headers."""
        lines = [f"HTTP/1.1 {self.status} Scripted", *(f"{name}: {value}" for name, value in (*self.headers, *more))]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def whole(body: bytes, status: int = 200, **headers: str) -> Script:
    """Answers with `body` and its length. Underscores of header names stand for hyphens."""
    named = tuple((name.replace("_", "-"), value) for name, value in headers.items())

    async def answer(exchange: Exchange) -> None:
        await exchange.send(Reply(status, named).head(("content-length", str(len(body)))) + body)

    return answer


def document(content: Any, status: int = 200, **headers: str) -> Script:
    """Answers with JSON."""
    return whole(orjson.dumps(content), status, content_type="application/json", **headers)


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def chunked(pieces: Iterable[bytes], *, ends: bool = True) -> Script:
    """Answers with a chunked body, piece by piece. With `ends` false the connection is reset instead of the last chunk."""

    async def answer(exchange: Exchange) -> None:
        await exchange.send(Reply().head(("content-type", "text/event-stream"), ("transfer-encoding", "chunked")))
        await exchange.send(*(chunk(piece) for piece in pieces))
        if ends:
            await exchange.send(b"0\r\n\r\n")
        else:
            exchange.reset()

    return answer


async def hangs(exchange: Exchange) -> None:
    """Never answers."""
    await exchange.gone()
