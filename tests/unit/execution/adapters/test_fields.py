"""Every field of the contract at every kind of provider: sent, refused by name before a provider is called, or left out as its comment
says. What is none of the three is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest
from google.protobuf.descriptor import Descriptor

from services.execution.adapters import anthropic, gemini, openai
from services.execution.provider import Prompt
from services.gateway import validation
from services.gateway.needs import field_of, find_needs
from services.routing.catalogue import CAPABILITIES, FIELDS, UNCARRIED, parse
from sluice.inference.v1 import conversation_pb2
from tests.unit.execution.examples import SCHEMA, conversation, prompt, said
from tests.unit.routing import examples

KINDS: Final = tuple(sorted(UNCARRIED))
BODIES: Final[dict[str, Callable[[Prompt], Any]]] = {
    "openai": lambda call: openai.request_of(call, streaming=False),
    "local": lambda call: openai.request_of(call, streaming=False, limit_field="max_tokens"),
    "anthropic": lambda call: anthropic.request_of(call, streaming=False),
    "gemini": gemini.request_of,
}
"""What goes over the wire. The `echo` provider has no wire and takes everything."""

Talk = conversation_pb2.Conversation
JSON_SCHEMA: Final = conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA
REQUIRED: Final = conversation_pb2.TOOL_CHOICE_MODE_REQUIRED
HIGH: Final = conversation_pb2.REASONING_EFFORT_HIGH


def plain() -> Talk:
    return conversation()


def with_image() -> Talk:
    talk = conversation()
    talk.messages[0].parts.add().image.CopyFrom(conversation_pb2.Image(data=b"\x01", media_type="image/png"))
    return talk


def with_tools() -> Talk:
    return conversation(tools=[conversation_pb2.ToolDefinition(name="f", parameters_json_schema="{}")])


def with_call() -> Talk:
    """A question, a call with thinking and a refusal before it, and its result."""
    thought = conversation_pb2.Reasoning(text="hm", signature="s")
    call = conversation_pb2.ToolCall(id="c1", name="f", arguments_json='{"a":1}')
    result = conversation_pb2.ToolResult(tool_call_id="c1", text="one")
    parts = [
        conversation_pb2.Part(reasoning=thought),
        conversation_pb2.Part(refusal="no"),
        conversation_pb2.Part(tool_call=call),
    ]
    talk = with_tools()
    talk.messages.add(role=conversation_pb2.ROLE_ASSISTANT, parts=parts)
    talk.messages.add(role=conversation_pb2.ROLE_TOOL, parts=[conversation_pb2.Part(tool_result=result)])
    return talk


def with_schema() -> Talk:
    return conversation(response_format=conversation_pb2.ResponseFormat(kind=JSON_SCHEMA, json_schema=SCHEMA))


def with_strict_schema() -> Talk:
    talk = with_schema()
    talk.response_format.strict = True
    return talk


def with_logprobs() -> Talk:
    return conversation(sampling=conversation_pb2.Sampling(logprobs=True))


def with_forced_call() -> Talk:
    talk = with_tools()
    talk.tool_choice.mode = REQUIRED
    return talk


def put(path: str, value: Any) -> Callable[[Talk], None]:
    """Sets the field at `path`, with numbers for places in lists."""

    def change(talk: Talk) -> None:
        *way, name = path.split(".")
        target: Any = talk
        for step in way:
            target = target[int(step)] if step.isdigit() else getattr(target, step)
        setattr(target, name, value)

    return change


CASES: Final[dict[str, tuple[Callable[[], Talk], Callable[[Talk], Any]]]] = {
    "messages.role": (plain, lambda talk: talk.messages.insert(0, said("brief", conversation_pb2.ROLE_DEVELOPER))),
    "messages.name": (plain, put("messages.0.name", "ann")),
    "messages.name of a tool turn": (with_call, put("messages.2.name", "f")),
    "messages.parts.text": (plain, put("messages.0.parts.0.text", "other")),
    "messages.parts.image.data": (with_image, put("messages.0.parts.1.image.data", b"\x02")),
    "messages.parts.image.url": (with_image, put("messages.0.parts.1.image.url", "https://x/y.png")),
    "messages.parts.image.media_type": (with_image, put("messages.0.parts.1.image.media_type", "image/gif")),
    "messages.parts.image.detail": (with_image, put("messages.0.parts.1.image.detail", "low")),
    "messages.parts.tool_call.id": (with_call, put("messages.1.parts.2.tool_call.id", "c2")),
    "messages.parts.tool_call.name": (with_call, put("messages.1.parts.2.tool_call.name", "g")),
    "messages.parts.tool_call.arguments_json": (with_call, put("messages.1.parts.2.tool_call.arguments_json", "{}")),
    "messages.parts.tool_result.tool_call_id": (with_call, put("messages.2.parts.0.tool_result.tool_call_id", "c2")),
    "messages.parts.tool_result.text": (with_call, put("messages.2.parts.0.tool_result.text", "two")),
    "messages.parts.tool_result.is_error": (with_call, put("messages.2.parts.0.tool_result.is_error", True)),
    "messages.parts.refusal": (with_call, put("messages.1.parts.1.refusal", "never")),
    "messages.parts.reasoning.text": (with_call, put("messages.1.parts.0.reasoning.text", "so")),
    "messages.parts.reasoning.signature": (with_call, put("messages.1.parts.0.reasoning.signature", "t")),
    "tools.name": (with_tools, put("tools.0.name", "g")),
    "tools.description": (with_tools, put("tools.0.description", "d")),
    "tools.parameters_json_schema": (with_tools, put("tools.0.parameters_json_schema", SCHEMA)),
    "tools.strict": (with_tools, put("tools.0.strict", True)),
    "tool_choice.mode": (with_tools, put("tool_choice.mode", conversation_pb2.TOOL_CHOICE_MODE_NONE)),
    "tool_choice.name": (
        with_tools,
        lambda talk: talk.tool_choice.MergeFrom(
            conversation_pb2.ToolChoice(mode=conversation_pb2.TOOL_CHOICE_MODE_NAMED, name="f")
        ),
    ),
    "response_format.kind": (plain, put("response_format.kind", conversation_pb2.RESPONSE_FORMAT_KIND_JSON_OBJECT)),
    "response_format.json_schema": (with_schema, put("response_format.json_schema", '{"type":"object"}')),
    "response_format.name": (with_schema, put("response_format.name", "n")),
    "response_format.strict": (with_schema, put("response_format.strict", True)),
    "response_format.description": (with_schema, put("response_format.description", "d")),
    "response_format.description of a strict format": (
        with_strict_schema,
        put("response_format.description", "d"),
    ),
    "sampling.temperature": (plain, put("sampling.temperature", 0.5)),
    "sampling.top_p": (plain, put("sampling.top_p", 0.5)),
    "sampling.top_k": (plain, put("sampling.top_k", 5)),
    "sampling.seed": (plain, put("sampling.seed", 5)),
    "sampling.presence_penalty": (plain, put("sampling.presence_penalty", 0.5)),
    "sampling.frequency_penalty": (plain, put("sampling.frequency_penalty", 0.5)),
    "sampling.logit_bias": (plain, lambda talk: talk.sampling.logit_bias.update({5: 1.0})),
    "sampling.logprobs": (plain, put("sampling.logprobs", True)),
    "sampling.top_logprob_count": (with_logprobs, put("sampling.top_logprob_count", 2)),
    "max_output_tokens": (plain, put("max_output_tokens", 7)),
    "stop_sequences": (plain, lambda talk: talk.stop_sequences.append("END")),
    "reasoning_effort": (plain, put("reasoning_effort", HIGH)),
    "reasoning_effort with a tool that must be called": (with_forced_call, put("reasoning_effort", HIGH)),
    "reasoning_effort with a format": (with_schema, put("reasoning_effort", HIGH)),
    "reasoning_effort with a strict format": (
        with_strict_schema,
        put("reasoning_effort", HIGH),
    ),
    "parallel_tool_calls": (with_tools, put("parallel_tool_calls", False)),
}
"""By field, and by what stands beside it where that matters: a conversation, and what sets or changes the field in it."""

REFUSED: Final[dict[str, dict[str, str]]] = {
    "anthropic": {
        "messages.name": "messages.name",
        "messages.parts.image.detail": "image.detail",
        "sampling.seed": "seed",
        "sampling.presence_penalty": "presence_penalty",
        "sampling.frequency_penalty": "frequency_penalty",
        "sampling.logit_bias": "logit_bias",
        "sampling.logprobs": "logprobs",
        "sampling.top_logprob_count": "logprobs",
        "reasoning_effort with a tool that must be called": "reasoning_effort",
        "reasoning_effort with a format": "reasoning_effort",
    },
    "gemini": {
        "messages.name": "messages.name",
        "messages.parts.image.detail": "image.detail",
        "sampling.logit_bias": "logit_bias",
        "sampling.logprobs": "logprobs",
        "sampling.top_logprob_count": "logprobs",
        "parallel_tool_calls": "parallel_tool_calls",
    },
    "local": {
        "messages.name": "messages.name",
        "messages.parts.image.detail": "image.detail",
        "tools.strict": "tools.strict",
        "response_format.description": "response_format.description",
        "response_format.description of a strict format": "response_format.description",
    },
    "openai": {},
    "echo": {},
}
"""The name in the refusal, by field."""

_NO_THINKING_BACK: Final = {"messages.parts.reasoning.text", "messages.parts.reasoning.signature"}
LEFT_OUT: Final[dict[str, set[str]]] = {
    "anthropic": {"messages.name of a tool turn", "response_format.name"},
    # A strict format is what Gemini gives anyway.
    "gemini": {"messages.name of a tool turn", "response_format.name", "response_format.strict", *_NO_THINKING_BACK},
    "local": {"messages.parts.tool_result.is_error", *_NO_THINKING_BACK},
    "openai": {"messages.parts.tool_result.is_error", *_NO_THINKING_BACK},
    "echo": set(),
}
"""Fields whose comments in the contract say so."""


def leaves(descriptor: Descriptor, path: str = "") -> Iterator[str]:
    """The fields of a message that hold values, by path."""
    for field in descriptor.fields:
        inner = field.message_type
        if inner is None or inner.GetOptions().map_entry:
            yield path + field.name
        else:
            yield from leaves(inner, f"{path}{field.name}.")


def abilities(kind: str) -> frozenset[str]:
    """Those of a model that lists all that a provider of the kind can carry."""
    content = examples.content()
    content["providers"]["p"] = {"kind": kind}
    content["models"]["p/m"] = examples.model(
        "p", capabilities=sorted(CAPABILITIES - UNCARRIED[kind]), fields=sorted(FIELDS - UNCARRIED[kind])
    )
    return parse(content).models["p/m"].abilities


def test_every_field_of_the_contract_has_its_case() -> None:
    assert {case.partition(" ")[0] for case in CASES} == set(leaves(Talk.DESCRIPTOR))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
async def test_a_field_is_sent_or_refused_by_name_or_left_out_as_its_comment_says(case: str, kind: str) -> None:
    make, change = CASES[case]
    talk = make()
    change(talk)
    needs = find_needs(talk, validation.check_conversation(talk, 10**6), streaming=False)
    missing = [field_of(need) for need in needs if need not in abilities(kind)]
    assert missing == ([REFUSED[kind][case]] if case in REFUSED[kind] else [])
    if not missing and kind in BODIES:
        before, after = (BODIES[kind](prompt(one, most=one.max_output_tokens)) for one in (make(), talk))
        assert (before != after) is (case not in LEFT_OUT[kind])
