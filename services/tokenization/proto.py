"""Translations between `sluice.inference.v1` and what counting sees."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from types import MappingProxyType
from typing import Final

from services.runtime.errors import invalid
from services.tokenization.conversation import Conversation, Picture, Role, Tool, ToolCall, Turn
from services.tokenization.counting import Count, Method
from sluice.inference.v1 import conversation_pb2, receipt_pb2

_ROLES: Final[dict[int, Role]] = {
    conversation_pb2.ROLE_SYSTEM: Role.SYSTEM,
    conversation_pb2.ROLE_USER: Role.USER,
    conversation_pb2.ROLE_ASSISTANT: Role.ASSISTANT,
    conversation_pb2.ROLE_TOOL: Role.TOOL,
    conversation_pb2.ROLE_DEVELOPER: Role.DEVELOPER,
}

_METHODS: Final = MappingProxyType(
    {
        Method.EXACT: receipt_pb2.TOKEN_COUNT_METHOD_EXACT,
        Method.ENCODING: receipt_pb2.TOKEN_COUNT_METHOD_ENCODING,
        Method.ESTIMATED: receipt_pb2.TOKEN_COUNT_METHOD_ESTIMATED,
    }
)

_PNG: Final = b"\x89PNG\r\n\x1a\n"


def conversation_from_proto(message: conversation_pb2.Conversation) -> Conversation:
    """The conversation; raises Failure (REQUEST_INVALID) for a turn without a role."""
    turns: list[Turn] = []
    for given in message.messages:
        role = _ROLES.get(given.role)
        if role is None:
            raise invalid(f"conversation.messages[{len(turns)}].role", "must be set")
        parts = given.parts
        if len(parts) == 1 and (part := parts[0]).HasField("text"):
            turns.append(Turn(role, part.text, given.name))
        else:
            turns.append(_turn(role, given, parts))
    if turns and len(message.ListFields()) == 1:
        return Conversation(tuple(turns))
    return Conversation(
        tuple(turns),
        tuple([Tool(tool.name, tool.description, tool.parameters_json_schema) for tool in message.tools]),
        message.response_format.json_schema,
    )


def _turn(role: Role, given: conversation_pb2.Message, parts: Sequence[conversation_pb2.Part]) -> Turn:
    texts: list[str] = []
    calls: list[ToolCall] = []
    pictures: list[Picture] = []
    answered = ""
    for part in parts:
        match part.WhichOneof("kind"):
            case "text":
                texts.append(part.text)
            case "refusal":
                texts.append(part.refusal)
            case "reasoning":
                texts.append(part.reasoning.text)
            case "tool_call":
                calls.append(ToolCall(part.tool_call.id, part.tool_call.name, part.tool_call.arguments_json))
            case "tool_result":
                texts.append(part.tool_result.text)
                answered = part.tool_result.tool_call_id
            case "image":
                pictures.append(_picture(part.image))
    return Turn(role, "".join(texts), given.name, tuple(calls), answered, tuple(pictures))


def _picture(image: conversation_pb2.Image) -> Picture:
    width, height = picture_size(image.data) if image.data else (None, None)
    return Picture(width, height, image.detail or "auto")


def picture_size(data: bytes) -> tuple[int | None, int | None]:
    """Width and height in pixels out of the header of a PNG, GIF, JPEG or WebP file; None, None for others."""
    if data.startswith(_PNG) and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
        return width, height
    if data[:6] in (b"GIF87a", b"GIF89a") and len(data) >= 10:
        width, height = struct.unpack("<HH", data[6:10])
        return width, height
    if data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X" and len(data) >= 30:
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if data[:2] == b"\xff\xd8":
        return _jpeg_size(data)
    return None, None


def _jpeg_size(data: bytes) -> tuple[int | None, int | None]:
    at = 2
    while at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return width, height
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None, None


def count_to_proto(count: Count) -> receipt_pb2.TokenCount:
    """The count as a message."""
    message = receipt_pb2.TokenCount()
    fill_count(message, count)
    return message


def fill_count(message: receipt_pb2.TokenCount, count: Count) -> None:
    """Fills an empty message with the count, field by field: the constructor takes half as long again."""
    message.token_count = count.tokens
    message.method = _METHODS[count.method]
    message.tokenizer = count.tokenizer
    message.error_bound = count.error_bound


def method_to_proto(method: Method) -> receipt_pb2.TokenCountMethod.ValueType:
    """The method as an enum value."""
    return _METHODS[method]
