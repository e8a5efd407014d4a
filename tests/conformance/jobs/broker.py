"""A real nats-server with the configuration of `sluice up`, which a test may kill and start again."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import nats
from nats.aio.client import Client

from services.cli.nats import command

_TOKEN = "token-of-the-tests"
START_SECONDS = 10.0


class Broker:
    """The server; a port and a directory that outlive its process."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port: int = probe.getsockname()[1]
        self._process: asyncio.subprocess.Process | None = None
        self.url = f"nats://{_TOKEN}@127.0.0.1:{self._port}"

    async def start(self) -> None:
        """Starts the server and waits until it answers."""
        self._process = await asyncio.create_subprocess_exec(
            *command(self._directory, self._port, _TOKEN),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        async with asyncio.timeout(START_SECONDS):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", self._port)
                    writer.close()
                    return
                await asyncio.sleep(0.02)

    async def kill(self) -> None:
        """`kill -9`."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """A connection that reconnects for ever, as the services' own."""

        async def ignore(_: Exception) -> None:
            return

        client = await nats.connect(self.url, max_reconnect_attempts=-1, reconnect_time_wait=0.1, error_cb=ignore)
        try:
            yield client
        finally:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(2):
                    await client.close()


@contextlib.asynccontextmanager
async def broker(directory: Path) -> AsyncIterator[Broker]:
    """A server that runs, and is gone afterwards."""
    made = Broker(directory)
    await made.start()
    try:
        yield made
    finally:
        await made.kill()
