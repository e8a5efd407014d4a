"""Kept answers in a JetStream key-value bucket on disk. `run` must be running.

While NATS is away nothing is asked of it: requests go on, with this process's memory alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import nats.errors
from nats.aio.client import Client

from services.runtime.errors import Failure
from services.runtime.jetstream import KeyValue

BUCKET: Final = "sluice_replays"
_ENSURE_SECONDS: Final = 10.0
"""A server that was set up anew has lost the bucket and doesn't say so: it is made again this often."""
_REST_SECONDS: Final = 1.0
"""After a call that failed nothing is asked for so long."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Of the bucket and the waits. Times in seconds."""

    max_bytes: int
    max_entry_bytes: int
    max_age: float
    replicas: int
    read_timeout: float
    write_timeout: float
    max_waiting: int


class NatsReplays:
    """See Replays."""

    def __init__(
        self,
        settings: Settings,
        connect: Callable[[], Awaitable[Client]],
        *,
        clock: Callable[[], float],
        warn: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._connect = connect
        self._clock = clock
        self._warn = warn
        self._client: Client | None = None
        self._reading: KeyValue | None = None
        self._writing: KeyValue | None = None
        self._rests_until = 0.0
        self._waiting = 0
        self.unkept_count = 0
        """Answers that were not kept, since NATS was away, full or slow, or they were too large."""
        self.found_count = 0
        """Answers that were found."""

    async def find(self, key: str) -> bytes | None:
        """See Replays."""
        bucket = self._reading
        if bucket is None or not self._is_up():
            return None
        try:
            value = await bucket.get(key)
        except Failure:
            self._rests_until = self._clock() + _REST_SECONDS
            return None
        self.found_count += value is not None
        return value

    async def keep(self, key: str, record: bytes) -> bool:
        """See Replays."""
        bucket = self._writing
        settings = self._settings
        if (
            bucket is None
            or not self._is_up()
            or len(record) > settings.max_entry_bytes
            # The server syncs one record after the other: behind so many it would come too late.
            or self._waiting >= settings.max_waiting
        ):
            self.unkept_count += 1
            return False
        self._waiting += 1
        try:
            await bucket.put(key, record)
        except Failure:
            self.unkept_count += 1
            self._rests_until = self._clock() + _REST_SECONDS
            return False
        finally:
            self._waiting -= 1
        return True

    def _is_up(self) -> bool:
        client = self._client
        return client is not None and client.is_connected and self._clock() >= self._rests_until

    async def run(self) -> None:
        """The worker: connects, makes the bucket, and makes it again after outages."""
        settings = self._settings
        told = ""
        while True:
            try:
                client = await self._connect()
                await KeyValue(client, BUCKET).ensure(
                    max_bytes=settings.max_bytes,
                    max_age=settings.max_age,
                    max_value_bytes=settings.max_entry_bytes + 4096,
                    is_durable=True,
                    replicas=settings.replicas,
                )
                if self._client is None:
                    self._reading = KeyValue(client, BUCKET, timeout=settings.read_timeout)
                    self._writing = KeyValue(client, BUCKET, timeout=settings.write_timeout)
                    self._client = client
                told = ""
                await asyncio.sleep(_ENSURE_SECONDS)
            except (Failure, nats.errors.Error, OSError) as error:
                text = error.message if isinstance(error, Failure) else type(error).__name__
                if text != told:
                    told = text
                    self._warn(text)
                await asyncio.sleep(1.0)
