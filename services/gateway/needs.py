"""Capabilities that a request needs, by the names of the catalogue.

Names are those of `Model.capabilities`, and `field:<name>` for request fields that not every provider knows. A model that lacks one is
no candidate, so that no field is ever dropped in silence.
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


def find_needs(conversation: conversation_pb2.Conversation, shape: Shape, *, streaming: bool) -> tuple[str, ...]:
    """What a candidate must be able to do, sorted."""
    if shape.is_plain and not shape.image_count:
        return _CHAT_STREAMING if streaming else _CHAT
    needs: list[str] = []
    if shape.tool_count:
        needs.append("tools")
    if shape.image_count:
        needs.append("vision")
    if conversation.HasField("response_format"):
        kind = conversation.response_format.kind
        if kind == conversation_pb2.RESPONSE_FORMAT_KIND_JSON_OBJECT:
            needs.append("json_object")
        elif kind == conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA:
            needs.append("json_schema")
    if conversation.reasoning_effort > conversation_pb2.REASONING_EFFORT_NONE:
        # Less than nothing can't be asked: a model that doesn't reason obeys NONE by nature.
        needs.append("reasoning")
    if conversation.HasField("parallel_tool_calls"):
        needs.append("field:parallel_tool_calls")
    if conversation.HasField("sampling"):
        sampling = conversation.sampling
        if sampling.HasField("top_k"):
            needs.append("field:top_k")
        if sampling.HasField("seed"):
            needs.append("field:seed")
        if sampling.HasField("presence_penalty"):
            needs.append("field:presence_penalty")
        if sampling.HasField("frequency_penalty"):
            needs.append("field:frequency_penalty")
        if sampling.logit_bias:
            needs.append("field:logit_bias")
        if sampling.logprobs:
            needs.append("logprobs")
    if not needs:
        return _CHAT_STREAMING if streaming else _CHAT
    needs.append("chat")
    if streaming:
        needs.append("streaming")
    needs.sort()
    return tuple(needs)


def field_of(need: str) -> str:
    """The request field that asks for a need."""
    if need.startswith(FIELD_PREFIX):
        return need[len(FIELD_PREFIX) :]
    return FIELDS.get(need, need)
