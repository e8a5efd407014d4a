"""Receipts from few and from many facts."""

from __future__ import annotations

from services.gateway.receipts import Completion, Facts, receipt_to_proto
from sluice.inference.v1 import receipt_pb2
from tests.unit.gateway.fakes import PRINCIPAL, answer, generate


def test_a_receipt_of_hardly_anything() -> None:
    facts = Facts("A" * 26, PRINCIPAL, generate(task_type=receipt_pb2.TASK_TYPE_CODE), "generate", 1_500_000_000, 10)
    receipt = receipt_to_proto(facts)
    assert receipt.receive_time.seconds == 1
    assert receipt.task_type_source == receipt_pb2.TASK_TYPE_SOURCE_CALLER
    assert not receipt.HasField("total_duration")
    assert not receipt.HasField("budget_before_nano_usd")


def test_durations_and_budget() -> None:
    facts = Facts("A" * 26, PRINCIPAL, generate(), "generate", 1_500_000_000, 10)
    facts.first_byte_ns, facts.end_ns = 1010, 2010
    facts.budget_before, facts.budget_level, facts.cost = 100, "tenant", 30
    facts.degrade("tokenization: estimated")
    completion = Completion(facts, answer())
    receipt = completion.receipt()
    assert receipt.first_byte_duration.nanos == 1000
    assert receipt.total_duration.nanos == 2000
    assert (receipt.budget_before_nano_usd, receipt.budget_after_nano_usd) == (100, 70)
    assert receipt.degradations == ["tokenization: estimated"]
    assert completion.created == 1
