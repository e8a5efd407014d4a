"""Conversations, prompts and plans that the tests of this service share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from services.execution.provider import Completed, EmbeddingPrompt, Prompt, ungated
from sluice.execution.v1 import execution_service_pb2
from sluice.inference.v1 import answer_pb2, conversation_pb2
from sluice.metering.v1 import price_pb2
from sluice.routing.v1 import routing_service_pb2
from tests.unit.execution.upstream import PATIENCE

SECRET: Final = "sk-canary-4f1d9a7c2b"  # a made-up key that must never be seen outside its header
SCHEMA: Final = '{"type":"object","properties":{"city":{"type":"string"}},"required":["city"]}'


def said(text: str, role: conversation_pb2.Role.ValueType = conversation_pb2.ROLE_USER) -> conversation_pb2.Message:
    """A turn of one text."""
    return conversation_pb2.Message(role=role, parts=[conversation_pb2.Part(text=text)])


def conversation(text: str = "hello", **fields: Any) -> conversation_pb2.Conversation:
    """One user turn."""
    return conversation_pb2.Conversation(messages=[said(text)], **fields)


def prompt(
    talk: conversation_pb2.Conversation | None = None,
    *,
    wire: int = 0,
    most: int = 0,
    seconds: float = PATIENCE,
    metadata: Mapping[str, str] | None = None,
    user: str = "",
) -> Prompt:
    """A call with a deadline `seconds` from now."""
    ends = asyncio.get_running_loop().time() + seconds
    return Prompt("upstream-model", "catalogue/model", talk or conversation(), most, ends, user, metadata or {}, wire, ungated)


def embedding(*texts: str, dimensions: int | None = None) -> EmbeddingPrompt:
    """An embedding call."""
    ends = asyncio.get_running_loop().time() + PATIENCE
    return EmbeddingPrompt("upstream-model", "catalogue/model", texts, dimensions, ends, "", {}, ungated)


def price(version: str = "p1", *, per_request: int = 0) -> price_pb2.Price:
    """A price of 1,000 nano-dollars per token in and 2,000 per token out."""
    return price_pb2.Price(
        price_version=version,
        input_nano_usd_per_million=10**9,
        output_nano_usd_per_million=2 * 10**9,
        request_nano_usd=per_request,
    )


def candidate(provider: str, model: str = "", **fields: Any) -> routing_service_pb2.Candidate:
    """A candidate at `provider`; its model is `<provider>/m`."""
    return routing_service_pb2.Candidate(
        model=model or f"{provider}/m", provider=provider, upstream_model="m", price=price(), **fields
    )


def billing(**fields: Any) -> execution_service_pb2.Billing:
    """Somebody who pays."""
    return execution_service_pb2.Billing(tenant_id="t", project_id="p", key_id="k", lease_id="l", **fields)


def texts(answer: answer_pb2.Answer) -> str:
    """The texts of an answer."""
    return "".join(part.text for part in answer.message.parts)


class Heard:
    """What a stream brought."""

    def __init__(self) -> None:
        self.wire = b""
        self.deltas: list[answer_pb2.Delta] = []
        self.completed: Completed | None = None
        self.count = 0

    @property
    def answer(self) -> answer_pb2.Answer:
        """The whole answer at its end."""
        assert self.completed is not None
        answer: answer_pb2.Answer = self.completed.answer
        return answer

    @property
    def text(self) -> str:
        """The texts of its pieces."""
        return "".join(delta.text for delta in self.deltas)

    @property
    def reasoning(self) -> str:
        """The reasoning of its pieces."""
        return "".join(delta.reasoning.text for delta in self.deltas)

    def calls(self) -> dict[int, tuple[str, str, str]]:
        """Id, name and arguments of the tool calls by index, put together from the pieces."""
        made: dict[int, tuple[str, str, str]] = {}
        for delta in self.deltas:
            if delta.HasField("tool_call"):
                call = delta.tool_call
                known = made.get(call.index, ("", "", ""))
                made[call.index] = (known[0] or call.id, known[1] or call.name, known[2] + call.arguments_json)
        return made

    def take(self, piece: Any) -> None:
        """One piece; nothing may follow the answer."""
        assert self.completed is None
        self.count += 1
        if isinstance(piece, bytes):
            self.wire += piece
        elif isinstance(piece, Completed):
            self.completed = piece
        else:
            assert piece.deltas
            self.deltas += piece.deltas


async def heard(pieces: AsyncIterator[Any]) -> Heard:
    """All of a stream."""
    made = Heard()
    async for piece in pieces:
        made.take(piece)
    return made
