"""The upstream pool, against real loopback servers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

import pytest
import uvloop

from services.execution.adapters.http1 import Pool, Response
from services.execution.errors import AttemptFailed, ConnectionStale
from services.execution.provider import ungated
from services.runtime.errors import Reason
from tests.unit.execution.upstream import (
    PATIENCE,
    Exchange,
    Reply,
    Upstream,
    chunk,
    chunked,
    hangs,
    pool_to,
    upstream,
    whole,
)

SOON: Final = 0.05
"""Seconds: a deadline that is meant to pass."""


def later(seconds: float = PATIENCE) -> float:
    return asyncio.get_running_loop().time() + seconds


async def ask(pool: Pool, body: bytes = b"{}", seconds: float = PATIENCE) -> Response:
    return await pool.exchange(pool.head("POST", "/x", {"accept": "a/b"}), body, later(seconds), ungated)


async def read(pool: Pool, *, idle: float = PATIENCE, seconds: float = PATIENCE) -> tuple[Response, bytes]:
    connection, response = await pool.open_stream(pool.head("POST", "/x", {}), b"{}", later(seconds), ungated)
    return response, b"".join([piece async for piece in connection.pieces(idle, later(seconds))])


ASKINGS: Final[tuple[Callable[[Pool], Awaitable[Any]], ...]] = (ask, read)
"""A whole answer, and a streamed one."""


async def ended(server: Upstream, connection: int) -> None:
    async with asyncio.timeout(PATIENCE):
        await server.ended[connection].wait()


async def test_a_request_is_one_well_formed_message_under_the_base_path() -> None:
    async with upstream(whole(b"hello", x_a="1")) as server, pool_to(server.url + "/base") as pool:
        response = await ask(pool, b'{"a":1}')
    assert (response.status, response.body, response.headers[b"x-a"]) == (200, b"hello", b"1")
    [seen] = server.exchanges
    assert (seen.method, seen.path, seen.body) == ("POST", "/base/x", b'{"a":1}')
    assert seen.headers == {"host": f"127.0.0.1:{server.port}", "accept": "a/b", "content-length": "7"}


async def test_a_connection_is_kept_for_exchanges_and_streams_alike() -> None:
    async with upstream(whole(b"1"), chunked([b"2", b"3"]), whole(b"4")) as server, pool_to(server.url) as pool:
        assert (await ask(pool)).body == b"1"
        assert (await read(pool))[1] == b"23"
        assert (await ask(pool)).body == b"4"
    assert [exchange.connection for exchange in server.exchanges] == [0, 0, 0]


async def test_calls_at_once_have_connections_of_their_own() -> None:
    async with upstream(whole(b"ok")) as server, pool_to(server.url) as pool:
        await asyncio.gather(*(ask(pool) for _ in range(3)))
        await ask(pool)
    assert sorted(exchange.connection for exchange in server.exchanges[:3]) == [0, 1, 2]
    assert len(server.streams) == 3


async def test_requests_of_one_turn_leave_at_its_end_and_none_of_a_call_that_was_cancelled_in_it() -> None:
    async with upstream(whole(b"ok")) as server, pool_to(server.url) as pool:
        await asyncio.gather(*(ask(pool) for _ in range(3)))
        first, leaving, last = (asyncio.create_task(ask(pool, body)) for body in (b"1", b"2", b"3"))
        await asyncio.sleep(0)
        leaving.cancel()
        answers = await asyncio.gather(first, leaving, last, return_exceptions=True)
        assert isinstance(answers[1], asyncio.CancelledError)
        # The connection of the one that left is gone, and another call gets one of its own.
        assert (await ask(pool, b"4")).body == b"ok"
    assert sorted(exchange.body for exchange in server.exchanges[3:]) == [b"1", b"3", b"4"]


@pytest.mark.parametrize("keep_alive", [0.0, 0.001])
async def test_an_idle_connection_that_is_too_old_is_closed_and_not_used(keep_alive: float) -> None:
    async with upstream(whole(b"ok")) as server, pool_to(server.url, keep_alive=keep_alive) as pool:
        await ask(pool)
        # The loop's clock passes keep_alive while the timer runs.
        await asyncio.sleep(2 * keep_alive)
        await ask(pool)
        await ended(server, 0)
    assert [exchange.connection for exchange in server.exchanges] == [0, 1]


async def test_connection_close_is_obeyed() -> None:
    async with upstream(whole(b"ok", connection="close")) as server, pool_to(server.url) as pool:
        await ask(pool)
        await ended(server, 0)
        await ask(pool)
    assert [exchange.connection for exchange in server.exchanges] == [0, 1]


async def test_a_kept_connection_that_the_provider_has_closed_is_not_used() -> None:
    async def answers_and_closes(exchange: Exchange) -> None:
        await whole(b"ok")(exchange)
        exchange.writer.close()

    async with upstream(answers_and_closes) as server, pool_to(server.url) as pool:
        assert (await ask(pool)).body == b"ok"
        await ended(server, 0)
        # Turns of the loop in which the end reaches the pool's side.
        for _ in range(3):
            await asyncio.sleep(0)
        assert (await ask(pool)).body == b"ok"
    assert [exchange.connection for exchange in server.exchanges] == [0, 1]


async def test_a_kept_connection_that_dies_before_the_answer_is_stale() -> None:
    async def resets(exchange: Exchange) -> None:
        exchange.reset()

    for asking in ASKINGS:
        async with upstream(whole(b"ok"), resets, whole(b"again")) as server, pool_to(server.url) as pool:
            await ask(pool)
            with pytest.raises(ConnectionStale):
                await asking(pool)
            assert (await ask(pool)).body == b"again"
        assert [exchange.connection for exchange in server.exchanges] == [0, 0, 1]


async def test_after_a_stale_connection_no_older_one_is_tried() -> None:
    async def resets(exchange: Exchange) -> None:
        exchange.reset()

    together = asyncio.Barrier(3)

    async def answers_together(exchange: Exchange) -> None:
        await together.wait()
        await whole(b"ok")(exchange)

    async with upstream(answers_together) as server, pool_to(server.url) as pool:
        # A restart of the provider closes all that was kept, not only the one that is found out first.
        await asyncio.gather(*(ask(pool) for _ in range(3)))
        server.plays(resets, whole(b"again"))
        with pytest.raises(ConnectionStale):
            await ask(pool)
        assert (await ask(pool)).body == b"again"
        assert server.exchanges[-1].connection == 3


async def test_a_connection_is_stale_only_if_nothing_of_the_answer_came() -> None:
    async def begins_and_resets(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 2")
        exchange.reset()

    async def resets(exchange: Exchange) -> None:
        exchange.reset()

    async with upstream(whole(b"ok"), begins_and_resets) as server, pool_to(server.url) as pool:
        await ask(pool)
        with pytest.raises(AttemptFailed) as caught:
            await ask(pool)
        assert not isinstance(caught.value, ConnectionStale)
        assert caught.value.reason is Reason.PROVIDER_UNAVAILABLE
    async with upstream(resets) as server, pool_to(server.url) as pool:
        # A fresh connection that dies is the provider's failure: it was not closed for being idle.
        with pytest.raises(AttemptFailed) as caught:
            await ask(pool)
        assert not isinstance(caught.value, ConnectionStale)
        assert caught.value.reason is Reason.PROVIDER_UNAVAILABLE


ANSWER: Final = b"The answer.\x00\r\n\r\n\xff"
FORMS: Final = {
    "length": Reply().head(("Content-Length", str(len(ANSWER)))) + ANSWER,
    "chunks": Reply().head(("Transfer-Encoding", "chunked")) + chunk(ANSWER[:3]) + chunk(ANSWER[3:]) + b"0\r\n\r\n",
    "trailers": Reply().head(("Transfer-Encoding", "chunked")) + chunk(ANSWER) + b"0\r\nx-checksum: 1\r\n\r\n",
    "interim": b"HTTP/1.1 100 Continue\r\nx-old: 1\r\n\r\n" + Reply().head(("Content-Length", str(len(ANSWER)))) + ANSWER,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("asking", ["exchange", "stream"])
async def test_an_answer_is_the_same_wherever_it_is_cut(form: str, asking: str) -> None:
    raw = FORMS[form]
    cut = 0

    async def answers(exchange: Exchange) -> None:
        await exchange.send(raw[:cut], raw[cut:])

    async with upstream(answers) as server, pool_to(server.url) as pool:
        for at in range(1, len(raw)):
            cut = at
            if asking == "exchange":
                response = await ask(pool)
                assert response.body == ANSWER
            else:
                response, body = await read(pool)
                assert body == ANSWER
            assert response.status == 200
            assert b"x-old" not in response.headers
    assert {exchange.connection for exchange in server.exchanges} == {0}


async def test_a_body_without_a_length_ends_with_the_connection() -> None:
    async def answers(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\n\r\n", b"one", b"two")
        exchange.writer.close()

    async with upstream(answers) as server, pool_to(server.url) as pool:
        assert (await ask(pool)).body == b"onetwo"
        assert (await read(pool))[1] == b"onetwo"
    assert [exchange.connection for exchange in server.exchanges] == [0, 1]


@pytest.mark.parametrize("head", [Reply().head(("content-length", "100")), Reply().head(("transfer-encoding", "chunked"))])
async def test_an_early_end_is_no_answer(head: bytes) -> None:
    async def breaks(exchange: Exchange) -> None:
        await exchange.send(head, chunk(b"some"))
        exchange.writer.close()

    async def breaks_after_head(exchange: Exchange) -> None:
        await exchange.send(head)
        exchange.writer.close()

    async with upstream(breaks) as server, pool_to(server.url) as pool:
        for asking in ASKINGS:
            with pytest.raises(AttemptFailed) as caught:
                await asking(pool)
            assert caught.value.reason is Reason.PROVIDER_STREAM_BROKEN
        server.plays(breaks_after_head)
        for asking in ASKINGS:
            with pytest.raises(AttemptFailed) as caught:
                await asking(pool)
            assert caught.value.reason is Reason.PROVIDER_UNAVAILABLE


async def test_what_came_before_a_stream_broke_is_still_read() -> None:
    async with upstream(chunked([b"one", b"two"], ends=False)) as server, pool_to(server.url) as pool:
        connection, _ = await pool.open_stream(pool.head("POST", "/x", {}), b"", later(), ungated)
        await ended(server, 0)
        got = b""
        with pytest.raises(AttemptFailed):
            async for piece in connection.pieces(PATIENCE, later()):
                got += piece
        # A reset may discard what the kernel still had, but never out of order.
        assert b"onetwo".startswith(got)


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhal"])
async def test_a_slow_answer_ends_at_the_deadline_and_its_socket_is_closed(said: bytes) -> None:
    async def dawdles(exchange: Exchange) -> None:
        await exchange.send(said)
        await exchange.gone()

    async with upstream(dawdles) as server, pool_to(server.url) as pool:
        for number in range(2):
            with pytest.raises(AttemptFailed) as caught:
                await (ask(pool, seconds=SOON) if number == 0 else read(pool, seconds=SOON))
            assert caught.value.reason is Reason.PROVIDER_TIMEOUT
            await ended(server, number)


async def test_a_head_that_drips_does_not_move_the_deadline() -> None:
    async def drips(exchange: Exchange) -> None:
        with contextlib.suppress(ConnectionError):
            await exchange.send(b"HTTP/1.1 200 OK\r\n")
            while True:
                await exchange.send(b"x-a: 1\r\n")
                await asyncio.sleep(SOON / 10)

    async with upstream(drips) as server, pool_to(server.url) as pool:
        with pytest.raises(AttemptFailed) as caught:
            await ask(pool, seconds=SOON)
        assert caught.value.reason is Reason.PROVIDER_TIMEOUT
        await ended(server, 0)


async def test_a_stream_that_falls_silent_ends_after_the_idle_time() -> None:
    async def falls_silent(exchange: Exchange) -> None:
        await exchange.send(Reply().head(("transfer-encoding", "chunked")), chunk(b"one"))
        await exchange.gone()

    async with upstream(falls_silent) as server, pool_to(server.url) as pool:
        with pytest.raises(AttemptFailed) as caught:
            await read(pool, idle=SOON)
        assert caught.value.reason is Reason.PROVIDER_TIMEOUT
        await ended(server, 0)


async def test_an_answer_that_is_too_large_is_refused_while_it_comes() -> None:
    async def never_stops(exchange: Exchange) -> None:
        with contextlib.suppress(ConnectionError):
            await exchange.send(Reply().head(("transfer-encoding", "chunked")))
            while True:
                await exchange.send(chunk(b"x" * 1000))

    async with upstream(never_stops) as server, pool_to(server.url, max_answer_bytes=10_000) as pool:
        with pytest.raises(AttemptFailed) as caught:
            await ask(pool)
        assert caught.value.reason is Reason.PROVIDER_MALFORMED
        assert "10000 bytes" in caught.value.message
        await ended(server, 0)
        server.plays(whole(b"x" * 10_000))
        assert len((await ask(pool)).body) == 10_000


async def test_a_head_that_is_too_large_is_refused() -> None:
    async def boasts(exchange: Exchange) -> None:
        with contextlib.suppress(ConnectionError):
            await exchange.send(b"HTTP/1.1 200 OK\r\n", *(b"x-%d: %b\r\n" % (n, b"y" * 1000) for n in range(70)))
            await exchange.gone()

    async with upstream(boasts) as server, pool_to(server.url) as pool:
        with pytest.raises(AttemptFailed) as caught:
            await ask(pool)
        assert caught.value.reason is Reason.PROVIDER_MALFORMED
        await ended(server, 0)


@pytest.mark.parametrize(
    "said",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
    ],
)
async def test_what_is_not_http_is_malformed(said: bytes) -> None:
    async def babbles(exchange: Exchange) -> None:
        await exchange.send(said)
        await exchange.gone()

    async with upstream(babbles) as server, pool_to(server.url) as pool:
        for number, asking in enumerate(ASKINGS):
            with pytest.raises(AttemptFailed) as caught:
                await asking(pool)
            assert caught.value.reason is Reason.PROVIDER_MALFORMED
            await ended(server, number)


@pytest.mark.parametrize("extra", [b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil", b"HTTP/1.1 200 OK\r\ncontent-le"])
@pytest.mark.parametrize("together", [True, False])
async def test_bytes_that_nobody_asked_for_never_become_an_answer(extra: bytes, together: bool) -> None:
    good = Reply().head(("content-length", "4")) + b"good"

    async def says_too_much(exchange: Exchange) -> None:
        await (exchange.send(good + extra) if together else exchange.send(good, extra))

    for asking in ("exchange", "stream"):
        async with upstream(says_too_much, whole(b"next")) as server, pool_to(server.url) as pool:
            if asking == "exchange":
                assert (await ask(pool)).body == b"good"
            else:
                assert (await read(pool))[1] == b"good"
            # The desynchronised connection is closed, not handed to the next caller.
            await ended(server, 0)
            assert (await ask(pool)).body == b"next"
            assert server.exchanges[-1].connection == 1


async def test_cancelling_an_exchange_closes_the_providers_socket() -> None:
    async with upstream(hangs) as server, pool_to(server.url) as pool:
        task = asyncio.create_task(ask(pool))
        await server.asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await ended(server, 0)


async def test_cancelling_a_stream_before_its_head_closes_the_providers_socket() -> None:
    async with upstream(hangs) as server, pool_to(server.url) as pool:
        task = asyncio.create_task(read(pool))
        await server.asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await ended(server, 0)


@pytest.mark.parametrize("leaving", ["cancel", "break"])
async def test_leaving_a_stream_closes_the_providers_socket(leaving: str) -> None:
    async def talks_on(exchange: Exchange) -> None:
        await exchange.send(Reply().head(("transfer-encoding", "chunked")), chunk(b"one"))
        await exchange.gone()

    first = asyncio.Event()

    async def follow(pool: Pool) -> None:
        connection, _ = await pool.open_stream(pool.head("POST", "/x", {}), b"", later(), ungated)
        async with contextlib.aclosing(connection.pieces(PATIENCE, later())) as pieces:  # type: ignore[type-var]  # a generator
            async for _ in pieces:
                first.set()
                if leaving == "break":
                    break

    async with upstream(talks_on) as server, pool_to(server.url) as pool:
        task = asyncio.create_task(follow(pool))
        await first.wait()
        if leaving == "cancel":
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await ended(server, 0)
        server.plays(whole(b"ok"))
        assert (await ask(pool)).body == b"ok"
        assert server.exchanges[-1].connection == 1


async def test_a_reader_that_does_not_read_stops_the_provider() -> None:
    sent = 0
    blocked = asyncio.Event()

    async def floods(exchange: Exchange) -> None:
        nonlocal sent
        exchange.writer.transport.set_write_buffer_limits(high=0)
        await exchange.send(Reply().head(("transfer-encoding", "chunked")))
        with contextlib.suppress(ConnectionError):
            for _ in range(1024):
                exchange.writer.write(chunk(b"x" * 65536))
                sent += 65536
                try:
                    async with asyncio.timeout(0.2):
                        await exchange.writer.drain()
                except TimeoutError:
                    blocked.set()
                    await exchange.writer.drain()
            await exchange.send(b"0\r\n\r\n")

    async with upstream(floods) as server, pool_to(server.url) as pool:
        connection, _ = await pool.open_stream(pool.head("POST", "/x", {}), b"", later(), ungated)
        async with asyncio.timeout(PATIENCE):
            await blocked.wait()
        assert sent < 64 * 1024 * 1024
        # Once it is read again, all of it comes.
        size = 0
        async for piece in connection.pieces(PATIENCE, later()):
            size += len(piece)
        assert size == 1024 * 65536


async def test_no_more_connections_than_allowed() -> None:
    async with upstream(hangs) as server, pool_to(server.url, max_connections=2) as pool:
        tasks = [asyncio.create_task(ask(pool)) for _ in range(2)]
        await asyncio.sleep(0)
        # Connections that are still being made count too.
        with pytest.raises(AttemptFailed) as caught:
            await ask(pool)
        assert caught.value.reason is Reason.OVERLOADED, "our own pool is full: that tells nothing of the provider"
        assert caught.value.retry_delay == 1.0
        tasks[0].cancel()
        await asyncio.gather(tasks[0], return_exceptions=True)
        server.plays(whole(b"ok"))
        assert (await ask(pool)).body == b"ok"
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_provider_that_is_not_there_is_unavailable() -> None:
    async with upstream(hangs) as server:
        url = server.url
    async with pool_to(url) as pool:
        with pytest.raises(AttemptFailed) as caught:
            await ask(pool)
    assert caught.value.reason is Reason.PROVIDER_UNAVAILABLE
    assert "ConnectionRefusedError" in caught.value.message


async def test_a_server_that_closes_every_connection_at_once_fails_the_call_soon() -> None:
    async def slam(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    server = await asyncio.start_server(slam, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with pool_to(f"http://127.0.0.1:{port}", max_connections=1) as pool, asyncio.timeout(PATIENCE):
        for _ in range(20):
            with pytest.raises(AttemptFailed) as caught:
                await ask(pool, seconds=60)
            # Neither a timeout nor a leaked place in the pool.
            assert caught.value.reason is Reason.PROVIDER_UNAVAILABLE
    server.close()


async def test_closing_the_pool_closes_idle_and_busy_connections() -> None:
    async with upstream(whole(b"ok"), hangs) as server, pool_to(server.url) as pool:
        await ask(pool)
        server.asked.clear()
        busy = asyncio.create_task(ask(pool))
        await server.asked.wait()
        server.plays(whole(b"ok"))
        await ask(pool)
        assert len(server.streams) == 2
        pool.close()
        await asyncio.gather(ended(server, 0), ended(server, 1))
        [failed] = await asyncio.gather(busy, return_exceptions=True)
        assert isinstance(failed, AttemptFailed)


SCENARIOS: Final[tuple[Callable[[], Coroutine[Any, Any, None]], ...]] = (
    test_a_connection_is_kept_for_exchanges_and_streams_alike,
    test_a_kept_connection_that_dies_before_the_answer_is_stale,
    test_after_a_stale_connection_no_older_one_is_tried,
    test_a_connection_is_stale_only_if_nothing_of_the_answer_came,
    test_a_body_without_a_length_ends_with_the_connection,
    test_what_came_before_a_stream_broke_is_still_read,
    test_a_stream_that_falls_silent_ends_after_the_idle_time,
    test_an_answer_that_is_too_large_is_refused_while_it_comes,
    test_cancelling_an_exchange_closes_the_providers_socket,
    test_cancelling_a_stream_before_its_head_closes_the_providers_socket,
    test_a_reader_that_does_not_read_stops_the_provider,
    test_a_server_that_closes_every_connection_at_once_fails_the_call_soon,
    test_closing_the_pool_closes_idle_and_busy_connections,
)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_it_holds_on_uvloop_too(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    # Services run on uvloop, whose callbacks come in another order.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario())
