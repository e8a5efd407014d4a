"""`python -m tests.bench`: CPU per request of Sluice in both topologies against a bare proxy, and what the ledger takes, each beside its
reference in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.bench import ledger, rig, scenarios
from tests.bench.scenarios import FULL, SHORT, TOPOLOGIES, Figure

_REQUEST_NOTE: Final = (
    "Minimum · median · maximum of the rounds. CPU time of all of Sluice's processes, NATS included; `bare` is a proxy on the same "
    "HTTP stack in the same rounds (median, µs a request), `ratio` Sluice's CPU over its; `added` is how much longer than the upstream itself "
    "one request at a time takes (medians of p50 and p99); `mark` decides, `goal` is performance.md's."
)
_LEDGER_NOTE: Final = (
    "A pair is a hold and the settlement that ends it, each confirmed when it is on disk (SQLite: synchronous=FULL, PostgreSQL: fsync and "
    "synchronous_commit). 256 callers; `alone` is one. `bare` writes as many rows on the same store, 64 to a transaction, and checks "
    "nothing. CPU is of a pair, the server's included."
)
_WIDTH: Final = 140
"""Columns of the table where the output is no terminal."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, returns the exit code."""
    given = _parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    errors = Console(stderr=True)
    chosen = scenarios.select(given.only)
    stores = [name for name in ledger.NAMES if not given.only or any(part in name for part in given.only)]
    if not chosen and not stores:
        names = ", ".join([*(f"{topology}.{scenario.name}" for topology, scenario in scenarios.select(())), *ledger.NAMES])
        errors.print(f"--only {' '.join(given.only)} names no scenario; there are {names}", markup=False)
        return 2
    plan = SHORT if given.short else FULL
    if given.profile is not None:
        plan = replace(plan, rounds=1)
    figures: list[Figure] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=errors, transient=True) as progress:
            task = progress.add_task("starting", total=len(chosen) + len(stores))
            for topology in TOPOLOGIES:
                wanted = [scenario for where, scenario in chosen if where == topology]
                if not wanted:
                    continue
                progress.update(task, description=f"starting {topology}")
                with scenarios.stand(topology) as stand:
                    for scenario in wanted:
                        name = f"{topology}.{scenario.name}"
                        progress.update(task, description=name)
                        during = _profiler(stand, given.profile, name) if given.profile is not None else None
                        figures.append(scenarios.measure(stand, scenario, plan, during=during))
                        console.print(line(figures[-1]), markup=False, highlight=False, soft_wrap=True)
                        progress.advance(task)
            books = _ledgers(
                stores,
                ledger.SHORT if given.short else ledger.FULL,
                console,
                lambda name: progress.update(task, description=name),
            )
    except rig.RigError as error:
        errors.print(f"the bench can't run here: {error}", style="red", markup=False)
        return 2
    if books:
        console.print(ledger_table(books))
        console.print(_LEDGER_NOTE, style="dim")
    if figures:
        console.print(table(figures))
        console.print(_REQUEST_NOTE, style="dim")
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        written = [*(to_json(figure) for figure in figures), *(asdict(figure) for figure in books)]
        given.json.write_text(json.dumps(written, indent=2) + "\n")
    verdicts = [*(figure.verdict for figure in figures), *(figure.verdict for figure in books)]
    return int(given.strict and any(verdict in ("short", "void") for verdict in verdicts))


def _ledgers(names: Sequence[str], plan: ledger.Plan, console: Console, started: Callable[[str], None]) -> list[ledger.Figure]:
    """Measures the stores of these names, a round of each in turn."""
    if not names:
        return []
    with ledger.places() as places:
        chosen = [(place, ledger.Figure(place.name, place.mark)) for place in places if place.name in names]
        for number in range(1, plan.rounds + 1):
            for place, figure in chosen:
                started(f"{place.name}, round {number} of {plan.rounds}")
                figure.rounds.append(asyncio.run(ledger.measure_round(place, plan)))
    for _, figure in chosen:
        rate = figure.spread(lambda one: one.rate)[1]
        text = f"{figure.name}  {rate:,.0f} holds and settlements a second  {figure.verdict}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    return [figure for _, figure in chosen]


