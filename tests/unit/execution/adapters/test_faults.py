"""Providers' errors as one closed set of reasons."""

from __future__ import annotations

import email.utils
import time

import orjson
import pytest

from services.execution.adapters.faults import fault, retry_delay_of, stream_fault
from services.runtime.errors import Reason

OPENAI_WINDOW = {"error": {"message": "This model's maximum context length is 8192 tokens.", "code": "context_length_exceeded"}}
ANTHROPIC_WINDOW = {"type": "error", "error": {"type": "invalid_request_error", "message": "prompt is too long: 210000 tokens"}}
GEMINI_WINDOW = {
    "error": {
        "code": 400,
        "message": "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).",
        "status": "INVALID_ARGUMENT",
    }
}
GEMINI_KEY = {
    "error": {"code": 400, "message": "API key not valid. Please pass a valid API key.", "status": "INVALID_ARGUMENT"}
}
ANTHROPIC_BILLING = {
    "type": "error",
    "error": {"type": "invalid_request_error", "message": "Your credit balance is too low to access the Anthropic API."},
}
OPENAI_QUOTA = {"error": {"message": "You exceeded your current quota.", "code": "insufficient_quota"}}
PLAIN = {"error": {"message": "Unsupported value: 'temperature'.", "param": "temperature", "type": "invalid_request_error"}}


@pytest.mark.parametrize(
    ("status", "body", "reason", "ends_chain"),
    [
        (400, PLAIN, Reason.PROVIDER_REJECTED, True),
        (422, PLAIN, Reason.PROVIDER_REJECTED, True),
        (413, {}, Reason.PROVIDER_REJECTED, True),
        (400, OPENAI_WINDOW, Reason.CONTEXT_WINDOW_EXCEEDED, True),
        (400, ANTHROPIC_WINDOW, Reason.CONTEXT_WINDOW_EXCEEDED, True),
        (400, GEMINI_WINDOW, Reason.CONTEXT_WINDOW_EXCEEDED, True),
        (400, [GEMINI_WINDOW], Reason.CONTEXT_WINDOW_EXCEEDED, True),
        (400, GEMINI_KEY, Reason.PROVIDER_AUTHENTICATION, False),
        (400, ANTHROPIC_BILLING, Reason.PROVIDER_AUTHENTICATION, False),
        (401, PLAIN, Reason.PROVIDER_AUTHENTICATION, False),
        (402, PLAIN, Reason.PROVIDER_AUTHENTICATION, False),
        (403, PLAIN, Reason.PROVIDER_AUTHENTICATION, False),
        (404, PLAIN, Reason.PROVIDER_UNAVAILABLE, False),
        (408, {}, Reason.PROVIDER_TIMEOUT, False),
        (429, PLAIN, Reason.PROVIDER_RATE_LIMITED, False),
        (429, OPENAI_QUOTA, Reason.PROVIDER_AUTHENTICATION, False),
        (500, PLAIN, Reason.PROVIDER_UNAVAILABLE, False),
        (502, {}, Reason.PROVIDER_UNAVAILABLE, False),
        (503, {}, Reason.PROVIDER_UNAVAILABLE, False),
        (529, PLAIN, Reason.PROVIDER_OVERLOADED, False),
        (302, {}, Reason.PROVIDER_MALFORMED, False),
    ],
)
def test_whose_fault_it_is(status: int, body: object, reason: Reason, ends_chain: bool) -> None:
    failure = fault(status, {}, orjson.dumps(body))
    assert (failure.reason, failure.ends_chain, failure.status) == (reason, ends_chain, status)
    assert failure.metadata["provider_status"] == str(status)


def test_the_providers_words_are_shown_only_where_the_fault_is_the_callers() -> None:
    body = orjson.dumps({"error": {"message": "organisation org-123 is over its limit", "param": "model"}})
    for status in (401, 402, 403, 404, 408, 429, 500, 503, 529):
        failure = fault(status, {}, body)
        assert "org-123" not in failure.message
        assert "field" not in failure.metadata
    failure = fault(400, {}, body)
    assert "org-123" in failure.message
    assert failure.metadata["field"] == "model"


def test_the_key_is_never_among_the_words() -> None:
    body = orjson.dumps({"error": {"message": "bad header: x-key: sk-1234", "param": "sk-1234"}})
    failure = fault(400, {}, body, secret="sk-1234")
    assert "sk-1234" not in f"{failure!r} {failure}"
    # A long message is not cut in the middle of a key before the key is looked for.
    body = orjson.dumps({"error": {"message": "x" * 497 + "sk-1234"}})
    assert "sk-" not in fault(400, {}, body, secret="sk-1234").message


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"null", b"[]", b'"x"', b'{"error": null}', b'{"error": {"message": 3}}', b"\xff"]
)
def test_any_body_is_borne(body: bytes) -> None:
    assert fault(400, {}, body).message == "the provider refused the request with status 400"
    assert fault(500, {}, body).reason is Reason.PROVIDER_UNAVAILABLE


def test_long_words_are_cut() -> None:
    failure = fault(400, {}, orjson.dumps({"error": {"message": "x" * 100_000, "param": "y" * 100_000}}))
    assert len(failure.message) < 600
    assert len(failure.metadata["field"]) <= 200


def test_retry_after() -> None:
    assert retry_delay_of({}) is None
    assert retry_delay_of({b"retry-after": b"7"}) == 7.0
    assert retry_delay_of({b"retry-after": b" 1.5 "}) == 1.5
    assert retry_delay_of({b"retry-after-ms": b"250", b"retry-after": b"7"}) == 0.25
    assert retry_delay_of({b"retry-after": b"-3"}) == 0.0
    assert retry_delay_of({b"retry-after": b"1e300"}) == 3600.0
    assert retry_delay_of({b"retry-after": b"soon"}) is None
    assert retry_delay_of({b"retry-after": b"nan"}) in (None, 0.0)
    moment = email.utils.formatdate(time.time() + 100, usegmt=True).encode()
    assert 90 < (retry_delay_of({b"retry-after": moment}) or 0) <= 100
    assert retry_delay_of({b"retry-after": email.utils.formatdate(time.time() - 100, usegmt=True).encode()}) == 0.0


@pytest.mark.parametrize("status", [408, 429, 500, 503, 529])
def test_retry_after_is_kept_by_the_failure(status: int) -> None:
    failure = fault(status, {b"retry-after": b"7"}, b"")
    assert failure.retry_delay == 7.0
    if status == 503:
        assert failure.reason is Reason.PROVIDER_OVERLOADED


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ({"type": "overloaded_error"}, Reason.PROVIDER_OVERLOADED),
        ({"type": "rate_limit_error"}, Reason.PROVIDER_RATE_LIMITED),
        ({"type": "invalid_request_error"}, Reason.PROVIDER_REJECTED),
        ({"type": "api_error"}, Reason.PROVIDER_UNAVAILABLE),
        ({"code": "server_error"}, Reason.PROVIDER_UNAVAILABLE),
        ({"code": 503, "status": "UNAVAILABLE", "message": "The model is overloaded."}, Reason.PROVIDER_UNAVAILABLE),
        ({"code": 429, "status": "RESOURCE_EXHAUSTED"}, Reason.PROVIDER_RATE_LIMITED),
        ("words", Reason.PROVIDER_UNAVAILABLE),
        (None, Reason.PROVIDER_UNAVAILABLE),
    ],
)
def test_errors_within_streams(error: object, reason: Reason) -> None:
    assert stream_fault(error).reason is reason
