"""The listener over real loopback sockets, on asyncio's loop and on uvloop: framing, limits, times, order, cancellation, drain."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvloop

from services.gateway.edge.config import EdgeConfig
from services.gateway.edge.errors import Dialect, error_body, error_head, status_of
from services.gateway.edge.http1 import Connection, Exchange, Listener
from services.runtime.barrier import Barrier
from services.runtime.errors import Failure, Reason

OK = b"HTTP/1.1 200 OK\r\n"
HOST = b"host: sluice\r\n"
GET = b"GET /%b HTTP/1.1\r\nhost: sluice\r\n\r\n"
Handler = Callable[[Exchange], Coroutine[Any, Any, None] | None]


def on_both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs a test on asyncio's loop and on uvloop: production has uvloop, whose transports differ in when they pause and close.

    Written here since pytest-asyncio's hook for that reaches every test of the run. A test that waits for what never comes fails.
    """

    @functools.wraps(test)
    def run(loop_factory: Callable[[], asyncio.AbstractEventLoop], **arguments: Any) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(30):
                await test(**arguments)

        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(bounded())

    signature = inspect.signature(test)
    added = inspect.Parameter("loop_factory", inspect.Parameter.KEYWORD_ONLY)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), added])  # type: ignore[attr-defined]
    loops = pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
    marked: Callable[..., None] = loops(run)
    return marked


@dataclass
class Site:
    """A listener and what its application saw."""

    handler: Handler
    config: EdgeConfig
    seen: list[tuple[bytes, bytes, bytes]] = field(default_factory=list)
    headers: list[dict[bytes, bytes]] = field(default_factory=list)
    refused: list[Failure] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.listener = Listener(self.config, self, Barrier())

    def handle(self, exchange: Exchange) -> Coroutine[Any, Any, None] | None:
        self.seen.append((exchange.method, exchange.target, bytes(exchange.body)))
        self.headers.append(exchange.headers)
        return self.handler(exchange)

    def refuse(self, exchange: Exchange, failure: Failure) -> None:
        self.refused.append(failure)
        exchange.respond(error_head(failure, "r1"), error_body(failure, Dialect.OPENAI, "r1"))

    @property
    def paths(self) -> list[bytes]:
        return [target for _, target, _ in self.seen]

    async def client(self, *, receive_buffer: int = 0) -> Client:
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.listener.port))
        # A small limit keeps asyncio's own buffer from reading ahead for a client that is meant to be slow.
        reader, writer = await asyncio.open_connection(sock=sock, limit=16_384)
        return Client(reader, writer)


@dataclass
class Answer:
    """One answer as it came."""

    status: int
    headers: dict[str, str]
    body: bytes
    pieces: list[bytes] = field(default_factory=list)


@dataclass
class Client:
    """A client that sends what it is told to, byte for byte."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, *, to_head: bool = False) -> Answer:
        """The next answer, read as RFC 9112 says."""
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        version, status, _ = lines[0].split(" ", 2)
        assert version == "HTTP/1.1"
        pairs = [line.split(": ", 1) for line in lines[1:]]
        headers = dict(pairs)
        assert len(headers) == len(pairs), "no header stands twice"
        code = int(status)
        if to_head or code == 100:
            return Answer(code, headers, b"")
        if headers.get("transfer-encoding") == "chunked":
            assert "content-length" not in headers
            pieces = []
            while (size := int(await self.reader.readuntil(b"\r\n"), 16)) > 0:
                pieces.append(await self.reader.readexactly(size))
                assert await self.reader.readexactly(2) == b"\r\n"
            assert await self.reader.readexactly(2) == b"\r\n"
            return Answer(code, headers, b"".join(pieces), pieces)
        if "content-length" in headers:
            return Answer(code, headers, await self.reader.readexactly(int(headers["content-length"])))
        return Answer(code, headers, await self.reader.read())

    async def ask(self, data: bytes) -> Answer:
        await self.send(data)
        return await self.answer()

    async def is_closed(self) -> bool:
        """Waits for the server's end; True when nothing more came before it."""
        try:
            return await self.reader.read() == b""
        except ConnectionError:
            return True

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


async def echo(exchange: Exchange) -> None:
    exchange.respond(OK, b" ".join((exchange.method, exchange.target, exchange.body)))


def at_once(exchange: Exchange) -> None:
    exchange.respond(OK, b" ".join((exchange.method, exchange.target, exchange.body)))


@contextlib.asynccontextmanager
async def listening(handler: Handler = echo, **settings: Any) -> AsyncIterator[Site]:
    site = Site(handler, EdgeConfig(**{"port": 0, "linger_timeout": 0.02, "drain_timeout": 5.0, **settings}))
    async with site.listener.listening():
        yield site
    assert site.listener.connection_count == 0
    assert site.listener.buffered_bytes == 0
    assert not site.listener.tasks


async def until(condition: Callable[[], bool]) -> None:
    """Waits for what has no event."""
    while not condition():
        await asyncio.sleep(0.002)


