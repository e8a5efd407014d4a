"""The order of calls, against scripted services."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from typing import Any

import pytest

from services.gateway.core import Completion
from services.gateway.events import Opened
from services.gateway.principals import Principal
from services.runtime.errors import Failure, Reason
from sluice.caching.v1 import caching_service_pb2
from sluice.execution.v1 import execution_service_pb2
from sluice.inference.v1 import inference_service_pb2, receipt_pb2
from sluice.routing.v1 import routing_service_pb2
from tests.unit.gateway.fakes import PRINCIPAL, World, answer, candidate, down, generate, price
from tests.unit.gateway.test_leases import eventually


async def refused(work: Any) -> Failure:
    """The failure of a call that must fail."""
    with pytest.raises(Failure) as caught:
        await work
    return caught.value


async def test_a_miss_goes_all_the_way_and_says_so_in_the_receipt() -> None:
    world = World()
    completion = await world.generate()
    assert completion.answer.message.parts[0].text == "hi"
    assert len(completion.operation_id) == 26
    receipt = completion.receipt()
    assert receipt.operation_id == completion.operation_id
    assert (receipt.tenant_id, receipt.project_id, receipt.key_id) == ("acme", "default", "key-1")
    assert receipt.cache.status == receipt_pb2.CACHE_STATUS_MISS
    assert receipt.policy == "default"
    assert receipt.policy_version == "v1"
    assert [(fate.model, fate.planned) for fate in receipt.candidates] == [("a/one", True)]
    assert receipt.input_count.token_count == 10
    assert receipt.attempts[0].attempt_id == f"{completion.operation_id}/1"
    assert receipt.total_duration.ToNanoseconds() > 0
    assert not receipt.degradations
    assert world.lines[-1]["outcome"] == "ok"
    assert world.lines[-1]["output_tokens"] == 5


@pytest.mark.parametrize(
    ("view", "request_id", "omitted"),
    [
        (inference_service_pb2.RECEIPT_VIEW_UNSPECIFIED, "", False),
        (inference_service_pb2.RECEIPT_VIEW_FULL, "", False),
        (inference_service_pb2.RECEIPT_VIEW_NONE, "", True),
        # Whoever joins by the id may want the receipt.
        (inference_service_pb2.RECEIPT_VIEW_NONE, "one", False),
    ],
)
async def test_attempts_are_asked_for_where_somebody_may_want_the_receipt(
    view: inference_service_pb2.ReceiptView.ValueType, request_id: str, omitted: bool
) -> None:
    world = World()
    await world.generate(generate(receipt_view=view, request_id=request_id))
    assert [asked.omit_attempts for asked in world.execution.asked("Complete")] == [omitted]
    assert world.lines[-1]["attempts"] == 1


async def test_a_second_request_asks_neither_metering_nor_routing() -> None:
    world = World()
    await world.generate()
    await world.generate()
    assert len(world.metering.asked("AcquireLease")) == 1
    assert len(world.routing.asked("Plan")) == 1
    assert len(world.execution.asked("Complete")) == 2


async def test_an_answer_from_the_cache_costs_nothing_and_is_booked() -> None:
    world = World()
    world.caching.hit = caching_service_pb2.LookupResponse(
        verdict=receipt_pb2.CacheVerdict(status=receipt_pb2.CACHE_STATUS_HIT_EXACT),
        answer=caching_service_pb2.CachedAnswer(answer=answer("stored"), cost_nano_usd=77, operation_id="earlier"),
    )
    completion = await world.generate()
    assert completion.cache_status == receipt_pb2.CACHE_STATUS_HIT_EXACT
    assert completion.cost_nano_usd == 0
    assert completion.receipt().saved_nano_usd == 77
    assert not world.execution.calls
    await world.hits.flush()
    (settlement,) = world.metering.asked("PostSettlements")[0].settlements
    assert settlement.attempt_id == f"{completion.operation_id}/cache"
    assert settlement.provider == "cache"
    assert (settlement.cost_nano_usd, settlement.saved_nano_usd) == (0, 77)
    assert settlement.cache_status == receipt_pb2.CACHE_STATUS_HIT_EXACT


async def test_a_miss_is_stored_under_its_ticket() -> None:
    world = World()
    world.execution.cost = 5
    completion = await world.generate()
    await world.writer.flush()
    ((store,),) = [batch.requests for batch in world.caching.asked("BatchStore")]
    assert store.ticket == b"ticket"
    assert store.answer.cost_nano_usd == 5
    assert store.answer.operation_id == completion.operation_id


async def test_cache_off_neither_reads_nor_writes() -> None:
    world = World()
    completion = await world.generate(
        generate(cache=inference_service_pb2.CacheWishes(mode=inference_service_pb2.CACHE_MODE_OFF))
    )
    await world.writer.flush()
    assert not world.caching.calls
    assert completion.cache_status == receipt_pb2.CACHE_STATUS_BYPASS
    assert "CACHE_MODE_OFF" in completion.receipt().cache.reason


async def test_a_dead_cache_is_passed_by_and_then_not_asked() -> None:
    world = World()
    world.caching.failures["Lookup"] = down("caching")
    for _ in range(5):
        completion = await world.generate()
        assert completion.cache_status == receipt_pb2.CACHE_STATUS_UNAVAILABLE
        assert any(line.startswith("caching:") for line in completion.receipt().degradations)
    assert len(world.caching.asked("Lookup")) == 3


async def test_a_hanging_cache_costs_its_budget_and_no_more() -> None:
    world = World()
    world.caching.delays["Lookup"] = 30.0
    began = world.loop.time()
    completion = await world.generate()
    assert 0.05 < world.loop.time() - began < 0.5
    assert completion.cache_status == receipt_pb2.CACHE_STATUS_UNAVAILABLE


async def test_a_dead_tokenizer_is_replaced_by_an_estimate() -> None:
    world = World()
    world.tokenization.failures["Count"] = down("tokenization")
    completion = await world.generate(generate("x" * 400))
    receipt = completion.receipt()
    assert receipt.input_count.method == receipt_pb2.TOKEN_COUNT_METHOD_ESTIMATED
    # The bound covers the worst tokenizer: one token per byte.
    assert receipt.input_count.token_count * (1 + receipt.input_count.error_bound) >= 400
    assert receipt.degradations[0].startswith("tokenization: estimated")


async def test_the_last_good_plan_serves_while_routing_is_down() -> None:
    world = World()
    world.routing.plan.reuse_duration.FromMilliseconds(1)
    await world.generate()
    await asyncio.sleep(0.01)
    world.routing.failures["Plan"] = down("routing")
    completion = await world.generate()
    assert completion.receipt().degradations[0].startswith("routing:")
    # A request that routing has not seen, of the same kind, is served too.
    completion = await world.generate(generate("a much longer text " * 100))
    assert completion.answer.model == "a/one"


async def test_without_any_plan_routing_down_is_unavailable() -> None:
    world = World()
    world.routing.failures["Plan"] = down("routing")
    failure = await refused(world.generate())
    assert failure.reason is Reason.DEPENDENCY_UNAVAILABLE


async def test_a_model_that_nobody_knows() -> None:
    world = World()
    world.routing.failures["Plan"] = Failure(Reason.MODEL_NOT_FOUND, "no such model", metadata={"model": "x/y"})
    failure = await refused(world.generate(generate(routing=inference_service_pb2.RoutingWishes(model="x/y"))))
    assert failure.reason is Reason.MODEL_NOT_FOUND
    assert world.lines[-1]["outcome"] == "MODEL_NOT_FOUND"


@pytest.mark.parametrize(
    ("rejections", "reason", "metadata"),
    [
        ([("a/one", "capability", "field:logit_bias")], Reason.FIELD_UNSUPPORTED, {"field": "logit_bias"}),
        ([("a/one", "capability", "tools"), ("b/two", "capability", "tools")], Reason.FIELD_UNSUPPORTED, {"field": "tools"}),
        ([("a/one", "permission", "")], Reason.MODEL_NOT_FOUND, {"model": "auto"}),
        ([("a/one", "price", "")], Reason.PRICE_UNKNOWN, {"model": "a/one"}),
        ([("a/one", "health", ""), ("b/two", "region", "")], Reason.PROVIDER_UNAVAILABLE, {"provider": "a"}),
        (
            [("a/one", "region", ""), ("b/two", "capability", "tools")],
            Reason.NO_CANDIDATE,
            {"candidate/a/one": "region: words", "candidate/b/two": "capability: words"},
        ),
    ],
)
async def test_a_plan_without_candidates_says_why(
    rejections: list[tuple[str, str, str]], reason: Reason, metadata: dict[str, str]
) -> None:
    world = World()
    del world.routing.plan.candidates[:]
    for model, name, need in rejections:
        world.routing.plan.rejections.add(model=model, filter=name, reason="words", missing_need=need)
    failure = await refused(world.generate())
    assert failure.reason is reason
    assert metadata.items() <= failure.metadata.items()
    assert not world.execution.calls


async def test_a_coarse_bound_that_seems_too_large_is_counted_and_planned_again() -> None:
    world = World()
    world.routing.exact_plan = routing_service_pb2.PlanResponse()
    world.routing.exact_plan.CopyFrom(world.routing.plan)
    del world.routing.plan.candidates[:]
    world.routing.plan.rejections.add(model="a/one", filter="context_window", reason="too small")
    world.tokenization.count = 1050
    completion = await world.generate(generate("x" * 4200))
    assert completion.answer.model == "a/one"
    assert world.routing.asked("Plan")[-1].input_token_bound == 1050


async def test_a_prompt_that_fits_nowhere() -> None:
    world = World()
    del world.routing.plan.candidates[:]
    world.routing.plan.rejections.add(model="a/one", filter="context_window", reason="too small")
    world.routing.models = [inference_service_pb2.Model(id="a/one", context_window=2048)]
    world.tokenization.count = 5000
    failure = await refused(world.generate())
    assert failure.reason is Reason.CONTEXT_WINDOW_EXCEEDED
    assert failure.metadata == {"input_tokens": "5000", "context_window": "2048"}


async def test_candidates_into_whose_window_the_count_does_not_fit_are_dropped() -> None:
    world = World()
    world.tokenization.count = 1500
    del world.routing.plan.candidates[:]
    world.routing.plan.candidates.extend([candidate("a/one", window=1024), candidate("b/two", window=8192)])
    completion = await world.generate()
    (request,) = world.execution.asked("Complete")
    assert [chosen.model for chosen in request.candidates] == ["b/two"]
    fates = {fate.model: fate.planned for fate in completion.receipt().candidates}
    assert fates == {"b/two": True, "a/one": False}


async def test_the_hold_is_the_worst_case_over_the_candidates() -> None:
    world = World()
    world.metering.budget = 10_000_000_000
    del world.routing.plan.candidates[:]
    dear = price(output_nano_usd_per_million=20_000_000_000)
    world.routing.plan.candidates.extend(
        [candidate("a/one", cost=price(), longest=100), candidate("a/two", cost=dear, longest=50)]
    )
    world.execution.cost = 30_000
    completion = await world.generate()
    (request,) = world.execution.asked("Complete")
    # 10 tokens at 1,000 nano-USD and 50 at 20,000 are more than 100 at 2,000.
    assert request.billing.hold_nano_usd == 10 * 1000 + 50 * 20_000
    assert request.billing.lease_id == "lease-1"
    assert request.billing.hold_id == ""
    receipt = completion.receipt()
    assert receipt.hold_nano_usd == request.billing.hold_nano_usd
    assert receipt.budget_before_nano_usd == 10_000_000_000
    assert receipt.budget_after_nano_usd == 10_000_000_000 - 30_000
    assert receipt.budget_level == "tenant"


async def test_the_rest_of_a_hold_returns_to_the_slice() -> None:
    world = World(nano_usd=1_000_000)
    world.metering.budget = 1_000_000
    del world.routing.plan.candidates[:]
    world.routing.plan.candidates.append(candidate("a/one", cost=price(), longest=100))
    world.execution.cost = 20_000
    for _ in range(10):
        await world.generate()
    # Each needed 210,000 for a while and cost 20,000: one slice was enough for all.
    assert sum(call.wanted_nano_usd for call in world.metering.asked("AcquireLease")) < 3_000_000
    lease = world.leases.admit("key-1", 0)
    assert lease is not None
    assert lease.money == 1_000_000 - 10 * 20_000
    assert lease.held == 0


async def test_another_providers_tokenizer_is_bounded_by_bytes() -> None:
    world = World()
    world.metering.budget = 10_000_000_000
    world.tokenization.count = 100
    del world.routing.plan.candidates[:]
    world.routing.plan.candidates.extend(
        [candidate("a/one", cost=price(), longest=1), candidate("b/two", cost=price(), longest=1)]
    )
    await world.generate(generate("x" * 400))
    (request,) = world.execution.asked("Complete")
    assert request.billing.hold_nano_usd >= 400 * 1000 + 2000


async def test_a_hold_of_its_own_when_no_slice_is_granted_and_the_answer_is_clamped_to_it() -> None:
    world = World()
    world.metering.budget = 100_000
    world.metering.leases_money = False
    del world.routing.plan.candidates[:]
    world.routing.plan.candidates.append(candidate("a/one", cost=price(), longest=1000))
    completion = await world.generate()
    (hold,) = world.metering.asked("Hold")
    assert hold.amount_nano_usd == 10 * 1000 + 1000 * 2000
    assert hold.min_amount_nano_usd == 10 * 1000 + 16 * 2000
    (request,) = world.execution.asked("Complete")
    assert request.billing.hold_nano_usd == 100_000
    assert request.billing.hold_id == f"hold-{completion.operation_id}"
    assert request.billing.lease_id == ""
    assert request.conversation.max_output_tokens == (100_000 - 10 * 1000) // 2000
    assert world.metering.budget == 0


async def test_an_empty_budget_refuses_and_nothing_runs() -> None:
    world = World()
    world.metering.budget = 1000
    world.metering.leases_money = False
    del world.routing.plan.candidates[:]
    world.routing.plan.candidates.append(candidate("a/one", cost=price(), longest=1000))
    failure = await refused(world.generate())
    assert failure.reason is Reason.BUDGET_EXHAUSTED
    assert not world.execution.calls


async def test_concurrent_requests_never_hold_more_than_the_budget() -> None:
    world = World(nano_usd=100_000)
    cost = 10 * 1000 + 45 * 2000
    world.metering.budget = 7 * cost
    del world.routing.plan.candidates[:]
    world.routing.plan.candidates.append(candidate("a/one", cost=price(), longest=45))
    world.execution.cost = cost
    world.execution.delays["Complete"] = 0.02
    results = await asyncio.gather(
        *(world.generate(generate(f"n{number}", conversation_fields={"max_output_tokens": 45})) for number in range(30)),
        return_exceptions=True,
    )
    holds = sum(request.billing.hold_nano_usd for request in world.execution.asked("Complete"))
    assert holds <= 7 * cost
    assert sum(isinstance(result, Completion) for result in results) >= 6
    assert all(
        isinstance(result, Completion) or (isinstance(result, Failure) and result.reason is Reason.BUDGET_EXHAUSTED)
        for result in results
    )


async def test_the_callers_own_cost_limit_clamps_or_refuses() -> None:
    world = World()
    del world.routing.plan.candidates[:]
    world.routing.plan.candidates.append(candidate("a/one", cost=price(), longest=1000))
    await world.generate(generate(routing=inference_service_pb2.RoutingWishes(max_cost_nano_usd=100_000)))
    (request,) = world.execution.asked("Complete")
    assert request.billing.hold_nano_usd == 100_000
    assert request.conversation.max_output_tokens == 45
    failure = await refused(world.generate(generate(routing=inference_service_pb2.RoutingWishes(max_cost_nano_usd=1))))
    assert failure.reason is Reason.COST_LIMIT
    assert failure.metadata == {"max_cost_nano_usd": "1"}


async def test_a_failure_without_attempts_gives_the_hold_back() -> None:
    world = World()
    world.metering.budget = 1_000_000
    del world.routing.plan.candidates[:]
    world.routing.plan.candidates.append(candidate("a/one", cost=price(), longest=100))
    world.execution.failures["Complete"] = Failure(Reason.BREAKER_OPEN, "open", retry_delay=1.0)
    assert (await refused(world.generate())).reason is Reason.BREAKER_OPEN
    lease = world.leases.admit("key-1", 0)
    assert lease is not None
    assert (lease.money, lease.held, lease.stranded, lease.in_flight) == (1_000_000, 0, 0, 1)


async def test_a_hold_of_its_own_is_voided_when_nothing_was_charged() -> None:
    world = World()
    world.metering.budget = 10_000_000
    world.metering.leases_money = False
    del world.routing.plan.candidates[:]
    world.routing.plan.candidates.append(candidate("a/one", cost=price(), longest=100))
    world.execution.failures["Complete"] = Failure(Reason.BREAKER_OPEN, "open")
    await refused(world.generate())
    await world.releases.flush()
    (void,) = world.metering.asked("VoidHold")
    assert void.hold_id.startswith("hold-")


@pytest.mark.parametrize("streaming", [False, True])
async def test_what_is_held_is_freed_when_the_deadline_passes_before_execution_is_asked(streaming: bool) -> None:
    world = World()
    world.metering.budget = 10_000_000
    world.metering.leases_money = False
    del world.routing.plan.candidates[:]
    world.routing.plan.candidates.append(candidate("a/one", cost=price(), longest=100))
    # The process stands still while the hold's answer waits to be read.
    world.core._clock = lambda: world.loop.time() + (10.0 if world.metering.asked("Hold") else 0.0)
    failure = await refused(world.stream() if streaming else world.generate())
    assert failure.reason is Reason.DEADLINE_EXCEEDED
    assert not world.execution.calls
    await world.releases.flush()
    assert len(world.metering.asked("VoidHold")) == 1


def _with_limited_models(**requests: int) -> World:
    world = World()
    world.metering.identity.limited_models.extend(sorted(f"a/{name}" for name in requests))
    world.metering.model_requests = {f"a/{name}": count for name, count in requests.items()}
    del world.routing.plan.candidates[:]
    world.routing.plan.candidates.extend([candidate("a/one"), candidate("a/two"), candidate("a/three")])
    return world


LIMITED = dataclasses.replace(PRINCIPAL, limited_models=frozenset({"a/one", "a/two"}))


async def test_a_model_whose_limit_is_used_up_is_passed_over_and_the_receipt_says_so() -> None:
    world = _with_limited_models(one=2, two=1)
    wanted = generate(receipt_view=inference_service_pb2.RECEIPT_VIEW_FULL)
    for _ in range(2):
        await world.generate(wanted, principal=LIMITED)
    asked = [[one.model for one in request.candidates] for request in world.execution.asked("Complete")]
    assert asked == [["a/one", "a/two", "a/three"]] * 2
    # The second model is asked first now, and has one request.
    world.execution.answer.model = "a/two"
    completion = await world.generate(wanted, principal=LIMITED)
    await world.generate(wanted, principal=LIMITED)
    asked = [[one.model for one in request.candidates] for request in world.execution.asked("Complete")]
    assert asked[2:] == [["a/two", "a/three"], ["a/three"]]
    receipt = completion.receipt()
    (dropped,) = [one for one in receipt.candidates if one.model == "a/one"]
    assert not dropped.planned
    assert dropped.reason.startswith("model_limit: the limit of 60 requests per minute of the model a/one is used up")
    wishes = [request for request in world.metering.asked("AcquireLease") if request.model]
    assert {request.model for request in wishes} == {"a/one", "a/two"}
    assert not any(request.wanted_nano_usd for request in wishes)


async def test_where_every_model_is_limited_and_used_up_the_request_is_refused() -> None:
    world = _with_limited_models(one=0)
    del world.routing.plan.candidates[1:]
    failure = await refused(world.generate(principal=dataclasses.replace(PRINCIPAL, limited_models=frozenset({"a/one"}))))
    assert failure.reason is Reason.RATE_LIMITED
    assert dict(failure.metadata) == {"limit": "60", "level": "model", "model": "a/one"}
    assert failure.retry_delay is not None
    assert 6.0 < failure.retry_delay <= 7.0
    assert not world.execution.asked("Complete")
    lease = world.leases.admit("key-1", 0)
    assert lease is not None
    assert lease.in_flight == 1


async def test_a_model_that_answers_in_anothers_place_is_charged_and_the_first_gets_its_tokens_back() -> None:
    world = _with_limited_models(one=10, two=10)
    world.execution.answer.model = "a/two"
    await world.generate(principal=LIMITED)
    leases = world.leases._leases
    first, second = leases["key-1/a/one"], leases["key-1/a/two"]
    assert (first.in_flight, first.requests) == (0, 9)
    assert (second.in_flight, second.requests, second.tokens) == (0, -1, -15)
    # It is owed to the next slice.
    await world.leases._refill(second, 0, 1.0)
    assert second.requests == 9


async def test_a_model_known_to_be_used_up_is_no_fallback_either() -> None:
    world = _with_limited_models(one=10, two=0)
    world.execution.answer.model = "a/two"
    await world.generate(principal=LIMITED)
    await world.leases._refill(world.leases._leases["key-1/a/two"], 0, 1.0)
    await world.generate(principal=LIMITED)
    (_, second) = world.execution.asked("Complete")
    assert [one.model for one in second.candidates] == ["a/one", "a/three"]


def _with_holds_of_their_own() -> World:
    world = World()
    world.metering.budget = 10_000_000
    world.metering.leases_money = False
    del world.routing.plan.candidates[:]
    world.routing.plan.candidates.append(candidate("a/one", cost=price(), longest=100))
    return world


async def test_a_hold_whose_operation_may_have_run_is_kept_until_that_is_settled() -> None:
    world = _with_holds_of_their_own()
    world.execution.failures["Complete"] = down("execution")
    await refused(world.generate())
    await world.releases.flush()
    (void,) = world.metering.asked("VoidHold")
    assert void.may_have_run


async def test_a_hold_whose_answer_was_lost_is_freed_and_one_that_was_refused_is_not_asked_for_again() -> None:
    world = _with_holds_of_their_own()
    world.metering.failures["Hold"] = down("metering")
    assert (await refused(world.generate())).reason is Reason.DEPENDENCY_UNAVAILABLE
    (asked,) = world.metering.asked("Hold")
    await world.releases.flush()
    (void,) = world.metering.asked("VoidHold")
    assert (void.hold_id, void.may_have_run) == (f"hold-{asked.operation_id}", False)
    world.metering.failures["Hold"] = Failure(Reason.BUDGET_EXHAUSTED, "the budget is used up", metadata={"level": "tenant"})
    assert (await refused(world.generate())).reason is Reason.BUDGET_EXHAUSTED
    await world.releases.flush()
    assert len(world.metering.asked("VoidHold")) == 1


@pytest.mark.parametrize(("seconds", "reason"), [(10.0, Reason.DEPENDENCY_UNAVAILABLE), (0.05, Reason.DEADLINE_EXCEEDED)])
async def test_who_has_time_left_is_told_that_metering_had_none_for_its_hold(seconds: float, reason: Reason) -> None:
    world = _with_holds_of_their_own()
    world.metering.delays["Hold"] = 30.0
    world.core._limits = dataclasses.replace(world.core._limits, lease=0.1)
    failure = await refused(world.generate(seconds=seconds))
    assert failure.reason is reason
    assert not world.execution.calls


async def test_a_hold_whose_caller_left_before_its_answer_came_is_freed() -> None:
    world = _with_holds_of_their_own()
    world.metering.delays["Hold"] = 0.05
    caller = asyncio.create_task(world.generate())
    await eventually(lambda: world.metering.asked("Hold"))
    caller.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await caller
    await world.releases.flush()
    (void,) = world.metering.asked("VoidHold")
    assert void.hold_id == f"hold-{world.metering.asked('Hold')[0].operation_id}"


async def test_a_failure_of_unknown_cost_keeps_the_hold_until_the_lease_is_exchanged() -> None:
    world = World()
    world.metering.budget = 1_000_000
    del world.routing.plan.candidates[:]
    world.routing.plan.candidates.append(candidate("a/one", cost=price(), longest=100))
    world.execution.failures["Complete"] = Failure(Reason.PROVIDER_STREAM_BROKEN, "broken")
    await refused(world.generate())
    lease = world.leases.admit("key-1", 0)
    assert lease is not None
    assert (lease.money, lease.held, lease.stranded) == (1_000_000 - 210_000, 0, 210_000)


async def test_a_stream_opens_pieces_and_completes() -> None:
    world = World()
    events = await world.stream()
    assert isinstance(events[0], Opened)
    assert events[0].is_wire is False
    assert "".join(delta.text for batch in events[1:-1] for delta in batch.deltas) == "hi"
    assert isinstance(events[-1], Completion)
    assert events[-1].receipt().first_byte_duration.ToNanoseconds() > 0
    assert world.routing.asked("Plan")[0].needs == ["chat", "streaming"]


async def test_a_wire_stream_passes_bytes_through() -> None:
    world = World()
    world.execution.is_wire = True
    world.execution.pieces = [b"data: 1\n\n", b"data: 2\n\n"]
    events = await world.stream(wire=execution_service_pb2.WIRE_FORMAT_OPENAI_CHAT)
    assert events[0].is_wire is True
    assert events[1:-1] == [b"data: 1\n\n", b"data: 2\n\n"]


async def test_a_hit_is_streamed_as_deltas() -> None:
    world = World()
    world.caching.hit = caching_service_pb2.LookupResponse(
        verdict=receipt_pb2.CacheVerdict(status=receipt_pb2.CACHE_STATUS_HIT_SEMANTIC, score=0.97),
        answer=caching_service_pb2.CachedAnswer(answer=answer("stored")),
    )
    opened, batch, completion = await world.stream(wire=execution_service_pb2.WIRE_FORMAT_OPENAI_CHAT)
    assert opened.is_wire is False
    assert batch.deltas[0].text == "stored"
    assert completion.cache_status == receipt_pb2.CACHE_STATUS_HIT_SEMANTIC
    assert completion.receipt().cache.score == 0.97


async def test_closing_a_stream_cancels_execution_and_frees_the_slot() -> None:
    world = World()
    world.execution.piece_gate = asyncio.Event()
    events = world.core.stream(PRINCIPAL, generate(), accepted_wire=0, deadline=world.soon())
    await anext(events)
    await anext(events)
    await events.aclose()
    assert world.execution.closed_count == 1
    lease = world.leases.admit("key-1", 0)
    assert lease is not None
    assert lease.in_flight == 1
    assert world.lines[-1]["outcome"] == "CANCELLED"
    assert await world.core.wait_idle(0.1)


async def test_cancelling_a_call_cancels_execution() -> None:
    world = World()
    world.execution.gate = asyncio.Event()
    task = asyncio.create_task(world.generate())
    while not world.execution.calls:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.execution.cancelled_count == 1
    assert await world.core.wait_idle(0.1)


async def test_a_stream_that_breaks_raises_its_failure() -> None:
    world = World()
    world.execution.pieces = ["h", Failure(Reason.PROVIDER_STREAM_BROKEN, "broken", metadata={"provider": "a"})]
    seen: list[Any] = []
    events = world.core.stream(PRINCIPAL, generate(), accepted_wire=0, deadline=world.soon())
    with pytest.raises(Failure) as caught:
        async for event in events:
            seen += [event]
    assert caught.value.reason is Reason.PROVIDER_STREAM_BROKEN
    assert len(seen) == 2
    assert world.lines[-1]["outcome"] == "PROVIDER_STREAM_BROKEN"


async def test_the_deadline_is_spent_across_the_steps() -> None:
    world = World()
    world.execution.delays["Complete"] = 30.0
    began = world.loop.time()
    failure = await refused(world.generate(seconds=0.15))
    assert failure.reason is Reason.DEADLINE_EXCEEDED
    assert world.loop.time() - began < 1.0
    ((_, _, call),) = [entry for entry in world.execution.calls if entry[0] == "Complete"]
    assert call.deadline <= began + 0.16


async def test_a_deadline_that_has_passed_runs_nothing() -> None:
    world = World()
    failure = await refused(world.generate(seconds=-1.0))
    assert failure.reason is Reason.DEADLINE_EXCEEDED
    assert not world.execution.calls


async def test_scopes_are_required() -> None:
    world = World()
    jobs_only = Principal("acme", "default", "key-1", ("jobs",), (), "", None)
    failure = await refused(world.generate(principal=jobs_only))
    assert failure.reason is Reason.PERMISSION_DENIED
    assert failure.metadata == {"needs": "inference"}


async def test_allowed_models_reach_routing_and_are_checked_again() -> None:
    world = World()
    limited = Principal("acme", "default", "key-1", ("inference",), ("b/two",), "", None)
    failure = await refused(world.generate(principal=limited))
    assert failure.reason is Reason.NO_CANDIDATE
    assert world.routing.asked("Plan")[0].allowed_models == ["b/two"]
    assert world.caching.asked("Lookup")[0].routing_scope == "allowed=b/two"


async def test_a_repeated_request_id_is_replayed_once_done() -> None:
    world = World()
    first = await world.generate(generate(request_id="r1"))
    second = await world.generate(generate(request_id="r1"))
    assert second.operation_id == first.operation_id
    assert len(world.execution.asked("Complete")) == 1


async def test_concurrent_calls_of_one_request_id_are_one_operation() -> None:
    world = World()
    world.execution.gate = asyncio.Event()
    tasks = [asyncio.create_task(world.generate(generate(request_id="r1"))) for _ in range(10)]
    while not world.execution.calls:
        await asyncio.sleep(0)
    world.execution.gate.set()
    completions = await asyncio.gather(*tasks)
    assert len({completion.operation_id for completion in completions}) == 1
    assert len(world.execution.asked("Complete")) == 1


async def test_a_request_id_with_another_body_is_refused() -> None:
    world = World()
    await world.generate(generate(request_id="r1"))
    failure = await refused(world.generate(generate("other", request_id="r1")))
    assert failure.reason is Reason.REQUEST_ID_REUSED
    assert failure.metadata == {"request_id": "r1"}


async def test_request_ids_belong_to_a_tenant() -> None:
    world = World()
    other = Principal("globex", "default", "key-2", ("inference",), (), "", None)
    first = await world.generate(generate(request_id="r1"))
    second = await world.generate(generate("other", request_id="r1"), principal=other)
    assert first.operation_id != second.operation_id


async def test_execution_is_told_what_the_ledger_shall_charge_once() -> None:
    """The same for a repetition at another gateway that finds no answer; another for another body, and none without a request id."""
    keys: list[bytes] = []
    for world in (World(), World()):
        await world.generate(generate(request_id="r1"))
        # The second uses the template that the first one's plan left.
        await world.generate(generate())
        await world.stream(generate(request_id="r2"))
        keys += [request.billing.request_key for request in world.execution.asked("Complete")]
        keys += [request.billing.request_key for request in world.execution.asked("StreamComplete")]
    first, none, second = keys[:3]
    assert keys[3:] == keys[:3]
    assert (len(first), none, len(second)) == (16, b"", 16)
    other = World()
    await other.generate(generate("other", request_id="r1"))
    (request,) = other.execution.asked("Complete")
    assert request.billing.request_key not in (first, second, b"")


async def test_a_failed_request_id_may_be_tried_again() -> None:
    world = World()
    world.execution.failures["Complete"] = Failure(Reason.ALL_CANDIDATES_FAILED, "all failed")
    assert (await refused(world.generate(generate(request_id="r1")))).reason is Reason.ALL_CANDIDATES_FAILED
    world.execution.failures.clear()
    assert (await world.generate(generate(request_id="r1"))).answer.model == "a/one"


async def test_the_operation_lives_while_one_caller_waits_and_is_cancelled_with_the_last() -> None:
    world = World()
    world.execution.gate = asyncio.Event()
    first = asyncio.create_task(world.generate(generate(request_id="r1")))
    second = asyncio.create_task(world.generate(generate(request_id="r1")))
    while not world.execution.calls:
        await asyncio.sleep(0)
    first.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await first
    await asyncio.sleep(0.01)
    assert world.execution.cancelled_count == 0
    second.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await second
    await asyncio.sleep(0.01)
    assert world.execution.cancelled_count == 1
    assert not world.requests.running()


async def test_a_stream_is_joined_from_its_first_piece() -> None:
    world = World()
    world.execution.piece_gate = asyncio.Event()
    request = generate(request_id="r1")
    first = world.core.stream(PRINCIPAL, request, accepted_wire=0, deadline=world.soon())
    assert isinstance(await anext(first), Opened)
    assert (await anext(first)).deltas[0].text == "h"  # type: ignore[union-attr]
    second = asyncio.create_task(world.stream(request))
    third = asyncio.create_task(world.generate(request))
    await asyncio.sleep(0.01)
    world.execution.piece_gate.set()
    rest = [event async for event in first]
    events = await second
    assert [delta.text for batch in events[1:-1] for delta in batch.deltas] == ["h", "i"]
    assert events[-1].operation_id == rest[-1].operation_id == (await third).operation_id  # type: ignore[union-attr]
    assert len(world.execution.asked("StreamComplete")) == 1


async def test_a_stream_in_a_format_that_the_joiner_cannot_read_is_given_whole() -> None:
    world = World()
    world.execution.is_wire = True
    world.execution.pieces = [b"data: 1\n\n", b"data: 2\n\n"]
    world.execution.piece_gate = asyncio.Event()
    request = generate(request_id="r1")
    first = asyncio.create_task(world.stream(request, wire=execution_service_pb2.WIRE_FORMAT_OPENAI_CHAT))
    await asyncio.sleep(0.01)
    second = asyncio.create_task(world.stream(request, wire=0))
    await asyncio.sleep(0.01)
    world.execution.piece_gate.set()
    assert (await first)[1:-1] == [b"data: 1\n\n", b"data: 2\n\n"]
    opened, batch, completion = await second
    assert opened.is_wire is False
    assert batch.deltas[0].text == "hi"
    assert isinstance(completion, Completion)


async def test_a_finished_request_id_is_replayed_as_a_stream() -> None:
    world = World()
    completion = await world.generate(generate(request_id="r1"))
    opened, batch, last = await world.stream(generate(request_id="r1"))
    assert opened.operation_id == last.operation_id == completion.operation_id
    assert batch.deltas[0].text == "hi"


async def test_embeddings_hold_and_settle() -> None:
    world = World()
    world.metering.budget = 1_000_000
    del world.routing.plan.candidates[:]
    world.routing.plan.candidates.append(candidate("a/one", cost=price(output_nano_usd_per_million=0)))
    world.execution.cost = 7000
    response = await world.core.embed(
        PRINCIPAL, inference_service_pb2.EmbedRequest(model="a/one", inputs=["abc", "d"]), deadline=world.soon()
    )
    assert len(response.embeddings) == 2
    assert len(response.operation_id) == 26
    (request,) = world.execution.asked("Embed")
    assert request.billing.hold_nano_usd >= 4 * 1000
    assert world.routing.asked("Plan")[0].needs == ["embeddings"]
    lease = world.leases.admit("key-1", 0)
    assert lease is not None
    assert (lease.money, lease.held) == (1_000_000 - 7000, 0)


async def test_count_tokens_counts_for_the_named_model() -> None:
    world = World()
    response = await world.core.count_tokens(
        PRINCIPAL,
        inference_service_pb2.CountTokensRequest(model="alias", conversation=generate().conversation),
        deadline=world.soon(),
    )
    assert response.input_count.token_count == 10
    assert world.tokenization.asked("Count")[0].models == ["a/one"]


async def test_explain_takes_and_runs_nothing() -> None:
    world = World()
    world.metering.budget = 1_000_000
    del world.routing.plan.candidates[:]
    world.routing.plan.candidates.append(candidate("a/one", cost=price(), longest=100))
    response = await world.core.explain(
        PRINCIPAL, inference_service_pb2.ExplainRequest(request=generate()), deadline=world.soon()
    )
    assert response.receipt.hold_nano_usd == 210_000
    assert response.receipt.cache.status == receipt_pb2.CACHE_STATUS_MISS
    assert response.receipt.input_count.token_count == 10
    assert not world.execution.calls
    assert not world.metering.calls


async def test_models_are_listed_for_the_key() -> None:
    world = World()
    world.routing.models = [inference_service_pb2.Model(id="a/one")]
    response = await world.core.list_models(PRINCIPAL, inference_service_pb2.ListModelsRequest(), deadline=world.soon())
    assert [model.id for model in response.models] == ["a/one"]


async def test_outcomes_are_remembered_per_tenant() -> None:
    world = World()
    completion = await world.generate()
    await world.core.report_outcome(
        PRINCIPAL,
        inference_service_pb2.ReportOutcomeRequest(
            operation_id=completion.operation_id, outcome=inference_service_pb2.OUTCOME_SERVED, score=0.5
        ),
    )
    report = world.outcomes.get("acme", completion.operation_id)
    assert report is not None
    assert report.score == 0.5
    assert world.outcomes.get("globex", completion.operation_id) is None


async def test_a_draining_core_takes_nothing_new() -> None:
    world = World()
    world.core.close_admission()
    assert (await refused(world.generate())).reason is Reason.DRAINING


async def test_calls_inside_the_lease_go_on_while_metering_is_down_and_then_stop() -> None:
    world = World(request_slice=4)
    world.metering.lease_seconds = 0.4
    await world.core.authenticate("sk-sluice-x")
    await world.generate()
    for name in ("AcquireLease", "Authenticate"):
        world.metering.failures[name] = down("metering")
    await world.generate()
    await asyncio.sleep(0.45)
    failure = await refused(world.generate())
    assert failure.reason is Reason.DEPENDENCY_UNAVAILABLE
    assert failure.metadata["dependency"] == "metering"
    assert len(world.execution.asked("Complete")) == 2


async def test_the_answer_is_given_its_bound_when_the_model_has_none() -> None:
    world = World()
    await world.generate()
    (request,) = world.execution.asked("Complete")
    assert request.conversation.max_output_tokens == 4096


async def test_end_users_are_hashed_and_labels_are_passed_on() -> None:
    world = World()
    await world.generate(generate(end_user="alice", metadata={"echo.delay": "5"}))
    (request,) = world.execution.asked("Complete")
    assert len(request.end_user_hash) == 64
    assert request.metadata == {"echo.delay": "5"}
    assert world.caching.asked("Lookup")[0].routing_scope == "echo.delay=5"


async def test_hits_alone_see_a_changed_catalogue() -> None:
    """The version of the policies is a part of every cache key; it is asked for though only answers from the cache are given."""
    world = World()
    await world.generate()
    assert world.caching.asked("Lookup")[-1].policy_version == "v1"
    world.routing.plan.policy_version = "v2"
    world.plans._plans.clear()
    world.plans.version_fresh_until = world.loop.time() - 1
    await world.generate()
    assert world.caching.asked("Lookup")[-1].policy_version == "v2"


async def test_the_cache_answers_on_while_routing_is_away() -> None:
    world = World()
    await world.generate()
    world.routing.failures["Plan"] = down("routing")
    world.plans._plans.clear()
    world.plans.version_fresh_until = world.loop.time() - 1
    await world.generate()
    assert world.caching.asked("Lookup")[-1].policy_version == "v1"


async def test_request_ids_belong_to_a_key() -> None:
    """Another key of the tenant may not be allowed what this one is."""
    world = World()
    other = Principal("acme", "default", "key-2", ("inference",), (), "", None)
    first = await world.generate(generate(request_id="r1"))
    # Of the same key this would be REQUEST_ID_REUSED.
    second = await world.generate(generate("other", request_id="r1"), principal=other)
    assert first.operation_id != second.operation_id


async def test_a_retry_right_after_its_caller_left_begins_anew() -> None:
    world = World()
    world.execution.delays["Complete"] = 0.2
    leaving = asyncio.create_task(world.generate(generate(request_id="r1")))
    while not world.execution.asked("Complete"):
        await asyncio.sleep(0.005)
    leaving.cancel()
    retried = asyncio.create_task(world.generate(generate(request_id="r1")))
    await asyncio.gather(leaving, return_exceptions=True)
    assert (await retried).answer.message.parts
    assert len(world.execution.asked("Complete")) == 2


async def test_the_line_of_a_failed_request_says_what_was_charged_for_it() -> None:
    world = World()
    world.execution.failures["Complete"] = Failure(
        Reason.DEADLINE_EXCEEDED, "too late", metadata={"cost_nano_usd": "34", "attempt/1": "a/one PROVIDER_TIMEOUT"}
    )
    await refused(world.generate())
    assert (world.lines[-1]["cost_nano_usd"], world.lines[-1]["attempts"]) == (34, 1)


async def test_the_line_of_a_request_whose_caller_left_does_not_say_that_it_cost_nothing() -> None:
    world = World()
    world.execution.gate = asyncio.Event()
    call = asyncio.create_task(world.generate())
    while not world.execution.asked("Complete"):
        await asyncio.sleep(0.001)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert world.lines[-1]["outcome"] == "CANCELLED"
    assert world.lines[-1]["cost_nano_usd"] is None
