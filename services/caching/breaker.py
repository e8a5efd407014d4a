"""A breaker: after so many failures in a row a tier isn't asked for a while; then one call tries."""

from __future__ import annotations

from typing import Final

FAILURES: Final = 3
OPEN_SECONDS: Final = 5.0


class Breaker:
    """Times are of one monotonic clock, in seconds."""

    def __init__(self, failures: int = FAILURES, open_seconds: float = OPEN_SECONDS) -> None:
        self._limit = failures
        self._open_seconds = open_seconds
        self._failures = 0
        self._until = 0.0

    def allows(self, now: float) -> bool:
        """Whether a call may be made. While it is open, one call passes each time the wait is over."""
        if self._failures < self._limit:
            return True
        if now < self._until:
            return False
        # Nobody else tries until this call has told how it went.
        self._until = now + self._open_seconds
        return True

    def succeeded(self) -> None:
        """A call was answered."""
        self._failures = 0

    def failed(self, now: float) -> None:
        """A call was not answered."""
        self._failures += 1
        if self._failures >= self._limit:
            self._until = now + self._open_seconds
