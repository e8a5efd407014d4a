"""What execution is told and what it says."""

from __future__ import annotations

from dataclasses import replace

from services.gateway.executions import deltas_of, end_user_hash, settled_cost
from services.runtime.errors import Failure, NotSent, Reason, unavailable
from sluice.inference.v1 import answer_pb2
from tests.unit.gateway.fakes import PRINCIPAL, World, answer, generate, price


def test_the_cost_of_a_failure() -> None:
    said = Failure(Reason.ALL_CANDIDATES_FAILED, "", metadata={"cost_nano_usd": "42"})
    assert settled_cost(said) == 42
    assert settled_cost(Failure(Reason.PROVIDER_REJECTED, "")) == 0
    assert settled_cost(Failure(Reason.DEADLINE_EXCEEDED, "")) is None
    assert settled_cost(unavailable("execution", "")) is None
    assert settled_cost(NotSent.of(unavailable("execution", ""))) == 0
    free = {"attempt/1": "a/one PROVIDER_UNAVAILABLE", "attempt/2": "b/two BREAKER_OPEN"}
    assert settled_cost(Failure(Reason.ALL_CANDIDATES_FAILED, "", metadata=free)) == 0
    unsure = {**free, "attempt/3": "c/three PROVIDER_TIMEOUT"}
    assert settled_cost(Failure(Reason.ALL_CANDIDATES_FAILED, "", metadata=unsure)) is None
    assert settled_cost(Failure(Reason.ALL_CANDIDATES_FAILED, "")) is None


def test_an_answer_becomes_deltas() -> None:
    whole = answer("text")
    whole.message.parts.add().tool_call.name = "f"
    whole.message.parts.add().tool_call.name = "g"
    whole.message.parts.add().refusal = "no"
    batch = deltas_of(whole)
    assert [delta.WhichOneof("kind") for delta in batch.deltas] == ["text", "tool_call", "tool_call", "refusal"]
    assert [delta.tool_call.index for delta in batch.deltas[1:3]] == [0, 1]


def test_deltas_of_an_empty_answer() -> None:
    assert not deltas_of(answer_pb2.Answer()).deltas


def test_end_users_are_told_apart_and_not_told() -> None:
    assert end_user_hash(PRINCIPAL, "alice") == end_user_hash(PRINCIPAL, "alice")
    assert end_user_hash(PRINCIPAL, "alice") != end_user_hash(PRINCIPAL, "bob")
    assert "alice" not in end_user_hash(PRINCIPAL, "alice")


async def test_what_is_reused_of_a_request_never_crosses_keys_leases_or_amounts() -> None:
    world = World()
    world.metering.budget = 10**12
    world.routing.plan.candidates[0].price.CopyFrom(price())
    other = replace(PRINCIPAL, project_id="other", key_id="key-2")
    for principal, text in ((PRINCIPAL, "short"), (PRINCIPAL, "long " * 400), (other, "short"), (PRINCIPAL, "short")):
        world.tokenization.count = len(text)
        await world.core.generate(principal, generate(text), deadline=world.loop.time() + 5)
    first, longer, foreign, last = world.execution.asked("Complete")
    assert [one.billing.key_id for one in (first, longer, foreign, last)] == ["key-1", "key-1", "key-2", "key-1"]
    assert foreign.billing.project_id == "other"
    assert foreign.billing.lease_id != first.billing.lease_id == last.billing.lease_id
    assert longer.billing.hold_nano_usd > first.billing.hold_nano_usd == last.billing.hold_nano_usd
    assert len({one.operation_id for one in (first, longer, foreign, last)}) == 4
    assert [one.conversation.messages[0].parts[0].text for one in (first, last)] == ["short", "short"]
    assert len(first.candidates) == len(last.candidates) == 1
