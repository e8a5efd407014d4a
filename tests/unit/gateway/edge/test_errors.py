"""Failures as HTTP answers: the statuses of the contract, and what the unmodified SDKs of OpenAI and Anthropic make of them."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import orjson
import pytest

from services.gateway.edge.config import EdgeConfig
from services.gateway.edge.errors import (
    STATUSES,
    Dialect,
    EdgeError,
    error_body,
    error_event,
    error_head,
    error_object,
    param_of,
    status_line,
    status_of,
)
from services.gateway.edge.http1 import Exchange, Listener
from services.gateway.edge.payload import FieldUnsupported, RequestInvalid
from services.runtime.barrier import Barrier
from services.runtime.errors import Failure, Reason, invalid

_PROTO = Path(__file__).parents[4] / "protos/sluice/errors/v1/error_reason.proto"
_OPENAI_CLASSES: dict[int, type[openai.APIStatusError]] = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    429: openai.RateLimitError,
}
_ANTHROPIC_CLASSES: dict[int, type[anthropic.APIStatusError]] = {
    400: anthropic.BadRequestError,
    401: anthropic.AuthenticationError,
    403: anthropic.PermissionDeniedError,
    404: anthropic.NotFoundError,
    409: anthropic.ConflictError,
    429: anthropic.RateLimitError,
}


class Refuser:
    """Answers every request with one failure, in the middle of a stream if it is told so."""

    def __init__(self, failure: Failure, dialect: Dialect, *, begun: bytes = b"") -> None:
        self.count = 0
        self.failure = failure
        self._dialect = dialect
        self._begun = begun

    def handle(self, exchange: Exchange) -> None:
        self.count += 1
        if self._begun:
            exchange.open(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n")
            exchange.send(self._begun)
            exchange.send(error_event(self.failure, self._dialect, "req-7"))
            exchange.close()
            return
        exchange.respond(error_head(self.failure, "req-7"), error_body(self.failure, self._dialect, "req-7"))

    def refuse(self, exchange: Exchange, failure: Failure) -> None:
        raise AssertionError(f"an SDK sent what the listener refuses: {failure!r}")


@contextlib.asynccontextmanager
async def openai_sdk(refuser: Refuser, *, max_retries: int = 0) -> AsyncIterator[openai.AsyncOpenAI]:
    listener = Listener(EdgeConfig(port=0), refuser, Barrier())
    async with (
        listener.listening(),
        openai.AsyncOpenAI(api_key="k", base_url=f"http://127.0.0.1:{listener.port}/v1", max_retries=max_retries) as client,
    ):
        yield client


@contextlib.asynccontextmanager
async def anthropic_sdk(refuser: Refuser, *, max_retries: int = 0) -> AsyncIterator[anthropic.AsyncAnthropic]:
    listener = Listener(EdgeConfig(port=0), refuser, Barrier())
    async with (
        listener.listening(),
        anthropic.AsyncAnthropic(api_key="k", base_url=f"http://127.0.0.1:{listener.port}", max_retries=max_retries) as client,
    ):
        yield client


def stated_statuses() -> dict[Reason, set[int]]:
    """What the comments of the proto say."""
    result: dict[Reason, set[int]] = {}
    comment = ""
    for line in _PROTO.read_text().splitlines():
        line = line.strip()
        if line.startswith("//"):
            comment += line[2:]
        elif (match := re.match(r"ERROR_REASON_(\w+) = [1-9]", line)) is not None:
            stated = re.search(r"HTTP (\d{3})(?: or (\d{3}))?", comment)
            result[Reason(match[1])] = {int(number) for number in stated.groups() if number} if stated else set()
        if not line.startswith("//"):
            comment = ""
    return result


def test_statuses_are_those_of_the_contract() -> None:
    stated = stated_statuses()
    assert set(stated) == set(Reason) == set(STATUSES)
    # A broken stream has no status of its own: it becomes an event. It needs one before the first byte all the same.
    assert stated.pop(Reason.PROVIDER_STREAM_BROKEN) == set()
    for reason, statuses in stated.items():
        assert STATUSES[reason] in statuses, reason


def test_a_known_route_with_another_method_is_405() -> None:
    failure = Failure(Reason.ROUTE_NOT_FOUND, "no", metadata={"allow": "GET, HEAD"})
    assert status_of(failure) == 405
    assert b"\r\nallow: GET, HEAD\r\n" in error_head(failure, "r")
    assert status_of(Failure(Reason.ROUTE_NOT_FOUND, "no")) == 404
    assert b"allow:" not in error_head(Failure(Reason.MODEL_NOT_FOUND, "no", metadata={"allow": "GET"}), "r")


async def test_openai_s_sdk_reads_every_failure() -> None:
    # One client for all: making one costs more than asking a hundred times.
    refuser = Refuser(Failure(Reason.INTERNAL, ""), Dialect.OPENAI)
    async with openai_sdk(refuser) as client:
        for reason in Reason:
            refuser.failure = Failure(reason, "words for people", metadata={"field": "seed", "limit": "3"})
            with pytest.raises(openai.APIStatusError) as caught:
                await client.models.list()
            error = caught.value
            status = STATUSES[reason]
            assert type(error) is _OPENAI_CLASSES.get(
                status, openai.InternalServerError if status >= 500 else openai.APIStatusError
            )
            assert error.status_code == status
            assert error.code == reason.value.lower()
            assert error.param == "seed"
            assert error.type
            assert error.request_id == "req-7"
            body: Any = error.body
            assert body["message"] == "words for people"
            assert body["metadata"] == {"field": "seed", "limit": "3"}


async def test_anthropic_s_sdk_reads_every_failure() -> None:
    refuser = Refuser(Failure(Reason.INTERNAL, ""), Dialect.ANTHROPIC)
    async with anthropic_sdk(refuser) as client:
        for reason in Reason:
            refuser.failure = Failure(reason, "words for people", metadata={"field": "seed"})
            with pytest.raises(anthropic.APIStatusError) as caught:
                await client.models.list()
            error = caught.value
            status = STATUSES[reason]
            assert isinstance(error, _ANTHROPIC_CLASSES.get(status, anthropic.APIStatusError))
            assert error.status_code == status
            assert error.request_id == "req-7"
            body: Any = error.body
            assert body["type"] == "error"
            assert body["request_id"] == "req-7"
            assert body["error"]["message"] == "words for people"
            assert body["error"]["code"] == reason.value.lower()
            assert body["error"]["param"] == "seed"


@pytest.mark.parametrize(
    ("reason", "of_openai", "of_anthropic"),
    [
        (Reason.REQUEST_INVALID, "invalid_request_error", "invalid_request_error"),
        (Reason.KEY_INVALID, "authentication_error", "authentication_error"),
        (Reason.PERMISSION_DENIED, "permission_error", "permission_error"),
        (Reason.MODEL_NOT_FOUND, "invalid_request_error", "not_found_error"),
        (Reason.REQUEST_TOO_LARGE, "invalid_request_error", "request_too_large"),
        (Reason.RATE_LIMITED, "rate_limit_error", "rate_limit_error"),
        (Reason.BUDGET_EXHAUSTED, "insufficient_quota", "rate_limit_error"),
        (Reason.OVERLOADED, "server_error", "overloaded_error"),
        (Reason.PROVIDER_OVERLOADED, "server_error", "overloaded_error"),
        (Reason.DEADLINE_EXCEEDED, "server_error", "timeout_error"),
        (Reason.INTERNAL, "server_error", "api_error"),
    ],
)
def test_types_are_the_dialect_s_own_words(reason: Reason, of_openai: str, of_anthropic: str) -> None:
    failure = Failure(reason, "m")
    assert error_object(failure, Dialect.OPENAI, "r")["error"]["type"] == of_openai
    assert error_object(failure, Dialect.ANTHROPIC, "r")["error"]["type"] == of_anthropic


async def test_openai_s_sdk_raises_in_the_middle_of_a_stream() -> None:
    chunk = (
        b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m",'
        b'"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
    )
    refuser = Refuser(Failure(Reason.PROVIDER_STREAM_BROKEN, "broken"), Dialect.OPENAI, begun=chunk)
    async with openai_sdk(refuser) as client:
        stream = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}], stream=True)
        got = []
        with pytest.raises(openai.APIError, match="broken") as caught:
            async for piece in stream:
                # Not a comprehension: that would lose what came before the error.
                got += [piece.choices[0].delta.content]
    assert got == ["a"]
    assert caught.value.code == "provider_stream_broken"


async def test_anthropic_s_sdk_raises_in_the_middle_of_a_stream() -> None:
    refuser = Refuser(
        Failure(Reason.PROVIDER_STREAM_BROKEN, "broken"), Dialect.ANTHROPIC, begun=b'event: ping\ndata: {"type":"ping"}\n\n'
    )
    async with anthropic_sdk(refuser) as client:
        with pytest.raises(anthropic.APIStatusError) as caught:
            async for _ in await client.messages.create(
                model="m", max_tokens=5, messages=[{"role": "user", "content": "x"}], stream=True
            ):
                pass
    body: Any = caught.value.body
    assert body["error"]["message"] == "broken"
    assert body["error"]["code"] == "provider_stream_broken"


_HOPELESS = {
    Reason.REQUEST_ID_REUSED, Reason.RESOURCE_EXISTS, Reason.STATE_CONFLICT, Reason.BUDGET_EXHAUSTED, Reason.DEADLINE_EXCEEDED,
}  # fmt: skip


async def test_sdks_try_again_what_may_succeed_and_nothing_else() -> None:
    begun = Failure(Reason.INTERNAL, "")
    of_openai, of_anthropic = Refuser(begun, Dialect.OPENAI), Refuser(begun, Dialect.ANTHROPIC)
    async with openai_sdk(of_openai, max_retries=1) as one, anthropic_sdk(of_anthropic, max_retries=1) as other:
        for reason in (*sorted(_HOPELESS), Reason.RATE_LIMITED, Reason.OVERLOADED, Reason.DRAINING, Reason.REQUEST_INVALID):
            again = reason not in _HOPELESS and STATUSES[reason] != 400
            failure = Failure(reason, "m", retry_delay=0.001)
            of_openai.failure = of_anthropic.failure = failure
            of_openai.count = of_anthropic.count = 0
            with pytest.raises(openai.APIStatusError):
                await one.models.list()
            with pytest.raises(anthropic.APIStatusError):
                await other.models.list()
            assert of_openai.count == of_anthropic.count == (2 if again else 1), reason


@pytest.mark.parametrize(
    ("delay", "seconds", "milliseconds"),
    [
        (0.0, 0, 0),
        (0.001, 1, 1),
        (1.0, 1, 1000),
        (1.2345, 2, 1235),
        (-5.0, 0, 0),
        (1e12, 86400, 86_400_000),
        (math.inf, 86400, 86_400_000),
    ],
)
def test_retry_delays_are_rounded_up(delay: float, seconds: int, milliseconds: int) -> None:
    lines = error_head(Failure(Reason.RATE_LIMITED, "m", retry_delay=delay), "r").split(b"\r\n")
    assert b"retry-after: %d" % seconds in lines
    assert b"retry-after-ms: %d" % milliseconds in lines


def test_a_delay_that_is_no_number_breaks_no_answer() -> None:
    assert b"retry-after: 0\r\n" in error_head(Failure(Reason.RATE_LIMITED, "m", retry_delay=math.nan), "r")


def test_without_a_delay_nothing_is_said() -> None:
    assert b"retry-after" not in error_head(Failure(Reason.RATE_LIMITED, "m"), "r")


def test_a_missing_key_is_asked_for() -> None:
    assert b"www-authenticate: Bearer\r\n" in error_head(Failure(Reason.KEY_MISSING, "m"), "r")
    assert b"www-authenticate" not in error_head(Failure(Reason.PERMISSION_DENIED, "m"), "r")


@pytest.mark.parametrize("reason", list(Reason))
def test_heads_are_heads(reason: Reason) -> None:
    head = error_head(Failure(reason, "m", retry_delay=1.0), "req-7")
    assert head.startswith(status_line(STATUSES[reason]))
    lines = head.decode("ascii").split("\r\n")
    assert lines.pop() == ""
    assert all(": " in line for line in lines[1:])
    assert "x-request-id: req-7" in lines
    assert "request-id: req-7" in lines
    assert "content-type: application/json" in lines


def test_status_lines() -> None:
    assert status_line(404) == b"HTTP/1.1 404 Not Found\r\n"
    assert status_line(499) == b"HTTP/1.1 499 Client Closed Request\r\n"


@pytest.mark.parametrize("dialect", list(Dialect))
def test_text_that_json_can_t_carry_breaks_no_answer(dialect: Dialect) -> None:
    failure = Failure(Reason.INTERNAL, "half \ud800 of a pair", metadata={"a\udfff": "\ud800"})
    parsed = orjson.loads(error_body(failure, dialect, "r"))
    assert parsed["error"]["message"] == "half ? of a pair"
    assert parsed["error"]["metadata"] == {"a?": "?"}


@pytest.mark.parametrize("dialect", list(Dialect))
def test_a_message_can_t_end_its_event(dialect: Dialect) -> None:
    event = error_event(Failure(Reason.INTERNAL, "one\n\ndata: [DONE]\n\n"), dialect, "r")
    assert event.count(b"\n\n") == 1
    assert event.endswith(b"\n\n")


@pytest.mark.parametrize(
    ("field", "of_openai", "of_anthropic"),
    [
        ("conversation.messages", "messages", "messages"),
        ("conversation.messages[2].role", "messages[2].role", "messages[2].role"),
        ("conversation.messages[2].parts", "messages[2].content", "messages[2].content"),
        ("conversation.messages[2].parts[1]", "messages[2].content", "messages[2].content"),
        ("conversation.messages[2].parts[1].image.url", "messages[2].content", "messages[2].content"),
        ("conversation.messages[2].parts[0].tool_call.id", "messages[2].tool_calls", "messages[2].content"),
        ("conversation.messages[2].parts[0].tool_result.tool_call_id", "messages[2].tool_call_id", "messages[2].content"),
        ("conversation.messages[2].parts[0].tool_result.text", "messages[2].content", "messages[2].content"),
        ("conversation.tools", "tools", "tools"),
        ("conversation.tools[3].name", "tools[3].function.name", "tools[3].name"),
        ("conversation.tools[3].parameters_json_schema", "tools[3].function.parameters", "tools[3].input_schema"),
        ("conversation.tool_choice.mode", "tool_choice", "tool_choice.type"),
        ("conversation.tool_choice.name", "tool_choice.function.name", "tool_choice.name"),
        ("conversation.response_format.json_schema", "response_format.json_schema.schema", "output_config.format.schema"),
        ("conversation.response_format.name", "response_format.json_schema.name", "output_config.format"),
        ("conversation.response_format.kind", "response_format.type", "output_config.format"),
        ("response_format", "response_format", "output_config.format"),
        ("conversation.sampling.temperature", "temperature", "temperature"),
        ("conversation.sampling.top_logprob_count", "top_logprobs", "top_logprob_count"),
        ("conversation.sampling.logit_bias[7]", "logit_bias[7]", "logit_bias[7]"),
        ("conversation.max_output_tokens", "max_completion_tokens", "max_tokens"),
        ("request.conversation.max_output_tokens", "max_completion_tokens", "max_tokens"),
        ("conversation.stop_sequences", "stop", "stop_sequences"),
        ("conversation.stop_sequences[2]", "stop[2]", "stop_sequences[2]"),
        ("reasoning_effort", "reasoning_effort", "thinking"),
        ("parallel_tool_calls", "parallel_tool_calls", "tool_choice.disable_parallel_tool_use"),
        ("routing.model", "model", "model"),
        ("routing.region", "x-sluice-region", "x-sluice-region"),
        ("routing.affinity_key", "x-sluice-affinity-key", "x-sluice-affinity-key"),
        ("cache.cache_namespace", "x-sluice-cache-namespace", "x-sluice-cache-namespace"),
        ("cache.ttl", "x-sluice-cache-ttl", "x-sluice-cache-ttl"),
        ("task_type", "x-sluice-task-type", "x-sluice-task-type"),
        ("request_id", "Idempotency-Key", "Idempotency-Key"),
        ("end_user", "user", "metadata.user_id"),
        ("inputs[3]", "input[3]", "inputs[3]"),
        ("dimension_count", "dimensions", "dimension_count"),
        ("metadata[team]", "metadata[team]", "metadata[team]"),
        ("logit_bias", "logit_bias", "logit_bias"),
    ],
)
def test_the_core_s_fields_are_spelled_as_the_caller_did(field: str, of_openai: str, of_anthropic: str) -> None:
    failure = invalid(field, "is wrong")
    assert param_of(failure, Dialect.OPENAI) == of_openai
    assert param_of(failure, Dialect.ANTHROPIC) == of_anthropic
    assert failure.metadata["field"] == field


@pytest.mark.parametrize(
    "field", ["response_format.json_schema", "tools[0].name", "end_user", "inputs", "messages[0].parts", "region"]
)
def test_the_edge_s_own_fields_are_spelled_already(field: str) -> None:
    for failure in (RequestInvalid(field, "m"), FieldUnsupported(field)):
        assert param_of(failure, Dialect.OPENAI) == field
        assert param_of(failure, Dialect.ANTHROPIC) == field


def test_failures_without_a_field() -> None:
    assert param_of(EdgeError(Reason.INTERNAL, "m"), Dialect.OPENAI) is None
    assert param_of(Failure(Reason.MODEL_NOT_FOUND, "m", metadata={"model": "x"}), Dialect.OPENAI) == "model"
