"""Keeps a dead dependency from costing every request its timeout."""

from __future__ import annotations


class Breaker:
    """Counts failures in a row; after `failures` of them calls are skipped for `open_seconds`, then one at a time tries again.

    It only saves time: what happens without the dependency is its caller's decision. Times are of the caller's clock.
    """

    __slots__ = ("_limit", "_open_seconds", "_open_until", "failure_count")

    def __init__(self, *, failures: int = 3, open_seconds: float = 2.0) -> None:
        self._limit = failures
        self._open_seconds = open_seconds
        self.failure_count = 0
        """In a row. A hot path may skip `allows` and `succeeded` while it is 0: both would do nothing."""
        self._open_until = 0.0

    def allows(self, now: float) -> bool:
        """Whether to call. When it was open, the first caller after that is let through and the rest wait for its verdict."""
        if self.failure_count < self._limit:
            return True
        if now < self._open_until:
            return False
        self._open_until = now + self._open_seconds
        return True

    def succeeded(self) -> None:
        """The call was answered."""
        self.failure_count = 0

    def failed(self, now: float) -> None:
        """The call was not answered."""
        self.failure_count += 1
        if self.failure_count >= self._limit:
            self._open_until = now + self._open_seconds
