"""Failures as HTTP answers, in the shape that each SDK parses into its own exceptions."""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, Final

import orjson

from services.runtime.errors import Failure, Reason


class Dialect(enum.Enum):
    """Whose JSON a route speaks."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"


class EdgeError(Failure):
    """The edge itself refuses the request; base of what its modules raise."""


STATUSES: Final[Mapping[Reason, int]] = MappingProxyType(
    {
        Reason.REQUEST_INVALID: 400,
        Reason.REQUEST_TOO_LARGE: 413,
        Reason.FIELD_UNSUPPORTED: 400,
        Reason.MODEL_NOT_FOUND: 404,
        Reason.CONTEXT_WINDOW_EXCEEDED: 400,
        Reason.KEY_MISSING: 401,
        Reason.KEY_INVALID: 401,
        Reason.PERMISSION_DENIED: 403,
        Reason.REQUEST_ID_REUSED: 409,
        Reason.RESOURCE_NOT_FOUND: 404,
        Reason.RESOURCE_EXISTS: 409,
        Reason.REQUEST_TOO_SLOW: 408,
        Reason.CANCELLED: 499,
        Reason.ROUTE_NOT_FOUND: 404,
        Reason.STATE_CONFLICT: 409,
        Reason.BUDGET_EXHAUSTED: 429,
        Reason.RATE_LIMITED: 429,
        Reason.CONCURRENCY_LIMITED: 429,
        Reason.PRICE_UNKNOWN: 400,
        Reason.NO_CANDIDATE: 400,
        Reason.COST_LIMIT: 400,
        Reason.QUEUE_FULL: 429,
        Reason.ALL_CANDIDATES_FAILED: 502,
        Reason.PROVIDER_UNAVAILABLE: 502,
        Reason.PROVIDER_RATE_LIMITED: 503,
        Reason.PROVIDER_REJECTED: 400,
        Reason.PROVIDER_AUTHENTICATION: 502,
        Reason.PROVIDER_TIMEOUT: 504,
        Reason.PROVIDER_MALFORMED: 502,
        Reason.PROVIDER_STREAM_BROKEN: 502,
        Reason.BREAKER_OPEN: 503,
        Reason.PROVIDER_OVERLOADED: 503,
        Reason.DEPENDENCY_UNAVAILABLE: 503,
        Reason.DEADLINE_EXCEEDED: 504,
        Reason.OVERLOADED: 503,
        Reason.DRAINING: 503,
        Reason.INTERNAL: 500,
        Reason.SERVICE_IDENTITY: 500,
    }
)
"""HTTP status by reason, as the comments in `error_reason.proto` say."""

_OPENAI_TYPES: Final[Mapping[int, str]] = MappingProxyType(
    {
        400: "invalid_request_error",
        401: "authentication_error",
        403: "permission_error",
        404: "invalid_request_error",
        405: "invalid_request_error",
        408: "timeout_error",
        409: "conflict_error",
        413: "invalid_request_error",
        429: "rate_limit_error",
    }
)

_ANTHROPIC_TYPES: Final[Mapping[int, str]] = MappingProxyType(
    {
        400: "invalid_request_error",
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        405: "not_found_error",
        408: "timeout_error",
        409: "invalid_request_error",
        413: "request_too_large",
        429: "rate_limit_error",
        504: "timeout_error",
    }
)

_MAX_RETRY_SECONDS: Final = 86_400.0
_OVERLOADS: Final = frozenset({Reason.OVERLOADED, Reason.PROVIDER_OVERLOADED})

_HOPELESS: Final = frozenset(
    # Statuses that the SDKs would try again by themselves, where the same request can only fail again.
    {Reason.REQUEST_ID_REUSED, Reason.RESOURCE_EXISTS, Reason.STATE_CONFLICT, Reason.BUDGET_EXHAUSTED, Reason.DEADLINE_EXCEEDED}
)

_OPENAI_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "stop_sequences": "stop",
        "max_output_tokens": "max_completion_tokens",
        "top_logprob_count": "top_logprobs",
        "end_user": "user",
        "inputs": "input",
        "dimension_count": "dimensions",
    }
)

_ANTHROPIC_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "max_output_tokens": "max_tokens",
        "reasoning_effort": "thinking",
        "response_format": "output_config.format",
        "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
        "end_user": "metadata.user_id",
    }
)

_HEADER_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "request_id": "Idempotency-Key",
        "task_type": "x-sluice-task-type",
        "cache.mode": "x-sluice-cache",
        "cache.cache_namespace": "x-sluice-cache-namespace",
        "cache.min_similarity": "x-sluice-cache-min-similarity",
        "cache.ttl": "x-sluice-cache-ttl",
        "max_cost_nano_usd": "x-sluice-max-cost-nano-usd",
        "max_latency": "x-sluice-max-latency",
        "region": "x-sluice-region",
        "affinity_key": "x-sluice-affinity-key",
        "allow_fallback": "x-sluice-allow-fallback",
        "receipt_view": "x-sluice-receipt",
    }
)

_PREFIXES: Final = ("request.", "conversation.", "sampling.", "routing.")

# Inner fields whose place differs. The index of a part says nothing to a caller who sent no parts, so it is left out.
_OPENAI_PATHS: Final = (
    (re.compile(r"(messages\[\d+\])\.parts\[\d+\]\.tool_call(?:\..*)?"), r"\1.tool_calls"),
    (re.compile(r"(messages\[\d+\])\.parts\[\d+\]\.tool_result\.tool_call_id"), r"\1.tool_call_id"),
    (re.compile(r"(messages\[\d+\])\.parts.*"), r"\1.content"),
    (re.compile(r"(tools\[\d+\])\.parameters_json_schema"), r"\1.function.parameters"),
    (re.compile(r"(tools\[\d+\])\.(\w+)"), r"\1.function.\2"),
    (re.compile(r"tool_choice\.mode"), "tool_choice"),
    (re.compile(r"tool_choice\.name"), "tool_choice.function.name"),
    (re.compile(r"response_format\.kind"), "response_format.type"),
    (re.compile(r"response_format\.json_schema"), "response_format.json_schema.schema"),
    (re.compile(r"response_format\.(name|strict|description)"), r"response_format.json_schema.\1"),
)

_ANTHROPIC_PATHS: Final = (
    (re.compile(r"(messages\[\d+\])\.parts.*"), r"\1.content"),
    (re.compile(r"(tools\[\d+\])\.parameters_json_schema"), r"\1.input_schema"),
    (re.compile(r"tool_choice\.mode"), "tool_choice.type"),
    (re.compile(r"response_format\.json_schema"), "output_config.format.schema"),
    (re.compile(r"response_format\.\w+"), "output_config.format"),
)


def status_of(failure: Failure) -> int:
    """The HTTP status of `failure`. A route that exists but not for this method is 405."""
    if failure.reason is Reason.ROUTE_NOT_FOUND and "allow" in failure.metadata:
        return 405
    return STATUSES[failure.reason]


def param_of(failure: Failure, dialect: Dialect) -> str | None:
    """The field that `failure` names, as the dialect spells it; None: it names none."""
    field = failure.metadata.get("field")
    if field is None:
        return "model" if failure.reason is Reason.MODEL_NOT_FOUND else None
    if isinstance(failure, EdgeError):
        # The edge names what it read, as it was spelled.
        return field
    for prefix in _PREFIXES:
        field = field.removeprefix(prefix)
    is_openai = dialect is Dialect.OPENAI
    for pattern, spelling in _OPENAI_PATHS if is_openai else _ANTHROPIC_PATHS:
        if (match := pattern.fullmatch(field)) is not None:
            return match.expand(spelling)
    if field in _HEADER_NAMES:
        return _HEADER_NAMES[field]
    # `stop_sequences[2]`: the list's name is its own, the index is the caller's.
    name, bracket, index = field.partition("[")
    return (_OPENAI_NAMES if is_openai else _ANTHROPIC_NAMES).get(name, name) + bracket + index


def error_object(failure: Failure, dialect: Dialect, request_id: str) -> dict[str, Any]:
    """The JSON object of `failure`, the body of an answer or the data of a stream's error event."""
    status = status_of(failure)
    error: dict[str, Any] = {"message": _worded(failure, dialect)}
    if dialect is Dialect.OPENAI:
        kind = "insufficient_quota" if failure.reason is Reason.BUDGET_EXHAUSTED else _OPENAI_TYPES.get(status, "server_error")
    else:
        kind = "overloaded_error" if failure.reason in _OVERLOADS else _ANTHROPIC_TYPES.get(status, "api_error")
    error["type"] = kind
    error["param"] = param_of(failure, dialect)
    error["code"] = failure.reason.value.lower()
    if failure.metadata:
        error["metadata"] = dict(failure.metadata)
    if dialect is Dialect.OPENAI:
        return {"error": error}
    return {"type": "error", "error": error, "request_id": request_id}


