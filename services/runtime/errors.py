"""Errors that cross a service boundary.

    Exception
    └── Failure            a reason of `sluice.errors.v1.ErrorReason`, words for people, values for programs, a retry delay
        └── NotSent        a channel's own failure: the call never left this process

A service derives its own base from `Failure` and a class per decision that its callers can make. Transports carry a `Failure`
as `google.rpc.Status` with one `ErrorInfo` and, with a retry delay, one `RetryInfo`; the other side gets an equal `Failure`.
This module is free of gRPC and of generated code, so that domain modules may use it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final


class Code(enum.IntEnum):
    """Canonical codes of `google.rpc.Code` that Sluice uses."""

    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class Reason(enum.StrEnum):
    """Reasons of `sluice.errors.v1.ErrorReason` without their prefix; a test keeps both equal. The proto has the meanings."""

    REQUEST_INVALID = "REQUEST_INVALID"
    REQUEST_TOO_LARGE = "REQUEST_TOO_LARGE"
    FIELD_UNSUPPORTED = "FIELD_UNSUPPORTED"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    CONTEXT_WINDOW_EXCEEDED = "CONTEXT_WINDOW_EXCEEDED"
    KEY_MISSING = "KEY_MISSING"
    KEY_INVALID = "KEY_INVALID"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    RESOURCE_NOT_FOUND = "RESOURCE_NOT_FOUND"
    RESOURCE_EXISTS = "RESOURCE_EXISTS"
    REQUEST_TOO_SLOW = "REQUEST_TOO_SLOW"
    CANCELLED = "CANCELLED"
    ROUTE_NOT_FOUND = "ROUTE_NOT_FOUND"
    STATE_CONFLICT = "STATE_CONFLICT"
    BUDGET_EXHAUSTED = "BUDGET_EXHAUSTED"
    RATE_LIMITED = "RATE_LIMITED"
    CONCURRENCY_LIMITED = "CONCURRENCY_LIMITED"
    PRICE_UNKNOWN = "PRICE_UNKNOWN"
    NO_CANDIDATE = "NO_CANDIDATE"
    COST_LIMIT = "COST_LIMIT"
    QUEUE_FULL = "QUEUE_FULL"
    ALL_CANDIDATES_FAILED = "ALL_CANDIDATES_FAILED"
    PROVIDER_UNAVAILABLE = "PROVIDER_UNAVAILABLE"
    PROVIDER_RATE_LIMITED = "PROVIDER_RATE_LIMITED"
    PROVIDER_REJECTED = "PROVIDER_REJECTED"
    PROVIDER_AUTHENTICATION = "PROVIDER_AUTHENTICATION"
    PROVIDER_TIMEOUT = "PROVIDER_TIMEOUT"
    PROVIDER_MALFORMED = "PROVIDER_MALFORMED"
    PROVIDER_STREAM_BROKEN = "PROVIDER_STREAM_BROKEN"
    BREAKER_OPEN = "BREAKER_OPEN"
    PROVIDER_OVERLOADED = "PROVIDER_OVERLOADED"
    DEPENDENCY_UNAVAILABLE = "DEPENDENCY_UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    OVERLOADED = "OVERLOADED"
    DRAINING = "DRAINING"
    INTERNAL = "INTERNAL"
    SERVICE_IDENTITY = "SERVICE_IDENTITY"


CODES: Final[Mapping[Reason, Code]] = MappingProxyType(
    {
        Reason.REQUEST_INVALID: Code.INVALID_ARGUMENT,
        Reason.REQUEST_TOO_LARGE: Code.RESOURCE_EXHAUSTED,
        Reason.FIELD_UNSUPPORTED: Code.INVALID_ARGUMENT,
        Reason.MODEL_NOT_FOUND: Code.NOT_FOUND,
        Reason.CONTEXT_WINDOW_EXCEEDED: Code.INVALID_ARGUMENT,
        Reason.KEY_MISSING: Code.UNAUTHENTICATED,
        Reason.KEY_INVALID: Code.UNAUTHENTICATED,
        Reason.PERMISSION_DENIED: Code.PERMISSION_DENIED,
        Reason.REQUEST_ID_REUSED: Code.ALREADY_EXISTS,
        Reason.RESOURCE_NOT_FOUND: Code.NOT_FOUND,
        Reason.RESOURCE_EXISTS: Code.ALREADY_EXISTS,
        Reason.REQUEST_TOO_SLOW: Code.DEADLINE_EXCEEDED,
        Reason.CANCELLED: Code.CANCELLED,
        Reason.ROUTE_NOT_FOUND: Code.UNIMPLEMENTED,
        Reason.STATE_CONFLICT: Code.FAILED_PRECONDITION,
        Reason.BUDGET_EXHAUSTED: Code.RESOURCE_EXHAUSTED,
        Reason.RATE_LIMITED: Code.RESOURCE_EXHAUSTED,
        Reason.CONCURRENCY_LIMITED: Code.RESOURCE_EXHAUSTED,
        Reason.PRICE_UNKNOWN: Code.FAILED_PRECONDITION,
        Reason.NO_CANDIDATE: Code.FAILED_PRECONDITION,
        Reason.COST_LIMIT: Code.FAILED_PRECONDITION,
        Reason.QUEUE_FULL: Code.RESOURCE_EXHAUSTED,
        Reason.ALL_CANDIDATES_FAILED: Code.UNAVAILABLE,
        Reason.PROVIDER_UNAVAILABLE: Code.UNAVAILABLE,
        Reason.PROVIDER_RATE_LIMITED: Code.UNAVAILABLE,
        Reason.PROVIDER_REJECTED: Code.INVALID_ARGUMENT,
        Reason.PROVIDER_AUTHENTICATION: Code.UNAVAILABLE,
        Reason.PROVIDER_TIMEOUT: Code.UNAVAILABLE,
        Reason.PROVIDER_MALFORMED: Code.UNAVAILABLE,
        Reason.PROVIDER_STREAM_BROKEN: Code.UNAVAILABLE,
        Reason.BREAKER_OPEN: Code.UNAVAILABLE,
        Reason.PROVIDER_OVERLOADED: Code.UNAVAILABLE,
        Reason.DEPENDENCY_UNAVAILABLE: Code.UNAVAILABLE,
        Reason.DEADLINE_EXCEEDED: Code.DEADLINE_EXCEEDED,
        Reason.OVERLOADED: Code.RESOURCE_EXHAUSTED,
        Reason.DRAINING: Code.UNAVAILABLE,
        Reason.INTERNAL: Code.INTERNAL,
        Reason.SERVICE_IDENTITY: Code.UNAUTHENTICATED,
    }
)

_NO_METADATA: Final[Mapping[str, str]] = MappingProxyType({})


class Failure(Exception):
    """A call failed, and the caller may know why.

    `message` says what to do in words; it never has a secret or the inside of an engine in it. `metadata` has the values that
    the reason's comment in the proto names. `retry_delay` is in seconds; None: waiting doesn't help or nobody knows how long.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        metadata: Mapping[str, str] = _NO_METADATA,
        retry_delay: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = metadata
        self.retry_delay = retry_delay

    @property
    def code(self) -> Code:
        """The canonical code; it follows from the reason."""
        return CODES[self.reason]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.reason.value}, {self.message!r}, metadata={dict(self.metadata)!r})"


class NotSent(Failure):
    """A call that never left this process, so that nothing can have come of it. Raised by channels; across a service boundary it is a
    Failure like any other.
    """

    @classmethod
    def of(cls, failure: Failure) -> NotSent:
        """`failure`, of a call that was not sent."""
        return cls(failure.reason, failure.message, metadata=failure.metadata, retry_delay=failure.retry_delay)


def invalid(field: str, message: str) -> Failure:
    """The failure of a request that breaks the contract at `field`, a path such as `conversation.messages[2].role`."""
    return Failure(Reason.REQUEST_INVALID, f"{field}: {message}", metadata={"field": field})


def unavailable(dependency: str, message: str, *, retry_delay: float = 1.0) -> Failure:
    """The failure of a call that needs `dependency`, which isn't there."""
    return Failure(Reason.DEPENDENCY_UNAVAILABLE, message, metadata={"dependency": dependency}, retry_delay=retry_delay)


def deadline_exceeded(what: str) -> Failure:
    """The failure of a call whose deadline passed while `what` was awaited."""
    return Failure(Reason.DEADLINE_EXCEEDED, f"the deadline passed while waiting for {what}")
