"""Capabilities by request."""

from __future__ import annotations

from typing import Any

import pytest

from services.gateway import validation
from services.gateway.needs import field_of, find_needs
from sluice.inference.v1 import conversation_pb2
from tests.unit.gateway.fakes import conversation


def needs(*, streaming: bool = False, **fields: Any) -> tuple[str, ...]:
    """The needs of a conversation."""
    talk = conversation(**fields)
    return find_needs(talk, validation.check_conversation(talk, 10**6), streaming=streaming)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ("chat",)),
        ({"tools": [conversation_pb2.ToolDefinition(name="f")]}, ("chat", "tools")),
        ({"response_format": conversation_pb2.ResponseFormat(kind=conversation_pb2.RESPONSE_FORMAT_KIND_TEXT)}, ("chat",)),
        (
            {"response_format": conversation_pb2.ResponseFormat(kind=conversation_pb2.RESPONSE_FORMAT_KIND_JSON_OBJECT)},
            ("chat", "json_object"),
        ),
        (
            {
                "response_format": conversation_pb2.ResponseFormat(
                    kind=conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA, json_schema="{}"
                )
            },
            ("chat", "json_schema"),
        ),
        ({"reasoning_effort": 1}, ("chat",)),
        ({"reasoning_effort": 4}, ("chat", "reasoning")),
        ({"parallel_tool_calls": False}, ("chat", "field:parallel_tool_calls")),
        ({"sampling": conversation_pb2.Sampling(temperature=1.0, top_p=0.5)}, ("chat",)),
        (
            {"sampling": conversation_pb2.Sampling(top_k=3, seed=0, logit_bias={1: 1.0}, logprobs=True)},
            ("chat", "field:logit_bias", "field:seed", "field:top_k", "logprobs"),
        ),
        (
            {"sampling": conversation_pb2.Sampling(presence_penalty=0.0, frequency_penalty=1.0)},
            ("chat", "field:frequency_penalty", "field:presence_penalty"),
        ),
    ],
)
def test_needs(fields: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert needs(**fields) == expected
    assert needs(streaming=True, **fields) == tuple(sorted((*expected, "streaming")))


def test_pictures() -> None:
    talk = conversation()
    talk.messages[0].parts.add().image.url = "https://example.com/cat.png"
    assert find_needs(talk, validation.check_conversation(talk, 10**6), streaming=False) == ("chat", "vision")


def test_fields() -> None:
    assert field_of("field:logit_bias") == "logit_bias"
    assert field_of("json_schema") == "response_format"
    assert field_of("something_new") == "something_new"