def _worded(failure: Failure, dialect: Dialect) -> str:
    """The message; where it begins with the contract's name of a field, with the one that the caller wrote."""
    field = failure.metadata.get("field")
    if field and failure.message.startswith(f"{field}: ") and (param := param_of(failure, dialect)) is not None:
        return f"{param}{failure.message[len(field) :]}"
    return failure.message


def error_body(failure: Failure, dialect: Dialect, request_id: str) -> bytes:
    """`error_object` as JSON."""
    return orjson.dumps(_sendable(error_object(failure, dialect, request_id)))


def error_event(failure: Failure, dialect: Dialect, request_id: str) -> bytes:
    """`error_object` as a server-sent event."""
    body = error_body(failure, dialect, request_id)
    if dialect is Dialect.OPENAI:
        return b"data: %b\n\n" % body
    return b"event: error\ndata: %b\n\n" % body


def error_head(failure: Failure, request_id: str) -> bytes:
    """Status line and headers of an error answer, without length and end."""
    status = status_of(failure)
    lines = [
        status_line(status),
        b"content-type: application/json\r\nx-request-id: %b\r\nrequest-id: %b\r\n" % ((request_id.encode(),) * 2),
    ]
    if failure.retry_delay is not None:
        delay = min(max(0.0, failure.retry_delay), _MAX_RETRY_SECONDS)
        lines.append(b"retry-after: %d\r\nretry-after-ms: %d\r\n" % (math.ceil(delay), math.ceil(delay * 1000)))
    if failure.reason in _HOPELESS:
        lines.append(b"x-should-retry: false\r\n")
    if status == 401:
        lines.append(b"www-authenticate: Bearer\r\n")
    allow = failure.metadata.get("allow")
    if status == 405 and allow is not None:
        lines.append(b"allow: %b\r\n" % allow.encode("ascii"))
    return b"".join(lines)


def status_line(status: int) -> bytes:
    """`HTTP/1.1 404 Not Found`, with its end of line."""
    phrase = "Client Closed Request" if status == 499 else HTTPStatus(status).phrase
    return b"HTTP/1.1 %d %b\r\n" % (status, phrase.encode("ascii"))


def _sendable(error: Any) -> Any:
    """`error` without lone surrogates, which a failure's text may have got from elsewhere and JSON can't carry."""
    if isinstance(error, str):
        return error.encode("utf-8", "replace").decode("utf-8")
    if isinstance(error, dict):
        return {_sendable(key): _sendable(value) for key, value in error.items()}
    return error
