"""Anthropic's Messages API."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final

import orjson

from services.execution.adapters.faults import fault, json_of, malformed, stream_fault
from services.execution.adapters.http1 import Pool, beginning
from services.execution.adapters.openai import MOST_KEPT, described_schema
from services.execution.adapters.sse import EventCutter, data_of, events
from services.execution.errors import AttemptFailed
from services.execution.provider import Completed, Embedded, EmbeddingPrompt, Prompt, ungated
from services.runtime.errors import Reason
from sluice.execution.v1 import execution_service_pb2
from sluice.inference.v1 import answer_pb2, conversation_pb2

_WIRE: Final = execution_service_pb2.WIRE_FORMAT_ANTHROPIC_MESSAGES
_VERSION: Final = "2023-06-01"
_DEFAULT_TOKENS: Final = 4096
"""Anthropic demands a limit."""
_BUDGETS: Final = {
    conversation_pb2.REASONING_EFFORT_MINIMAL: 1024,
    conversation_pb2.REASONING_EFFORT_LOW: 2048,
    conversation_pb2.REASONING_EFFORT_MEDIUM: 8192,
    conversation_pb2.REASONING_EFFORT_HIGH: 24576,
}
_CHOICES: Final = {
    conversation_pb2.TOOL_CHOICE_MODE_AUTO: "auto",
    conversation_pb2.TOOL_CHOICE_MODE_NONE: "none",
    conversation_pb2.TOOL_CHOICE_MODE_REQUIRED: "any",
}
_FINISHES: Final = {
    "end_turn": answer_pb2.FINISH_REASON_STOP,
    "stop_sequence": answer_pb2.FINISH_REASON_STOP,
    "max_tokens": answer_pb2.FINISH_REASON_LENGTH,
    "model_context_window_exceeded": answer_pb2.FINISH_REASON_LENGTH,
    "tool_use": answer_pb2.FINISH_REASON_TOOL_CALLS,
    "refusal": answer_pb2.FINISH_REASON_CONTENT_FILTER,
    # The turn is to be gone on with: what is there isn't the whole.
    "pause_turn": answer_pb2.FINISH_REASON_ERROR,
}
_FORMAT_TOOL: Final = "answer"
"""Stands for a format that isn't strict: Anthropic's grammar takes some schemas only, and none for any object. A tool whose input is
the schema, and which must be called, is its own advice."""
_MUST_CALL: Final = (conversation_pb2.TOOL_CHOICE_MODE_REQUIRED, conversation_pb2.TOOL_CHOICE_MODE_NAMED)
_SYSTEM: Final = (conversation_pb2.ROLE_SYSTEM, conversation_pb2.ROLE_DEVELOPER)


def request_of(prompt: Prompt, *, streaming: bool) -> dict[str, Any]:
    """The body of a Messages request."""
    conversation: conversation_pb2.Conversation = prompt.conversation
    system: list[str] = []
    messages: list[dict[str, Any]] = []
    for message in conversation.messages:
        if message.role in _SYSTEM:
            system.append("".join(part.text for part in message.parts))
            continue
        role = "assistant" if message.role == conversation_pb2.ROLE_ASSISTANT else "user"
        content = [block for part in message.parts if (block := _block(part)) is not None]
        if messages and messages[-1]["role"] == role:
            # Roles must alternate: results of parallel calls and turns in a row become one turn.
            messages[-1]["content"] += content
        else:
            messages.append({"role": role, "content": content})
    body: dict[str, Any] = {
        "model": prompt.upstream_model,
        "max_tokens": prompt.max_output_tokens or _DEFAULT_TOKENS,
        "messages": messages,
    }
    if system:
        body["system"] = "\n\n".join(system)
    _options(conversation, prompt, body)
    if streaming:
        body["stream"] = True
    return body


def _options(conversation: conversation_pb2.Conversation, prompt: Prompt, body: dict[str, Any]) -> None:
    sampling = conversation.sampling
    for name in ("temperature", "top_p", "top_k"):
        if sampling.HasField(name):
            body[name] = getattr(sampling, name)
    if conversation.stop_sequences:
        body["stop_sequences"] = list(conversation.stop_sequences)
    tools = [_tool(tool) for tool in conversation.tools]
    choice: dict[str, Any] | None = None
    mode = conversation.tool_choice.mode
    if conversation.HasField("tool_choice") and tools:
        choice = {"type": _CHOICES[mode]} if mode in _CHOICES else {"type": "tool", "name": conversation.tool_choice.name}
    # Where no tool may be called there is nothing to run side by side, and Anthropic refuses the word.
    if conversation.HasField("parallel_tool_calls") and tools and mode != conversation_pb2.TOOL_CHOICE_MODE_NONE:
        choice = {**(choice or {"type": "auto"}), "disable_parallel_tool_use": not conversation.parallel_tool_calls}
    if _has_grammar(conversation):
        schema = described_schema(conversation.response_format)
        body["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
    if _has_format_tool(conversation):
        text = conversation.response_format.json_schema
        answer = {
            "name": _FORMAT_TOOL,
            "description": conversation.response_format.description or "Give the answer by calling this tool.",
            "input_schema": json_of(text, "conversation.response_format") if text else {"type": "object"},
        }
        # The model calls one of the caller's tools or gives the answer, where both are allowed.
        both = tools and mode != conversation_pb2.TOOL_CHOICE_MODE_NONE
        choice = {**(choice or {}), "type": "any"} if both else {"type": "tool", "name": _FORMAT_TOOL}
        tools.append(answer)
    if tools:
        body["tools"] = tools
    if choice is not None:
        body["tool_choice"] = choice
    budget = _BUDGETS.get(conversation.reasoning_effort)
    # Anthropic refuses thinking where a tool must be called; routing sends no request that asks for both.
    forced = choice is not None and choice["type"] in ("any", "tool")
    if budget is not None and body["max_tokens"] > 1024 and not forced:
        body["thinking"] = {"type": "enabled", "budget_tokens": min(budget, max(1024, body["max_tokens"] // 2))}
    if prompt.end_user_hash:
        body["metadata"] = {"user_id": prompt.end_user_hash}


def _tool(tool: conversation_pb2.ToolDefinition) -> dict[str, Any]:
    schema = tool.parameters_json_schema
    made = {
        "name": tool.name,
        "description": tool.description,
        "input_schema": json_of(schema, "conversation.tools") if schema else {"type": "object"},
    }
    # False is Anthropic's default, and older models don't know the word.
    return {**made, "strict": True} if tool.strict else made


def _has_grammar(conversation: conversation_pb2.Conversation) -> bool:
    wanted = conversation.response_format
    return wanted.kind == conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA and wanted.strict


def _has_format_tool(conversation: conversation_pb2.Conversation) -> bool:
    kind = conversation.response_format.kind
    if kind not in (conversation_pb2.RESPONSE_FORMAT_KIND_JSON_OBJECT, conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA):
        return False
    # An answer that must be a call has no text, so nothing that could have a form.
    return not _has_grammar(conversation) and conversation.tool_choice.mode not in _MUST_CALL


def _block(part: conversation_pb2.Part) -> dict[str, Any] | None:
    match part.WhichOneof("kind"):
        case "text":
            return {"type": "text", "text": part.text} if part.text else None
        case "refusal":
            return {"type": "text", "text": part.refusal} if part.refusal else None
        case "image":
            image = part.image
            if image.WhichOneof("source") == "url":
                return {"type": "image", "source": {"type": "url", "url": image.url}}
            data = base64.b64encode(image.data).decode()
            return {"type": "image", "source": {"type": "base64", "media_type": image.media_type or "image/png", "data": data}}
        case "tool_call":
            call = part.tool_call
            return {
                "type": "tool_use",
                "id": call.id,
                "name": call.name,
                "input": json_of(call.arguments_json or "{}", "conversation.messages"),
            }
        case "tool_result":
            result = part.tool_result
            block = {"type": "tool_result", "tool_use_id": result.tool_call_id, "content": result.text}
            return {**block, "is_error": True} if result.is_error else block
        case "reasoning":
            reasoning = part.reasoning
            # Only signed thinking may be sent back.
            return (
                {"type": "thinking", "thinking": reasoning.text, "signature": reasoning.signature}
                if reasoning.signature
                else None
            )
        case _:
            return None


def usage_of(raw: Mapping[str, Any], usage: answer_pb2.Usage) -> None:
    """Fills `usage`. Anthropic's input tokens leave out those read from and written to its cache; ours include them."""
    if raw.get("input_tokens") is not None:
        cached = raw.get("cache_read_input_tokens") or 0
        written = raw.get("cache_creation_input_tokens") or 0
        usage.input_token_count = raw["input_tokens"] + cached + written
        usage.cached_input_token_count = cached
        usage.cache_write_token_count = written
    usage.output_token_count = raw.get("output_tokens") or usage.output_token_count
    usage.source = answer_pb2.USAGE_SOURCE_REPORTED


