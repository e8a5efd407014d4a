"""The servicer: contract, limits, pages."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from services.routing.service import RoutingServicer
from services.runtime.call import Call
from services.runtime.errors import Failure, Reason
from sluice.inference.v1 import receipt_pb2
from sluice.metering.v1 import price_pb2
from sluice.routing.v1 import routing_service_pb2 as pb2
from tests.unit.routing import examples

CALL = Call("/sluice.routing.v1.RoutingService/Plan", deadline=1e12)


def servicer() -> RoutingServicer:
    planner = examples.planner()
    rates = {name: planner.prices.rates(name) for name in planner.catalogue.models}
    planner.prices.use(
        (name, one, price_pb2.Price(model=name, price_version="v")) for name, one in rates.items() if one is not None
    )
    return RoutingServicer(planner, reuse_seconds=2.5, planned=lambda _: None)


async def test_a_plan_has_all_that_execution_needs() -> None:
    response = await servicer().Plan(
        pb2.PlanRequest(tenant_id="t", needs=["chat"], input_token_bound=64, affinity_bucket=-1), CALL
    )
    first = response.candidates[0]
    assert (first.model, first.provider, first.upstream_model) == ("a/cheap", "a", "cheap")
    assert first.price.price_version == "v"
    assert first.attempt_timeout == Duration(nanos=500_000_000)
    assert response.reuse_duration == Duration(seconds=2, nanos=500_000_000)
    assert response.task_type == receipt_pb2.TASK_TYPE_SIMPLE
    assert response.task_type_source == receipt_pb2.TASK_TYPE_SOURCE_CLASSIFIER
    assert response.policy == "default"
    assert len(response.policy_version) == 12
    assert first.reason


BAD: list[tuple[str, dict[str, Any]]] = [
    ("tenant_id", {"tenant_id": ""}),
    ("needs", {"needs": ["chat"] * 65}),
    ("allowed_models", {"allowed_models": ["m"] * 1001}),
    ("input_token_bound", {"input_token_bound": -1}),
    ("max_output_tokens", {"max_output_tokens": -1}),
    ("max_cost_nano_usd", {"max_cost_nano_usd": -1}),
    ("affinity_bucket", {"affinity_bucket": 64}),
    ("task_type", {"task_type": 99}),
    ("features.code_signal_count", {"features": pb2.Features(code_signal_count=4)}),
    ("max_latency", {"max_latency": Duration(seconds=-1)}),
]


@pytest.mark.parametrize(("field", "changes"), BAD, ids=[field for field, _ in BAD])
async def test_a_bad_request_is_refused_by_field(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(Failure) as caught:
        await servicer().Plan(pb2.PlanRequest(**{"tenant_id": "t", "affinity_bucket": -1, **changes}), CALL)
    assert caught.value.reason is Reason.REQUEST_INVALID
    assert caught.value.metadata["field"] == field


async def test_an_unknown_model_is_not_found() -> None:
    with pytest.raises(Failure) as caught:
        await servicer().Plan(pb2.PlanRequest(tenant_id="t", model="none/such"), CALL)
    assert caught.value.reason is Reason.MODEL_NOT_FOUND


async def test_models_are_paged_without_gap_or_double() -> None:
    service = servicer()
    found: list[str] = []
    token = ""
    while True:
        page = await service.ListModels(pb2.ListModelsRequest(page_size=2, page_token=token), CALL)
        assert len(page.models) <= 2
        found += [model.id for model in page.models]
        token = page.next_page_token
        if not token:
            break
    assert (
        found
        == sorted(set(found))
        == ["a/cheap", "b/dear", "c/near", "c/seeing", "fake/echo", "policy/default", "policy/house"]
    )


async def test_a_list_is_cut_to_what_the_key_may_use() -> None:
    page = await servicer().ListModels(pb2.ListModelsRequest(allowed_models=["cheap"]), CALL)
    assert [model.id for model in page.models] == ["a/cheap"]


async def test_reports_decide_on_health_and_latency() -> None:
    service = servicer()
    report = pb2.ReportExecutionRequest(
        replica_id="r",
        attempts=[
            pb2.AttemptReport(model="b/dear", outcome=receipt_pb2.ATTEMPT_OUTCOME_SUCCEEDED, duration=Duration(seconds=9))
            for _ in range(5)
        ]
        + [pb2.AttemptReport(model="a/cheap", outcome=receipt_pb2.ATTEMPT_OUTCOME_FAILED, duration=Duration(seconds=9))] * 5,
        targets=[
            pb2.TargetHealth(model="a/cheap", probe=pb2.PROBE_STATE_UNHEALTHY, probe_detail="connection refused"),
            pb2.TargetHealth(model="c/seeing", breaker=pb2.BREAKER_STATE_HALF_OPEN),
        ],
    )
    await service.ReportExecution(report, CALL)
    response = await service.Plan(
        pb2.PlanRequest(
            tenant_id="t", task_type=receipt_pb2.TASK_TYPE_CODE, max_latency=Duration(seconds=1), affinity_bucket=-1
        ),
        CALL,
    )
    assert [candidate.model for candidate in response.candidates] == ["c/seeing"]
    assert {one.model: one.filter for one in response.rejections} == {"a/cheap": "health", "b/dear": "latency"}
    assert "connection refused" in next(one.reason for one in response.rejections if one.filter == "health")
    listed = await service.ListModels(pb2.ListModelsRequest(), CALL)
    assert {model.id: model.healthy for model in listed.models}["a/cheap"] is False


async def test_a_report_is_bounded_and_signed() -> None:
    with pytest.raises(Failure):
        await servicer().ReportExecution(pb2.ReportExecutionRequest(), CALL)
    with pytest.raises(Failure):
        await servicer().ReportExecution(
            pb2.ReportExecutionRequest(replica_id="r", targets=[pb2.TargetHealth()] * 20_001), CALL
        )
