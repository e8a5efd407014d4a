"""Plans of routing, reused for requests that are equal in what routing looks at.

A plan is kept for the time that routing allows. While routing can't be reached the last plan for an equal request serves on, or one
for a request that differs only in size, signs in the text, cost and latency limits or stickiness; limits of cost and window are checked
again here anyway.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from services.gateway.breakers import Breaker
from services.gateway.flights import Flights
from services.gateway.holds import Tariff
from services.gateway.ports import OUTAGES
from services.gateway.principals import Principal
from services.runtime.call import Metadata
from services.runtime.errors import Failure, unavailable
from sluice.inference.v1 import receipt_pb2
from sluice.metering.v1 import price_pb2
from sluice.routing.v1 import routing_service_pb2

_MAX_STALE_SECONDS: Final = 3600.0


PlanFields = tuple[
    str, str, int, tuple[str, ...], str, bool | None, tuple[str, ...], bool, int, int, int, int, int, int, int
]  # fmt: skip
"""The fields of a PlanKey in order."""


class PlanKey(NamedTuple):
    """What routing is told of a request; equal keys get equal plans."""

    tenant_id: str
    model: str
    task_type: int
    needs: tuple[str, ...]
    region: str
    allow_fallback: bool | None
    allowed_models: tuple[str, ...]
    has_image: bool
    code_signal_count: int
    reasoning_signal_count: int
    input_token_bound: int
    max_output_tokens: int
    max_cost_nano_usd: int
    max_latency_ns: int
    affinity_bucket: int

    def essence(self) -> tuple[object, ...]:
        """The part without which a plan can't stand in for another."""
        return self[:7]


@dataclass(frozen=True, slots=True)
class PlannedCandidate:
    """A candidate with what the gateway computes from."""

    model: str
    provider: str
    tariff: Tariff | None
    """None: it is free, or its price is unknown and policy allows that; nothing is held for it."""
    context_window: int
    max_output_tokens: int
    message: routing_service_pb2.Candidate
    """What execution gets: without scores and words, which it doesn't read."""


class Plan:
    """A plan of routing."""

    __slots__ = (
        "candidates", "fresh_until", "has_unbounded", "meant", "messages", "policy", "policy_version", "response", "task_type", "templates",
    )  # fmt: skip

    def __init__(
        self, response: routing_service_pb2.PlanResponse, candidates: tuple[PlannedCandidate, ...], fresh_until: float
    ) -> None:
        self.response = response
        # Once per plan instead of once per request.
        self.policy = response.policy
        self.policy_version = response.policy_version
        self.task_type = response.task_type
        self.meant: str = response.named_model or (candidates[0].model if candidates else "")
        """The model that such requests are for: the one that the caller named, else the policy's first."""
        self.candidates = candidates
        self.messages = tuple(candidate.message for candidate in candidates)
        self.has_unbounded = any(not (candidate.max_output_tokens or candidate.context_window) for candidate in candidates)
        """A candidate has no bound of its own for the answer."""
        self.fresh_until = fresh_until
        self.templates: dict[type[Message], tuple[Principal, str, Any]] = {}
        """By type: the last request to execution made from this plan, without what differs between requests of one key and lease,
        and that key's principal and lease id.
        """


PlanCall = Callable[..., Awaitable[routing_service_pb2.PlanResponse]]
"""`RoutingService.Plan` of a stub: takes the request, and `timeout` and `metadata` by name."""


