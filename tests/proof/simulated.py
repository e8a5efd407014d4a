"""What is promised of money under crashes at every step: seeds of the deterministic simulation."""

from __future__ import annotations

from typing import Final

from tests.proof.registry import Context, Result, Scenario
from tests.simulation.survey import Survey, told
from tests.simulation.world import simulate


def simulation(context: Context) -> Result:
    """Runs seeds, each with its own crashes, losses, repetitions, delays and faults of provider and disk."""
    number = context.size(long=10_000, short=500)
    survey = Survey()
    with context.track("seeds", number) as step:
        for seed in range(number):
            survey.add(simulate(seed))
            step()
    details = [line for outcome in survey.failures for line in told(outcome)]
    return Result(number, survey.line(), "0 failed", not survey.failures, details or (survey.line(),))


SCENARIOS: Final = (
    Scenario(
        "money.simulation",
        "admit, hold, execute and settle under seeded crashes at every await, lost, doubled and late calls: the books are the provider's bill",
        simulation,
    ),
)