def answer_of(document: Any, model: str, *, formatted: bool) -> answer_pb2.Answer:
    """The answer in a Messages response. Raises AttemptFailed when it isn't one."""
    try:
        answer = answer_pb2.Answer(model=model, provider_response_id=str(document.get("id") or "")[:256])
        turn = answer.message
        turn.role = conversation_pb2.ROLE_ASSISTANT
        for block in document["content"]:
            match block["type"]:
                case "text":
                    turn.parts.add().text = block["text"]
                case "thinking":
                    reasoning = turn.parts.add().reasoning
                    reasoning.text, reasoning.signature = block["thinking"], block.get("signature") or ""
                case "tool_use":
                    arguments = orjson.dumps(block["input"]).decode()
                    if formatted and block["name"] == _FORMAT_TOOL:
                        turn.parts.add().text = arguments
                    else:
                        call = turn.parts.add().tool_call
                        call.id, call.name, call.arguments_json = block["id"], block["name"], arguments
        called = any(part.HasField("tool_call") for part in turn.parts)
        answer.finish_reason = _finish(document.get("stop_reason"), formatted and not called)
        answer.stop_sequence = document.get("stop_sequence") or ""
        if document.get("usage"):
            usage_of(document["usage"], answer.usage)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise malformed(f"no message ({type(error).__name__})") from None
    return answer


