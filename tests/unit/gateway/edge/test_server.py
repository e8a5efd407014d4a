"""The edge in its process."""

from __future__ import annotations

import asyncio
from pathlib import Path

from services.gateway.edge.config import EdgeConfig
from services.gateway.edge.server import serve
from services.runtime.process import Process
from services.runtime.settings import MeshSettings
from tests.unit.gateway.fakes import World
from tests.unit.runtime.fakes import Lines


async def test_answers_pass_the_processs_barrier(tmp_path: Path) -> None:
    passed: list[str] = []

    async def ping() -> None:
        """All is well."""

    async with (
        Process("gateway", MeshSettings(state_dir=tmp_path), log=Lines()) as process,
        serve(World().core, EdgeConfig(port=0), process, ping) as edge,
    ):
        process.barrier.add(lambda: passed.append("barrier"))
        reader, writer = await asyncio.open_connection("127.0.0.1", edge.listener.port)
        writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        assert passed
        writer.close()
