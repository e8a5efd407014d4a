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
        (
            {"tools": [conversation_pb2.ToolDefinition(name="f"), conversation_pb2.ToolDefinition(name="g", strict=True)]},
            ("chat", "tools", "field:tools.strict"),
        ),
        ({"tools": [conversation_pb2.ToolDefinition(name="f", strict=False)]}, ("chat", "tools")),
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
        (
            {
                "response_format": conversation_pb2.ResponseFormat(
                    kind=conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA, json_schema="{}", description="d"
                )
            },
            ("chat", "json_schema", "field:response_format.description"),
        ),
        ({"reasoning_effort": 1}, ("chat",)),
        ({"reasoning_effort": 4}, ("chat", "reasoning")),
        ({"parallel_tool_calls": False}, ("chat", "field:parallel_tool_calls")),
        ({"sampling": conversation_pb2.Sampling(temperature=1.0, top_p=0.5)}, ("chat",)),
        (
            {"sampling": conversation_pb2.Sampling(top_k=3, seed=0, logit_bias={1: 1.0}, logprobs=True)},
            ("chat", "logprobs", "field:logit_bias", "field:seed", "field:top_k"),
        ),
        (
            {"sampling": conversation_pb2.Sampling(presence_penalty=0.0, frequency_penalty=1.0)},
            ("chat", "field:frequency_penalty", "field:presence_penalty"),
        ),
    ],
)
def test_needs(fields: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert needs(**fields) == expected
    capabilities = [need for need in expected if not need.startswith("field:")]
    assert needs(streaming=True, **fields) == (*sorted((*capabilities, "streaming")), *expected[len(capabilities) :])


@pytest.mark.parametrize(
    ("detail", "expected"), [("", ()), ("auto", ()), ("low", ("field:image.detail",)), ("high", ("field:image.detail",))]
)
def test_pictures(detail: str, expected: tuple[str, ...]) -> None:
    talk = conversation()
    talk.messages[0].parts.add().image.CopyFrom(conversation_pb2.Image(url="https://example.com/cat.png", detail=detail))
    assert find_needs(talk, validation.check_conversation(talk, 10**6), streaming=False) == ("chat", "vision", *expected)


@pytest.mark.parametrize("role", [conversation_pb2.ROLE_USER, conversation_pb2.ROLE_SYSTEM, conversation_pb2.ROLE_ASSISTANT])
def test_a_name_tells_speakers_apart(role: conversation_pb2.Role.ValueType) -> None:
    talk = conversation()
    assert validation.check_conversation(talk, 10**6).is_plain
    talk.messages.add(role=role, name="ann", parts=[conversation_pb2.Part(text="I")])
    shape = validation.check_conversation(talk, 10**6)
    assert not shape.is_plain
    assert find_needs(talk, shape, streaming=True) == ("chat", "streaming", "field:messages.name")


def test_a_name_in_a_tool_turn_tells_nobody_apart() -> None:
    talk = conversation()
    result = conversation_pb2.ToolResult(tool_call_id="c", text="t")
    talk.messages.add(role=conversation_pb2.ROLE_TOOL, name="f", parts=[conversation_pb2.Part(tool_result=result)])
    assert find_needs(talk, validation.check_conversation(talk, 10**6), streaming=False) == ("chat",)


@pytest.mark.parametrize(
    ("mode", "wanted", "expected"),
    [
        (0, None, False),
        (conversation_pb2.TOOL_CHOICE_MODE_AUTO, None, False),
        (conversation_pb2.TOOL_CHOICE_MODE_NONE, None, False),
        (conversation_pb2.TOOL_CHOICE_MODE_REQUIRED, None, True),
        (conversation_pb2.TOOL_CHOICE_MODE_NAMED, None, True),
        (0, conversation_pb2.ResponseFormat(kind=conversation_pb2.RESPONSE_FORMAT_KIND_JSON_OBJECT), True),
        (0, conversation_pb2.ResponseFormat(kind=conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA, json_schema="{}"), True),
        (
            0,
            conversation_pb2.ResponseFormat(
                kind=conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA, json_schema="{}", strict=True
            ),
            False,
        ),
    ],
)
def test_thinking_beside_a_call_that_must_be_made(
    mode: conversation_pb2.ToolChoiceMode.ValueType, wanted: conversation_pb2.ResponseFormat | None, expected: bool
) -> None:
    talk = conversation(tools=[conversation_pb2.ToolDefinition(name="f")], response_format=wanted)
    if mode:
        named = mode == conversation_pb2.TOOL_CHOICE_MODE_NAMED
        talk.tool_choice.CopyFrom(conversation_pb2.ToolChoice(mode=mode, name="f" if named else ""))
    shape = validation.check_conversation(talk, 10**6)
    assert not any(need.startswith("field:") for need in find_needs(talk, shape, streaming=False))
    talk.reasoning_effort = conversation_pb2.REASONING_EFFORT_LOW
    assert ("field:reasoning_effort" in find_needs(talk, shape, streaming=False)) is expected


def test_fields() -> None:
    assert field_of("field:logit_bias") == "logit_bias"
    assert field_of("field:image.detail") == "image.detail"
    assert field_of("json_schema") == "response_format"
    assert field_of("something_new") == "something_new"