def _finish(reason: str | None, formatted: bool) -> answer_pb2.FinishReason.ValueType:
    finish = _FINISHES.get(reason or "", answer_pb2.FINISH_REASON_ERROR)
    return answer_pb2.FINISH_REASON_STOP if formatted and finish == answer_pb2.FINISH_REASON_TOOL_CALLS else finish


class Gathered:
    """An answer that is put together from the events of a stream."""

    def __init__(self, model: str, *, formatted: bool) -> None:
        self._answer = answer_pb2.Answer(model=model)
        self._answer.message.role = conversation_pb2.ROLE_ASSISTANT
        self._formatted = formatted
        self._blocks: dict[int, tuple[str, Any, list[str]]] = {}
        self._calls = 0
        self._call_index: dict[int, int] = {}
        self._size = 0
        self.ended = False

    def take(self, event: Any) -> list[answer_pb2.Delta]:
        """Adds an event and returns its pieces. Raises AttemptFailed."""
        try:
            match event["type"]:
                case "message_start":
                    message = event["message"]
                    self._answer.provider_response_id = str(message.get("id") or "")[:256]
                    # What is used is known at the end; without it the whole is estimated.
                    usage_of(message.get("usage") or {}, self._answer.usage)
                    self._answer.usage.source = answer_pb2.USAGE_SOURCE_UNSPECIFIED
                case "content_block_start":
                    return self._start(event["index"], event["content_block"])
                case "content_block_delta":
                    return self._delta(event["index"], event["delta"])
                case "message_delta":
                    delta = event["delta"]
                    self._answer.finish_reason = _finish(delta.get("stop_reason"), self._formatted and not self._calls)
                    self._answer.stop_sequence = delta.get("stop_sequence") or ""
                    if event.get("usage"):
                        usage_of(event["usage"], self._answer.usage)
                case "message_stop":
                    self.ended = True
                case "error":
                    raise stream_fault(event.get("error"))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise malformed(f"no event ({type(error).__name__})") from None
        return []

    def _start(self, index: int, block: Mapping[str, Any]) -> list[answer_pb2.Delta]:
        kind = block["type"]
        self._blocks[index] = (kind, block, [])
        if kind == "text" and block.get("text"):
            return self._delta(index, {"type": "text_delta", "text": block["text"]})
        if kind == "tool_use" and not (self._formatted and block["name"] == _FORMAT_TOOL):
            self._call_index[index] = self._calls
            made = answer_pb2.ToolCallDelta(index=self._calls, id=block["id"], name=block["name"])
            self._calls += 1
            return [answer_pb2.Delta(tool_call=made)]
        return []

    def _delta(self, index: int, delta: Mapping[str, Any]) -> list[answer_pb2.Delta]:
        kind = delta["type"]
        pieces = self._blocks[index][2]
        if kind == "signature_delta":
            self._blocks[index] = (self._blocks[index][0], {"signature": delta["signature"]}, pieces)
            return [answer_pb2.Delta(reasoning=conversation_pb2.Reasoning(signature=delta["signature"]))]
        text = delta.get("text") or delta.get("thinking") or delta.get("partial_json") or ""
        if not text:
            return []
        self._size += len(text)
        if self._size <= MOST_KEPT:
            pieces.append(text)
        if kind == "thinking_delta":
            return [answer_pb2.Delta(reasoning=conversation_pb2.Reasoning(text=text))]
        if kind == "input_json_delta" and index in self._call_index:
            return [answer_pb2.Delta(tool_call=answer_pb2.ToolCallDelta(index=self._call_index[index], arguments_json=text))]
        return [answer_pb2.Delta(text=text)]

    def answer(self) -> answer_pb2.Answer:
        """The whole answer."""
        if self._size > MOST_KEPT:
            return self._answer
        for index in sorted(self._blocks):
            kind, block, pieces = self._blocks[index]
            text = "".join(pieces)
            if kind == "thinking":
                reasoning = self._answer.message.parts.add().reasoning
                reasoning.text, reasoning.signature = text, str(block.get("signature") or "")
            elif index in self._call_index:
                call = self._answer.message.parts.add().tool_call
                call.id, call.name, call.arguments_json = block["id"], block["name"], text or "{}"
            elif text:
                self._answer.message.parts.add().text = text
        return self._answer


