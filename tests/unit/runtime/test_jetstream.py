from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import nats
import pytest
import pytest_asyncio
from nats.aio.client import Client

from services.runtime.errors import Failure, Reason
from services.runtime.jetstream import (
    KeyValue,
    ack_sync,
    ensure_consumer,
    ensure_stream,
    fetch,
    publish,
    remove_consumer,
    token,
)
from tests.unit.runtime.test_link import free_port
from tests.unit.runtime.test_process import nats_server

JOBS: dict[str, Any] = {
    "name": "JOBS",
    "subjects": ["jobs.>"],
    "retention": "workqueue",
    "discard": "new",
    "discard_new_per_subject": True,
    "max_msgs_per_subject": 2,
    "storage": "file",
}
CONSUMER: dict[str, Any] = {"durable_name": "acme", "ack_policy": "explicit", "filter_subject": "jobs.acme.>"}


@pytest_asyncio.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    port = free_port()
    async with nats_server(port, tmp_path / "js"):
        connection = await nats.connect(f"nats://127.0.0.1:{port}")
        yield connection
        await connection.close()


async def test_a_stream_is_made_kept_and_changed(client: Client) -> None:
    await ensure_stream(client, JOBS)
    await ensure_stream(client, JOBS)
    await ensure_stream(client, {**JOBS, "max_msgs_per_subject": 5})
    info = await client.jetstream().stream_info("JOBS")
    assert info.config.max_msgs_per_subject == 5


async def test_a_change_that_nats_refuses_says_so(client: Client) -> None:
    await ensure_stream(client, JOBS)
    with pytest.raises(Failure) as raised:
        await ensure_stream(client, {**JOBS, "storage": "memory"})
    assert raised.value.reason is Reason.STATE_CONFLICT


async def test_a_job_goes_round(client: Client) -> None:
    await ensure_stream(client, JOBS)
    await ensure_consumer(client, "JOBS", CONSUMER)
    await ensure_consumer(client, "JOBS", CONSUMER)
    stream = client.jetstream()
    first = await publish(stream, "jobs.acme.batch", b"one", message_id="id-1", headers={"Job": "1"})
    again = await publish(stream, "jobs.acme.batch", b"one", message_id="id-1")
    assert (first.duplicate, again.duplicate) == (None, True)
    subscription = await stream.pull_subscribe_bind("acme", "JOBS")
    (message,) = await fetch(subscription, 10, timeout=1)
    assert message.data == b"one"
    assert await ack_sync(message)
    assert await fetch(subscription, 10, timeout=0.1) == []
    await remove_consumer(client, "JOBS", "acme")
    await remove_consumer(client, "JOBS", "acme")


async def test_a_full_queue_refuses_and_loses_nothing(client: Client) -> None:
    await ensure_stream(client, JOBS)
    stream = client.jetstream()
    for number in range(2):
        await publish(stream, "jobs.acme.batch", b"x", message_id=str(number))
    with pytest.raises(Failure) as raised:
        await publish(stream, "jobs.acme.batch", b"x", message_id="2")
    assert raised.value.reason is Reason.QUEUE_FULL
    await publish(stream, "jobs.other.batch", b"x", message_id="3")
    assert (await stream.stream_info("JOBS")).state.messages == 3


async def test_without_a_server_every_wait_ends(tmp_path: Path) -> None:
    port = free_port()
    async with nats_server(port, tmp_path / "js") as server:
        client = await nats.connect(f"nats://127.0.0.1:{port}", max_reconnect_attempts=-1, error_cb=_ignore)
        await ensure_stream(client, JOBS)
        await ensure_consumer(client, "JOBS", CONSUMER)
        stream = client.jetstream()
        await publish(stream, "jobs.acme.batch", b"x")
        subscription = await stream.pull_subscribe_bind("acme", "JOBS")
        (message,) = await fetch(subscription, 1)
        server.kill()
        await server.wait()
        began = asyncio.get_running_loop().time()
        assert not await ack_sync(message, timeout=0.3)
        for call in (
            ensure_stream(client, JOBS, timeout=0.3),
            publish(stream, "jobs.acme.batch", b"x", timeout=0.3),
            KeyValue(client, "b", timeout=0.3).get("k"),
        ):
            with pytest.raises(Failure) as raised:
                await call
            assert raised.value.reason is Reason.DEPENDENCY_UNAVAILABLE
        assert asyncio.get_running_loop().time() - began < 3
        with contextlib.suppress(OSError):
            await client.close()


async def _ignore(_: Exception) -> None:
    return


async def test_a_bucket_keeps_replaces_forgets_and_removes(client: Client) -> None:
    bucket = KeyValue(client, "answers")
    await bucket.ensure(max_bytes=1_000_000, max_age=3600, max_value_bytes=100_000)
    assert await bucket.get("acme.k1") is None
    await bucket.put("acme.k1", b"one")
    await bucket.put("acme.k1", b"two")
    assert await bucket.get("acme.k1") == b"two"
    await bucket.delete("acme.k1")
    assert await bucket.get("acme.k1") is None
    await bucket.put("acme.k2", b"short", ttl=1)
    assert await bucket.get("acme.k2") == b"short"
    await asyncio.sleep(1.6)
    assert await bucket.get("acme.k2") is None


@pytest.mark.parametrize("key", ["", "a b", "a..b", "*", "a.>", ".a", "ä"])
async def test_a_key_that_reaches_further_is_refused(client: Client, key: str) -> None:
    with pytest.raises(ValueError, match="must be made of"):
        await KeyValue(client, "answers").get(key)


def test_a_token_holds_no_wildcard() -> None:
    assert token("acme_1-x") == "acme_1-x"
    for text in ("", "a.b", "*", ">", "a b", "x" * 129):
        with pytest.raises(Failure):
            token(text)
