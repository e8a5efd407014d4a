"""How many calls a process runs for others at once."""

from __future__ import annotations

from services.runtime.errors import Failure, Reason


class Admission:
    """Counts the calls that a process runs for others, over whichever transport, and bounds them."""

    __slots__ = ("limit", "open_count")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.open_count = 0

    def enter(self) -> None:
        """Takes a place; raises Failure OVERLOADED when there is none. Every `enter` that returned needs a `leave`."""
        if self.open_count >= self.limit:
            raise Failure(
                Reason.OVERLOADED,
                f"{self.limit} calls are running already; try again in a moment",
                retry_delay=0.2,
            )
        self.open_count += 1

    def leave(self) -> None:
        """Gives the place back."""
        self.open_count -= 1
