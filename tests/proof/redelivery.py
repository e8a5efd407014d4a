"""Every settlement of a running mesh a second time: read from the spool as it is written, and posted again.

Nothing of money travels on NATS on the way of a request (key invalidations and the shared cache tier do): settlements go from the spool
of `execution` to `metering` by gRPC. So the messages to be doubled are those. What is posted here are the same bytes, over another
connection, in another order and other groups, some before their original; while metering is away, as late as it comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import grpc

from services.execution.attempts import lost
from sluice.metering.v1 import metering_service_pb2
from sluice.metering.v1.metering_service_pb2_grpc import MeteringServiceStub

_RECORD: Final = struct.Struct("<IIB")
"""Length, CRC-32 and kind, then the payload: services/execution/spool.py."""
_START: Final = 1
_LOOK_SECONDS: Final = 0.02
_GROUP: Final = 50
_CALL_SECONDS: Final = 5.0
_RECONNECT: Final = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500))


class Redelivery:
    """Follows the spool in `directory` (of the execution service) and posts what settles to metering at `target`."""

    def __init__(self, directory: Path, target: str, service_token: str) -> None:
        self._directory = directory
        self._target = target
        self._metadata = (("authorization", f"Bearer {service_token}"), ("x-sluice-service", "execution"))
        self._files: dict[Path, tuple[BinaryIO, bytearray]] = {}
        self._begun: dict[str, Any] = {}
        self._waiting: list[Any] = []
        self._random = random.Random(8)
        self.delivered_count = 0
        """Settlements that metering has answered to."""
        self.refused: list[str] = []
        """What metering said of settlements that it didn't take."""

    @contextlib.asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Follows while the context is open; then posts the rest."""
        async with grpc.aio.insecure_channel(self._target, options=_RECONNECT) as channel:
            stub = MeteringServiceStub(channel)
            task = asyncio.create_task(self._follow(stub))
            try:
                yield
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            self._look()
            # Those that a crash cut off: execution books them when it starts again, and here they come once more.
            self._waiting += [lost(record) for record in self._begun.values()]
            while self._waiting:
                await self._post(stub)

    async def _follow(self, stub: Any) -> None:
        while True:
            self._look()
            if self._waiting:
                await self._post(stub)
            await asyncio.sleep(_LOOK_SECONDS)

    def _look(self) -> None:
        for path in self._directory.glob("*.spool"):
            if path not in self._files:
                # Kept open: a segment that is done with is removed, and can be read to its end all the same.
                with contextlib.suppress(FileNotFoundError):
                    self._files[path] = (path.open("rb"), bytearray())
        for file, rest in self._files.values():
            rest += file.read()
            self._take(rest)

    def _take(self, rest: bytearray) -> None:
        while len(rest) >= _RECORD.size:
            length, checksum, kind = _RECORD.unpack_from(rest)
            payload = bytes(rest[_RECORD.size : _RECORD.size + length])
            if len(payload) < length or zlib.crc32(payload) != checksum:
                return
            del rest[: _RECORD.size + length]
            record = metering_service_pb2.Settlement.FromString(payload)
            if kind == _START:
                self._begun[record.attempt_id] = record
            else:
                self._begun.pop(record.attempt_id, None)
                self._waiting.append(record)

    async def _post(self, stub: Any) -> None:
        self._random.shuffle(self._waiting)
        group = self._waiting[:_GROUP]
        try:
            response = await stub.PostSettlements(
                metering_service_pb2.PostSettlementsRequest(settlements=group), timeout=_CALL_SECONDS, metadata=self._metadata
            )
        except grpc.RpcError:
            await asyncio.sleep(0.2)
            return
        del self._waiting[: len(group)]
        self.delivered_count += len(group)
        self.refused += [
            result.status.message
            for result in response.results
            if result.state == metering_service_pb2.SETTLEMENT_STATE_REFUSED
        ]
