from __future__ import annotations

import pytest
from google.rpc import error_details_pb2, status_pb2

from services.runtime.errors import Failure, Reason
from services.runtime.status import DOMAIN, failure_from_status, status_from_failure
from tests.unit.runtime.fakes import parts


@pytest.mark.parametrize("reason", list(Reason))
@pytest.mark.parametrize("retry_delay", [None, 0.0, 2.25])
def test_a_failure_survives_the_round_trip(reason: Reason, retry_delay: float | None) -> None:
    failure = Failure(reason, "words", metadata={"field": "x"}, retry_delay=retry_delay)
    assert parts(failure_from_status(status_from_failure(failure))) == parts(failure)


def test_exactly_one_error_info() -> None:
    status = status_from_failure(Failure(Reason.RATE_LIMITED, "slow down", retry_delay=1))
    infos = [detail for detail in status.details if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)]
    assert len(infos) == 1
    info = error_details_pb2.ErrorInfo()
    infos[0].Unpack(info)
    assert (info.domain, info.reason) == (DOMAIN, "RATE_LIMITED")
    assert len(status.details) == 2


def test_long_texts_fit_into_trailers() -> None:
    failure = Failure(Reason.REQUEST_INVALID, "x" * 100_000, metadata={f"k{n}": "y" * 10_000 for n in range(100)})
    assert status_from_failure(failure).ByteSize() < 8_192


@pytest.mark.parametrize(
    ("code", "reason"),
    [(14, Reason.DEPENDENCY_UNAVAILABLE), (8, Reason.OVERLOADED), (2, Reason.INTERNAL), (99, Reason.INTERNAL)],
)
def test_a_status_of_somebody_else_gets_a_reason_by_its_code(code: int, reason: Reason) -> None:
    assert failure_from_status(status_pb2.Status(code=code, message="m")).reason is reason


def test_a_foreign_or_lying_error_info_is_not_believed() -> None:
    foreign = status_pb2.Status(code=5, message="m")
    foreign.details.add().Pack(error_details_pb2.ErrorInfo(domain="other", reason="RATE_LIMITED"))
    assert failure_from_status(foreign).reason is Reason.RESOURCE_NOT_FOUND
    lying = status_pb2.Status(code=14, message="m")
    lying.details.add().Pack(error_details_pb2.ErrorInfo(domain=DOMAIN, reason="RATE_LIMITED"))
    assert failure_from_status(lying).reason is Reason.DEPENDENCY_UNAVAILABLE
