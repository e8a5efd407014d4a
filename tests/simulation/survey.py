"""Many seeds, and what came of all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.simulation.awaits import awaits, met
from tests.simulation.world import Outcome

_MOST_PROBLEMS = 5


@dataclass(slots=True)
class Survey:
    """What came of the seeds that were added."""

    seeds: int = 0
    seconds: float = 0.0
    """Of the simulated clock."""
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[Outcome] = field(default_factory=list)
    places: set[tuple[str, int]] = field(default_factory=set)

    def add(self, outcome: Outcome) -> None:
        """One more."""
        self.seeds += 1
        self.seconds += outcome.seconds
        self.counts.update(outcome.counts)
        self.places |= outcome.killed_at
        if outcome.problems:
            self.failures.append(outcome)

    def line(self) -> str:
        """All of it in a line."""
        counts = self.counts
        return (
            f"{self.seeds} seeds, {len(self.failures)} failed; {counts['answered']} answers, {counts['failed']} failures, "
            f"{counts['attempts']} attempts, {counts['calls']} calls, {counts['kills']} kills at {len(met(self.places))} of "
            f"{len(awaits())} awaits, {self.seconds / 3600:.1f} simulated hours"
        )


def told(outcome: Outcome) -> Iterator[str]:
    """A seed that failed, and how to see it again."""
    yield f"seed {outcome.seed} failed; replay it with: python -m tests.simulation --seed {outcome.seed} --trace"
    for problem in outcome.problems[:_MOST_PROBLEMS]:
        yield f"    {problem}"
    if len(outcome.problems) > _MOST_PROBLEMS:
        yield f"    and {len(outcome.problems) - _MOST_PROBLEMS} more"