class Plans:
    """The plans that are at hand. `clock` is the loop's."""

    def __init__(self, call: PlanCall, clock: Callable[[], float], *, call_seconds: float, max_count: int) -> None:
        self._call = call
        self._clock = clock
        self._call_seconds = call_seconds
        self._max_count = max_count
        self._plans: OrderedDict[tuple[object, ...], Plan] = OrderedDict()
        self._last_good: OrderedDict[tuple[object, ...], Plan] = OrderedDict()
        self._flights: Flights[PlanKey, Plan] = Flights("a plan from routing")
        self._breaker = Breaker()
        self.policy_version = ""
        """Of the latest plan; empty: none was made yet."""
        self.version_fresh_until = 0.0
        """Moment from which on the version is to be asked for again, though only answers from the cache are given: it is a part of their
        keys, and a catalogue that has changed must end them."""

    def get(self, key: PlanFields) -> Plan | None:
        """A plan that is fresh. `key` is a PlanKey, or its plain fields: making the one of the other costs more than this."""
        plan = self._plans.get(key)
        if plan is None or self._clock() >= plan.fresh_until:
            return None
        return plan

    async def fetch(self, key: PlanKey, timeout: float, metadata: Metadata) -> tuple[Plan, bool]:
        """The plan for a key, and whether it is an old one used because routing can't be reached.

        Failure MODEL_NOT_FOUND as routing says; DEPENDENCY_UNAVAILABLE when routing is away and no plan is at hand.
        """
        old = self._plans.get(key)
        if old is not None and self._flights.is_running(key) and self._clock() < old.fresh_until + 5.0:
            # Somebody renews it: no need to wait for that.
            return old, False
        if not self._breaker.allows(self._clock()):
            return self._stand_in(key, None), True
        try:
            return await self._flights.run(
                key, lambda: self._ask(key, min(timeout, self._call_seconds), metadata), timeout
            ), False
        except Failure as failure:
            if failure.reason not in OUTAGES:
                raise
            return self._stand_in(key, failure), True

    def _stand_in(self, key: PlanKey, failure: Failure | None) -> Plan:
        plan = self._plans.get(key) or self._last_good.get(key.essence())
        if plan is None or self._clock() > plan.fresh_until + _MAX_STALE_SECONDS:
            raise failure or unavailable(
                "routing", "routing can't be reached and no plan for such a request is at hand; retry later"
            )
        return plan

    async def _ask(self, key: PlanKey, timeout: float, metadata: Metadata) -> Plan:
        try:
            response = await self._call(plan_request_to_proto(key), timeout=timeout, metadata=metadata)
        except Failure as failure:
            if failure.reason in OUTAGES:
                self._breaker.failed(self._clock())
            else:
                self._breaker.succeeded()
            raise
        self._breaker.succeeded()
        candidates = tuple(
            _candidate_from_proto(candidate)
            for candidate in response.candidates
            if _may_use(key, candidate.model, response.policy)
        )
        reuse = response.reuse_duration
        plan = Plan(response, candidates, self._clock() + reuse.seconds + reuse.nanos / 1e9)
        self.policy_version = response.policy_version
        self.version_fresh_until = plan.fresh_until
        _remember(self._plans, key, plan, self._max_count)
        if candidates:
            _remember(self._last_good, key.essence(), plan, self._max_count)
        return plan


def plan_request_to_proto(key: PlanKey) -> routing_service_pb2.PlanRequest:
    """The request that asks for the plan of a key."""
    request = routing_service_pb2.PlanRequest(
        tenant_id=key.tenant_id,
        model=key.model,
        task_type=receipt_pb2.TaskType.ValueType(key.task_type),
        features=routing_service_pb2.Features(
            has_image=key.has_image,
            code_signal_count=key.code_signal_count,
            reasoning_signal_count=key.reasoning_signal_count,
        ),
        needs=key.needs,
        input_token_bound=key.input_token_bound,
        max_output_tokens=key.max_output_tokens,
        max_cost_nano_usd=key.max_cost_nano_usd,
        region=key.region,
        affinity_bucket=key.affinity_bucket,
        allow_fallback=key.allow_fallback,
        allowed_models=key.allowed_models,
    )
    if key.max_latency_ns:
        request.max_latency.CopyFrom(Duration(seconds=key.max_latency_ns // 10**9, nanos=key.max_latency_ns % 10**9))
    return request


def tariff_from_proto(price: price_pb2.Price) -> Tariff:
    """The dearest that a price can become."""
    dearest_input = price.input_nano_usd_per_million
    if price.HasField("cached_input_nano_usd_per_million"):
        dearest_input = max(dearest_input, price.cached_input_nano_usd_per_million)
    if price.HasField("cache_write_nano_usd_per_million"):
        dearest_input = max(dearest_input, price.cache_write_nano_usd_per_million)
    dearest_output = price.output_nano_usd_per_million
    if price.HasField("reasoning_nano_usd_per_million"):
        dearest_output = max(dearest_output, price.reasoning_nano_usd_per_million)
    return Tariff(dearest_input, dearest_output, price.image_nano_usd, price.request_nano_usd)


def round_up(count: int) -> int:
    """The next power of two."""
    return 1 << max(0, count - 1).bit_length()


def _candidate_from_proto(candidate: routing_service_pb2.Candidate) -> PlannedCandidate:
    message = routing_service_pb2.Candidate()
    message.CopyFrom(candidate)
    message.ClearField("scores")
    message.ClearField("reason")
    tariff = tariff_from_proto(candidate.price) if candidate.HasField("price") else None
    return PlannedCandidate(
        candidate.model,
        candidate.provider,
        None if tariff is None or tariff.is_free() else tariff,
        candidate.context_window,
        candidate.max_output_tokens,
        message,
    )


def _may_use(key: PlanKey, model: str, policy: str) -> bool:
    """Routing filters by permission; this keeps a fault there from becoming a breach here."""
    allowed = key.allowed_models
    return not allowed or model in allowed or key.model in allowed or policy in allowed or f"policy/{policy}" in allowed


def _remember(table: OrderedDict[tuple[object, ...], Plan], key: tuple[object, ...], plan: Plan, limit: int) -> None:
    table.pop(key, None)
    table[key] = plan
    if len(table) > limit:
        table.popitem(last=False)
