"""Plans: who is filtered and why, who ranks first and why."""

from __future__ import annotations

from typing import Any

import pytest

from services.routing.catalogue import parse
from services.routing.classifier import Features, TaskType, classify
from services.routing.errors import ModelNotFound
from services.routing.filters import Ask
from services.routing.planner import Plan
from services.routing.prices import Rates
from services.routing.statistics import Finished, TargetState
from tests.unit.routing import examples


def ask(**changes: Any) -> Ask:
    return Ask(**{"tenant": "t", "task_type": TaskType.SIMPLE, "input_bound": 64, **changes})


def names(plan: Plan) -> list[str]:
    return [one.prospect.model.id for one in plan.candidates]


def refused(plan: Plan) -> dict[str, str]:
    return {one.model: one.filter for one in plan.refusals}


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (Features(), TaskType.SIMPLE),
        (Features(has_image=True, code_signals=3), TaskType.VISION),
        (Features(code_signals=1), TaskType.CODE),
        (Features(code_signals=1, reasoning_signals=1), TaskType.REASONING),
        (Features(code_signals=2, reasoning_signals=3), TaskType.CODE),
        (Features(reasoning_signals=1), TaskType.REASONING),
    ],
)
def test_the_classifier(features: Features, expected: TaskType) -> None:
    assert classify(features).task_type is expected


def test_the_caller_is_believed_and_the_classifier_named() -> None:
    planner = examples.planner()
    assert planner.plan(ask(task_type=TaskType.VISION)).verdict.said_by_caller
    verdict = planner.plan(ask(task_type=None, features=Features(code_signals=2))).verdict
    assert (verdict.task_type, verdict.said_by_caller) == (TaskType.CODE, False)
    assert "2 of 3 signs of code" in verdict.reason


def test_the_cheapest_first_and_the_fake_last_though_it_is_free() -> None:
    plan = examples.planner().plan(ask())
    assert names(plan) == ["a/cheap", "b/dear", "fake/echo"]
    assert plan.candidates[0].cost == 64 * 1 + 100 * 2
    assert plan.candidates[0].scores["cost"] > plan.candidates[1].scores["cost"]


def test_a_fixed_policy_keeps_the_order_of_its_chain() -> None:
    content = examples.content()
    content["policies"]["default"]["order"] = "fixed"
    assert names(examples.planner(parse(content)).plan(ask())) == ["b/dear", "a/cheap", "fake/echo"]


def test_a_named_model_stands_first_and_its_fallbacks_follow() -> None:
    planner = examples.planner()
    for name in ("a/cheap", "cheap"):
        assert names(planner.plan(ask(model=name))) == ["a/cheap", "b/dear", "c/seeing"]
    assert names(planner.plan(ask(model="a/cheap", allow_fallback=False))) == ["a/cheap"]


def test_without_fallback_a_policy_gives_its_first_alone() -> None:
    assert names(examples.planner().plan(ask(allow_fallback=False))) == ["b/dear"]


@pytest.mark.parametrize("name", ["none", "policy/none", "policy/house", "policy/", "a/cheap "])
def test_what_is_not_there_is_not_found(name: str) -> None:
    planner = examples.planner()
    if name == "policy/":
        # An empty name is the default.
        assert planner.plan(ask(model=name)).policy == "default"
        return
    with pytest.raises(ModelNotFound):
        planner.plan(ask(model=name))


def test_a_policy_of_a_tenant_is_that_tenants() -> None:
    assert names(examples.planner().plan(ask(tenant="acme", model="policy/house"))) == ["c/seeing"]


def test_a_key_gets_only_what_it_may_use() -> None:
    planner = examples.planner()
    plan = planner.plan(ask(allowed=frozenset({"a/cheap"})))
    assert names(plan) == ["a/cheap"]
    assert refused(plan) == {"b/dear": "permission", "fake/echo": "permission"}
    assert len(planner.plan(ask(allowed=frozenset({"policy/default"}))).candidates) == 3
    with pytest.raises(ModelNotFound):
        planner.plan(ask(model="b/dear", allowed=frozenset({"a/cheap"})))
    # Being allowed the first doesn't allow its fallbacks.
    assert names(planner.plan(ask(model="cheap", allowed=frozenset({"cheap"})))) == ["a/cheap"]


@pytest.mark.parametrize(
    ("changes", "model", "expected"),
    [
        ({"needs": ("chat", "tools")}, "a/cheap", "capability"),
        ({"needs": ("field:seed",)}, "b/dear", "capability"),
        ({"region": "eu"}, "b/dear", "region"),
        ({"input_bound": 1000}, "a/cheap", "context_window"),
        ({"max_cost": 200}, "b/dear", "cost"),
    ],
)
def test_each_filter_refuses_and_says_why(changes: dict[str, Any], model: str, expected: str) -> None:
    plan = examples.planner().plan(ask(**changes))
    assert refused(plan)[model] == expected
    assert model not in names(plan)
    assert all(one.reason for one in plan.refusals)