def ledger_table(figures: Sequence[ledger.Figure]) -> Table:
    """All figures of the ledger."""
    made = Table(title="The ledger", box=SIMPLE, padding=(0, 1, 0, 0))
    made.add_column("store", no_wrap=True)
    for heading in ("pairs/s", "of bare", "hold ms p50 · p99", "alone p50 · p99", "CPU µs", "mark"):
        made.add_column(heading, justify="right", no_wrap=True)
    made.add_column("", no_wrap=True, min_width=5)

    def milliseconds(figure: ledger.Figure, of: Callable[[ledger.Round], Sequence[float]]) -> str:
        middle = [figure.spread(lambda one: ledger.percentile(of(one), share))[1] for share in (0.5, 0.99)]  # noqa: B023
        return " · ".join(f"{seconds * 1e3:.1f}" for seconds in middle)

    for figure in figures:
        made.add_row(
            figure.name,
            _three(figure.spread(lambda one: one.rate), 0),
            f"{figure.spread(lambda one: one.rate / one.reference_rate)[1]:.2f}",
            milliseconds(figure, lambda one: one.hold_seconds),
            milliseconds(figure, lambda one: one.lone_hold_seconds),
            f"{figure.spread(lambda one: one.cpu_seconds * 1e6)[1]:.0f}",
            "-" if figure.mark is None else f"{figure.mark:.0f}",
            figure.verdict,
        )
    return made


def _parse(arguments: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--short", action="store_true", help=f"{SHORT.rounds} rounds of {SHORT.seconds:g} s")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="scenarios with NAME in their name; repeatable"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round to FILE")
    parser.add_argument(
        "--profile", type=Path, metavar="DIR", help="write a flame graph per scenario, of one round; the figures suffer"
    )
    parser.add_argument("--strict", action="store_true", help="exit 1 when a figure is short or void")
    return parser.parse_args(arguments)


def _profiler(stand: scenarios.Stand, directory: Path, name: str) -> Callable[[int], contextlib.AbstractContextManager[None]]:
    return lambda seconds: scenarios.profiled(stand.sluice.process.pid, directory / f"{name}.svg", seconds)


def _three(values: tuple[float, float, float], digits: int = 1) -> str:
    low, middle, high = values
    return f"{low:.{digits}f} · {middle:.{digits}f} · {high:.{digits}f}"


def _added(figure: Figure) -> str:
    if not figure.scenario.is_timed:
        return "-"
    middle = [figure.spread(lambda one: one.added_us(of))[1] for of in (lambda r: r.p50_us, lambda r: r.p99_us)]  # noqa: B023
    return " · ".join(f"{microseconds:.0f}" for microseconds in middle)


def line(figure: Figure) -> str:
    """One figure in one line."""
    if figure.void:
        return f"{figure.name}  void: {figure.void}"
    middle = figure.spread(lambda one: one.cost(per_chunk=False))[1]
    ratio = figure.spread(lambda one: one.ratio)[1]
    return f"{figure.name}  {middle:.0f} µs a request, {ratio:.1f} times the bare proxy  {figure.verdict}"


def table(figures: Sequence[Figure]) -> Table:
    """All figures."""
    made = Table(title="CPU per request", box=SIMPLE, padding=(0, 1, 0, 0))
    made.add_column("scenario", no_wrap=True)
    for heading in ("n", "µs a request", "µs a chunk", "bare", "ratio", "added µs", "mark", "goal"):
        made.add_column(heading, justify="right", no_wrap=True)
    made.add_column("", no_wrap=True, min_width=5)
    made.add_column("note", overflow="fold", min_width=4)
    for figure in figures:
        if figure.void or not figure.rounds:
            made.add_row(figure.name, *[""] * 6, figure.mark.text, figure.goal.text, figure.verdict, figure.note)
            continue
        streams = figure.rounds[0].product.cpu_us_per_frame > 0
        made.add_row(
            figure.name,
            str(sum(one.product.ok for one in figure.rounds)),
            _three(figure.spread(lambda one: one.cost(per_chunk=False)), 0),
            _three(figure.spread(lambda one: one.cost(per_chunk=True))) if streams else "-",
            f"{figure.spread(lambda one: one.reference.cpu_ms * 1e3)[1]:.0f}",
            _three(figure.spread(lambda one: one.ratio)),
            _added(figure),
            figure.mark.text,
            figure.goal.text,
            figure.verdict,
            figure.note,
        )
    return made


def to_json(figure: Figure) -> dict[str, Any]:
    """A figure with all its rounds."""
    return {
        "name": figure.name,
        "summary": figure.scenario.summary,
        "verdict": figure.verdict,
        "note": figure.note,
        "measured_us": figure.measured if figure.rounds and not figure.void else None,
        "mark_us": figure.bound,
        "mark": asdict(figure.mark),
        "goal": asdict(figure.goal),
        "rounds": [
            {
                "lone": None if one.lone is None else [asdict(reading) for reading in one.lone],
                "ratio": one.ratio,
                "saturated": one.saturated,
                "sluice": asdict(one.product),
                "reference": asdict(one.reference),
            }
            for one in figure.rounds
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
