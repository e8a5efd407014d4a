"""Cancellation that can't get lost.

`asyncio.wait_for` of Python 3.11 returns the result when it is cancelled in the moment in which the result is there, and swallows
the cancellation; nats-py waits by it everywhere. A loop around such calls must look by itself whether it was cancelled.
"""

from __future__ import annotations

import asyncio


def checkpoint() -> None:
    """Raises CancelledError when the running task was cancelled, even if a call in between swallowed that."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
