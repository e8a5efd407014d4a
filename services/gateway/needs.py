"""Capabilities that a request needs, by the names of the catalogue.

Names are those of `Model.capabilities`, and `field:<name>` for request fields that not every provider knows. A model that lacks one is
no candidate, so that no field is ever dropped in silence. Fields of turns, pictures and tools have their list in front:
`field:image.detail`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from services.gateway.validation import Shape
from sluice.inference.v1 import conversation_pb2

FIELD_PREFIX: Final = "field:"

FIELDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "tools": "tools",
        "vision": "image",
        "json_object": "response_format",
        "json_schema": "response_format",
        "streaming": "stream",
        "reasoning": "reasoning_effort",
        "logprobs": "logprobs",
        "embeddings": "inputs",
        "chat": "messages",
    }
)
"""The request field behind each capability, for the refusal that names it."""

_CHAT: Final = ("chat",)
_CHAT_STREAMING: Final = ("chat", "streaming")
_MUST_CALL: Final = (conversation_pb2.TOOL_CHOICE_MODE_REQUIRED, conversation_pb2.TOOL_CHOICE_MODE_NAMED)


def find_needs(conversation: conversation_pb2.Conversation, shape: Shape, *, streaming: bool) -> tuple[str, ...]:
    """What a candidate must be able to do: capabilities, then fields, each sorted.

    The first that is lacking is named to the caller, and a field that goes with a capability is no use without it.
    """
    if shape.is_plain and not shape.image_count:
        return _CHAT_STREAMING if streaming else _CHAT
    needs: list[str] = []
    fields: list[str] = []
    must_call = False
    if shape.has_names:
        fields.append("field:messages.name")
    if shape.tool_count:
        needs.append("tools")
        if any(tool.strict for tool in conversation.tools):
            fields.append("field:tools.strict")
        must_call = conversation.tool_choice.mode in _MUST_CALL
    if shape.image_count:
        needs.append("vision")
        if shape.has_image_detail:
            fields.append("field:image.detail")
    if conversation.HasField("response_format"):
        wanted = conversation.response_format
        if wanted.kind == conversation_pb2.RESPONSE_FORMAT_KIND_JSON_OBJECT:
            needs.append("json_object")
            must_call = True
        elif wanted.kind == conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA:
            needs.append("json_schema")
            if wanted.description:
                fields.append("field:response_format.description")
            # Without a grammar, a tool whose input is the answer stands for the format.
            must_call = must_call or not wanted.strict
    if conversation.reasoning_effort > conversation_pb2.REASONING_EFFORT_NONE:
        # Less than nothing can't be asked: a model that doesn't reason obeys NONE by nature.
        needs.append("reasoning")
        if must_call:
            fields.append("field:reasoning_effort")
    if conversation.HasField("parallel_tool_calls"):
        fields.append("field:parallel_tool_calls")
    if conversation.HasField("sampling"):
        sampling = conversation.sampling
        if sampling.HasField("top_k"):
            fields.append("field:top_k")
        if sampling.HasField("seed"):
            fields.append("field:seed")
        if sampling.HasField("presence_penalty"):
            fields.append("field:presence_penalty")
        if sampling.HasField("frequency_penalty"):
            fields.append("field:frequency_penalty")
        if sampling.logit_bias:
            fields.append("field:logit_bias")
        if sampling.logprobs:
            needs.append("logprobs")
    if not needs and not fields:
        return _CHAT_STREAMING if streaming else _CHAT
    needs.append("chat")
    if streaming:
        needs.append("streaming")
    needs.sort()
    fields.sort()
    return (*needs, *fields)


def field_of(need: str) -> str:
    """The request field that asks for a need."""
    if need.startswith(FIELD_PREFIX):
        return need[len(FIELD_PREFIX) :]
    return FIELDS.get(need, need)
