"""The `echo` provider: a shipped fake, for tests, demos and load. It calls nobody and says that it is a fake.

It answers with the last user turn, after `echo: `. Directives change that, from request metadata with keys `echo.<name>` or from a
block `[[echo {"name": value}]]` in the last user turn (the block wins, and is cut out of the answer):

    delay            seconds before the answer
    chunk_delay      seconds between two pieces of a stream
    chunks           number of pieces of a stream; default: one per word
    text             the answer instead of the echo
    error            an HTTP status to fail with, say 500 or 429
    error_message    the words of that failure
    retry_after      seconds that the failure asks to wait
    break_after      pieces after which the stream breaks
    hang             true: never answers
    finish           stop, length, tool_calls or content_filter
    input_tokens, output_tokens, cached_tokens, reasoning_tokens     the usage it reports
    no_usage         true: reports no usage
    tool_calls       a list of {"name": …, "arguments": {…}} that it calls
    reasoning        text that it shows as reasoning
    refusal          text with which it refuses

With a response format of JSON it answers with a document that satisfies the schema. It takes every other field of a conversation, and
none has an effect: nothing is generated that it could change.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
import struct
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import orjson

from services.execution.adapters.faults import fault, json_of
from services.execution.errors import AttemptFailed
from services.execution.provider import Completed, Embedded, EmbeddingPrompt, Prompt
from services.runtime.errors import Reason
from sluice.execution.v1 import execution_service_pb2
from sluice.inference.v1 import answer_pb2, conversation_pb2

_DIRECTIVE: Final = re.compile(r"\[\[echo (\{.*?\})\]\]", re.DOTALL)
_KNOWN: Final = frozenset(
    [
        "delay",
        "chunk_delay",
        "chunks",
        "text",
        "error",
        "error_message",
        "retry_after",
        "break_after",
        "hang",
        "finish",
        "input_tokens",
        "output_tokens",
        "cached_tokens",
        "reasoning_tokens",
        "no_usage",
        "tool_calls",
        "reasoning",
        "refusal",
    ]
)
_FINISHES: Final = {
    "stop": answer_pb2.FINISH_REASON_STOP,
    "length": answer_pb2.FINISH_REASON_LENGTH,
    "tool_calls": answer_pb2.FINISH_REASON_TOOL_CALLS,
    "content_filter": answer_pb2.FINISH_REASON_CONTENT_FILTER,
}
_DIMENSIONS: Final = 384
_MOST_DIMENSIONS: Final = 4096
_MOST_CHUNKS: Final = 10_000
_DEEPEST: Final = 12


class _Script:
    """What one call is to do."""

    def __init__(self, conversation: conversation_pb2.Conversation, metadata: Mapping[str, str]) -> None:
        last = _last_user_text(conversation)
        self.values: dict[str, Any] = {}
        for key, value in metadata.items():
            if key.startswith("echo."):
                self._set(key[5:], _value(value))
        for found in _DIRECTIVE.finditer(last):
            try:
                block = orjson.loads(found.group(1))
            except orjson.JSONDecodeError as error:
                raise _refused(f"the echo block is not JSON: {error}") from None
            for name, value in block.items():
                self._set(name, value)
        self.prompt = _DIRECTIVE.sub("", last).strip()
        self.conversation = conversation

    def _set(self, name: str, value: Any) -> None:
        if name not in _KNOWN:
            raise _refused(f"{name!r} is no echo directive; there are {', '.join(sorted(_KNOWN))}")
        self.values[name] = value

    def number(self, name: str, default: float = 0.0) -> float:
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise _refused(f"echo.{name} must be a number of at least 0")
        return float(value)

    def text(self) -> str:
        if "text" in self.values:
            return str(self.values["text"])
        wanted = self.conversation.response_format
        if wanted.kind == conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA:
            return orjson.dumps(example(json_of(wanted.json_schema, "conversation.response_format"), self.prompt)).decode()
        if wanted.kind == conversation_pb2.RESPONSE_FORMAT_KIND_JSON_OBJECT:
            return orjson.dumps({"echo": self.prompt}).decode()
        if "refusal" in self.values or "tool_calls" in self.values:
            return ""
        return f"echo: {self.prompt}"

    async def begin(self) -> None:
        """Waits, hangs or fails, as the script says."""
        if self.values.get("hang") is True:
            await asyncio.Event().wait()
        delay = self.number("delay")
        if delay:
            await asyncio.sleep(delay)
        if "error" in self.values:
            status = int(self.number("error"))
            headers = {b"retry-after": str(self.values["retry_after"]).encode()} if "retry_after" in self.values else {}
            message = str(self.values.get("error_message", "scripted"))
            raise fault(status, headers, orjson.dumps({"error": {"message": message}}))

    def answer(self, model: str) -> answer_pb2.Answer:
        """The whole answer."""
        answer = answer_pb2.Answer(model=model, provider_response_id="echo")
        turn = answer.message
        turn.role = conversation_pb2.ROLE_ASSISTANT
        if "reasoning" in self.values:
            turn.parts.add().reasoning.text = str(self.values["reasoning"])
        text = self.text()
        if text:
            turn.parts.add().text = text
        if "refusal" in self.values:
            turn.parts.add().refusal = str(self.values["refusal"])
        calls = self.values.get("tool_calls") or ()
        if not isinstance(calls, list | tuple) or not all(isinstance(call, dict) and "name" in call for call in calls):
            raise _refused("echo.tool_calls must be a list of objects with a name")
        for index, call in enumerate(calls):
            made = turn.parts.add().tool_call
            made.id = f"call_echo_{index}"
            made.name = str(call["name"])
            made.arguments_json = orjson.dumps(call.get("arguments", {})).decode()
        default = "tool_calls" if calls else "stop"
        answer.finish_reason = _FINISHES.get(str(self.values.get("finish", default)), answer_pb2.FINISH_REASON_STOP)
        if self.values.get("no_usage") is not True:
            self._usage(answer.usage, text)
        return answer

    def _usage(self, usage: answer_pb2.Usage, text: str) -> None:
        words = sum(len(part.text.split()) for message in self.conversation.messages for part in message.parts)
        usage.input_token_count = int(self.number("input_tokens", words))
        usage.output_token_count = int(self.number("output_tokens", max(1, len(text.split()))))
        usage.cached_input_token_count = int(self.number("cached_tokens"))
        usage.reasoning_token_count = int(self.number("reasoning_tokens"))
        usage.source = answer_pb2.USAGE_SOURCE_REPORTED


class EchoProvider:
    """A fake provider in this process."""

    kind: Final = "echo"
    address: Final = ""
    credential: Final = ""
    wire: Final = 0

    async def complete(self, prompt: Prompt) -> Completed:
        """See Provider."""
        prompt.gate()
        script = _Script(prompt.conversation, prompt.metadata)
        try:
            async with asyncio.timeout_at(prompt.deadline):
                await script.begin()
        except TimeoutError:
            raise AttemptFailed(Reason.PROVIDER_TIMEOUT, "the provider did not answer in time", was_read=True) from None
        return Completed(script.answer(prompt.model))

    async def stream(self, prompt: Prompt) -> AsyncIterator[Any]:
        """See Provider."""
        prompt.gate()
        script = _Script(prompt.conversation, prompt.metadata)
        try:
            async with asyncio.timeout_at(prompt.deadline):
                await script.begin()
        except TimeoutError:
            raise AttemptFailed(Reason.PROVIDER_TIMEOUT, "the provider did not answer in time", was_read=True) from None
        answer = script.answer(prompt.model)
        wait = script.number("chunk_delay")
        breaks = int(script.number("break_after")) if "break_after" in script.values else None
        for index, delta in enumerate(_deltas(answer, int(script.number("chunks", 0)))):
            if breaks is not None and index >= breaks:
                raise AttemptFailed(Reason.PROVIDER_STREAM_BROKEN, "the scripted break of the stream")
            if index and wait:
                try:
                    async with asyncio.timeout_at(prompt.deadline):
                        await asyncio.sleep(wait)
                except TimeoutError:
                    raise AttemptFailed(Reason.PROVIDER_TIMEOUT, "the provider did not answer in time", was_read=True) from None
            yield execution_service_pb2.DeltaBatch(deltas=[delta])
        yield Completed(answer)

    async def embed(self, prompt: EmbeddingPrompt) -> Embedded:
        """See Provider. Unit vectors out of a hash: the same text has the same vector, other texts are far away."""
        prompt.gate()
        size = prompt.dimensions or _DIMENSIONS
        if not 1 <= size <= _MOST_DIMENSIONS:
            raise _refused(f"dimensions must be 1 to {_MOST_DIMENSIONS}")
        usage = answer_pb2.Usage(
            input_token_count=sum(len(text.split()) for text in prompt.inputs), source=answer_pb2.USAGE_SOURCE_REPORTED
        )
        return Embedded([_vector(text, size) for text in prompt.inputs], usage)

    async def probe(self, deadline: float) -> None:
        """See Provider."""

    async def close(self) -> None:
        """See Provider."""


def _refused(message: str) -> AttemptFailed:
    return AttemptFailed(Reason.PROVIDER_REJECTED, message, status=400)


def _value(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


def _last_user_text(conversation: conversation_pb2.Conversation) -> str:
    for message in reversed(conversation.messages):
        if message.role == conversation_pb2.ROLE_USER:
            return "".join(part.text for part in message.parts)
    return ""


def _deltas(answer: answer_pb2.Answer, chunks: int) -> list[answer_pb2.Delta]:
    deltas: list[answer_pb2.Delta] = []
    call = 0
    for part in answer.message.parts:
        match part.WhichOneof("kind"):
            case "text":
                deltas += [answer_pb2.Delta(text=piece) for piece in _pieces(part.text, chunks)]
            case "reasoning":
                deltas.append(answer_pb2.Delta(reasoning=part.reasoning))
            case "refusal":
                deltas.append(answer_pb2.Delta(refusal=part.refusal))
            case "tool_call":
                made = part.tool_call
                half = len(made.arguments_json) // 2
                first, second = made.arguments_json[:half], made.arguments_json[half:]
                opening = answer_pb2.ToolCallDelta(index=call, id=made.id, name=made.name, arguments_json=first)
                deltas.append(answer_pb2.Delta(tool_call=opening))
                deltas.append(answer_pb2.Delta(tool_call=answer_pb2.ToolCallDelta(index=call, arguments_json=second)))
                call += 1
    return deltas


def _pieces(text: str, chunks: int) -> list[str]:
    if chunks:
        count = min(chunks, _MOST_CHUNKS)
        if len(text) < count:
            text = text + " " * (count - len(text))
        size = len(text) / count
        return [text[round(index * size) : round((index + 1) * size)] for index in range(count)]
    return re.findall(r"\S+\s*|\s+", text)


def _vector(text: str, size: int) -> list[float]:
    raw = hashlib.shake_256(text.encode()).digest(4 * size)
    values = [number / 2**31 - 1.0 for number in struct.unpack(f"<{size}I", raw)]
    length = math.sqrt(sum(value * value for value in values)) or 1.0
    return [value / length for value in values]


def example(schema: Any, text: str, depth: int = 0) -> Any:
    """A small document that satisfies the usual parts of a JSON schema; strings are `text`."""
    if not isinstance(schema, dict) or depth > _DEEPEST:
        return None
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            return example(schema[key][0], text, depth + 1)
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = kind[0] if kind else None
    match kind:
        case "object":
            properties = schema.get("properties") or {}
            wanted = schema.get("required") or list(properties)
            return {name: example(properties.get(name, {"type": "string"}), text, depth + 1) for name in wanted}
        case "array":
            return [example(schema.get("items", {"type": "string"}), text, depth + 1)] * max(1, int(schema.get("minItems", 1)))
        case "integer" | "number":
            return schema.get("minimum", 0)
        case "boolean":
            return True
        case "null":
            return None
        case _:
            found = text[: int(schema.get("maxLength", 200))]
            return found.ljust(int(schema.get("minLength", 0)), "x")
