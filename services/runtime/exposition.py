"""The metrics endpoint: a minimal HTTP server for `GET /metrics`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

from services.runtime.metrics import Registry

_READ_SECONDS: Final = 5.0
_MAX_HEAD_BYTES: Final = 8 * 1024
_MAX_CONNECTIONS: Final = 32


@contextlib.asynccontextmanager
async def open_metrics(registry: Registry, host: str, port: int) -> AsyncIterator[str]:
    """Serves `registry` on `host`:`port` (0: a free one); yields the URL. Raises OSError when the port is taken."""
    connections: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            if len(connections) <= _MAX_CONNECTIONS:
                async with asyncio.timeout(_READ_SECONDS):
                    writer.write(await _answer(registry, reader))
                    await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            # The scraper is gone, too slow, or talks something else.
            return
        finally:
            connections.discard(task)
            writer.close()

    server = await asyncio.start_server(handle, host, port, limit=_MAX_HEAD_BYTES)
    try:
        bound = server.sockets[0].getsockname()[1]
        yield f"http://{f'[{host}]' if ':' in host else host}:{bound}/metrics"
    finally:
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


async def _answer(registry: Registry, reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    method, _, rest = head.partition(b" ")
    path = rest.partition(b" ")[0].partition(b"?")[0]
    if path != b"/metrics":
        return _response("404 Not Found", "text/plain", b"the metrics are at /metrics\n")
    if method != b"GET":
        return _response("405 Method Not Allowed", "text/plain", b"use GET\n")
    # Rendering thousands of series takes milliseconds that the event loop needs.
    body = await asyncio.to_thread(registry.exposition)
    return _response("200 OK", "text/plain; version=0.0.4; charset=utf-8", body)


def _response(status: str, content_type: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body
