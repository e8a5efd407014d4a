from __future__ import annotations

from google.rpc import code_pb2

from services.runtime.errors import CODES, Code, Failure, Reason, deadline_exceeded, invalid, unavailable
from sluice.errors.v1.error_reason_pb2 import ErrorReason


def test_the_reasons_are_those_of_the_contract() -> None:
    contract = {name.removeprefix("ERROR_REASON_") for name in ErrorReason.DESCRIPTOR.values_by_name} - {"UNSPECIFIED"}
    assert {reason.value for reason in Reason} == contract


def test_every_reason_has_a_code_that_grpc_knows() -> None:
    assert set(CODES) == set(Reason)
    for code in Code:
        assert code_pb2.Code.Name(code) == code.name


def test_the_ready_made_failures() -> None:
    assert invalid("messages[2].role", "must be set").metadata == {"field": "messages[2].role"}
    assert unavailable("nats", "down").code is Code.UNAVAILABLE
    assert deadline_exceeded("routing").reason is Reason.DEADLINE_EXCEEDED
    assert "BUDGET_EXHAUSTED" in repr(Failure(Reason.BUDGET_EXHAUSTED, "no"))
