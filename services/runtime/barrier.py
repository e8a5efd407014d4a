"""What must be written before anything leaves the process.

A record that has to be on disk before the bytes that depend on it may be written together with the others of the same turn of the loop,
and nobody has to wait for it: whoever sends, be it to a client, a provider or a peer, passes the barrier first, and what passes it
finds everything written that was recorded before.
"""

from __future__ import annotations

from collections.abc import Callable


class Barrier:
    """Called right before bytes are handed to a socket, or to a library that will: cheap when nothing waits to be written."""

    __slots__ = ("_steps",)

    def __init__(self) -> None:
        self._steps: tuple[Callable[[], None], ...] = ()

    def add(self, step: Callable[[], None]) -> None:
        """Makes `step` a part of it: writes what waits, and mustn't raise."""
        self._steps = (*self._steps, step)

    def __call__(self) -> None:
        for step in self._steps:
            step()
