"""Revocations over a real NATS server."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import nats
import pytest

from services.gateway.adapters.invalidations import KeyInvalidations
from services.runtime.errors import unavailable
from sluice.metering.v1 import metering_service_pb2, tenancy_service_pb2
from tests.unit.gateway.fakes import SECRET, World

SUBJECT = "sluice.keys.invalidated"


@pytest.fixture
async def client() -> AsyncIterator[Any]:
    """A client of a server of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    binary = Path(sys.executable).parent / "nats-server"
    server = subprocess.Popen(
        [str(binary) if binary.exists() else shutil.which("nats-server") or "nats-server", "-a", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        client = None
        for _ in range(100):
            with contextlib.suppress(OSError, nats.errors.Error):
                client = await nats.connect(f"nats://127.0.0.1:{port}", max_reconnect_attempts=0, connect_timeout=1)
                break
            await asyncio.sleep(0.05)
        assert client is not None, "nats-server didn't start"
        yield client
        await client.close()
    finally:
        server.terminate()
        server.wait(5)


async def until_gone(world: World) -> float:
    """How long the key is still known."""
    began = world.loop.time()
    while world.identities.known(SECRET) is not None:
        await asyncio.sleep(0.01)
        assert world.loop.time() - began < 1.0, "the key is still known after a second"
    return world.loop.time() - began


async def test_a_revoked_key_is_forgotten_within_a_second_and_a_changed_one_replaced(client: Any) -> None:
    world = World()
    await world.identities.authenticate(SECRET, 1.0)

    async def connected() -> Any:
        return client

    listener = KeyInvalidations(connected, world.identities)
    task = asyncio.create_task(listener.listen_forever())
    await asyncio.sleep(0.05)
    digest = hashlib.sha256(SECRET.encode()).digest()

    await client.publish(SUBJECT, b"\xff\xff not a message")
    changed = tenancy_service_pb2.KeyInvalidation(
        key_sha256=digest,
        key_id="key-1",
        identity=metering_service_pb2.Identity(tenant_id="acme", project_id="other", key_id="key-1", scopes=["usage"]),
    )
    await client.publish(SUBJECT, changed.SerializeToString())
    await client.flush()
    for _ in range(100):
        principal = world.identities.known(SECRET)
        if principal is not None and principal.project_id == "other":
            break
        await asyncio.sleep(0.01)
    assert principal is not None
    assert principal.scopes == ("usage",)
    assert listener.fault_count == 1

    revoked = tenancy_service_pb2.KeyInvalidation(key_sha256=digest, key_id="key-1")
    await client.publish(SUBJECT, revoked.SerializeToString())
    await client.flush()
    assert await until_gone(world) < 1.0
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_without_nats_it_waits_and_tries_again() -> None:
    world = World()

    async def absent() -> Any:
        raise unavailable("nats", "NATS can't be reached")

    task = asyncio.create_task(KeyInvalidations(absent, world.identities).listen_forever())
    await asyncio.sleep(0.05)
    assert not task.done()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
