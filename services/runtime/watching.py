"""Watches a file for changes, for what is reloaded without a restart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path


async def changes(path: Path, interval: float) -> AsyncIterator[None]:
    """Yields after each change of the file; looks every `interval` seconds. A file that is away for a while is no change.

    By looking, not by inotify: mounted configuration (a ConfigMap, a network share) changes by renames of folders that no watch sees.
    """
    seen = await asyncio.to_thread(_stamp, path)
    while True:
        await asyncio.sleep(interval)
        stamp = await asyncio.to_thread(_stamp, path)
        if stamp is not None and stamp != seen:
            seen = stamp
            yield


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
