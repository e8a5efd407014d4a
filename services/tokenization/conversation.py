"""A conversation as counting sees it: texts, tools and pictures, without anything that costs no tokens."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class Role(enum.StrEnum):
    """Who speaks, by the names that chat templates use."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"
    DEVELOPER = "developer"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model asked for."""

    id: str
    name: str
    arguments: str
    """JSON text."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture, as far as its price in tokens depends on it."""

    width: int | None
    """Pixels; None: unknown, as behind an address."""
    height: int | None
    detail: str
    """`low`, `high` or `auto`."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message."""

    role: Role
    text: str
    name: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    """The call that a tool turn answers."""
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool definition."""

    name: str
    description: str
    parameters: str
    """JSON schema as text."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a prompt is made of."""

    turns: tuple[Turn, ...]
    tools: tuple[Tool, ...] = field(default=())
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
