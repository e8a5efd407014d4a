"""Changes and revocations of keys, as metering publishes them on NATS."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from google.protobuf.message import DecodeError

from services.gateway.adapters.metering import principal_from_proto
from services.gateway.identities import Identities
from services.runtime.errors import Failure
from sluice.metering.v1 import tenancy_service_pb2

SUBJECT: Final = "sluice.keys.*"
"""Whatever is announced of a key is a `KeyInvalidation`, see tenancy_service.proto."""
_RETRY_SECONDS: Final = 2.0


class KeyInvalidations:
    """Listens for the life of the process. Without NATS identities are asked for again every few seconds, see `Identities`."""

    def __init__(self, nats: Callable[[], Awaitable[Any]], identities: Identities) -> None:
        self._nats = nats
        self._identities = identities
        self.fault_count = 0

    async def listen_forever(self) -> None:
        """The worker. The client subscribes again by itself after a reconnect."""
        while True:
            try:
                client = await self._nats()
            except Failure:
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            subscription = await client.subscribe(SUBJECT, cb=self._receive)
            try:
                await asyncio.Event().wait()
            finally:
                # The process is going down; the client is closed by its owner.
                del subscription

    async def _receive(self, message: Any) -> None:
        try:
            invalidation = tenancy_service_pb2.KeyInvalidation.FromString(message.data)
        except DecodeError:
            self.fault_count += 1
            return
        principal = principal_from_proto(invalidation.identity) if invalidation.HasField("identity") else None
        self._identities.revoke(invalidation.key_sha256, principal)