class Gate:
    """A handler that answers when it is told to, and says what becomes of it."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.opened = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def __call__(self, exchange: Exchange) -> None:
        self.entered.set()
        try:
            await self.opened.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        exchange.respond(OK, b" ".join((exchange.target, exchange.body)))


def post(body: bytes, path: bytes = b"/echo", extra: bytes = b"") -> bytes:
    return b"POST %b HTTP/1.1\r\n%bcontent-length: %d\r\n%b\r\n%b" % (path, HOST, len(body), extra, body)


def chunked(*chunks: bytes, path: bytes = b"/echo", trailers: bytes = b"") -> bytes:
    framed = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return b"POST %b HTTP/1.1\r\n%btransfer-encoding: chunked\r\n\r\n%b0\r\n%b\r\n" % (path, HOST, framed, trailers)


# requests and their order


@pytest.mark.parametrize("handler", [echo, at_once])
@on_both_loops
async def test_requests_of_one_connection_follow_each_other(handler: Handler) -> None:
    async with listening(handler) as site:
        client = await site.client()
        for number in range(3):
            answer = await client.ask(post(b"body %d" % number))
            assert answer.status == 200
            assert answer.body == b"POST /echo body %d" % number
            assert "connection" not in answer.headers
            assert answer.headers["date"].endswith("GMT")
        assert site.listener.connection_count == 1


@pytest.mark.parametrize("handler", [echo, at_once])
@on_both_loops
async def test_pipelined_requests_are_answered_in_their_order(handler: Handler) -> None:
    async with listening(handler) as site:
        client = await site.client()
        await client.send(b"".join(GET % b"%d" % number for number in range(500)))
        for number in range(500):
            assert (await client.answer()).body == b"GET /%d " % number
        assert (await client.ask(GET % b"last")).body == b"GET /last "


def same_head(body: bytes, length: bytes | None = None, extra: bytes = b"") -> bytes:
    said = b"%d" % len(body) if length is None else length
    return b"POST /echo?a=b HTTP/1.1\r\n%bX-Kept: Yes\r\nContent-Length: %b\r\n%b\r\n%b" % (HOST, said, extra, body)


@on_both_loops
async def test_a_head_that_is_repeated_means_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bytes] = []
    repeats = Connection._repeats

    def seen(self: Connection, known: Any, data: bytes) -> bool:
        is_taken = repeats(self, known, data)
        if is_taken:
            taken.append(data)
        return is_taken

    monkeypatch.setattr(Connection, "_repeats", seen)
    async with listening() as site:
        client = await site.client()
        bodies = [b"first", b"other", b"longer than before", b"", b"x" * 12_345, b"short"]
        for body in bodies:
            assert (await client.ask(same_head(body))).body == b"POST /echo?a=b " + body
        assert len(taken) == len(bodies) - 1
        assert [headers[b"content-length"] for headers in site.headers] == [b"%d" % len(body) for body in bodies]
        assert all(headers[b"x-kept"] == b"Yes" for headers in site.headers)
        taken.clear()
        # In two reads, two in one read, another head, and the parser's own view of the connection afterwards.
        whole = same_head(b"in two reads")
        for cut in (1, 40, len(whole) - 3):
            await client.send(whole[:cut])
            await asyncio.sleep(0.01)
            assert (await client.ask(whole[cut:])).body == b"POST /echo?a=b in two reads"
        await client.send(same_head(b"one") + same_head(b"two"))
        assert [(await client.answer()).body for _ in range(2)] == [b"POST /echo?a=b one", b"POST /echo?a=b two"]
        assert (await client.ask(same_head(b"more", extra=b"x-more: 1\r\n"))).body == b"POST /echo?a=b more"
        assert site.headers[-1][b"x-more"] == b"1"
        assert not taken
        assert (await client.ask(GET % b"last")).body == b"GET /last "
        assert site.listener.buffered_bytes == 0


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (same_head(b"body", b"+4"), 400),
        (same_head(b"body", b"-4"), 400),
        (same_head(b"body", b"0x4"), 400),
        (same_head(b"body", b"4, 4"), 400),
        (same_head(b"body", b"4\r\nContent-Length: 5"), 400),
        (same_head(b"body", b"4\r\nTransfer-Encoding: chunked"), 400),
        (same_head(b"body", b"99999999999999999999999999"), 400),
        (same_head(b"x" * 5000), 413),
        (same_head(b"body", b"5000"), 413),
        (b"\x00" * 40, 400),
    ],
)
@on_both_loops
async def test_what_only_looks_like_the_head_before_is_refused_as_ever(data: bytes, status: int) -> None:
    for times in (0, 2):
        async with listening(max_body_bytes=4096) as site:
            client = await site.client()
            for _ in range(times):
                assert (await client.ask(same_head(b"body"))).status == 200
            assert (await client.ask(data)).status == status
            assert len(site.seen) == times
            assert await client.is_closed()


@pytest.mark.parametrize("opening", [b"\r\n", b"\r\n\r\n", b"x" * 76 + b"\r\n\r\n"])
@on_both_loops
async def test_line_ends_behind_a_body_do_not_make_its_begin_a_part_of_the_head(opening: bytes) -> None:
    """llhttp skips them. Taken for the end of the body they would make the next request's body end in the request behind it."""
    async with listening() as site:
        client = await site.client()
        body = opening + b"a" * 20
        assert (await client.ask(same_head(body) + b"\r\n" * (len(opening) // 2))).body == b"POST /echo?a=b " + body
        other = same_head(b"of another")
        # All of one request and the begin of the next in one read, as long as the first was with its line ends.
        body = opening + b"b" * 20
        await client.send(same_head(body) + other[: len(opening)])
        await asyncio.sleep(0.01)
        await client.send(other[len(opening) :])
        assert [(await client.answer()).body for _ in range(2)] == [b"POST /echo?a=b " + body, b"POST /echo?a=b of another"]


@on_both_loops
async def test_heads_that_differ_each_time_are_not_remembered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    remembered: list[bytes] = []
    remember = Connection._remember

    def counted(self: Connection, data: bytes) -> None:
        remembered.append(data)
        remember(self, data)

    monkeypatch.setattr(Connection, "_remember", counted)
    async with listening() as site:
        client = await site.client()
        for number in range(10):
            body = b"body %d" % number
            answer = await client.ask(same_head(body, extra=b"x-request-id: %d\r\n" % number))
            assert answer.body == b"POST /echo?a=b " + body
            assert site.headers[-1][b"x-request-id"] == b"%d" % number
        assert len(remembered) == 3


@on_both_loops
async def test_bodies_behind_a_repeated_head_count_as_held() -> None:
    gate = Gate()
    async with listening(gate, max_buffered_bytes=10_000) as site:
        first, second = await site.client(), await site.client()
        gate.opened.set()
        for client in (first, second):
            await client.ask(same_head(b"x" * 6000))
        gate.opened.clear()
        gate.entered.clear()
        await first.send(same_head(b"y" * 6000))
        await gate.entered.wait()
        assert (await second.ask(same_head(b"z" * 6000))).status == 503
        gate.opened.set()
        assert (await first.answer()).status == 200


@pytest.mark.parametrize("size", [10, 70_000])
@on_both_loops
async def test_an_answer_passes_the_barrier_before_it_is_sent(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below 64 KiB it leaves at the end of the turn, above at once."""
    events: list[str] = []
    hand_over = Connection.hand_over

    def noticed(connection: Connection) -> None:
        if connection._unsent:
            events.append("sent")
        hand_over(connection)

    monkeypatch.setattr(Connection, "hand_over", noticed)

    async def handler(exchange: Exchange) -> None:
        events.append("answered")
        exchange.respond(b"HTTP/1.1 200 OK\r\n", b"x" * size)

    async def pieces(exchange: Exchange) -> None:
        exchange.open(b"HTTP/1.1 200 OK\r\n")
        for _ in range(3):
            await asyncio.sleep(0.001)
            events.append("piece")
            exchange.send(b"x" * size)
        exchange.close()

    async with listening(handler) as site:
        site.listener.barrier = lambda: events.append("barrier")
        client = await site.client()
        assert len((await client.ask(GET % b"x")).body) == size
        assert events[:3] == ["answered", "barrier", "sent"]
        events.clear()
        site.handler = pieces
        assert len((await client.ask(GET % b"x")).body) == 3 * size
        for index, event in enumerate(events):
            assert event != "piece" or events[index + 1 : index + 3] == ["barrier", "sent"]
            assert event != "sent" or events[index - 1] == "barrier"
        assert events.count("piece") == 3
        events.clear()
        # A refusal, and the end of the connection after it.
        assert (await client.ask(b"nonsense\r\n\r\n")).status == 400
        assert "barrier" in events


@on_both_loops
async def test_what_does_not_pass_the_barrier_is_not_answered_and_its_client_is_not_left_waiting() -> None:
    async with listening(at_once) as site:

        def broken() -> None:
            raise OSError("no")

        first, second = await site.client(), await site.client()
        assert (await first.ask(GET % b"x")).status == 200
        site.listener.barrier = broken
        await first.send(GET % b"x")
        await second.send(GET % b"x")
        for client in (first, second):
            assert await client.reader.read() == b""
        site.listener.barrier = lambda: None
        assert (await (await site.client()).ask(GET % b"x")).status == 200


@on_both_loops
async def test_a_quick_request_waits_for_the_slow_one_before_it() -> None:
    gate = Gate()

    def handler(exchange: Exchange) -> Coroutine[Any, Any, None] | None:
        if exchange.target == b"/slow":
            return gate(exchange)
        at_once(exchange)
        return None

    async with listening(handler) as site:
        client = await site.client()
        await client.send(GET % b"slow")
        await gate.entered.wait()
        await client.send(GET % b"quick" + post(b"later"))
        other = await site.client()
        await other.ask(GET % b"other")
        assert site.paths == [b"/slow", b"/other"]
        gate.opened.set()
        bodies = [(await client.answer()).body for _ in range(3)]
        assert bodies == [b"/slow ", b"GET /quick ", b"POST /echo later"]


@on_both_loops
async def test_one_byte_at_a_time_means_the_same() -> None:
    stream = (
        b"\r\n" + GET % b"a?b=c" + post(b"whole") + chunked(b"one", b"two", trailers=b"x-sum: 1\r\n") + chunked()
        + b"POST /old HTTP/1.0\r\ncontent-length: 2\r\n\r\nhi"
    )  # fmt: skip
    wanted = [
        (b"GET", b"/a?b=c", b""), (b"POST", b"/echo", b"whole"), (b"POST", b"/echo", b"onetwo"), (b"POST", b"/echo", b""),
        (b"POST", b"/old", b"hi"),
    ]  # fmt: skip
    async with listening() as site:
        client = await site.client()
        for position in range(len(stream)):
            await client.send(stream[position : position + 1])
            await asyncio.sleep(0)
        for _ in wanted:
            assert (await client.answer()).status == 200
        assert await client.is_closed()
        assert site.seen == wanted
        site.seen.clear()
        other = await site.client()
        await other.send(stream)
        assert [(await other.answer()).status for _ in wanted] == [200] * len(wanted)
        assert site.seen == wanted


@on_both_loops
async def test_header_names_are_lower_case_and_lines_of_one_name_are_joined() -> None:
    async with listening() as site:
        client = await site.client()
        await client.ask(b"GET / HTTP/1.1\r\nHoSt: a\r\nX-One: 1\r\nx-one:  2  \r\nX-Empty:\r\nX-Text: caf\xe9\r\n\r\n")
        (headers,) = site.headers
        assert headers[b"host"] == b"a"
        assert headers[b"x-one"].replace(b" ", b"") == b"1,2"
        assert headers[b"x-empty"] == b""
        assert headers[b"x-text"] == b"caf\xe9"


@on_both_loops
async def test_trailers_change_no_header() -> None:
    async with listening() as site:
        client = await site.client()
        answer = await client.ask(chunked(b"x", trailers=b"authorization: Bearer stolen\r\nhost: other\r\n"))
        assert answer.status == 200
        assert b"authorization" not in site.headers[0]
        assert site.headers[0][b"host"] == b"sluice"


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        (b"http://sluice/v1/models?a=b", b"/v1/models?a=b"),
        (b"HTTPS://sluice:8080/x", b"/x"),
        (b"http://sluice", b"/"),
        (b"http://sluice?a=/b", b"/?a=/b"),
        (b"*", b"*"),
    ],
)
@on_both_loops
async def test_absolute_targets_of_proxies_are_paths(target: bytes, wanted: bytes) -> None:
    async with listening() as site:
        client = await site.client()
        await client.ask(b"OPTIONS %b HTTP/1.1\r\n%b\r\n" % (target, HOST))
        assert site.paths == [wanted]


@on_both_loops
async def test_head_gets_the_length_but_no_body() -> None:
    async with listening() as site:
        client = await site.client()
        await client.send(b"HEAD /h HTTP/1.1\r\n" + HOST + b"\r\n" + GET % b"after")
        answer = await client.answer(to_head=True)
        assert (answer.status, answer.headers["content-length"]) == (200, str(len(b"HEAD /h ")))
        assert (await client.answer()).body == b"GET /after "


@on_both_loops
async def test_head_of_a_stream_gets_the_head_only() -> None:
    async def handler(exchange: Exchange) -> None:
        exchange.open(OK)
        assert exchange.send(b"piece")
        exchange.close()

    async with listening(handler) as site:
        client = await site.client()
        await client.send(b"HEAD /h HTTP/1.1\r\n" + HOST + b"\r\n" + GET % b"after")
        assert (await client.answer(to_head=True)).status == 200
        assert (await client.answer()).body == b"piece"


@on_both_loops
async def test_a_refused_head_has_no_body() -> None:
    async with listening() as site:
        client = await site.client()
        await client.send(b"HEAD / HTTP/1.1\r\n\r\n")
        assert (await client.answer(to_head=True)).status == 400
        assert await client.is_closed()


# HTTP/1.0, versions, methods, protocols


@on_both_loops
async def test_http_1_0_closes_unless_asked_to_stay() -> None:
    async with listening() as site:
        client = await site.client()
        answer = await client.ask(b"GET /1 HTTP/1.0\r\nconnection: keep-alive\r\n\r\n")
        assert answer.headers["connection"] == "keep-alive"
        answer = await client.ask(b"GET /2 HTTP/1.0\r\n\r\n")
        assert answer.headers["connection"] == "close"
        assert await client.is_closed()


@on_both_loops
async def test_a_stream_to_http_1_0_ends_with_the_connection() -> None:
    async def handler(exchange: Exchange) -> None:
        exchange.open(OK)
        exchange.send(b"one")
        exchange.send(b"two")
        exchange.close()

    async with listening(handler) as site:
        client = await site.client()
        answer = await client.ask(b"GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n")
        assert "transfer-encoding" not in answer.headers
        assert answer.headers["connection"] == "close"
        assert answer.body == b"onetwo"


@on_both_loops
async def test_a_stream_comes_in_chunks_and_the_connection_stays() -> None:
    async def handler(exchange: Exchange) -> None:
        exchange.open(OK + b"content-type: text/event-stream\r\n")
        for piece in (b"a", b"b" * 300, b"c"):
            exchange.send(piece)
        exchange.close()
        exchange.close()
        exchange.respond(OK, b"too late")

    async with listening(handler) as site:
        client = await site.client()
        for _ in range(2):
            assert (await client.ask(GET % b"s")).pieces == [b"a", b"b" * 300, b"c"]


@on_both_loops
async def test_connection_close_is_kept() -> None:
    async with listening() as site:
        client = await site.client()
        await client.send(b"GET /1 HTTP/1.1\r\n" + HOST + b"connection: close\r\n\r\n" + GET % b"2")
        answer = await client.answer()
        assert (answer.body, answer.headers["connection"]) == (b"GET /1 ", "close")
        assert await client.is_closed()
        assert site.paths == [b"/1"]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"BREW / HTTP/1.1\r\n" + HOST + b"\r\n", id="unknown method"),
        pytest.param(b"get / HTTP/1.1\r\n" + HOST + b"\r\n", id="method in lower case"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="preface of HTTP/2"),
        pytest.param(b"GET / HTTP/2.0\r\n" + HOST + b"\r\n", id="HTTP/2.0 in text"),
        pytest.param(b"GET / HTTP/1.2\r\n" + HOST + b"\r\n", id="HTTP/1.2"),
        pytest.param(b"GET /\r\n\r\n", id="HTTP/0.9"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", id="TLS"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="no Host"),
        pytest.param(b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n", id="two Hosts"),
        pytest.param(b"GET / HTTP/1.1\nhost: a\n\n", id="bare LF"),
        pytest.param(b"GET / HTTP/1.1\r\nx: a\rhost: b\r\n\r\n", id="bare CR"),
        pytest.param(b"GET /\xc3\xa9 HTTP/1.1\r\n" + HOST + b"\r\n", id="target not ASCII"),
        pytest.param(b"GET /a\0b HTTP/1.1\r\n" + HOST + b"\r\n", id="NUL in the target"),
        pytest.param(b"GET / HTTP/1.1\r\n" + HOST + b"x: a\0b\r\n\r\n", id="NUL in a value"),
        pytest.param(b"GET / HTTP/1.1\r\n" + HOST + b"x\0y: a\r\n\r\n", id="NUL in a name"),
        pytest.param(b"GET / HTTP/1.1\r\n" + HOST + b"x: a\r\n folded\r\n\r\n", id="obs-fold"),
        pytest.param(b"GET / HTTP/1.1\r\n x: a\r\n" + HOST + b"\r\n", id="space before the first header"),
        pytest.param(b"GET / HTTP/1.1\r\n" + HOST + b"x : a\r\n\r\n", id="space before the colon"),
        pytest.param(b"GET / HTTP/1.1\r\n" + HOST + b": a\r\n\r\n", id="empty name"),
        pytest.param(b"GET / HTTP/1.1\r\n" + HOST + b"expect: a miracle\r\n\r\n", id="unknown expectation"),
        pytest.param(b"GET / HTTP/1.1\r\n" + HOST + b"authorization: a\r\nauthorization: b\r\n\r\n", id="two keys"),
        pytest.param(
            b"GET / HTTP/1.1\r\n" + HOST + b"idempotency-key: a\r\nidempotency-key: b\r\n\r\n", id="two idempotency keys"
        ),
    ],
)
@on_both_loops
async def test_what_is_not_http_1_1_is_refused_once_and_the_connection_closed(data: bytes) -> None:
    async with listening() as site:
        client = await site.client()
        await client.send(data)
        answer = await client.answer()
        assert answer.status == 400
        assert answer.headers["connection"] == "close"
        assert await client.is_closed()
        assert site.seen == []
        assert [failure.reason for failure in site.refused] == [Reason.REQUEST_INVALID]


_SMUGGLED = GET % b"smuggled"


def framed(headers: bytes, body: bytes, version: bytes = b"1.1") -> bytes:
    return b"POST /x HTTP/%b\r\n%b%b\r\n%b%b" % (version, HOST, headers, body, _SMUGGLED)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(framed(b"content-length: 5\r\ntransfer-encoding: chunked\r\n", b"0\r\n\r\n"), id="CL.TE"),
        pytest.param(framed(b"transfer-encoding: chunked\r\ncontent-length: 5\r\n", b"0\r\n\r\n"), id="TE.CL"),
        pytest.param(framed(b"content-length: 3\r\ncontent-length: 3\r\n", b"abc"), id="two equal lengths"),
        pytest.param(framed(b"content-length: 3\r\ncontent-length: 0\r\n", b"abc"), id="two lengths"),
        pytest.param(framed(b"content-length: 3, 3\r\n", b"abc"), id="list of lengths"),
        pytest.param(framed(b"content-length: +3\r\n", b"abc"), id="signed length"),
        pytest.param(framed(b"content-length: -1\r\n", b""), id="negative length"),
        pytest.param(framed(b"content-length: 0x3\r\n", b"abc"), id="hexadecimal length"),
        pytest.param(framed(b"content-length: 3 4\r\n", b"abc"), id="length of two words"),
        pytest.param(framed(b"content-length:\r\n", b""), id="empty length"),
        pytest.param(framed(b"content-length: 18446744073709551616\r\n", b""), id="length overflows"),
        pytest.param(framed(b"content-length : 3\r\n", b"abc"), id="length with a space in its name"),
        pytest.param(framed(b"transfer-encoding: xchunked\r\n", b"0\r\n\r\n"), id="xchunked"),
        pytest.param(framed(b"transfer-encoding: identity\r\n", b""), id="identity"),
        pytest.param(framed(b"transfer-encoding: chunked, identity\r\n", b"0\r\n\r\n"), id="chunked, identity"),
        pytest.param(framed(b"transfer-encoding: gzip, chunked\r\n", b"0\r\n\r\n"), id="gzip, chunked"),
        pytest.param(framed(b"transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n", b"0\r\n\r\n"), id="two codings"),
        pytest.param(framed(b"transfer-encoding: chunked;q=1\r\n", b"0\r\n\r\n"), id="coding with a parameter"),
        pytest.param(framed(b"transfer-encoding: \x0bchunked\r\n", b"0\r\n\r\n"), id="coding after a vertical tab"),
        pytest.param(framed(b"transfer-encoding:\r\n chunked\r\n", b"0\r\n\r\n"), id="folded coding"),
        pytest.param(framed(b"transfer-encoding:\r\n", b"0\r\n\r\n"), id="empty coding"),
        pytest.param(framed(b"transfer-encoding: chunked\r\n", b"0\r\n\r\n", b"1.0"), id="chunks in HTTP/1.0"),
        *(
            pytest.param(framed(b"transfer-encoding: chunked\r\n", chunks), id=f"chunk {chunks!r}")
            for chunks in (
                b"g\r\n", b"-1\r\n", b"+1\r\na\r\n0\r\n\r\n", b"0x1\r\na\r\n0\r\n\r\n", b" 1\r\na\r\n0\r\n\r\n", b"\r\n",
                b"1 \r\na\r\n0\r\n\r\n", b"1\na\n0\n\n", b"1_0\r\n", b"10000000000000000\r\n", b"1\r\nab\r\n0\r\n\r\n",
                b"2\r\na\r\n0\r\n\r\n", b"1;\n\r\na\r\n0\r\n\r\n", b"1\r\na0\r\n\r\n", b"1;a\0b\r\na\r\n0\r\n\r\n",
            )
        ),
    ],
)  # fmt: skip
@on_both_loops
async def test_ambiguous_framing_is_refused_and_nothing_after_it_is_read(data: bytes) -> None:
    async with listening() as site:
        client = await site.client()
        await client.send(data)
        assert (await client.answer()).status == 400
        assert await client.is_closed()
        assert site.seen == []


@on_both_loops
async def test_good_requests_before_a_bad_one_are_answered_first() -> None:
    gate = Gate()
    async with listening(gate) as site:
        client = await site.client()
        await client.send(post(b"1") + post(b"2") + b"garbage\r\n\r\n" + _SMUGGLED)
        await gate.entered.wait()
        gate.opened.set()
        assert [(await client.answer()).status for _ in range(3)] == [200, 200, 400]
        assert await client.is_closed()
        assert site.paths == [b"/echo", b"/echo"]


@pytest.mark.parametrize(
    "body", [b"content-length: 5\r\n\r\nhello", b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"]
)
@on_both_loops
async def test_an_upgrade_is_ignored_and_the_body_read(body: bytes) -> None:
    # What Java's HttpClient sends with its first request.
    wish = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAA\r\n"
    async with listening() as site:
        client = await site.client()
        request = b"POST /u HTTP/1.1\r\n" + HOST + b"x-one: 1\r\n" + wish + body
        await client.send(request + request + GET % b"next")
        assert [(await client.answer()).body for _ in range(3)] == [b"POST /u hello", b"POST /u hello", b"GET /next "]
        assert site.headers[0][b"x-one"] == b"1"
        answer = await client.ask(request.replace(b"Upgrade,", b"close, Upgrade,"))
        assert (answer.body, answer.headers["connection"]) == (b"POST /u hello", "close")
        assert await client.is_closed()


@on_both_loops
async def test_limits_hold_for_an_upgrade_too() -> None:
    async with listening(max_body_bytes=1024) as site:
        client = await site.client()
        wish = b"connection: upgrade\r\nupgrade: h2c\r\n"
        assert (await client.ask(post(b"a" * 1025, extra=wish))).status == 413
        other = await site.client()
        assert (await other.ask(b"GET / HTTP/1.1\r\n" + wish + b"\r\n")).status == 400


@on_both_loops
async def test_connect_is_answered_and_nothing_after_it_is_read() -> None:
    async with listening() as site:
        client = await site.client()
        await client.send(b"CONNECT other:443 HTTP/1.1\r\n" + HOST + b"\r\n" + _SMUGGLED)
        assert (await client.answer()).body == b"CONNECT other:443 "
        assert await client.is_closed()
        assert site.paths == [b"other:443"]
        other = await site.client()
        assert (await other.ask(b"CONNECT other:443 HTTP/1.1\r\n\r\n")).status == 400


# expectations


@on_both_loops
async def test_a_client_that_waits_is_told_to_go_on() -> None:
    async with listening() as site:
        client = await site.client()
        for _ in range(2):
            answer = await client.ask(b"POST /c HTTP/1.1\r\n" + HOST + b"content-length: 2\r\nexpect: 100-Continue\r\n\r\n")
            assert answer.status == 100
            assert (await client.ask(b"hi")).body == b"POST /c hi"


@on_both_loops
async def test_a_client_that_does_not_wait_is_not_told() -> None:
    async with listening() as site:
        client = await site.client()
        answer = await client.ask(post(b"hi", extra=b"expect: 100-continue\r\n"))
        assert (answer.status, answer.body) == (200, b"POST /echo hi")
        answer = await client.ask(post(b"", extra=b"expect: 100-continue\r\n"))
        assert answer.status == 200


@on_both_loops
async def test_a_body_that_is_too_large_is_refused_before_it_is_sent() -> None:
    async with listening(max_body_bytes=1024) as site:
        client = await site.client()
        head = b"POST /c HTTP/1.1\r\n" + HOST + b"content-length: 1025\r\nexpect: 100-continue\r\n\r\n"
        assert (await client.ask(head)).status == 413
        assert await client.is_closed()


@on_both_loops
async def test_http_1_0_knows_no_interim_answers() -> None:
    async with listening(body_timeout=0.1) as site:
        client = await site.client()
        head = b"POST /c HTTP/1.0\r\ncontent-length: 2\r\nexpect: 100-continue\r\n\r\n"
        # No invitation comes first, so a client that waits for one is told that it waited in vain.
        assert (await client.ask(head)).status == 408
        other = await site.client()
        assert (await other.ask(head + b"hi")).status == 200


@on_both_loops
async def test_the_invitation_waits_for_the_answer_before_it() -> None:
    gate = Gate()
    async with listening(gate) as site:
        client = await site.client()
        await client.send(GET % b"1")
        await gate.entered.wait()
        await client.send(b"POST /2 HTTP/1.1\r\n" + HOST + b"content-length: 2\r\nexpect: 100-continue\r\n\r\n")
        await (await site.client()).send(GET % b"other")
        await until(lambda: len(site.seen) == 2)
        gate.opened.set()
        assert [(await client.answer()).status for _ in range(2)] == [200, 100]
        assert (await client.ask(b"hi")).body == b"/2 hi"


# sizes


@pytest.mark.parametrize("excess", [0, 1])
@on_both_loops
async def test_a_body_may_be_as_large_as_the_limit(excess: int) -> None:
    body = b"a" * (4096 + excess)
    for request in (post(body), chunked(*(body[at : at + 100] for at in range(0, len(body), 100)))):
        async with listening(max_body_bytes=4096) as site:
            client = await site.client()
            answer = await client.ask(request)
            assert answer.status == (413 if excess else 200)
            assert site.seen == ([] if excess else [(b"POST", b"/echo", body)])


@on_both_loops
async def test_a_declared_length_above_the_limit_is_refused_unread() -> None:
    async with listening(max_body_bytes=4096) as site:
        client = await site.client()
        answer = await client.ask(b"POST / HTTP/1.1\r\n" + HOST + b"content-length: 4097\r\n\r\n")
        assert answer.status == 413
        assert site.refused[0].metadata == {"limit_bytes": "4096"}


@on_both_loops
async def test_the_refusal_reaches_a_client_that_is_still_sending() -> None:
    async with listening(max_body_bytes=4096, linger_timeout=10.0) as site:
        client = await site.client()
        sending = asyncio.create_task(
            client.send(b"POST / HTTP/1.1\r\n" + HOST + b"content-length: 8000000\r\n\r\n" + b"a" * 8_000_000)
        )
        assert (await client.answer()).status == 413
        await sending
        assert await client.is_closed()
        await client.close()


@on_both_loops
async def test_lingering_has_an_end() -> None:
    async with listening(max_body_bytes=4096, linger_timeout=0.1) as site:
        client = await site.client()
        await client.send(b"POST / HTTP/1.1\r\n" + HOST + b"content-length: 8000000\r\n\r\n")
        assert (await client.answer()).status == 413
        with contextlib.suppress(ConnectionError):
            while site.listener.connection_count:
                await client.send(b"a")
                await asyncio.sleep(0.002)


@on_both_loops
async def test_a_body_in_chunks_of_one_byte_is_fine() -> None:
    body = b"0123456789" * 300
    async with listening(max_header_bytes=1024) as site:
        client = await site.client()
        request = chunked(*(body[at : at + 1] for at in range(len(body))))
        for at in range(0, len(request), 700):
            await client.send(request[at : at + 700])
            await asyncio.sleep(0)
        assert (await client.answer()).body == b"POST /echo " + body


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        pytest.param(b"GET /", b"a", id="target"),
        pytest.param(b"GET / HTTP/1.1\r\n" + HOST + b"x: ", b"a", id="value"),
        pytest.param(b"GET / HTTP/1.1\r\n" + HOST + b"x: ", b" ", id="space before a value"),
        pytest.param(b"GET / HTTP/1.1\r\n" + HOST, b"a", id="name"),
        pytest.param(b"GET / HTTP/1.1\r\n" + HOST, b"abcdefg: b\r\n", id="many lines of one name"),
        pytest.param(b"POST / HTTP/1.1\r\n" + HOST + b"transfer-encoding: chunked\r\n\r\n0\r\nx: ", b"a", id="trailer"),
        pytest.param(b"POST / HTTP/1.1\r\n" + HOST + b"transfer-encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n", id="trailers"),
        pytest.param(b"POST / HTTP/1.1\r\n" + HOST + b"transfer-encoding: chunked\r\n\r\n1;", b"a", id="chunk extension"),
        pytest.param(
            b"POST / HTTP/1.1\r\n" + HOST + b"transfer-encoding: chunked\r\n\r\n",
            b"1;" + b"a" * 250 + b"\r\nx\r\n",
            id="chunk extensions",
        ),
    ],
)
@on_both_loops
async def test_what_never_ends_is_cut(begin: bytes, more: bytes) -> None:
    async with listening(max_header_bytes=1024, max_target_bytes=256, max_body_bytes=1_000_000, linger_timeout=10.0) as site:
        client = await site.client()
        answer = asyncio.create_task(client.answer())
        await client.send(begin)
        block = more * (200 // len(more) + 1)
        sent = 0
        while not answer.done():
            # Less than the body's own limit: it is not that one which ends it.
            assert sent < 400_000
            await client.send(block)
            sent += len(block)
            await asyncio.sleep(0)
        assert (await answer).status == 413
        assert site.seen == []
        await client.close()


@on_both_loops
async def test_the_limits_of_a_head_are_the_same_in_one_piece() -> None:
    lines = b"".join(b"x-%02d: %b\r\n" % (number, b"a" * 90) for number in range(9))
    async with listening(max_header_bytes=1024, max_target_bytes=256) as site:
        client = await site.client()
        # As much as may be: near 1024 bytes of headers after a target of 256.
        request = b"GET /%b HTTP/1.1\r\n%b%b\r\n" % (b"t" * 255, HOST, lines)
        assert (await client.ask(request)).status == 200
        for at in range(0, len(request), 100):
            await client.send(request[at : at + 100])
            await asyncio.sleep(0)
        assert (await client.answer()).status == 200
        assert (await client.ask(b"GET / HTTP/1.1\r\n%b%bx: %b\r\n\r\n" % (HOST, lines, b"a" * 140))).status == 413
        other = await site.client()
        assert (await other.ask(b"GET /%b HTTP/1.1\r\n%b\r\n" % (b"t" * 256, HOST))).status == 413


@pytest.mark.parametrize("name", [b"x-%d", b"x-same"])
@on_both_loops
async def test_header_lines_are_counted(name: bytes) -> None:
    async with listening(max_header_count=16) as site:
        for count, status in ((15, 200), (16, 413)):
            client = await site.client()
            lines = b"".join((name % number if b"%" in name else name) + b": 1\r\n" for number in range(count))
            assert (await client.ask(b"GET / HTTP/1.1\r\n" + HOST + lines + b"\r\n")).status == status


@on_both_loops
async def test_bodies_together_stay_below_the_reservation() -> None:
    gate = Gate()
    async with listening(gate, max_buffered_bytes=1_048_576) as site:
        first, second = await site.client(), await site.client()
        await first.send(post(b"a" * 700_000))
        await gate.entered.wait()
        assert site.listener.buffered_bytes == 700_000
        answer = await second.ask(post(b"b" * 700_000))
        assert answer.status == 503
        assert answer.headers["retry-after"] == "1"
        assert site.refused[0].reason is Reason.OVERLOADED
        gate.opened.set()
        assert (await first.answer()).status == 200
        assert site.listener.buffered_bytes == 0
        third = await site.client()
        assert (await third.ask(post(b"c" * 700_000))).status == 200


@on_both_loops
async def test_a_body_that_is_given_up_is_given_back() -> None:
    gate = Gate()
    async with listening(gate) as site:
        halves = await site.client()
        await halves.send(b"POST / HTTP/1.1\r\n" + HOST + b"content-length: 2000\r\n\r\n" + b"a" * 1000)
        await until(lambda: site.listener.buffered_bytes == 1000)
        await halves.close()
        await until(lambda: site.listener.buffered_bytes == 0)
        # In the handler, waiting behind it, and half read.
        waiting = await site.client()
        await waiting.send(post(b"a" * 10))
        await gate.entered.wait()
        await waiting.send(b"POST / HTTP/1.1\r\n" + HOST + b"content-length: 2000\r\n\r\n" + b"a" * 1000)
        await until(lambda: site.listener.buffered_bytes == 1010)
        await waiting.close()
        await until(lambda: site.listener.buffered_bytes == 0)


@on_both_loops
async def test_waiting_requests_do_not_pile_up() -> None:
    gate = Gate()
    async with listening(gate, drain_timeout=0.0) as site:
        client = await site.client()
        await client.send(GET % b"slow")
        await gate.entered.wait()
        block = GET % b"next" * 2000
        for _ in range(400):
            sending = asyncio.create_task(client.send(block))
            await asyncio.wait({sending}, timeout=0.5)
            if not sending.done():
                break
        else:
            pytest.fail("32 MB of requests were taken in behind one that isn't answered")
        gate.opened.set()
        assert (await client.answer()).status == 200
        await sending
        await client.close()
        await until(lambda: site.listener.connection_count == 0)


# times


async def trickle(client: Client, data: bytes) -> Answer:
    """Sends `data` over and over, a little at a time, until an answer comes."""
    answer = asyncio.create_task(client.answer())
    while not answer.done():
        with contextlib.suppress(ConnectionError):
            await client.send(data)
        await asyncio.wait({answer}, timeout=0.02)
    return answer.result()


@on_both_loops
async def test_a_head_has_its_time_however_often_a_byte_comes() -> None:
    async with listening(header_timeout=0.2) as site:
        client = await site.client()
        await client.send(b"GET / HTTP/1.1\r\nx: ")
        answer = await trickle(client, b"a")
        assert answer.status == 408
        assert answer.headers["connection"] == "close"
        assert site.refused[0].reason is Reason.REQUEST_TOO_SLOW
        assert site.refused[0].metadata == {"limit_seconds": "0.2"}


@on_both_loops
async def test_the_second_head_of_a_connection_has_its_time_too() -> None:
    async with listening(header_timeout=0.2, idle_timeout=30.0) as site:
        client = await site.client()
        assert (await client.ask(GET % b"1")).status == 200
        assert (await client.ask(b"GET / HT")).status == 408


@on_both_loops
async def test_a_silent_connection_is_closed_without_a_word() -> None:
    async with listening(header_timeout=0.1, idle_timeout=30.0) as site:
        client = await site.client()
        assert await client.is_closed()
        other = await site.client()
        await other.send(b"\r\n")
        assert await other.is_closed()
        assert site.refused == []


@on_both_loops
async def test_an_idle_connection_is_closed_without_a_word() -> None:
    async with listening(header_timeout=30.0, idle_timeout=0.1) as site:
        client = await site.client()
        assert (await client.ask(GET % b"1")).status == 200
        assert await client.is_closed()
        assert site.refused == []


@pytest.mark.parametrize(("head", "more"), [(b"content-length: 100000", b"a"), (b"transfer-encoding: chunked", b"1\r\na\r\n")])
@on_both_loops
async def test_a_body_has_its_time_however_often_a_byte_comes(head: bytes, more: bytes) -> None:
    async with listening(body_timeout=0.2) as site:
        client = await site.client()
        await client.send(b"POST / HTTP/1.1\r\n" + HOST + head + b"\r\n\r\n")
        assert (await trickle(client, more)).status == 408
        assert site.refused[0].metadata == {"limit_seconds": "0.2"}


@on_both_loops
async def test_a_client_told_to_go_on_must_go_on() -> None:
    async with listening(body_timeout=0.2) as site:
        client = await site.client()
        assert (
            await client.ask(b"POST / HTTP/1.1\r\n" + HOST + b"content-length: 2\r\nexpect: 100-continue\r\n\r\n")
        ).status == 100
        assert (await client.answer()).status == 408


@on_both_loops
async def test_a_large_body_that_comes_steadily_may_take_longer() -> None:
    async with listening(body_timeout=0.1, body_minimum_rate=1024) as site:
        client = await site.client()
        answer = asyncio.create_task(client.answer())
        await client.send(b"POST /l HTTP/1.1\r\n" + HOST + b"content-length: 20482\r\n\r\n" + b"a" * 20_480)
        await asyncio.wait({answer}, timeout=0.3)
        assert not answer.done()
        await client.send(b"bc")
        assert (await answer).status == 200


@on_both_loops
async def test_time_behind_a_slow_request_is_not_the_client_s() -> None:
    gate = Gate()
    async with listening(gate, header_timeout=0.2, body_timeout=0.2) as site:
        client = await site.client()
        await client.send(GET % b"slow")
        await gate.entered.wait()
        await client.send(b"POST /2 HTTP/1.1\r\n" + HOST + b"content-length: 2\r\n\r\n")
        answer = asyncio.create_task(client.answer())
        await asyncio.wait({answer}, timeout=0.4)
        assert not answer.done()
        gate.opened.set()
        assert (await answer).status == 200
        assert (await client.ask(b"hi")).body == b"/2 hi"


@on_both_loops
async def test_an_exchange_that_expires_is_cancelled_and_may_still_answer() -> None:
    async def handler(exchange: Exchange) -> None:
        exchange.expire_at = asyncio.get_running_loop().time() + 0.05
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            assert exchange.expired
            assert not exchange.closed
            exchange.respond(b"HTTP/1.1 504 Gateway Timeout\r\n", b"")

    async with listening(handler) as site:
        client = await site.client()
        for _ in range(2):
            assert (await client.ask(GET % b"1")).status == 504


# who goes away, and who doesn't read


@on_both_loops
async def test_a_client_that_goes_away_cancels_its_handler() -> None:
    gate = Gate()
    async with listening(gate) as site:
        client = await site.client()
        await client.send(GET % b"1")
        await gate.entered.wait()
        await client.close()
        await gate.cancelled.wait()
        await until(lambda: site.listener.connection_count == 0 and not site.listener.tasks)


@on_both_loops
async def test_a_client_that_is_reset_cancels_its_stream() -> None:
    stalled, gone = asyncio.Event(), asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        exchange.open(OK)
        exchange.send(b"first")
        try:
            while exchange.send(b"p" * 65_536):
                await asyncio.sleep(0)
            stalled.set()
            await exchange.writable()
            await asyncio.Event().wait()
        finally:
            assert exchange.closed
            assert not exchange.expired
            assert exchange.send(b"to nobody")
            # Nothing will make room any more: whoever asks now must not wait for it.
            await exchange.writable()
            gone.set()

    async with listening(handler, write_buffer_bytes=65_536) as site:
        client = await site.client(receive_buffer=16_384)
        await client.send(GET % b"1")
        await stalled.wait()
        client.writer.transport.abort()
        await gone.wait()


@on_both_loops
async def test_a_handler_that_fails_closes_its_connection_only() -> None:
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))

    async def handler(exchange: Exchange) -> None:
        if exchange.target == b"/bad":
            raise ZeroDivisionError
        if exchange.target == b"/good":
            exchange.respond(OK, b"good")

    async with listening(handler) as site:
        for path in (b"bad", b"silent"):
            client = await site.client()
            await client.send(GET % path)
            assert await client.is_closed()
        assert (await (await site.client()).ask(GET % b"good")).body == b"good"
    assert [type(problem["exception"]) for problem in problems] == [ZeroDivisionError]


@on_both_loops
async def test_an_answer_of_the_turn_in_which_the_client_says_no_more_is_sent() -> None:
    loop = asyncio.get_running_loop()

    async def handler(exchange: Exchange) -> None:
        # The end of the client's side comes in while this turn of the loop goes on, and is read before the turn's end sends.
        socket_of_the_client.shutdown(socket.SHUT_WR)
        ends = loop.time() + 0.05
        while time.monotonic() < ends:
            pass
        exchange.respond(OK, b"late")

    async with listening(handler) as site:
        socket_of_the_client = socket.create_connection(("127.0.0.1", site.listener.port))
        with contextlib.closing(socket_of_the_client):
            socket_of_the_client.sendall(GET % b"x")
            received = await asyncio.to_thread(lambda: b"".join(iter(lambda: socket_of_the_client.recv(4096), b"")))
    assert received.endswith(b"late")


@on_both_loops
async def test_a_slow_reader_holds_its_stream_back_and_nobody_else_s() -> None:
    stalled, pieces = asyncio.Event(), 600
    piece = b"p" * 32_768

    async def handler(exchange: Exchange) -> None:
        if exchange.target == b"/quick":
            exchange.respond(OK, b"quick")
            return
        exchange.open(OK)
        for number in range(pieces):
            if not exchange.send(piece):
                assert number < pieces - 1
                stalled.set()
                await exchange.writable()
        exchange.close()

    async with listening(handler, write_buffer_bytes=65_536, write_timeout=20.0) as site:
        client = await site.client(receive_buffer=16_384)
        await client.send(GET % b"slow")
        await stalled.wait()
        assert (await (await site.client()).ask(GET % b"quick")).body == b"quick"
        assert len((await client.answer()).body) == pieces * len(piece)
        assert (await client.ask(GET % b"quick")).body == b"quick"


@on_both_loops
async def test_a_client_that_never_reads_a_stream_is_cut_off() -> None:
    cancelled = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        exchange.open(OK)
        try:
            while True:
                if not exchange.send(b"p" * 65_536):
                    await exchange.writable()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with listening(handler, write_timeout=0.2, write_buffer_bytes=65_536) as site:
        client = await site.client(receive_buffer=16_384)
        await client.send(GET % b"1")
        await cancelled.wait()
        await until(lambda: site.listener.connection_count == 0)
        await client.close()


@pytest.mark.parametrize("write_buffer_bytes", [65_536, 268_435_456])
@pytest.mark.parametrize("extra", [b"", b"connection: close\r\n"])
@on_both_loops
async def test_a_client_that_never_reads_an_answer_is_cut_off(extra: bytes, write_buffer_bytes: int) -> None:
    # With the larger buffer the transport never says that it is full: the bytes left in it must not keep the connection for ever.
    async def handler(exchange: Exchange) -> None:
        exchange.respond(OK, bytes(32_000_000))

    settings = {"write_timeout": 0.2, "idle_timeout": 0.2, "write_buffer_bytes": write_buffer_bytes}
    async with listening(handler, **settings) as site:
        client = await site.client(receive_buffer=16_384)
        await client.send(b"GET / HTTP/1.1\r\n" + HOST + extra + b"\r\n")
        await until(lambda: len(site.seen) == 1)
        await until(lambda: site.listener.connection_count == 0)
        await client.close()


@on_both_loops
async def test_a_client_that_reads_steadily_gets_a_long_answer() -> None:
    size = 48_000_000

    async def handler(exchange: Exchange) -> None:
        exchange.respond(OK, bytes(size))

    async with listening(handler, write_timeout=0.7, write_buffer_bytes=65_536) as site:
        client = await site.client(receive_buffer=65_536)
        await client.send(GET % b"1")
        loop = asyncio.get_running_loop()
        begin = loop.time()
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(OK)
        left = size
        # About half of it in twice the time that a client that stops reading would have.
        while loop.time() < begin + 1.4 and left > size // 2:
            left -= len(await client.reader.readexactly(200_000))
            await asyncio.sleep(0.02)
        await client.reader.readexactly(left)
        assert (await client.ask(GET % b"2")).status == 200


@on_both_loops
async def test_requests_behind_an_answer_that_is_not_read_wait() -> None:
    async def handler(exchange: Exchange) -> None:
        exchange.respond(OK, bytes(16_000_000) if exchange.target == b"/large" else b"small")

    async with listening(handler, write_timeout=20.0, header_timeout=0.2, write_buffer_bytes=65_536) as site:
        client = await site.client(receive_buffer=16_384)
        await client.send(GET % b"large" + GET % b"small")
        await until(lambda: len(site.seen) == 1)
        other = await site.client()
        assert (await other.ask(GET % b"other")).body == b"small"
        assert site.paths == [b"/large", b"/other"]
        assert len((await client.answer()).body) == 16_000_000
        assert (await client.answer()).body == b"small"


# limits on connections, drain


@on_both_loops
async def test_connections_above_the_limit_are_told_so() -> None:
    async with listening(max_connections=2) as site:
        first, second = await site.client(), await site.client()
        for client in (first, second):
            assert (await client.ask(GET % b"1")).status == 200
        third = await site.client()
        answer = await third.answer()
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert await third.is_closed()
        assert (await first.ask(GET % b"2")).status == 200
        await first.close()
        await until(lambda: site.listener.connection_count == 1)
        assert (await (await site.client()).ask(GET % b"3")).status == 200


@on_both_loops
async def test_drain_ends_what_is_in_flight_and_closes_the_rest() -> None:
    gate = Gate()

    def handler(exchange: Exchange) -> Coroutine[Any, Any, None] | None:
        if exchange.target != b"/idle":
            return gate(exchange)
        at_once(exchange)
        return None

    async with listening(handler, header_timeout=20.0) as site:
        idle, busy, half, silent = [await site.client() for _ in range(4)]
        assert (await idle.ask(GET % b"idle")).status == 200
        await half.send(b"GET /idle HTTP/1.1\r\n")
        await busy.send(GET % b"slow" + GET % b"never")
        await gate.entered.wait()
        draining = asyncio.create_task(site.listener.drain())
        assert await idle.is_closed()
        assert await silent.is_closed()
        with pytest.raises(ConnectionError):
            await site.client()
        answer = await half.ask(HOST + b"\r\n")
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert await half.is_closed()
        assert not draining.done()
        gate.opened.set()
        answer = await busy.answer()
        assert (answer.body, answer.headers["connection"]) == (b"/slow ", "close")
        # What stood behind it was never begun, and its client was told in time.
        assert await busy.is_closed()
        assert b"/never" not in site.paths
        await busy.close()
        await draining
        assert site.listener.connection_count == 0


@pytest.mark.parametrize("handler", [echo, at_once])
@on_both_loops
async def test_drained_requests_of_one_read_end_with_the_first(handler: Handler) -> None:
    async with listening(handler) as site:
        client = await site.client()
        await client.send(b"POST /0 HTTP/1.1\r\n" + HOST + b"content-length: 2\r\n\r\nh")
        await until(lambda: site.listener.buffered_bytes == 1)
        draining = asyncio.create_task(site.listener.drain())
        await until(lambda: site.listener.draining)
        answer = await client.ask(b"i" + GET % b"1" + GET % b"2")
        assert (answer.body, answer.headers["connection"]) == (b"POST /0 hi", "close")
        assert await client.is_closed()
        assert site.paths == [b"/0"]
        await client.close()
        await draining


@on_both_loops
async def test_drain_cuts_off_what_takes_too_long_and_waits_for_its_end() -> None:
    entered, ended = asyncio.Event(), asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(5):
                await asyncio.sleep(0)
            ended.set()

    async with listening(handler, drain_timeout=0.1) as site:
        client = await site.client()
        await client.send(GET % b"1")
        await entered.wait()
        await site.listener.drain()
        assert ended.is_set()
        assert await client.is_closed()


@on_both_loops
async def test_leaving_the_context_ends_everything() -> None:
    gate = Gate()
    async with listening(gate) as site:
        client = await site.client()
        await client.send(GET % b"1")
        await gate.entered.wait()
    assert gate.cancelled.is_set()
    assert await client.is_closed()


@on_both_loops
async def test_a_taken_port_is_said() -> None:
    async with listening() as site:
        with pytest.raises(OSError, match="use"):
            async with listening(port=site.listener.port):
                pytest.fail("two listeners on one port")


@on_both_loops
async def test_ipv6() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        async with listening(host="::1") as site:
            reader, writer = await asyncio.open_connection("::1", site.listener.port)
            assert (await Client(reader, writer).ask(GET % b"6")).status == 200
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")


def refusals() -> Iterator[tuple[bytes, int]]:
    yield b"GET / HTTP/1.1\r\n\r\n", 400
    yield b"POST / HTTP/1.1\r\n" + HOST + b"content-length: 99999999\r\n\r\n", 413


@pytest.mark.parametrize(("data", "status"), list(refusals()))
@on_both_loops
async def test_a_refusal_knows_what_was_read(data: bytes, status: int) -> None:
    exchanges: list[Exchange] = []

    class Witness(Site):
        def refuse(self, exchange: Exchange, failure: Failure) -> None:
            exchanges.append(exchange)
            super().refuse(exchange, failure)

    site = Witness(at_once, EdgeConfig(port=0))
    async with site.listener.listening():
        client = await site.client()
        # The request before it must not lend it its target or headers.
        await client.ask(b"GET /before HTTP/1.1\r\n" + HOST + b"x-request-id: 7\r\n\r\n")
        await client.send(data)
        assert (await client.answer()).status == status == status_of(site.refused[0])
        assert exchanges[0].target == b"/"
        assert b"x-request-id" not in exchanges[0].headers
        other = await site.client()
        await other.ask(b"GET /before HTTP/1.1\r\n" + HOST + b"x-request-id: 7\r\n\r\n")
        await other.send(b"\x00\x01")
        assert (await other.answer()).status == 400
        assert exchanges[1].target == b""
        assert exchanges[1].headers == {}
