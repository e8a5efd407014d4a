"""`python -m tests.proof`: runs measured scenarios, one line each as they end, then a table. Exit code 1 when one is short."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.proof.registry import Context, Result, Scenario, registered, select

_WIDTH: Final = 128
"""Columns of the table where the output is no terminal."""
_MOST_DETAILS: Final = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, prints, returns the exit code."""
    given = _parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    errors = Console(stderr=True)
    if given.list:
        for scenario in registered():
            console.print(f"{scenario.name}  {scenario.summary}", markup=False, highlight=False, soft_wrap=True)
        return 0
    chosen = select(given.only)
    if not chosen:
        names = ", ".join(scenario.name for scenario in registered())
        errors.print(f"--only {' '.join(given.only)} names no scenario; there are {names}", markup=False)
        return 2
    results: list[tuple[Scenario, Result, float]] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        for scenario in chosen:
            began = time.monotonic()
            result = _run(scenario, Context(given.short, progress))
            results.append((scenario, result, time.monotonic() - began))
            console.print(line(scenario, result), markup=False, highlight=False, soft_wrap=True)
            for detail in result.details[:_MOST_DETAILS] if given.verbose or not result.ok else ():
                console.print(f"    {detail}", markup=False, highlight=False, soft_wrap=True, style="dim")
    console.print(table(results))
    return int(not all(result.ok for _, result, _ in results))


def _parse(arguments: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(prog="python -m tests.proof", description=__doc__)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="an issue, or a part of a name; repeatable")
    parser.add_argument("--short", action="store_true", help="smaller n, each scenario in less than a minute")
    parser.add_argument("--verbose", action="store_true", help="details of scenarios that are ok, too")
    parser.add_argument("--list", action="store_true", help="list the scenarios and run none")
    return parser.parse_args(arguments)


def _run(scenario: Scenario, context: Context) -> Result:
    try:
        return scenario.run(context)
    except Exception as error:
        # One scenario that can't run is short; the others still tell something.
        return Result(0, "nothing", "-", False, (f"{type(error).__name__}: {error}",))


def line(scenario: Scenario, result: Result) -> str:
    """A result in one line: name, n, measured, bound, verdict."""
    return f"{scenario.name}  n={result.n}  {result.measured}  bound {result.bound}  {_verdict(result)}"


def _verdict(result: Result) -> str:
    return "ok" if result.ok else "short"


def table(results: Sequence[tuple[Scenario, Result, float]]) -> Table:
    """All results."""
    made = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    made.add_column("scenario", no_wrap=True)
    made.add_column("n", justify="right", no_wrap=True)
    made.add_column("measured", overflow="fold")
    made.add_column("bound", overflow="fold")
    made.add_column("", no_wrap=True, min_width=5)
    made.add_column("took", justify="right", no_wrap=True)
    for scenario, result, seconds in results:
        made.add_row(
            scenario.name,
            str(result.n),
            result.measured,
            result.bound,
            _verdict(result),
            f"{seconds:.0f} s",
            style=None if result.ok else "red",
        )
    return made


if __name__ == "__main__":
    sys.exit(main())
