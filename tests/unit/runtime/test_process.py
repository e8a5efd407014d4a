from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from services.runtime.errors import Failure, Reason
from services.runtime.inproc import InprocChannel
from services.runtime.jetstream import ack_sync, ensure_stream, fetch, publish
from services.runtime.link import LinkChannel
from services.runtime.process import Process
from services.runtime.settings import MeshSettings
from sluice.tokenization.v1.tokenization_service_pb2 import CountTextsRequest
from sluice.tokenization.v1.tokenization_service_pb2_grpc import TokenizationServiceStub
from tests.unit.runtime.fakes import SETTINGS, Lines, Script, bindings, eventually, serve
from tests.unit.runtime.test_link import free_port


@contextlib.asynccontextmanager
async def nats_server(port: int, store: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A real nats-server with JetStream."""
    program = Path(sys.executable).parent / "nats-server"
    process = await asyncio.create_subprocess_exec(
        *(str(program), "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", str(store)),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    break
                await asyncio.sleep(0.02)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_a_service_of_this_process_is_called_without_a_socket() -> None:
    script = Script()
    async with Process("compact", MeshSettings(), log=Lines()) as process:
        before: Any = TokenizationServiceStub(process.channel("tokenization"))
        with pytest.raises(Failure):
            await before.CountTexts(CountTextsRequest())
        process.serve("tokenization", bindings(script))
        channel = process.channel("tokenization")
        assert isinstance(channel, InprocChannel)
        await before.CountTexts(CountTextsRequest())
        assert script.calls[0].caller.name == "compact"


async def test_a_service_of_another_process_is_called_over_one_set_of_links() -> None:
    async with serve() as running:
        settings = dataclasses.replace(SETTINGS, peers={"tokenization": (running.address,)})
        async with Process("gateway", settings, log=Lines()) as process:
            channel = process.channel("tokenization")
            assert isinstance(channel, LinkChannel)
            assert process.channel("tokenization") is channel
            stub: Any = TokenizationServiceStub(channel)
            await stub.CountTexts(CountTextsRequest(), timeout=5)
            assert running.script.calls[0].caller.name == "gateway"


async def test_replicas_have_names_of_their_own() -> None:
    first, second = Process("routing", MeshSettings(), log=Lines()), Process("routing", MeshSettings(), log=Lines())
    assert first.replica_id != second.replica_id


async def test_the_state_directory_is_private(tmp_path: Path) -> None:
    process = Process("metering", MeshSettings(state_dir=tmp_path / "state"), log=Lines())
    path = process.state_dir("metering")
    assert path == process.state_dir("metering") == tmp_path / "state" / "metering"
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o700


async def test_nats_is_unavailable_then_there_then_back(tmp_path: Path) -> None:
    port = free_port()
    settings = MeshSettings(nats_url=f"nats://127.0.0.1:{port}")
    log = Lines()
    async with Process("gateway", settings, log=log) as process:
        began = asyncio.get_running_loop().time()
        with pytest.raises(Failure) as raised:
            await process.nats()
        assert raised.value.reason is Reason.DEPENDENCY_UNAVAILABLE
        assert 1.9 < asyncio.get_running_loop().time() - began < 3
        async with nats_server(port, tmp_path / "js"):
            client = await process.nats()
            await client.flush(timeout=2)
        await eventually(lambda: not client.is_connected)
        async with nats_server(port, tmp_path / "js"):
            await eventually(lambda: client.is_connected, 10)
            assert await process.nats() is client
            await client.flush(timeout=2)


async def test_messages_to_nats_pass_the_barrier_before_they_are_sent(tmp_path: Path) -> None:
    """A result or an acknowledgement that arrived before its settlement was written would outlive a crash that the settlement doesn't."""
    port = free_port()
    passed: list[int] = []
    async with (
        nats_server(port, tmp_path / "js"),
        Process("gateway", MeshSettings(nats_url=f"nats://127.0.0.1:{port}"), log=Lines()) as process,
    ):
        client = await process.nats()
        stream = client.jetstream()
        await ensure_stream(client, {"name": "S", "subjects": ["s.>"], "storage": "memory"})
        subscription = await stream.pull_subscribe("s.>", "c")
        listener = await client.subscribe("plain")
        process.barrier.add(lambda: passed.append(client.stats["out_msgs"]))
        await client.publish("plain", b"x")
        await publish(stream, "s.one", b"x")
        [message] = await fetch(subscription, 1)
        assert await ack_sync(message)
        await listener.next_msg(1)
        # Each one passed before it was counted as sent: the two publishes, the fetch's request, the acknowledgement.
        assert passed == list(range(passed[0], passed[0] + 4))
        assert client.stats["out_msgs"] == passed[-1] + 1
