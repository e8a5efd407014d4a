"""Money holds under seeded crashes, losses, repetitions and delays; and the simulation sees it where it doesn't.

A seed that fails here is seen again with `python -m tests.simulation --seed N --trace`.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.running import ROOT
from tests.simulation.awaits import awaits, met
from tests.simulation.mutations import MUTATIONS, Plant, posted_twice
from tests.simulation.survey import Survey, told
from tests.simulation.world import simulate

SEEDS = 500
MOST_TO_FIND = 200
"""Seeds within which a planted bug must show."""


@pytest.mark.timeout(400)
def test_money_holds_under_every_seed() -> None:
    survey = Survey()
    for seed in range(SEEDS):
        survey.add(simulate(seed))
    assert not survey.failures, "\n".join(line for outcome in survey.failures for line in told(outcome))
    # It must have been tried: requests answered, processes killed, and killed nearly everywhere where something waits.
    counts = survey.counts
    assert counts["answered"] > 4 * SEEDS
    assert counts["kills"] > SEEDS
    assert len(met(survey.places)) > 0.5 * len(awaits())


def test_a_seed_is_always_the_same() -> None:
    first = [simulate(seed) for seed in range(20)]
    # In another order, since nothing of one may be seen by the next.
    second = [simulate(seed) for seed in reversed(range(20))]
    assert [one.trace for one in first] == [one.trace for one in reversed(second)]
    assert len({one.digest for one in first}) == len(first)


@pytest.mark.parametrize("hashes", ["1", "2"])
def test_it_is_the_same_in_another_process(hashes: str) -> None:
    here = simulate(7)
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulation", "--seed", "7", "--trace"],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}", "PYTHONHASHSEED": hashes},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    *trace, digest, summary = done.stdout.splitlines()
    assert tuple(trace) == here.trace
    assert digest.startswith(f"trace {here.digest}")
    assert summary.startswith("1 seeds, 0 failed")


@pytest.mark.parametrize("plant", MUTATIONS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: Plant) -> None:
    assert any(simulate(seed, plant).problems for seed in range(MOST_TO_FIND))


def test_a_seed_that_fails_is_told_with_how_to_see_it_again() -> None:
    found = next(outcome for seed in range(MOST_TO_FIND) if (outcome := simulate(seed, posted_twice)).problems)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.simulation",
            "--seeds",
            f"{found.seed}..{found.seed + 1}",
            "--plant",
            posted_twice.__name__,
        ],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1
    assert f"python -m tests.simulation --seed {found.seed} --trace" in done.stdout
    assert found.problems[0] in done.stdout
