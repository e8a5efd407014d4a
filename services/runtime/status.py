"""`Failure` as `google.rpc.Status` and back: the form in which errors cross sockets.

A status has exactly one `ErrorInfo` of the domain `sluice` and, with a retry delay, one `RetryInfo`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import grpc
from google.rpc import error_details_pb2, status_pb2

from services.runtime.errors import CODES, Code, Failure, Reason

DOMAIN: Final = "sluice"
DETAILS_KEY: Final = "grpc-status-details-bin"

_MAX_MESSAGE: Final = 1000
_MAX_VALUE: Final = 400
_MAX_VALUES: Final = 16
"""Trailers are limited to some kilobytes, so a status that echoes input must be, too."""

_GRPC_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}

_BY_CODE: Final = {
    Code.CANCELLED: Reason.CANCELLED,
    Code.INVALID_ARGUMENT: Reason.REQUEST_INVALID,
    Code.DEADLINE_EXCEEDED: Reason.DEADLINE_EXCEEDED,
    Code.NOT_FOUND: Reason.RESOURCE_NOT_FOUND,
    Code.ALREADY_EXISTS: Reason.RESOURCE_EXISTS,
    Code.PERMISSION_DENIED: Reason.PERMISSION_DENIED,
    Code.RESOURCE_EXHAUSTED: Reason.OVERLOADED,
    Code.UNIMPLEMENTED: Reason.ROUTE_NOT_FOUND,
    Code.UNAVAILABLE: Reason.DEPENDENCY_UNAVAILABLE,
    Code.UNAUTHENTICATED: Reason.SERVICE_IDENTITY,
}
"""What a status without ErrorInfo means: those come from gRPC itself, not from a servicer."""


def grpc_code(failure: Failure) -> grpc.StatusCode:
    """The gRPC library's constant for the failure's code."""
    return _GRPC_CODES[int(failure.code)]


def status_from_failure(failure: Failure) -> status_pb2.Status:
    """`failure` as a status; texts are cut to what trailers carry."""
    status = status_pb2.Status(code=int(failure.code), message=failure.message[:_MAX_MESSAGE])
    values = {key: value[:_MAX_VALUE] for key, value in list(failure.metadata.items())[:_MAX_VALUES]}
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=failure.reason.value, domain=DOMAIN, metadata=values))
    if failure.retry_delay is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(max(0, round(failure.retry_delay * 1e9)))
        status.details.add().Pack(retry)
    return status


def failure_from_status(status: status_pb2.Status) -> Failure:
    """The failure that `status` carries. Without an ErrorInfo of ours the reason follows from the code."""
    reason: Reason | None = None
    metadata: dict[str, str] = {}
    retry_delay: float | None = None
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            if info.domain == DOMAIN and info.reason in Reason.__members__:
                reason = Reason(info.reason)
                metadata = dict(info.metadata)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_delay = retry.retry_delay.ToNanoseconds() / 1e9
    if reason is None or int(CODES[reason]) != status.code:
        known = status.code in Code.__members__.values()
        reason = _BY_CODE.get(Code(status.code), Reason.INTERNAL) if known else Reason.INTERNAL
    return Failure(reason, status.message, metadata=metadata, retry_delay=retry_delay)


def failure_from_rpc(error: grpc.RpcError, dependency: str) -> Failure:
    """The failure behind an error of the gRPC library, raised by a call to `dependency`."""
    rpc: Any = error
    trailers: Iterable[tuple[str, str | bytes]] = rpc.trailing_metadata() or ()
    for key, value in trailers:
        if key == DETAILS_KEY and isinstance(value, bytes):
            return failure_from_status(status_pb2.Status.FromString(value))
    code: grpc.StatusCode = rpc.code()
    details: str = rpc.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE:
        # The library's text names addresses and sockets, which are no business of the caller.
        return Failure(
            Reason.DEPENDENCY_UNAVAILABLE,
            f"{dependency} can't be reached",
            metadata={"dependency": dependency},
            retry_delay=1.0,
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Failure(Reason.DEADLINE_EXCEEDED, f"the deadline passed while waiting for {dependency}")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return Failure(Reason.REQUEST_TOO_LARGE, f"a message to or from {dependency} is larger than the limit")
    return failure_from_status(status_pb2.Status(code=code.value[0], message=details))
