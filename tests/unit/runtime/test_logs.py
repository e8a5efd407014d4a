from __future__ import annotations

import io
import json
import logging

import pytest

from services.runtime.logs import LibraryLog, Redactor, RequestLog, open_log
from services.runtime.metrics import Counter
from services.runtime.settings import LogFormat, LogLevel

SECRETS = [
    "sk-sluice-AbCdEf0123456789",
    "sk-ant-api03-AbCdEf0123456789",
    "sk-proj-AbCdEf0123456789",
    "AIzaSyA-0123456789abcdefghijklmnopqrs",
    "gsk_0123456789abcdefghij",
    "AKIAABCDEFGHIJKLMNOP",
    "eyJhbGciOiJub25lIn0.eyJzdWIiOiJ4In0.c2ln",
]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize(
    "shape", ["{}", "Bearer {}", '{{"authorization": "Bearer {}"}}', "call to https://x/?a=1&key={} failed"]
)
def test_keys_are_known_by_their_shape(secret: str, shape: str) -> None:
    assert secret not in Redactor()(shape.format(secret))


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer canary-0123",
        "authorization=Basic Y2FuYXJ5LTAxMjM=canary-0123",
        "{'x-api-key': 'canary-0123'}",
        '{"api_key":"canary-0123"}',
        '"{\\"password\\": \\"canary-0123\\"}"',
        "service_token: canary-0123",
        "nats://user:canary-0123@host:4222",
        "nats://canary-0123@host:4222",
        "GET /v1beta/models?key=canary-0123&alt=sse",
        "-----BEGIN PRIVATE KEY-----\ncanary-0123\n-----END PRIVATE KEY-----",
    ],
)
def test_values_are_known_by_the_name_before_them(text: str) -> None:
    assert "canary-0123" not in Redactor()(text)


def test_a_secret_of_this_process_is_known_by_value() -> None:
    assert Redactor(["my-very-own"])("it is my-very-own, really") == "it is [redacted], really"


@pytest.mark.parametrize(
    "text",
    [
        '{"input_tokens":123456,"output_tokens":7,"model":"openai/gpt-4o","request_id":"0123456789abcdef"}',
        "listening grpc='127.0.0.1:4222' metrics='http://127.0.0.1:9/metrics'",
        "a task-based risk-averse plan",
    ],
)
def test_ordinary_lines_stay_as_they_are(text: str) -> None:
    assert Redactor()(text) == text


def test_a_json_line_has_time_level_event_and_values() -> None:
    output = io.StringIO()
    log = open_log(LogLevel.INFO, LogFormat.JSON, Redactor(), stream=output, process="gateway")
    log.debug("not this")
    log.info("serving", service="gateway", key="sk-sluice-AbCdEf0123456789", odd=object)
    (line,) = output.getvalue().splitlines()
    values = json.loads(line)
    assert (values["level"], values["event"], values["process"]) == ("info", "serving", "gateway")
    assert values["time"].endswith("Z")
    assert "sk-sluice" not in line


@pytest.mark.parametrize("form", list(LogFormat))
def test_a_traceback_is_redacted_too(form: LogFormat) -> None:
    output = io.StringIO()
    log = open_log(LogLevel.INFO, form, Redactor(), stream=output)
    try:
        raise ValueError("sk-sluice-AbCdEf0123456789")
    except ValueError as error:
        log.error("broken", exc_info=error)
    assert "ValueError" in output.getvalue()
    assert "AbCdEf" not in output.getvalue()


def test_libraries_write_into_our_log() -> None:
    output = io.StringIO()
    handler = LibraryLog(open_log(LogLevel.INFO, LogFormat.JSON, Redactor(), stream=output))
    library = logging.getLogger("some.library")
    library.addHandler(handler)
    library.propagate = False
    library.warning("lost %s", "Bearer canary-0123")
    library.removeHandler(handler)
    values = json.loads(output.getvalue())
    assert (values["library"], values["message"]) == ("some.library", "lost Bearer [redacted]")


def test_request_lines_are_whole_redacted_and_in_order() -> None:
    output, dropped = io.StringIO(), Counter()
    log = RequestLog(Redactor(), dropped, stream=output, interval=0.01)
    for number in range(100):
        log.write({"number": number, "key": "sk-sluice-AbCdEf0123456789"})
    log.close()
    lines = [json.loads(line) for line in output.getvalue().splitlines()]
    assert [line["number"] for line in lines] == list(range(100))
    assert "AbCdEf" not in output.getvalue()
    assert dropped.value == 0


def test_a_log_that_cannot_keep_up_drops_and_counts() -> None:
    output, dropped = io.StringIO(), Counter()
    log = RequestLog(Redactor(), dropped, stream=output, interval=30, capacity=10)
    for number in range(25):
        log.write({"number": number})
    log.close()
    assert len(output.getvalue().splitlines()) == 10
    assert dropped.value == 15


def test_a_reader_that_is_gone_does_not_stop_the_service() -> None:
    output, dropped = io.StringIO(), Counter()
    output.close()
    log = RequestLog(Redactor(), dropped, stream=output, interval=0.01)
    log.write({"number": 1})
    log.close()
    assert dropped.value == 1


def test_a_plain_line_is_written_as_it_is_and_others_are_searched() -> None:
    stream = io.StringIO()
    log = RequestLog(Redactor(), Counter(), stream=stream)
    log.write({"operation_id": "01A", "input_tokens": 3}, is_plain=True)
    log.write({"why": "authorization: Bearer sk-abcdefgh12345678"})
    log.close()
    first, second = stream.getvalue().splitlines()
    assert json.loads(first) == {"operation_id": "01A", "input_tokens": 3}
    assert "sk-abcdefgh12345678" not in second
