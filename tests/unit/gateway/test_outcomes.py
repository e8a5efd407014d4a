"""Reports of outcomes."""

from __future__ import annotations

from services.gateway.outcomes import Outcomes, Report


def test_the_last_report_wins_and_memory_is_bounded() -> None:
    outcomes = Outcomes(2)
    outcomes.report("t", "a", Report(True, None, ""))
    outcomes.report("t", "a", Report(False, 0.1, "wrong"))
    assert (outcomes.served_count, outcomes.failed_count) == (0, 1)
    assert outcomes.get("t", "a") == Report(False, 0.1, "wrong")
    outcomes.report("t", "b", Report(True, None, ""))
    outcomes.report("t", "c", Report(True, None, ""))
    assert outcomes.get("t", "a") is None
    assert (outcomes.served_count, outcomes.failed_count) == (2, 1)
