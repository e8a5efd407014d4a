"""Words and values of refusals; which reason fits is tested in test_core."""

from __future__ import annotations

from services.gateway.refusals import budget_exhausted, context_window_exceeded, cost_limit, no_candidate
from services.runtime.errors import Reason
from sluice.routing.v1 import routing_service_pb2


def test_many_rejections_are_listed_within_bounds() -> None:
    plan = routing_service_pb2.PlanResponse()
    for number in range(100):
        plan.rejections.add(model=f"a/{number}", filter="region", reason="elsewhere")
    failure = no_candidate(plan, "auto")
    assert failure.reason is Reason.NO_CANDIDATE
    assert len(failure.metadata) == 16
    assert len(failure.message) < 300


def test_an_empty_plan() -> None:
    assert no_candidate(routing_service_pb2.PlanResponse(), "auto").reason is Reason.NO_CANDIDATE


def test_values() -> None:
    assert context_window_exceeded(5, 4).metadata == {"input_tokens": "5", "context_window": "4"}
    assert cost_limit(1, 2).metadata == {"max_cost_nano_usd": "1"}
    assert budget_exhausted("", 1, 2).metadata == {"level": "key", "remaining_nano_usd": "1", "needed_nano_usd": "2"}
