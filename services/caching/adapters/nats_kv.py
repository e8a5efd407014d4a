"""The exact tier that replicas share: a JetStream key-value bucket in memory, written behind the path, read only when it pays.

Replicas announce the keys they wrote over core NATS, and only announced keys are asked for, so a miss costs no network. Writes are
published without waiting for the server's word: a lost one costs hit rate. Everything is bounded; what doesn't fit is dropped and
counted. While NATS is away the tier knows nothing and the process's own tier goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final, NamedTuple

import nats.errors
import orjson
from nats.aio.client import Client
from nats.aio.msg import Msg

from services.caching.breaker import Breaker
from services.caching.keys import KEY_BYTES
from services.runtime.errors import Failure, unavailable
from services.runtime.jetstream import KeyValue

ANNOUNCED: Final = "sluice.caching.announced"
"""Payload: 16 bytes that name the replica, then keys of 32 bytes."""
PURGED: Final = "sluice.caching.purged"
"""Payload: 16 bytes that name the replica, then JSON `[tenant, namespace]`."""

_NAME_BYTES: Final = 16
_EXPIRE: Final = struct.Struct(">d")
_ENSURE_SECONDS: Final = 10.0
"""A restarted server has lost the bucket and doesn't say so: it is made again this often."""
_TICK_SECONDS: Final = 0.02
_BATCH: Final = 64
_API_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class Settings:
    """Of the bucket and the bounds. Times in seconds."""

    bucket: str
    max_bytes: int
    max_entry_bytes: int
    max_age: float
    read_timeout: float
    queue_entries: int
    queue_bytes: int
    known_keys: int


class _Write(NamedTuple):
    partition: str
    namespace: str
    key: bytes
    value: bytes
    expire: float


