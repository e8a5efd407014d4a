"""Streams that are read on after their caller has left.

Some providers go on, and bill the whole answer, when their connection is closed: cutting it saves nothing, and what it cost isn't known.
For those the catalogue says `on_disconnect: drain`: the rest is read until the provider tells the usage, for so long at most.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, Final

_MOST_WAITING: Final = 64
"""Pieces that lie here unread before the provider is made to wait, as it is by a slow caller."""


class Draining:
    """Reads a provider's stream in a task of its own, so that a caller who leaves while the next piece is awaited doesn't end it.

    An async iterator like the one it reads. `aclose` ends that one and closes its connection.
    """

    def __init__(self, pieces: AsyncIterator[Any]) -> None:
        self._pieces = pieces
        self._waiting: deque[Any] = deque()
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._error: BaseException | None = None
        self._task = asyncio.get_running_loop().create_task(self._read())

    async def _read(self) -> None:
        try:
            async for piece in self._pieces:
                self._waiting.append(piece)
                self._changed.set()
                if len(self._waiting) >= _MOST_WAITING:
                    self._room.clear()
                    await self._room.wait()
            self._error = StopAsyncIteration()
        except BaseException as error:
            self._error = error
            if isinstance(error, asyncio.CancelledError):
                raise
        finally:
            self._changed.set()
            close = getattr(self._pieces, "aclose", None)
            if close is not None:
                await close()

    def __aiter__(self) -> Draining:
        return self

    async def __anext__(self) -> Any:
        while not self._waiting:
            if self._error is not None:
                error = self._error
                raise StopAsyncIteration if isinstance(error, StopAsyncIteration | asyncio.CancelledError) else error
            self._changed.clear()
            await self._changed.wait()
        piece = self._waiting.popleft()
        self._room.set()
        return piece

    async def aclose(self) -> None:
        """Ends the reading."""
        self._task.cancel()
        await asyncio.wait([self._task])
