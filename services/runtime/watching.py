"""Watches a file for changes, for what is reloaded without a restart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path


class Watch:
    """A file as it is now, and its changes from here on: make it before the file is read, so that no change is missed.

    By looking, not by inotify: mounted configuration (a ConfigMap, a network share) changes by renames of folders that no watch sees.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = _stamp(path)

    async def changes(self, interval: float) -> AsyncGenerator[None, None]:
        """Yields after each change; looks every `interval` seconds. A file that is away for a while is no change."""
        while True:
            await asyncio.sleep(interval)
            stamp = await asyncio.to_thread(_stamp, self._path)
            if stamp is not None and stamp != self._seen:
                self._seen = stamp
                yield


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
