"""What both sides of a link share: the outbox, which puts what is ready into one message, and the channel's options."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Awaitable, Callable
from typing import Any, Final

LINK_SERVICE: Final = "sluice.link.v1.LinkService"
REPLICA_KEY: Final = "x-sluice-replica"
"""Initial metadata of a link: which process the caller is talking to."""
FIRST_CREDITS: Final = 64
"""Replies that a streaming call may send before the caller has taken one."""
MAX_OUTBOX_BYTES: Final = 64 * 1024 * 1024
"""More than this unsent, and a side stops producing."""
MAX_BATCH_BYTES: Final = 1024 * 1024

_MAX_FRAMES: Final = 1024


class Outbox:
    """Messages (ExchangeRequest or ExchangeResponse) to be sent, filled frame by frame and emptied by one writer."""

    def __init__(self, message_class: Any) -> None:
        self._class = message_class
        self._full: collections.deque[tuple[Any, int]] = collections.deque()
        self._message: Any = None
        self._message_bytes = 0
        self._frame_count = 0
        self._wake: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self.byte_count = 0

    def add(self, size: int) -> Any:
        """A new frame to fill now, whose payload has `size` bytes."""
        message = self._message
        if message is None:
            message = self._message = self._class()
            wake = self._wake
            if wake is not None:
                self._wake = None
                if not wake.done():
                    wake.set_result(None)
        elif self._frame_count >= _MAX_FRAMES or self._message_bytes + size > MAX_BATCH_BYTES:
            self._full.append((message, self._message_bytes))
            message = self._message = self._class()
            self._message_bytes = self._frame_count = 0
        self._message_bytes += size
        self._frame_count += 1
        self.byte_count += size
        return message.frames.add()

    async def write_to(self, write: Callable[[Any], Awaitable[None]]) -> None:
        """Sends what comes, until cancelled or until `write` raises."""
        while True:
            if self._full:
                message, size = self._full.popleft()
            elif self._message is not None:
                message, size = self._message, self._message_bytes
                self._message = None
                self._message_bytes = self._frame_count = 0
            else:
                self._wake = self._loop.create_future()
                await self._wake
                continue
            await write(message)
            self.byte_count -= size
            if self._drained is not None and self.byte_count <= MAX_OUTBOX_BYTES:
                if not self._drained.done():
                    self._drained.set_result(None)
                self._drained = None

    async def room(self) -> None:
        """Returns when the other side has taken enough that more may be produced."""
        while self.byte_count > MAX_OUTBOX_BYTES:
            if self._drained is None:
                self._drained = self._loop.create_future()
            await asyncio.shield(self._drained)


def link_options(max_message_bytes: int) -> tuple[tuple[str, int], ...]:
    """Options of the gRPC channel below a link."""
    return (
        ("grpc.max_receive_message_length", max_message_bytes + 2 * MAX_BATCH_BYTES),
        ("grpc.max_send_message_length", max_message_bytes + 2 * MAX_BATCH_BYTES),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.min_reconnect_backoff_ms", 50),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # A dial of ours is a channel of its own; shared subchannels would bring their backoff along.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
    )
