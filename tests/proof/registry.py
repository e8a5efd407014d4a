"""What a measured scenario is, and which there are.

A scenario has a name `<issue>.<what>`, measures something that Sluice promises in a number, and is held against that number. It runs
long by default; the short form is for CI and takes less than a minute.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from rich.progress import Progress


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured."""

    n: int
    """How many times the thing was tried that is counted."""
    measured: str
    """With its unit."""
    bound: str
    """What `measured` must keep to, in the same unit."""
    ok: bool
    details: Sequence[str] = field(default=())
    """What stands behind the figure, the worst first; shown when it is short, or when asked for."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a running scenario is given."""

    short: bool
    progress: Progress

    def size(self, *, long: int, short: int) -> int:
        """How many to try."""
        return short if self.short else long

    @contextlib.contextmanager
    def track(self, description: str, total: int) -> Iterator[Callable[[], None]]:
        """A progress bar while the context is open; call what it yields once per step."""
        task = self.progress.add_task(description, total=total)
        try:
            yield lambda: self.progress.advance(task)
        finally:
            self.progress.remove_task(task)


@dataclass(frozen=True, slots=True)
class Scenario:
    """A named measurement."""

    name: str
    """`<issue>.<what>`."""
    summary: str
    run: Callable[[Context], Result]


def registered() -> tuple[Scenario, ...]:
    """Every scenario there is. A new issue brings a module and its line here."""
    from tests.proof import mesh, money, simulated

    return (*mesh.SCENARIOS, *money.SCENARIOS, *simulated.SCENARIOS)


def select(only: Sequence[str]) -> list[Scenario]:
    """The scenarios whose name begins with one of `only` or has it after the dot; all when it is empty."""
    return [
        scenario
        for scenario in registered()
        if not only or any(scenario.name.startswith(part) or part in scenario.name.partition(".")[2] for part in only)
    ]
