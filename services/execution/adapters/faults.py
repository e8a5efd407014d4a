"""A provider's HTTP answer that is no answer, as an AttemptFailed: one closed set of reasons for every provider.

Whose fault it is decides what happens next: a fault of the caller ends the chain, anything else lets the next candidate try.
"""

from __future__ import annotations

import email.utils
import time
from collections.abc import Mapping
from typing import Any, Final

import orjson

from services.execution.errors import AttemptFailed
from services.runtime.errors import Reason

_LONGEST_MESSAGE: Final = 500
_WINDOW_WORDS: Final = (
    "context_length_exceeded",
    "maximum context length",
    "prompt is too long",
    "exceeds the available context",
    "exceed_context_size",
    "exceeds the maximum number of tokens allowed",
)
_BILLING_WORDS: Final = (
    "insufficient_quota",
    "credit balance is too low",
    "billing_not_active",
    "billing_error",
    "billing hard limit",
)
"""Whole phrases: in a refusal the provider repeats what the caller wrote, which may well be about billing."""
_CREDENTIAL_WORDS: Final = ("api key not valid", "api key expired", "api_key_invalid")
"""Gemini refuses a bad key with status 400."""
_LONGEST_FIELD: Final = 200
_MOST_WAIT: Final = 3600.0


def retry_delay_of(headers: Mapping[bytes, bytes]) -> float | None:
    """Seconds of `retry-after-ms` or `retry-after` (seconds or a date); None when there is none."""
    millis = headers.get(b"retry-after-ms")
    if millis is not None and millis.isdigit():
        return min(_MOST_WAIT, int(millis) / 1000)
    value = headers.get(b"retry-after", b"").decode("latin-1").strip()
    if not value:
        return None
    try:
        return min(_MOST_WAIT, max(0.0, float(value)))
    except ValueError:
        pass
    try:
        moment = email.utils.parsedate_to_datetime(value).timestamp()
    except (TypeError, ValueError):
        return None
    return min(_MOST_WAIT, max(0.0, moment - time.time()))


def fault(status: int, headers: Mapping[bytes, bytes], body: bytes, secret: str = "") -> AttemptFailed:
    """The failure that an answer with `status` (not 2xx) is. `secret` is our key, which some servers repeat in their words."""
    message, code, param = _said(body)
    if secret:
        message, param = message.replace(secret, "[key]"), param.replace(secret, "[key]")
    text = f"{code} {message}".lower()
    delay = retry_delay_of(headers)
    # The provider's own words are shown only where the fault is the caller's: elsewhere they may tell of our account with it.
    shown = (
        f"the provider refused the request: {message[:_LONGEST_MESSAGE]}"
        if message
        else f"the provider refused the request with status {status}"
    )
    if status in (400, 413, 422, 409, 405):
        if any(word in text for word in _WINDOW_WORDS):
            return AttemptFailed(Reason.CONTEXT_WINDOW_EXCEEDED, shown, status=status)
        if any(word in text for word in _BILLING_WORDS):
            return AttemptFailed(Reason.PROVIDER_AUTHENTICATION, "the provider refuses our account", status=status)
        if any(word in text for word in _CREDENTIAL_WORDS):
            return AttemptFailed(Reason.PROVIDER_AUTHENTICATION, "the provider refuses our credential", status=status)
        return AttemptFailed(Reason.PROVIDER_REJECTED, shown, status=status, param=param[:_LONGEST_FIELD])
    if status in (401, 402, 403):
        return AttemptFailed(Reason.PROVIDER_AUTHENTICATION, "the provider refuses our credential", status=status)
    if status == 404:
        return AttemptFailed(Reason.PROVIDER_UNAVAILABLE, "the provider doesn't know the model or the address", status=status)
    if status == 408:
        return AttemptFailed(Reason.PROVIDER_TIMEOUT, "the provider gave up on the request", status=status, retry_delay=delay)
    if status == 429:
        if any(word in text for word in _BILLING_WORDS):
            return AttemptFailed(Reason.PROVIDER_AUTHENTICATION, "our account with the provider is used up", status=status)
        return AttemptFailed(Reason.PROVIDER_RATE_LIMITED, "the provider limits our rate", status=status, retry_delay=delay)
    if status == 529 or (status == 503 and delay is not None):
        return AttemptFailed(Reason.PROVIDER_OVERLOADED, "the provider is overloaded", status=status, retry_delay=delay)
    if status >= 500:
        return AttemptFailed(
            Reason.PROVIDER_UNAVAILABLE, f"the provider failed with status {status}", status=status, retry_delay=delay
        )
    return AttemptFailed(Reason.PROVIDER_MALFORMED, f"the provider answered with status {status}", status=status)


def _said(body: bytes) -> tuple[str, str, str]:
    """Message, code and parameter out of an error body of OpenAI's, Anthropic's or Gemini's shape."""
    try:
        document: Any = orjson.loads(body)
    except orjson.JSONDecodeError:
        return "", "", ""
    if isinstance(document, list) and document:
        document = document[0]
    error = document.get("error") if isinstance(document, dict) else None
    if isinstance(error, str):
        return error, "", ""
    if not isinstance(error, dict):
        return "", "", ""
    message = error.get("message")
    code = error.get("code") or error.get("type") or error.get("status") or ""
    return (message if isinstance(message, str) else ""), str(code), str(error.get("param") or "")


def stream_fault(error: Any) -> AttemptFailed:
    """The failure that an error event within a stream is."""
    kind = str(error.get("type") or error.get("status") or error.get("code") or "") if isinstance(error, dict) else ""
    if "overloaded" in kind:
        return AttemptFailed(Reason.PROVIDER_OVERLOADED, "the provider is overloaded")
    if "rate_limit" in kind or kind in ("RESOURCE_EXHAUSTED", "429"):
        return AttemptFailed(Reason.PROVIDER_RATE_LIMITED, "the provider limits our rate")
    if "invalid_request" in kind or kind == "INVALID_ARGUMENT":
        return AttemptFailed(Reason.PROVIDER_REJECTED, "the provider refused the request in its stream")
    return AttemptFailed(Reason.PROVIDER_UNAVAILABLE, "the provider failed in the middle of its stream")


def json_of(text: str, where: str) -> Any:
    """`text`, which a caller gave as JSON at `where`. Raises AttemptFailed REQUEST_INVALID when it isn't JSON."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        raise AttemptFailed(Reason.REQUEST_INVALID, f"{where}: must be JSON for this provider", param=where) from None


def malformed(what: str) -> AttemptFailed:
    """The failure of an answer that isn't what the API promises."""
    return AttemptFailed(Reason.PROVIDER_MALFORMED, f"the provider's answer is malformed: {what}", was_read=True)
