"""A circuit breaker per (provider, model, credential), on the figures of reliability.md T15.

Closed, it opens after so many failures in a row or a share of failures among enough calls of the window. Open, no call passes until
the cooldown, which has jitter and doubles. Then it is half open: one call at a time passes; enough successes close it, a failure
opens it for longer. Faults of callers never count. A provider's Retry-After opens it for as long.
"""

from __future__ import annotations

import enum
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

_JITTER: Final = 0.2


class State(enum.Enum):
    """State of a breaker."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True)
class Figures:
    """When a breaker opens and closes. Times in seconds."""

    failures: int = 5
    window: float = 10.0
    calls: int = 20
    share: float = 0.5
    cooldown: float = 30.0
    longest: float = 300.0
    successes: int = 3


class Breaker:
    """One breaker. Not for several threads."""

    __slots__ = (
        "_calls", "_clock", "_consecutive", "_cooldown", "_failed", "_figures", "_probing", "_random", "_state", "_successes", "_until",
        "in_flight",
    )  # fmt: skip

    def __init__(self, figures: Figures, clock: Callable[[], float], rng: random.Random | None = None) -> None:
        self._figures = figures
        self._clock = clock
        self._random = rng or random.Random()  # noqa: S311 - jitter is no secret
        self._state = State.CLOSED
        self._consecutive = 0
        self._calls: deque[tuple[float, bool]] = deque()
        self._failed = 0
        self._until = 0.0
        self._cooldown = figures.cooldown
        self._probing = False
        self._successes = 0
        self.in_flight = 0

    @property
    def state(self) -> State:
        """Its state; open turns into half open by time alone."""
        if self._state is State.OPEN and self._clock() >= self._until:
            return State.HALF_OPEN
        return self._state

    def retry_delay(self) -> float:
        """Seconds until a call may pass."""
        return max(0.0, self._until - self._clock())

    def allow(self) -> bool:
        """Whether a call may be made now. A call that may must be ended by `succeeded`, `failed` or `ignored`."""
        if self._state is not State.CLOSED:
            if self._state is State.OPEN:
                if self._clock() < self._until:
                    return False
                self._state = State.HALF_OPEN
                self._successes = 0
                self._probing = False
            if self._probing:
                return False
            self._probing = True
        self.in_flight += 1
        return True

    def succeeded(self) -> None:
        """The call was answered."""
        self.in_flight -= 1
        self._consecutive = 0
        if self._state is State.CLOSED:
            # With no failure in the window there is nothing to weigh successes against.
            if self._failed:
                self._note(failed=False)
                if self._too_many():
                    self._open(None)
            return
        if self._state is State.HALF_OPEN:
            self._probing = False
            self._successes += 1
            if self._successes >= self._figures.successes:
                self._state = State.CLOSED
                self._cooldown = self._figures.cooldown
                self._calls.clear()
                self._failed = 0

    def failed(self, retry_delay: float | None = None) -> None:
        """The provider failed the call; `retry_delay` is what it asks to wait."""
        self.in_flight -= 1
        self._consecutive += 1
        if self._state is State.HALF_OPEN:
            self._probing = False
            self._cooldown = min(self._figures.longest, self._cooldown * 2)
            self._open(retry_delay)
            return
        if self._state is State.OPEN:
            return
        self._note(failed=True)
        figures = self._figures
        if self._consecutive >= figures.failures or self._too_many():
            self._open(retry_delay)
        elif retry_delay is not None and retry_delay >= 1.0:
            # It says itself that it takes no calls.
            self._until = self._clock() + min(retry_delay, figures.longest)
            self._state = State.OPEN

    def ignored(self) -> None:
        """The call ended without saying anything about the provider: cancelled, or the caller's fault."""
        self.in_flight -= 1
        if self._state is State.HALF_OPEN:
            self._probing = False

    def _too_many(self) -> bool:
        calls = len(self._calls)
        return calls >= self._figures.calls and self._failed >= self._figures.share * calls

    def _note(self, *, failed: bool) -> None:
        now = self._clock()
        calls = self._calls
        calls.append((now, failed))
        self._failed += failed
        while calls and (calls[0][0] < now - self._figures.window or len(calls) > 1000):
            self._failed -= calls.popleft()[1]

    def _open(self, retry_delay: float | None) -> None:
        wait = self._cooldown * (1 + self._random.uniform(-_JITTER, _JITTER))
        if retry_delay is not None:
            wait = max(wait, min(retry_delay, self._figures.longest))
        self._until = self._clock() + wait
        self._state = State.OPEN
        self._consecutive = 0
