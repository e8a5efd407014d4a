"""Reports may be lost, repeated or late; memory is bounded."""

from __future__ import annotations

from services.routing.statistics import Finished, TargetState
from tests.unit.routing.examples import Clock, statistics


def test_percentiles_need_samples_and_forget_the_old() -> None:
    clock = Clock()
    found = statistics(clock)
    found.take("r", [Finished("m", second) for second in (1.0, 2.0, 3.0, 4.0)], [])
    assert found.latency("m") is None
    found.take("r", [Finished("m", 5.0)], [])
    assert found.latency("m") == 3.0
    assert found.latency("m", 0.95) == 5.0
    clock.now += 61
    assert found.latency("m") is None


def test_only_the_latest_samples_count() -> None:
    found = statistics(Clock())
    found.take("r", [Finished("m", 9.0)] * 10, [])
    found.take("r", [Finished("m", 1.0)] * 10, [])
    assert found.latency("m", 0.99) == 1.0


def test_a_report_replaces_the_one_before() -> None:
    found = statistics(Clock())
    found.take("r", [], [TargetState("m", 3, "down")])
    assert (found.in_flight("m"), found.problem("m")) == (3, "down")
    found.take("r", [], [TargetState("m", 1, "")])
    assert (found.in_flight("m"), found.problem("m")) == (1, "")


def test_load_is_summed_and_one_healthy_process_is_enough() -> None:
    found = statistics(Clock())
    found.take("r", [], [TargetState("m", 3, "down")])
    found.take("s", [], [TargetState("m", 4, "")])
    assert (found.in_flight("m"), found.problem("m")) == (7, "")


def test_silence_clears_what_was_said() -> None:
    clock = Clock()
    found = statistics(clock)
    found.take("r", [], [TargetState("m", 3, "down")])
    clock.now += 31
    assert (found.in_flight("m"), found.problem("m")) == (0, "")


def test_models_and_reporters_are_bounded() -> None:
    found = statistics(Clock())
    for number in range(10):
        found.take(f"r{number}", [Finished(f"m{number}", 1.0)] * 5, [TargetState(f"m{number}", 1, "")])
    assert found.latency("m0") is None
    assert found.latency("m9") == 1.0
    assert found.in_flight("m0") == 0
    assert found.in_flight("m9") == 1
