"""`python -m tests.simulation`: admit, hold, execute and settle under seeds, each with its own faults. Exit code 1 when one fails.

python -m tests.simulation                       the 500 seeds that CI runs
python -m tests.simulation --seeds 0..10000      more of them
python -m tests.simulation --seed 42 --trace     one, with all that happens in it
python -m tests.simulation --plant check_then_act --seeds 0..200     whether it finds a bug that is there
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tests.simulation.mutations import MUTATIONS
from tests.simulation.survey import Survey, told
from tests.simulation.world import simulate

_SEEDS: Final = range(500)
_MOST_TOLD: Final = 20
_PLANTS: Final = {plant.__name__: plant for plant in MUTATIONS}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, prints, returns the exit code."""
    given = _parse(arguments)
    plant = _PLANTS[given.plant] if given.plant else None
    console, errors = Console(soft_wrap=True, highlight=False, markup=False), Console(stderr=True)
    seeds = range(given.seed, given.seed + 1) if given.seed is not None else given.seeds
    survey = Survey()
    began = time.monotonic()
    columns = (
        SpinnerColumn(),
        TextColumn("seeds"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as progress:
        for seed in progress.track(seeds):
            outcome = simulate(seed, plant)
            survey.add(outcome)
            if given.trace:
                for line in outcome.trace:
                    console.print(line)
            if outcome.problems and len(survey.failures) <= _MOST_TOLD:
                for line in told(outcome):
                    console.print(line)
            if given.seed is not None:
                console.print(f"trace {outcome.digest}, {len(outcome.trace)} lines, {outcome.steps} turns")
    console.print(f"{survey.line()}, took {time.monotonic() - began:.1f} s")
    return int(bool(survey.failures))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seeds", type=_seeds, default=_SEEDS, metavar="A..B", help="from A to before B; default 0..500")
    which.add_argument("--seed", type=int, metavar="N", help="this one alone")
    parser.add_argument("--trace", action="store_true", help="print every event: moment, who, what")
    parser.add_argument("--plant", choices=sorted(_PLANTS), help="a bug to plant, see tests/simulation/mutations.py")
    return parser.parse_args(arguments)


def _seeds(text: str) -> range:
    first, dots, end = text.partition("..")
    if not dots or not first.isdigit() or not end.isdigit() or int(end) <= int(first):
        raise argparse.ArgumentTypeError(f"{text!r} is no range of seeds; write it as 0..500")
    return range(int(first), int(end))


if __name__ == "__main__":
    sys.exit(main())