class AnthropicProvider:
    """Anthropic, or a server that speaks its API."""

    kind: Final = "anthropic"
    wire: Final = _WIRE

    def __init__(
        self,
        pool: Pool,
        *,
        address: str,
        credential: Callable[[], str],
        credential_name: str,
        headers: Mapping[str, str],
        probe_path: str = "",
        idle_timeout: float,
    ) -> None:
        self.address = address
        self.credential = credential_name
        self._pool = pool
        self._secret = credential
        self._headers = dict(headers)
        self._probe_path = probe_path or "/v1/models"
        self._idle = idle_timeout

    def _head(self, method: str, path: str, accept: str) -> bytes:
        headers = {"content-type": "application/json", "accept": accept, "anthropic-version": _VERSION, **self._headers}
        headers["user-agent"] = "sluice/0.1"
        if secret := self._secret():
            headers["x-api-key"] = secret
        return self._pool.head(method, path, headers)

    async def complete(self, prompt: Prompt) -> Completed:
        """See Provider."""
        body = orjson.dumps(request_of(prompt, streaming=False))
        response = await self._pool.exchange(
            self._head("POST", "/v1/messages", "application/json"), body, prompt.deadline, prompt.gate
        )
        if response.status != 200:
            raise fault(response.status, response.headers, response.body, self._secret())
        try:
            document = orjson.loads(response.body)
        except orjson.JSONDecodeError:
            raise malformed("no JSON") from None
        return Completed(answer_of(document, prompt.model, formatted=_has_format_tool(prompt.conversation)))

    async def stream(self, prompt: Prompt) -> AsyncIterator[Any]:
        """See Provider."""
        body = orjson.dumps(request_of(prompt, streaming=True))
        head = self._head("POST", "/v1/messages", "text/event-stream")
        connection, response = await self._pool.open_stream(head, body, prompt.deadline, prompt.gate)
        pieces = connection.pieces(self._idle, prompt.deadline)
        formatted = _has_format_tool(prompt.conversation)
        # The tool that stands for a JSON format must not be seen by the caller: such streams are translated.
        wire = prompt.accepted_wire == _WIRE and not formatted
        gathered = Gathered(prompt.model, formatted=formatted)
        cutter = EventCutter()
        try:
            if response.status != 200:
                raise fault(response.status, response.headers, await beginning(pieces), self._secret())
            async for piece in pieces:
                shown: list[bytes] = []
                deltas: list[answer_pb2.Delta] = []
                for event in events(cutter.whole(piece)):
                    data = data_of(event)
                    if not data:
                        continue
                    try:
                        document = orjson.loads(data)
                    except orjson.JSONDecodeError:
                        raise malformed("no JSON in an event") from None
                    deltas += gathered.take(document)
                    if wire and document["type"] not in ("message_delta", "message_stop"):
                        shown.append(event + b"\n\n")
                if wire:
                    if shown:
                        yield b"".join(shown)
                elif deltas:
                    yield execution_service_pb2.DeltaBatch(deltas=deltas)
            if not gathered.ended:
                raise AttemptFailed(Reason.PROVIDER_STREAM_BROKEN, "the provider's stream ended before its answer did")
            yield Completed(gathered.answer())
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]  # an async generator

    async def embed(self, prompt: EmbeddingPrompt) -> Embedded:
        """See Provider."""
        raise AttemptFailed(Reason.PROVIDER_REJECTED, "Anthropic makes no embeddings", status=400)

    async def probe(self, deadline: float) -> None:
        """See Provider."""
        response = await self._pool.exchange(self._head("GET", self._probe_path, "application/json"), b"", deadline, ungated)
        if response.status >= 400:
            raise fault(response.status, response.headers, b"", self._secret())

    async def close(self) -> None:
        """See Provider."""
        self._pool.close()
