"""Translation between `sluice.routing.v1` and the service's own types."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from google.protobuf.duration_pb2 import Duration

from services.routing.catalogue import Catalogue, Model, Policy
from services.routing.classifier import Features, TaskType
from services.routing.filters import Ask
from services.routing.planner import POLICY_PREFIX, Plan, Planner
from services.routing.prices import Rates
from services.routing.statistics import Finished, TargetState
from services.runtime.errors import invalid
from sluice.inference.v1 import inference_service_pb2, receipt_pb2
from sluice.metering.v1 import price_pb2
from sluice.routing.v1 import routing_service_pb2 as pb2

MAX_NEEDS: Final = 64
MAX_ALLOWED: Final = 1000
MAX_SIGNALS: Final = 3
_BUCKETS: Final = 64
_TASK_TYPES: Final[Mapping[int, TaskType]] = MappingProxyType(
    {
        receipt_pb2.TASK_TYPE_SIMPLE: TaskType.SIMPLE,
        receipt_pb2.TASK_TYPE_REASONING: TaskType.REASONING,
        receipt_pb2.TASK_TYPE_CODE: TaskType.CODE,
        receipt_pb2.TASK_TYPE_VISION: TaskType.VISION,
    }
)
_NUMBERS: Final = MappingProxyType({name: receipt_pb2.TaskType.ValueType(number) for number, name in _TASK_TYPES.items()})


def ask_from_proto(request: pb2.PlanRequest) -> Ask:
    """What is asked for. Raises Failure REQUEST_INVALID."""
    if not request.tenant_id:
        raise invalid("tenant_id", "must be set")
    if len(request.needs) > MAX_NEEDS:
        raise invalid("needs", f"must have at most {MAX_NEEDS} entries, got {len(request.needs)}")
    if len(request.allowed_models) > MAX_ALLOWED:
        raise invalid("allowed_models", f"must have at most {MAX_ALLOWED} entries, got {len(request.allowed_models)}")
    for field in ("input_token_bound", "max_output_tokens", "max_cost_nano_usd"):
        if getattr(request, field) < 0:
            raise invalid(field, f"must not be negative, got {getattr(request, field)}")
    if not -1 <= request.affinity_bucket < _BUCKETS:
        raise invalid("affinity_bucket", f"must be -1 to {_BUCKETS - 1}, got {request.affinity_bucket}")
    if request.task_type and request.task_type not in _TASK_TYPES:
        raise invalid("task_type", f"{request.task_type} is not a task type")
    features = request.features
    for name in ("code_signal_count", "reasoning_signal_count"):
        if not 0 <= getattr(features, name) <= MAX_SIGNALS:
            raise invalid(f"features.{name}", f"must be 0 to {MAX_SIGNALS}, got {getattr(features, name)}")
    return Ask(
        tenant=request.tenant_id,
        model=request.model,
        task_type=_TASK_TYPES.get(request.task_type),
        features=Features(features.has_image, features.code_signal_count, features.reasoning_signal_count),
        needs=tuple(request.needs),
        input_bound=request.input_token_bound,
        max_output=request.max_output_tokens,
        max_cost=request.max_cost_nano_usd,
        max_latency=_seconds(request.max_latency, "max_latency") if request.HasField("max_latency") else 0.0,
        region=request.region,
        affinity=request.affinity_bucket,
        allow_fallback=request.allow_fallback if request.HasField("allow_fallback") else True,
        allowed=frozenset(request.allowed_models),
    )


def plan_to_proto(plan: Plan, planner: Planner, reuse: Duration) -> pb2.PlanResponse:
    """The response for a plan."""
    catalogue = planner.catalogue
    times = catalogue.times[plan.verdict.task_type]
    timeout = _duration(times.attempt_timeout)
    candidates = []
    for ranked in plan.candidates:
        model = ranked.prospect.model
        candidates.append(
            pb2.Candidate(
                model=model.id,
                provider=model.provider,
                upstream_model=model.upstream_model,
                price=planner.prices.row(model.id),
                context_window=model.context_window,
                max_output_tokens=model.max_output_tokens,
                estimated_cost_nano_usd=ranked.cost,
                scores=ranked.scores,
                total_score=ranked.total,
                reason=ranked.reason,
                attempt_timeout=timeout,
            )
        )
    source = receipt_pb2.TASK_TYPE_SOURCE_CALLER if plan.verdict.said_by_caller else receipt_pb2.TASK_TYPE_SOURCE_CLASSIFIER
    return pb2.PlanResponse(
        candidates=candidates,
        rejections=[
            pb2.Rejection(model=one.model, filter=one.filter, reason=one.reason, missing_need=one.missing)
            for one in plan.refusals
        ],
        policy=plan.policy,
        policy_version=catalogue.version,
        task_type=_NUMBERS[plan.verdict.task_type],
        task_type_source=source,
        task_type_reason=plan.verdict.reason,
        latency_target=_duration(times.latency_target),
        reuse_duration=reuse,
        named_model=plan.named,
    )


def model_to_proto(model: Model, rates: Rates | None, *, healthy: bool) -> inference_service_pb2.Model:
    """A model as callers see it."""
    return inference_service_pb2.Model(
        id=model.id,
        provider=model.provider,
        display_name=model.display_name,
        context_window=model.context_window,
        max_output_tokens=model.max_output_tokens,
        capabilities=model.capabilities,
        input_nano_usd_per_million=None if rates is None else rates.input,
        output_nano_usd_per_million=None if rates is None else rates.output,
        healthy=healthy,
        regions=model.regions,
    )


def policy_to_proto(policy: Policy, catalogue: Catalogue, *, healthy: bool) -> inference_service_pb2.Model:
    """A policy as callers see it: a model by another name. It can do what one of its models can."""
    found: set[str] = set()
    for chain in policy.chains.values():
        for name in chain:
            found.update(catalogue.models[name].capabilities)
    return inference_service_pb2.Model(
        id=f"{POLICY_PREFIX}{policy.name}",
        provider="sluice",
        display_name=f"Policy {policy.name}",
        capabilities=sorted(found),
        healthy=healthy,
    )


def rates_from_proto(price: price_pb2.Price) -> Rates:
    """What routing computes with: the dearest that the price can become is the gateway's matter."""
    return Rates(price.input_nano_usd_per_million, price.output_nano_usd_per_million, price.request_nano_usd)


def finished_from_proto(report: pb2.AttemptReport) -> Finished | None:
    """None: the attempt says nothing about latency."""
    if report.outcome != receipt_pb2.ATTEMPT_OUTCOME_SUCCEEDED or not report.HasField("duration"):
        return None
    return Finished(report.model, _seconds(report.duration, "attempts.duration"))


def state_from_proto(target: pb2.TargetHealth) -> TargetState:
    """A target's state. An open breaker and a failed probe are problems; half open isn't, for somebody must try."""
    problem = ""
    if target.breaker == pb2.BREAKER_STATE_OPEN:
        problem = "its breaker is open: calls failed too often"
    elif target.probe == pb2.PROBE_STATE_UNHEALTHY:
        problem = f"its provider doesn't answer the probe: {target.probe_detail[:200] or 'no reason given'}"
    return TargetState(target.model, max(0, target.in_flight_count), problem)


def _seconds(duration: Duration, field: str) -> float:
    value = duration.seconds + duration.nanos / 1e9
    if value < 0:
        raise invalid(field, "must not be negative")
    return value


def _duration(seconds: float) -> Duration:
    whole = int(seconds)
    return Duration(seconds=whole, nanos=round((seconds - whole) * 1e9))