class NatsSharedTier:
    """See SharedTier. `run` must be running."""

    def __init__(
        self,
        settings: Settings,
        connect: Callable[[], Awaitable[Client]],
        replica_id: str,
        *,
        now: Callable[[], float],
        clock: Callable[[], float],
        purged: Callable[[str, str], None],
        warn: Callable[[str], None],
    ) -> None:
        """`now` is Unix time, `clock` monotonic. `purged(tenant, namespace)` is called when another replica purged."""
        self._settings = settings
        self._connect = connect
        self._name = blake2b(replica_id.encode(), digest_size=_NAME_BYTES).digest()
        self._now = now
        self._clock = clock
        self._purged = purged
        self._warn = warn
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self._queue: deque[_Write] = deque()
        self._bytes = 0
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._breaker = Breaker()
        self._client: Client | None = None
        self._bucket: KeyValue | None = None
        self.dropped_count = 0

    @property
    def is_ready(self) -> bool:
        """Whether the bucket is there, as far as is known."""
        return self._client is not None

    def knows(self, key: bytes) -> bool:
        """See SharedTier."""
        return key in self._known

    async def get(self, partition: str, namespace: str, key: bytes) -> tuple[bytes, float] | None:
        """See SharedTier."""
        bucket = self._bucket
        if bucket is None or not self._breaker.allows(self._clock()):
            return None
        try:
            value = await bucket.get(_path(partition, namespace, key))
        except Failure:
            self._breaker.failed(self._clock())
            return None
        self._breaker.succeeded()
        if value is None or len(value) < _EXPIRE.size:
            self._known.pop(key, None)
            return None
        (expire,) = _EXPIRE.unpack_from(value)
        return value[_EXPIRE.size :], expire

    def put(self, partition: str, namespace: str, key: bytes, value: bytes, expire: float) -> bool:
        """See SharedTier."""
        settings = self._settings
        size = len(value)
        if size > settings.max_entry_bytes:
            return False
        if len(self._queue) >= settings.queue_entries or self._bytes + size > settings.queue_bytes:
            self.dropped_count += 1
            return False
        self._queue.append(_Write(partition, namespace, key, value, expire))
        self._bytes += size
        if not self._work.is_set():
            self._idle.clear()
            self._work.set()
        return True

    async def purge(self, tenant: str, partition: str, namespace: str) -> None:
        """See SharedTier."""
        prefix = f"{partition}." if not namespace else f"{partition}.{_namespace(namespace)}."
        kept = deque(w for w in self._queue if w.partition != partition or namespace not in ("", w.namespace))
        self._bytes = sum(len(write.value) for write in kept)
        self._queue = kept
        client = self._client
        if client is None:
            return
        with contextlib.suppress(nats.errors.Error, TimeoutError):
            await self._api(client, "STREAM.PURGE", {"filter": f"$KV.{self._settings.bucket}.{prefix}>"})
            await client.publish(PURGED, self._name + orjson.dumps([tenant, namespace]))

    async def flush(self, timeout: float) -> None:
        """Waits until all that is queued is written, at most `timeout` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._idle.wait()

    async def run(self) -> None:
        """The worker: connects, makes the bucket, writes, and makes it again after outages."""
        listening = False
        told = ""
        while True:
            try:
                client = await self._connect()
                if not listening:
                    await client.subscribe(ANNOUNCED, cb=self._heard)
                    await client.subscribe(PURGED, cb=self._heard_purge)
                    listening = True
                await self._ensure(client)
                self._client = client
                told = ""
                await self._write_for(client, _ENSURE_SECONDS)
            except (Failure, nats.errors.Error, OSError) as error:
                self._client = None
                text = error.message if isinstance(error, Failure) else type(error).__name__
                if text != told:
                    told = text
                    self._warn(text)
                await asyncio.sleep(1.0)

    async def _ensure(self, client: Client) -> None:
        settings = self._settings
        await KeyValue(client, settings.bucket).ensure(
            max_bytes=settings.max_bytes, max_age=settings.max_age, max_value_bytes=settings.max_entry_bytes + 4096
        )
        if self._bucket is None:
            self._bucket = KeyValue(client, settings.bucket, timeout=settings.read_timeout)
            await self._learn(client)

    async def _learn(self, client: Client) -> None:
        """Knows the keys that were there before this replica."""
        filtered = {"subjects_filter": f"$KV.{self._settings.bucket}.>"}
        answer = await self._api(client, "STREAM.INFO", filtered)
        subjects = (answer.get("state") or {}).get("subjects") or {}
        for subject in subjects:
            with contextlib.suppress(ValueError):
                self._know(bytes.fromhex(subject.rpartition(".")[2]))

    async def _write_for(self, client: Client, seconds: float) -> None:
        """Writes what is queued for about `seconds`."""
        end = self._clock() + seconds
        while (left := end - self._clock()) > 0:
            try:
                async with asyncio.timeout(left):
                    await self._work.wait()
            except TimeoutError:
                return
            if not client.is_connected:
                # What is published now would arrive before the bucket is made again.
                raise unavailable("nats", "NATS is not connected")
            written: list[bytes] = []
            while self._queue and len(written) < _BATCH:
                write = self._queue.popleft()
                self._bytes -= len(write.value)
                left = write.expire - self._now()
                if left < 1:
                    continue
                try:
                    await client.publish(
                        f"$KV.{self._settings.bucket}.{_path(write.partition, write.namespace, write.key)}",
                        _EXPIRE.pack(write.expire) + write.value,
                        headers={"Nats-TTL": f"{int(left)}s"},
                    )
                except (nats.errors.Error, OSError):
                    self.dropped_count += 1
                    raise
                written.append(write.key)
            await asyncio.sleep(_TICK_SECONDS)
            if written:
                # After a moment, so that whoever hears of a key finds it.
                await client.publish(ANNOUNCED, self._name + b"".join(written))
            if not self._queue:
                self._work.clear()
                self._idle.set()

    async def _heard(self, message: Msg) -> None:
        data = message.data
        if data[:_NAME_BYTES] == self._name:
            return
        for start in range(_NAME_BYTES, len(data) - KEY_BYTES + 1, KEY_BYTES):
            self._know(data[start : start + KEY_BYTES])

    async def _heard_purge(self, message: Msg) -> None:
        data = message.data
        if data[:_NAME_BYTES] == self._name:
            return
        with contextlib.suppress(orjson.JSONDecodeError, ValueError):
            tenant, namespace = orjson.loads(data[_NAME_BYTES:])
            if isinstance(tenant, str) and isinstance(namespace, str):
                self._purged(tenant, namespace)

    def _know(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            return
        known = self._known
        known[key] = None
        known.move_to_end(key)
        if len(known) > self._settings.known_keys:
            known.popitem(last=False)

    async def _api(self, client: Client, operation: str, request: dict[str, str]) -> dict[str, Any]:
        subject = f"$JS.API.{operation}.KV_{self._settings.bucket}"
        async with asyncio.timeout(_API_SECONDS):
            reply = await client.request(subject, orjson.dumps(request), timeout=_API_SECONDS)
        answer = orjson.loads(reply.data)
        return answer if isinstance(answer, dict) else {}


def _namespace(namespace: str) -> str:
    return f"n{namespace}"


def _path(partition: str, namespace: str, key: bytes) -> str:
    """Where an entry is: a tenant's and a namespace's entries share a prefix, so that a purge is one request."""
    return f"{partition}.{_namespace(namespace)}.{key.hex()}"
