"""Prompt tokens of OpenAI's chat models: an encoding, plus the overheads that OpenAI has published.

Sources: OpenAI Cookbook, "How to count tokens with tiktoken" (3 tokens per message, 1 per name, 3 to prime the answer; functions
are written out as a TypeScript namespace), and the vision guide (85 tokens a picture of low detail; 170 for each tile of
512 x 512 and 85 on top for a high one).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, Final

from services.tokenization.conversation import Conversation, Picture, Role, Tool
from services.tokenization.counting import Count, Method

_PER_MESSAGE: Final = 3
_PER_NAME: Final = 1
_PRIMING: Final = 3
_TOOLS_OVERHEAD: Final = 9
_PICTURE_BASE: Final = 85
_PICTURE_TILE: Final = 170
_LARGEST_SIDE: Final = 2048
_SHORT_SIDE: Final = 768
_TILE: Final = 512
_UNKNOWN_PICTURE: Final = _PICTURE_BASE + 4 * _PICTURE_TILE
"""A picture whose size is unknown, counted as the usual one of 1024 x 1024."""

_TEXT_BOUND: Final = 0.01
_TOOLS_BOUND: Final = 0.10
_PICTURES_BOUND: Final = 0.50
"""Published formulas are exact for texts, near for tools; a picture behind an address may have any size."""


def picture_tokens(picture: Picture) -> int:
    """Tokens of a picture by the published tile formula."""
    if picture.detail == "low":
        return _PICTURE_BASE
    if not picture.width or not picture.height:
        return _UNKNOWN_PICTURE
    width, height = float(picture.width), float(picture.height)
    shrink = min(1.0, _LARGEST_SIDE / max(width, height))
    width, height = width * shrink, height * shrink
    shrink = min(1.0, _SHORT_SIDE / min(width, height))
    tiles = math.ceil(width * shrink / _TILE) * math.ceil(height * shrink / _TILE)
    return _PICTURE_BASE + tiles * _PICTURE_TILE


def tools_text(tools: tuple[Tool, ...]) -> str:
    """The tools as the TypeScript namespace in which the model sees them."""
    lines = ["namespace functions {", ""]
    for tool in tools:
        if tool.description:
            lines.append(f"// {tool.description}")
        try:
            schema = json.loads(tool.parameters) if tool.parameters else {}
        except ValueError:
            schema = {}
        properties = schema.get("properties") if isinstance(schema, dict) else None
        if isinstance(properties, dict) and properties:
            lines.append(f"type {tool.name} = (_: {{")
            lines += _properties(properties, schema.get("required"), 0)
            lines.append("}) => any;")
        else:
            lines.append(f"type {tool.name} = () => any;")
        lines.append("")
    lines.append("} // namespace functions")
    return "\n".join(lines)


_DEEPEST: Final = 16


def _properties(properties: dict[str, Any], required: object, depth: int) -> list[str]:
    lines = []
    needed = required if isinstance(required, list) else []
    for name, schema in properties.items():
        if isinstance(schema, dict) and isinstance(schema.get("description"), str):
            lines.append(f"// {schema['description']}")
        lines.append(f"{name}{'' if name in needed else '?'}: {_type(schema, depth)},")
    return lines


def _type(schema: object, depth: int) -> str:
    if not isinstance(schema, dict) or depth > _DEEPEST:
        return "any"
    if isinstance(values := schema.get("enum"), list):
        return " | ".join(json.dumps(value, ensure_ascii=False) for value in values)
    kind = schema.get("type")
    if kind == "array":
        return f"{_type(schema.get('items'), depth + 1)}[]"
    if kind == "object" and isinstance(properties := schema.get("properties"), dict):
        return "\n".join(["{", *_properties(properties, schema.get("required"), depth + 1), "}"])
    names = {"string": "string", "integer": "number", "number": "number", "boolean": "boolean", "null": "null"}
    return names.get(kind, "any") if isinstance(kind, str) else "any"


class EncodingCounter:
    """Counts with an OpenAI encoding."""

    method: Final = Method.ENCODING

    def __init__(self, name: str, tokens: Callable[[str], int]) -> None:
        self.name = name
        self.error_bound = _TEXT_BOUND
        self._tokens = tokens

    def count(self, conversation: Conversation) -> Count:
        """See Counter."""
        tokens = self._tokens
        total = _PRIMING
        bound = _TEXT_BOUND
        has_system = False
        for turn in conversation.turns:
            total += _PER_MESSAGE + 1 + tokens(turn.text)
            has_system = has_system or turn.role in (Role.SYSTEM, Role.DEVELOPER)
            if turn.name:
                total += _PER_NAME + tokens(turn.name)
            for call in turn.tool_calls:
                total += _PER_MESSAGE + tokens(call.name) + tokens(call.arguments)
                bound = max(bound, _TOOLS_BOUND)
            for picture in turn.pictures:
                total += picture_tokens(picture)
                bound = _PICTURES_BOUND
        if conversation.tools:
            total += _TOOLS_OVERHEAD + tokens(tools_text(conversation.tools)) - (4 if has_system else 0)
            bound = max(bound, _TOOLS_BOUND)
        if conversation.schema:
            total += tokens(conversation.schema)
            bound = max(bound, _TOOLS_BOUND)
        return Count(total, self.method, self.name, bound)

    def count_text(self, text: str) -> Count:
        """See Counter."""
        return Count(self._tokens(text), self.method, self.name, 0.0)
