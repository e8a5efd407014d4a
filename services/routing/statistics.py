"""What is known of models while they work: latency percentiles, load, health; told by execution processes.

Reports may be lost, repeated or late: nothing here is money. What a process said of its targets holds until it says something else, or
until it was silent for `silence` seconds; a model of which nobody speaks counts as healthy and idle.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

MIN_SAMPLES: Final = 5
"""Fewer durations than this say nothing about a model's latency."""


@dataclass(frozen=True, slots=True)
class TargetState:
    """A model as one execution process sees it."""

    model: str
    in_flight: int
    problem: str
    """Why no call passes, in words; empty: calls pass."""


@dataclass(frozen=True, slots=True)
class Finished:
    """An attempt that ended well. Seconds."""

    model: str
    duration: float


class Statistics:
    """Statistics of all models. `clock` is monotonic, seconds."""

    def __init__(
        self, clock: Callable[[], float], *, samples: int, max_age: float, silence: float, max_models: int, max_reporters: int
    ) -> None:
        self._clock = clock
        self._samples = samples
        self._max_age = max_age
        self._silence = silence
        self._max_models = max_models
        self._max_reporters = max_reporters
        self._durations: OrderedDict[str, deque[tuple[float, float]]] = OrderedDict()
        self._reporters: OrderedDict[str, tuple[float, dict[str, TargetState]]] = OrderedDict()

    def take(self, reporter: str, finished: Iterable[Finished], targets: Iterable[TargetState]) -> None:
        """Takes in a report."""
        now = self._clock()
        for one in finished:
            ring = self._durations.get(one.model)
            if ring is None:
                ring = self._durations[one.model] = deque(maxlen=self._samples)
                if len(self._durations) > self._max_models:
                    self._durations.popitem(last=False)
            ring.append((now, one.duration))
            self._durations.move_to_end(one.model)
        self._reporters.pop(reporter, None)
        self._reporters[reporter] = (now, {target.model: target for target in targets})
        if len(self._reporters) > self._max_reporters:
            self._reporters.popitem(last=False)

    def latency(self, model: str, quantile: float = 0.5) -> float | None:
        """Seconds that an answer takes. None: too few were seen lately."""
        ring = self._durations.get(model)
        if ring is None:
            return None
        oldest = self._clock() - self._max_age
        while ring and ring[0][0] < oldest:
            ring.popleft()
        if len(ring) < MIN_SAMPLES:
            return None
        ordered = sorted(duration for _, duration in ring)
        return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))]

    def in_flight(self, model: str) -> int:
        """Attempts under way at all processes together."""
        return sum(target.in_flight for target in self._of(model))

    def problem(self, model: str) -> str:
        """Why no process can call the model at the moment; empty when one can, or when nothing is known."""
        targets = self._of(model)
        problems = [target.problem for target in targets]
        return problems[0] if problems and all(problems) else ""

    def _of(self, model: str) -> list[TargetState]:
        oldest = self._clock() - self._silence
        found = []
        for heard, targets in self._reporters.values():
            target = targets.get(model)
            if target is not None and heard >= oldest:
                found.append(target)
        return found
