from __future__ import annotations

import asyncio

import pytest

from services.runtime.exposition import open_metrics
from services.runtime.metrics import Registry


async def ask(url: str, request: bytes) -> bytes:
    host, _, rest = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(rest.partition("/")[0]))
    writer.write(request)
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    return answer


@pytest.mark.parametrize(
    ("request_line", "status", "content"),
    [
        (b"GET /metrics HTTP/1.1", b"200 OK", b"sluice_answers_total 2.0"),
        (b"GET /metrics?x=1 HTTP/1.1", b"200 OK", b"sluice_answers_total 2.0"),
        (b"GET / HTTP/1.1", b"404 Not Found", b"/metrics"),
        (b"POST /metrics HTTP/1.1", b"405 Method Not Allowed", b"GET"),
        (b"\x00\xff", b"404 Not Found", b""),
    ],
)
async def test_answers(request_line: bytes, status: bytes, content: bytes) -> None:
    registry = Registry()
    registry.counter("answers", "Answers.").inc(2)
    async with open_metrics(registry, "127.0.0.1", 0) as url:
        answer = await ask(url, request_line + b"\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert content in answer


async def test_an_endless_head_is_cut() -> None:
    async with open_metrics(Registry(), "127.0.0.1", 0) as url:
        assert await ask(url, b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 100_000) == b""


async def test_a_taken_port_is_an_error() -> None:
    async with open_metrics(Registry(), "127.0.0.1", 0) as url:
        with pytest.raises(OSError, match="address already in use"):
            async with open_metrics(Registry(), "127.0.0.1", int(url.split(":")[2].partition("/")[0])):
                pass
