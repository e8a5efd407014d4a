"""A conversation as counting sees it: texts, tools and pictures, without anything that costs no tokens.

Named tuples: they are made for every count, and a frozen dataclass takes three times as long.
"""

from __future__ import annotations

import enum
from typing import NamedTuple


class Role(enum.StrEnum):
    """Who speaks, by the names that chat templates use."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"
    DEVELOPER = "developer"


class ToolCall(NamedTuple):
    """A call that the model asked for."""

    id: str
    name: str
    arguments: str
    """JSON text."""


class Picture(NamedTuple):
    """A picture, as far as its price in tokens depends on it."""

    width: int | None
    """Pixels; None: unknown, as behind an address."""
    height: int | None
    detail: str
    """`low`, `high` or `auto`."""


class Turn(NamedTuple):
    """One message."""

    role: Role
    text: str
    name: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    """The call that a tool turn answers."""
    pictures: tuple[Picture, ...] = ()


class Tool(NamedTuple):
    """A tool definition."""

    name: str
    description: str
    parameters: str
    """JSON schema as text."""


class Conversation(NamedTuple):
    """What a prompt is made of."""

    turns: tuple[Turn, ...]
    tools: tuple[Tool, ...] = ()
    schema: str = ""
    """JSON schema of the answer, which some providers put into the prompt."""

    @property
    def size(self) -> int:
        """Characters of all texts: the measure of how long counting takes."""
        # A loop: this runs for every count, and generators inside sum() cost several times as much.
        size = len(self.schema)
        for turn in self.turns:
            size += len(turn.text)
            for call in turn.tool_calls:
                size += len(call.arguments)
        for tool in self.tools:
            size += len(tool.parameters) + len(tool.description)
        return size