def test_the_missing_need_is_named() -> None:
    plan = examples.planner().plan(ask(model="a/cheap", needs=("chat", "field:logit_bias"), allow_fallback=False))
    assert [(one.filter, one.missing) for one in plan.refusals] == [("capability", "field:logit_bias")]


@pytest.mark.parametrize(
    ("need", "reason"),
    [
        ("field:messages.name", "it has no messages.name"),
        ("field:image.detail", "it has no image.detail"),
        ("field:reasoning_effort", "it has no reasoning_effort where a tool must be called or stands for the response format"),
    ],
)
def test_a_field_that_the_wire_format_has_no_place_for_is_refused_by_name(need: str, reason: str) -> None:
    content = examples.content()
    content["providers"]["c"]["kind"] = "anthropic"
    plan = examples.planner(parse(content)).plan(ask(task_type=TaskType.CODE, needs=("chat", need)))
    assert [(one.model, one.missing, one.reason) for one in plan.refusals] == [("c/seeing", need, reason)]
    assert names(plan) == ["a/cheap", "b/dear"]


def test_an_unknown_price_is_refused_unless_the_policy_allows_it() -> None:
    content = examples.content()
    assert refused(examples.planner().plan(ask(task_type=TaskType.VISION)))["c/near"] == "price"
    content["policies"]["default"]["unknown_price"] = "allow"
    assert "c/near" in names(examples.planner(parse(content)).plan(ask(task_type=TaskType.VISION)))


def test_health_is_filtered_when_every_process_says_so() -> None:
    planner = examples.planner()
    planner.statistics.take("one", [], [TargetState("a/cheap", 0, "its breaker is open")])
    assert refused(planner.plan(ask())) == {"a/cheap": "health"}
    planner.statistics.take("two", [], [TargetState("a/cheap", 0, "")])
    assert refused(planner.plan(ask())) == {}


def test_a_slow_model_is_refused_by_the_latency_limit() -> None:
    planner = examples.planner()
    planner.statistics.take("one", [Finished("a/cheap", 3.0)] * 5, [])
    assert refused(planner.plan(ask(max_latency=2.0))) == {"a/cheap": "latency"}
    assert refused(planner.plan(ask(max_latency=3.0))) == {}


def test_weights_decide() -> None:
    content = examples.content()
    content["policies"]["default"]["weights"] = {"latency": 1}
    planner = examples.planner(parse(content))
    planner.statistics.take("one", [*[Finished("a/cheap", 4.0)] * 5, *[Finished("b/dear", 0.1)] * 5], [])
    assert names(planner.plan(ask()))[:2] == ["b/dear", "a/cheap"]
    content["policies"]["default"]["weights"] = {"load": 1}
    planner = examples.planner(parse(content))
    planner.statistics.take("one", [], [TargetState("b/dear", 50, "")])
    assert names(planner.plan(ask()))[:2] == ["a/cheap", "b/dear"]


def test_affinity_is_stable_and_spreads() -> None:
    content = examples.content()
    content["policies"]["default"]["weights"] = {"affinity": 1}
    planner = examples.planner(parse(content))
    firsts = [names(planner.plan(ask(task_type=TaskType.CODE, affinity=bucket)))[0] for bucket in range(64)]
    assert firsts == [names(planner.plan(ask(task_type=TaskType.CODE, affinity=bucket)))[0] for bucket in range(64)]
    assert set(firsts) == {"a/cheap", "b/dear", "c/seeing"}


def test_scores_and_totals_lie_between_0_and_1() -> None:
    planner = examples.planner()
    planner.statistics.take("one", [Finished("a/cheap", 100.0)] * 5, [TargetState("a/cheap", 10_000, "")])
    for task_type in TaskType:
        for one in planner.plan(ask(task_type=task_type, affinity=3)).candidates:
            assert all(0 <= score <= 1 for score in one.scores.values())
            assert 0 <= one.total <= 1.000001


def test_cost_is_rounded_up_once() -> None:
    assert Rates(1, 1).cost(1, 0) == 1
    assert Rates(1_500_000, 2_500_000).cost(1, 1) == 4
    assert Rates(0, 0, request=7).cost(5, 5) == 7


def test_the_output_bound_is_what_is_asked_allowed_and_fits() -> None:
    plan = examples.planner().plan(ask(max_output=10))
    assert plan.candidates[0].cost == 64 + 20
    near = examples.planner().plan(ask(input_bound=950))
    assert near.candidates[0].cost == 950 + 50 * 2


def test_a_name_that_is_nearly_one_is_answered_with_it() -> None:
    planner = examples.planner()
    for wanted, meant in (("dear", "b/dear"), ("a/chaep", "a/cheap")):
        with pytest.raises(ModelNotFound) as caught:
            planner.plan(ask(model=wanted))
        assert f"did you mean {meant}" in caught.value.message
    with pytest.raises(ModelNotFound) as caught:
        planner.plan(ask(model="dear", allowed=frozenset({"a/cheap"})))
    assert "b/dear" not in caught.value.message, "what the key may not use isn't hinted at"
