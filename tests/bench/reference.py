"""A bare reverse proxy on the gateway's own HTTP stack: the edge's server protocol and execution's upstream pool, nothing between.

It forwards bodies, whole and streamed, as they come: no key, no limits, no cache, no routing, no money. What Sluice costs over it
is what Sluice does, not what HTTP in Python costs. Run as a process of its own: `python -m tests.bench.reference PORT UPSTREAM`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
from collections.abc import Coroutine, Sequence
from typing import Any, Final

import uvloop

from services.execution.adapters.http1 import Pool
from services.execution.errors import AttemptFailed
from services.execution.provider import ungated
from services.gateway.edge.config import EdgeConfig
from services.gateway.edge.http1 import Exchange, Listener
from services.runtime.barrier import Barrier
from services.runtime.errors import Failure

_SECONDS: Final = 60.0
_PATH: Final = "/v1/chat/completions"
_EVENTS: Final = b"text/event-stream"
_BAD_GATEWAY: Final = b"HTTP/1.1 502 Bad Gateway\r\ncontent-type: text/plain\r\n"
_BAD_REQUEST: Final = b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\n"


class Proxy:
    """Sends every request's body to one upstream and its answer back."""

    def __init__(self, upstream: str) -> None:
        """`upstream` is an origin, say `http://127.0.0.1:9100`."""
        self._loop = asyncio.get_running_loop()
        self._pool = Pool(
            upstream, connect_timeout=5.0, max_connections=4096, keep_alive=60.0, max_answer_bytes=16 * 1024 * 1024
        )
        headers = {"content-type": "application/json"}
        self._head = self._pool.head("POST", _PATH, {**headers, "accept": "application/json"})
        self._stream_head = self._pool.head("POST", _PATH, {**headers, "accept": "text/event-stream"})

    def close(self) -> None:
        """Closes the connections to the upstream."""
        self._pool.close()

    def handle(self, exchange: Exchange) -> Coroutine[Any, Any, None] | None:
        """See Application."""
        return self._stream(exchange) if exchange.headers.get(b"accept") == _EVENTS else self._whole(exchange)

    def refuse(self, exchange: Exchange, failure: Failure) -> None:
        """See Application."""
        exchange.respond(_BAD_REQUEST, str(failure).encode())

    async def _whole(self, exchange: Exchange) -> None:
        try:
            response = await self._pool.exchange(self._head, bytes(exchange.body), self._loop.time() + _SECONDS, ungated)
        except AttemptFailed as failed:
            exchange.respond(_BAD_GATEWAY, str(failed).encode())
            return
        exchange.respond(_answer_head(response.status, response.headers), response.body)

    async def _stream(self, exchange: Exchange) -> None:
        deadline = self._loop.time() + _SECONDS
        try:
            connection, response = await self._pool.open_stream(self._stream_head, bytes(exchange.body), deadline, ungated)
            exchange.open(_answer_head(response.status, response.headers))
            pieces = connection.pieces(_SECONDS, deadline)
            async with contextlib.aclosing(pieces):  # type: ignore[type-var]  # an async generator behind its iterator type
                async for piece in pieces:
                    if not exchange.send(piece):
                        await exchange.writable()
        except AttemptFailed as failed:
            if not exchange.opened:
                exchange.respond(_BAD_GATEWAY, str(failed).encode())
                return
        exchange.close()


def _answer_head(status: int, headers: dict[bytes, bytes]) -> bytes:
    return b"HTTP/1.1 %d -\r\ncontent-type: %b\r\n" % (status, headers.get(b"content-type", b"application/json"))


async def _serve(port: int, upstream: str) -> None:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    proxy = Proxy(upstream)
    async with Listener(EdgeConfig(port=port), proxy, Barrier()).listening():
        await stopped.wait()
    proxy.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("port", type=int, help="port to listen on, loopback only")
    parser.add_argument("upstream", help="origin to forward to, such as http://127.0.0.1:9100")
    given = parser.parse_args(arguments)
    uvloop.run(_serve(given.port, given.upstream))


if __name__ == "__main__":
    main()
