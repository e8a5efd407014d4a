"""OpenAI's chat completions and embeddings: OpenAI itself, vLLM, TGI, Ollama, llama.cpp and whoever else speaks them."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final

import orjson

from services.execution.adapters.faults import fault, json_of, malformed, stream_fault
from services.execution.adapters.http1 import Pool, beginning
from services.execution.adapters.sse import EventCutter, data_of, events
from services.execution.errors import AttemptFailed
from services.execution.provider import Completed, Embedded, EmbeddingPrompt, Prompt, ungated
from services.runtime.errors import Reason
from sluice.execution.v1 import execution_service_pb2
from sluice.inference.v1 import answer_pb2, conversation_pb2

_ROLES: Final = {
    conversation_pb2.ROLE_SYSTEM: "system",
    conversation_pb2.ROLE_USER: "user",
    conversation_pb2.ROLE_ASSISTANT: "assistant",
    conversation_pb2.ROLE_TOOL: "tool",
    conversation_pb2.ROLE_DEVELOPER: "developer",
}
_EFFORTS: Final = {
    conversation_pb2.REASONING_EFFORT_NONE: "none",
    conversation_pb2.REASONING_EFFORT_MINIMAL: "minimal",
    conversation_pb2.REASONING_EFFORT_LOW: "low",
    conversation_pb2.REASONING_EFFORT_MEDIUM: "medium",
    conversation_pb2.REASONING_EFFORT_HIGH: "high",
}
_CHOICES: Final = {
    conversation_pb2.TOOL_CHOICE_MODE_AUTO: "auto",
    conversation_pb2.TOOL_CHOICE_MODE_NONE: "none",
    conversation_pb2.TOOL_CHOICE_MODE_REQUIRED: "required",
}
_FINISHES: Final = {
    "stop": answer_pb2.FINISH_REASON_STOP,
    "length": answer_pb2.FINISH_REASON_LENGTH,
    "tool_calls": answer_pb2.FINISH_REASON_TOOL_CALLS,
    "function_call": answer_pb2.FINISH_REASON_TOOL_CALLS,
    "content_filter": answer_pb2.FINISH_REASON_CONTENT_FILTER,
}
MOST_KEPT: Final = 4 * 1024 * 1024
"""Bytes of a passed-through stream that are kept for the answer; beyond it the answer's message is empty."""
_OPENAI: Final = execution_service_pb2.WIRE_FORMAT_OPENAI_CHAT


def message_of(message: conversation_pb2.Message) -> list[dict[str, Any]]:
    """The chat messages that a turn becomes: one, or one per tool result."""
    parts = message.parts
    role = _ROLES[message.role]
    if len(parts) == 1 and (part := parts[0]).HasField("text"):
        plain: dict[str, Any] = {"role": role, "content": part.text}
        if message.name:
            plain["name"] = message.name
        return [plain]
    content: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    refusal = ""
    for part in parts:
        match part.WhichOneof("kind"):
            case "text":
                content.append({"type": "text", "text": part.text})
            case "image":
                content.append({"type": "image_url", "image_url": _image(part.image)})
            case "tool_call":
                call = part.tool_call
                calls.append(
                    {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments_json}}
                )
            case "tool_result":
                # Chat completions have no mark for a failure: the contract has the text say it.
                result = {"role": "tool", "tool_call_id": part.tool_result.tool_call_id, "content": part.tool_result.text}
                results.append({**result, "name": message.name} if message.name else result)
            case "refusal":
                refusal += part.refusal
            case "reasoning":
                # Chat completions don't take thinking back; what a server showed is for the caller alone.
                pass
    if results:
        return results
    made: dict[str, Any] = {"role": role}
    texts_only = all(piece["type"] == "text" for piece in content)
    if texts_only and role != "user":
        made["content"] = "".join(piece["text"] for piece in content) if content else None
    else:
        made["content"] = content
    if calls:
        made["tool_calls"] = calls
    if refusal:
        made["refusal"] = refusal
    if message.name:
        made["name"] = message.name
    return [made]


def _image(image: conversation_pb2.Image) -> dict[str, Any]:
    if image.WhichOneof("source") == "url":
        url = image.url
    else:
        url = f"data:{image.media_type or 'image/png'};base64,{base64.b64encode(image.data).decode()}"
    return {"url": url, "detail": image.detail} if image.detail else {"url": url}


def request_of(prompt: Prompt, *, streaming: bool, limit_field: str = "max_completion_tokens") -> dict[str, Any]:
    """The body of a chat completion request."""
    conversation: conversation_pb2.Conversation = prompt.conversation
    messages: list[dict[str, Any]] = []
    for message in conversation.messages:
        messages += message_of(message)
    body: dict[str, Any] = {"model": prompt.upstream_model, "messages": messages}
    if prompt.max_output_tokens:
        body[limit_field] = prompt.max_output_tokens
    if len(conversation.ListFields()) > 1:
        # Something beside the turns.
        _wishes(conversation, body)
    if prompt.end_user_hash:
        body["user"] = prompt.end_user_hash
    if streaming:
        body["stream"] = True
        body["stream_options"] = {"include_usage": True}
    return body


def _wishes(conversation: conversation_pb2.Conversation, body: dict[str, Any]) -> None:
    if conversation.HasField("sampling"):
        _sampling(conversation.sampling, body)
    if conversation.tools:
        body["tools"] = [_tool(tool) for tool in conversation.tools]
        if conversation.HasField("tool_choice"):
            choice = conversation.tool_choice
            named = {"type": "function", "function": {"name": choice.name}}
            body["tool_choice"] = _CHOICES.get(choice.mode, named)
        if conversation.HasField("parallel_tool_calls"):
            body["parallel_tool_calls"] = conversation.parallel_tool_calls
    if conversation.HasField("response_format"):
        formatted = _format(conversation.response_format)
        if formatted is not None:
            body["response_format"] = formatted
    if conversation.stop_sequences:
        body["stop"] = list(conversation.stop_sequences)
    if conversation.reasoning_effort:
        body["reasoning_effort"] = _EFFORTS[conversation.reasoning_effort]


def _sampling(sampling: conversation_pb2.Sampling, body: dict[str, Any]) -> None:
    for name in ("temperature", "top_p", "top_k", "seed", "presence_penalty", "frequency_penalty"):
        if sampling.HasField(name):
            body[name] = getattr(sampling, name)
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if sampling.logprobs:
        body["logprobs"] = True
        if sampling.top_logprob_count:
            body["top_logprobs"] = sampling.top_logprob_count


def _tool(tool: conversation_pb2.ToolDefinition) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters_json_schema:
        function["parameters"] = json_of(tool.parameters_json_schema, "conversation.tools")
    if tool.HasField("strict"):
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _format(wanted: conversation_pb2.ResponseFormat) -> dict[str, Any] | None:
    if wanted.kind == conversation_pb2.RESPONSE_FORMAT_KIND_JSON_OBJECT:
        return {"type": "json_object"}
    if wanted.kind != conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA:
        return None
    schema: dict[str, Any] = {
        "name": wanted.name or "response",
        "schema": json_of(wanted.json_schema, "conversation.response_format"),
    }
    if wanted.HasField("strict"):
        schema["strict"] = wanted.strict
    if wanted.description:
        schema["description"] = wanted.description
    return {"type": "json_schema", "json_schema": schema}


def described_schema(wanted: conversation_pb2.ResponseFormat) -> Any:
    """The schema of a format with the format's description at its root, for APIs that take the schema alone."""
    schema = json_of(wanted.json_schema, "conversation.response_format")
    if wanted.description and isinstance(schema, dict):
        own = schema.get("description")
        schema["description"] = f"{wanted.description}\n\n{own}" if own else wanted.description
    return schema


def usage_of(raw: Mapping[str, Any], usage: answer_pb2.Usage) -> None:
    """Fills `usage` from a usage object."""
    usage.input_token_count = raw.get("prompt_tokens") or 0
    usage.output_token_count = raw.get("completion_tokens") or 0
    details = raw.get("prompt_tokens_details")
    if details:
        usage.cached_input_token_count = details.get("cached_tokens") or 0
    details = raw.get("completion_tokens_details")
    if details:
        usage.reasoning_token_count = details.get("reasoning_tokens") or 0
    usage.source = answer_pb2.USAGE_SOURCE_REPORTED


def _finish(reason: object) -> answer_pb2.FinishReason.ValueType:
    """Servers have reasons of their own (`abort`, `insufficient_system_resource`, none at all): such an answer isn't known to be whole."""
    return _FINISHES.get(reason, answer_pb2.FINISH_REASON_ERROR) if isinstance(reason, str) else answer_pb2.FINISH_REASON_ERROR


def fill_answer(answer: answer_pb2.Answer, document: Any, model: str) -> None:
    """Fills an empty message with the answer in a chat completion. Raises AttemptFailed when it isn't one."""
    try:
        choice = document["choices"][0]
        message = choice["message"]
        answer.model = model
        answer.provider_response_id = str(document.get("id") or "")[:256]
        turn = answer.message
        turn.role = conversation_pb2.ROLE_ASSISTANT
        reasoning = message.get("reasoning_content")
        if reasoning:
            turn.parts.add().reasoning.text = reasoning
        content = message.get("content")
        if content:
            turn.parts.add().text = content
        refusal = message.get("refusal")
        if refusal:
            turn.parts.add().refusal = refusal
        for call in message.get("tool_calls") or ():
            made = turn.parts.add().tool_call
            made.id = call.get("id") or ""
            made.name = call["function"]["name"]
            made.arguments_json = call["function"].get("arguments") or "{}"
        answer.finish_reason = _finish(choice.get("finish_reason"))
        logprobs = choice.get("logprobs")
        if logprobs:
            answer.logprobs_json = orjson.dumps(logprobs).decode()
        raw = document.get("usage")
        if raw:
            usage_of(raw, answer.usage)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise malformed(f"no chat completion ({type(error).__name__})") from None


class Gathered:
    """An answer that is put together from the chunks of a stream."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._text: list[str] = []
        self._refusal: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, tuple[list[str], list[str], list[str]]] = {}
        self._logprobs: list[Any] = []
        self._size = 0
        self.finish = answer_pb2.FINISH_REASON_UNSPECIFIED
        self.usage = answer_pb2.Usage()
        self.response_id = ""

    def take(self, document: Any) -> list[answer_pb2.Delta]:
        """Adds a chunk and returns its pieces. Raises AttemptFailed for an error in the stream or a malformed chunk."""
        try:
            if document.get("error"):
                raise stream_fault(document["error"])
            raw = document.get("usage")
            if raw:
                usage_of(raw, self.usage)
            if not self.response_id:
                self.response_id = str(document.get("id") or "")[:256]
            deltas: list[answer_pb2.Delta] = []
            for choice in document.get("choices") or ():
                if choice.get("finish_reason"):
                    self.finish = _finish(choice["finish_reason"])
                if choice.get("logprobs"):
                    self._logprobs.append(choice["logprobs"])
                delta = choice.get("delta")
                if delta:
                    self._delta(delta, deltas)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise malformed(f"no chunk ({type(error).__name__})") from None
        return deltas

    def _delta(self, delta: Mapping[str, Any], deltas: list[answer_pb2.Delta]) -> None:
        content = delta.get("content")
        if content:
            self._keep(self._text, content)
            deltas.append(answer_pb2.Delta(text=content))
        reasoning = delta.get("reasoning_content")
        if reasoning:
            self._keep(self._reasoning, reasoning)
            deltas.append(answer_pb2.Delta(reasoning=conversation_pb2.Reasoning(text=reasoning)))
        refusal = delta.get("refusal")
        if refusal:
            self._keep(self._refusal, refusal)
            deltas.append(answer_pb2.Delta(refusal=refusal))
        for call in delta.get("tool_calls") or ():
            index = call.get("index") or 0
            function = call.get("function") or {}
            made = answer_pb2.ToolCallDelta(
                index=index,
                id=call.get("id") or "",
                name=function.get("name") or "",
                arguments_json=function.get("arguments") or "",
            )
            ids, names, arguments = self._calls.setdefault(index, ([], [], []))
            if made.id and not ids:
                ids.append(made.id)
            if made.name and not names:
                names.append(made.name)
            self._keep(arguments, made.arguments_json)
            deltas.append(answer_pb2.Delta(tool_call=made))

    def _keep(self, pieces: list[str], piece: str) -> None:
        self._size += len(piece)
        if self._size <= MOST_KEPT:
            pieces.append(piece)

    def answer(self) -> answer_pb2.Answer:
        """The answer so far; without a finish reason it isn't known to be whole, which is an ERROR."""
        answer = answer_pb2.Answer(model=self._model, provider_response_id=self.response_id)
        answer.usage.CopyFrom(self.usage)
        answer.finish_reason = self.finish or answer_pb2.FINISH_REASON_ERROR
        turn = answer.message
        turn.role = conversation_pb2.ROLE_ASSISTANT
        if self._size > MOST_KEPT:
            return answer
        if self._reasoning:
            turn.parts.add().reasoning.text = "".join(self._reasoning)
        if self._text:
            turn.parts.add().text = "".join(self._text)
        if self._refusal:
            turn.parts.add().refusal = "".join(self._refusal)
        for index in sorted(self._calls):
            ids, names, arguments = self._calls[index]
            made = turn.parts.add().tool_call
            made.id = ids[0] if ids else f"call_{index}"
            made.name = names[0] if names else ""
            made.arguments_json = "".join(arguments) or "{}"
        if self._logprobs:
            content = [token for part in self._logprobs for token in part.get("content") or ()]
            answer.logprobs_json = orjson.dumps({"content": content}).decode()
        return answer


class OpenAIProvider:
    """A server that speaks OpenAI's API."""

    wire: Final = _OPENAI

    def __init__(
        self,
        pool: Pool,
        *,
        address: str,
        credential: Callable[[], str],
        credential_name: str,
        headers: Mapping[str, str],
        probe_path: str = "",
        first_byte_timeout: float,
        idle_timeout: float,
        kind: str = "openai",
        limit_field: str = "max_completion_tokens",
        keep_streams: bool = True,
    ) -> None:
        """`keep_streams`: whether a connection is kept after a stream; false for servers that close it without saying so."""
        self.kind = kind
        self.address = address
        self.credential = credential_name
        self._pool = pool
        self._secret = credential
        self._headers = dict(headers)
        self._probe_path = probe_path or "/models"
        self._first_byte = first_byte_timeout
        self._idle = idle_timeout
        self._limit_field = limit_field
        self._keep_streams = keep_streams
        self._heads: dict[tuple[str, str], bytes] = {}
        self._secret_seen: str | None = None

    def _head(self, path: str, accept: str) -> bytes:
        secret = self._secret()
        if secret != self._secret_seen:
            # A rotated credential is taken up at the next call.
            self._heads.clear()
            self._secret_seen = secret
        head = self._heads.get((path, accept))
        if head is None:
            headers = {"content-type": "application/json", "accept": accept, "user-agent": "sluice/0.1", **self._headers}
            if secret:
                headers["authorization"] = f"Bearer {secret}"
            head = self._heads[path, accept] = self._pool.head("POST", path, headers)
        return head

    async def complete(self, prompt: Prompt) -> Completed:
        """See Provider."""
        body = orjson.dumps(request_of(prompt, streaming=False, limit_field=self._limit_field))
        response = await self._pool.exchange(
            self._head("/chat/completions", "application/json"), body, prompt.deadline, prompt.gate
        )
        if response.status != 200:
            raise fault(response.status, response.headers, response.body, self._secret())
        try:
            document = orjson.loads(response.body)
        except orjson.JSONDecodeError:
            raise malformed("no JSON") from None
        reply = execution_service_pb2.CompleteResponse()
        answer = reply.answer
        fill_answer(answer, document, prompt.model)
        return Completed(answer, reply)

    async def stream(self, prompt: Prompt) -> AsyncIterator[Any]:
        """See Provider."""
        body = orjson.dumps(request_of(prompt, streaming=True, limit_field=self._limit_field))
        head = self._head("/chat/completions", "text/event-stream")
        # The first byte of a stream has its own limit within the caller's deadline, which `open_stream` and `pieces` keep.
        connection, response = await self._pool.open_stream(head, body, prompt.deadline, prompt.gate)
        pieces = connection.pieces(self._idle, prompt.deadline, keep=self._keep_streams)
        try:
            if response.status != 200:
                raise fault(response.status, response.headers, await beginning(pieces), self._secret())
            made = _PassedThrough(prompt.model) if prompt.accepted_wire == _OPENAI else _Translated(prompt.model)
            take = made.take
            async for piece in pieces:
                if shown := take(piece):
                    yield shown
            yield made.end()
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]  # an async generator

    async def embed(self, prompt: EmbeddingPrompt) -> Embedded:
        """See Provider."""
        request: dict[str, Any] = {"model": prompt.upstream_model, "input": list(prompt.inputs), "encoding_format": "float"}
        if prompt.dimensions is not None:
            request["dimensions"] = prompt.dimensions
        if prompt.end_user_hash:
            request["user"] = prompt.end_user_hash
        response = await self._pool.exchange(
            self._head("/embeddings", "application/json"), orjson.dumps(request), prompt.deadline, prompt.gate
        )
        if response.status != 200:
            raise fault(response.status, response.headers, response.body, self._secret())
        try:
            document = orjson.loads(response.body)
            rows = sorted(document["data"], key=lambda row: row["index"])
            vectors = [row["embedding"] for row in rows]
            usage = answer_pb2.Usage()
            if document.get("usage"):
                usage_of(document["usage"], usage)
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError):
            raise malformed("no embeddings") from None
        if len(vectors) != len(prompt.inputs):
            raise malformed(f"{len(vectors)} vectors for {len(prompt.inputs)} texts")
        return Embedded(vectors, usage)

    async def probe(self, deadline: float) -> None:
        """See Provider."""
        headers = {"accept": "application/json", "user-agent": "sluice/0.1", **self._headers}
        if secret := self._secret():
            headers["authorization"] = f"Bearer {secret}"
        response = await self._pool.exchange(self._pool.head("GET", self._probe_path, headers), b"", deadline, ungated)
        if response.status >= 400:
            raise fault(response.status, response.headers, b"", self._secret())

    async def close(self) -> None:
        """See Provider."""
        self._pool.close()


class _PassedThrough:
    """Lets whole events through as bytes, without those that are only usage and without the end mark; the answer is parsed once, at the
    end. A class, not a generator: each of those on the way costs a microsecond a chunk.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._cutter = EventCutter()
        self._kept: list[bytes] = []
        self._size = 0
        self._ended = False

    def take(self, piece: bytes) -> bytes:
        """What of it goes on, maybe nothing. Raises AttemptFailed."""
        block = self._cutter.whole(piece)
        if not block:
            return b""
        if b"[DONE]" in block or b'"usage":{' in block or b'"usage": {' in block or b'"error"' in block:
            shown: list[bytes] = []
            for event in events(block):
                data = data_of(event)
                if data == b"[DONE]":
                    self._ended = True
                    continue
                is_usage_only = _is_usage_only(data)
                self._size += len(event)
                # Some servers send the usage with every chunk: those are kept within the bound like others.
                if is_usage_only or self._size <= MOST_KEPT or b'"finish_reason":"' in event:
                    self._kept.append(event + b"\n\n")
                if not is_usage_only:
                    shown.append(event + b"\n\n")
            return b"".join(shown)
        self._size += len(block)
        if self._size <= MOST_KEPT:
            self._kept.append(block)
        return block

    def end(self) -> Completed:
        """The answer. Raises AttemptFailed when it isn't whole."""
        gathered = Gathered(self._model)
        for block in self._kept:
            for event in events(block):
                try:
                    gathered.take(orjson.loads(data_of(event)))
                except orjson.JSONDecodeError:
                    # A comment line, as servers send to keep the connection alive.
                    if data_of(event):
                        raise malformed("no JSON in an event") from None
        return _ended(gathered, self._ended, self._size)


def _is_usage_only(data: bytes) -> bool:
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError:
        return False
    if not isinstance(document, dict):
        return False
    if document.get("error"):
        raise stream_fault(document["error"])
    return bool(document.get("usage")) and not document.get("choices")


def _ended(gathered: Gathered, ended: bool, size: int) -> Completed:
    if not ended and gathered.finish == answer_pb2.FINISH_REASON_UNSPECIFIED:
        raise AttemptFailed(Reason.PROVIDER_STREAM_BROKEN, "the provider's stream ended before its answer did")
    answer = gathered.answer()
    if size > MOST_KEPT:
        answer.message.ClearField("parts")
    return Completed(answer)


class _Translated:
    """Makes pieces in the contract's own form of the provider's events."""

    def __init__(self, model: str) -> None:
        self._cutter = EventCutter()
        self._gathered = Gathered(model)
        self._ended = False

    def take(self, piece: bytes) -> execution_service_pb2.DeltaBatch | None:
        """The pieces in it, if any. Raises AttemptFailed."""
        deltas: list[answer_pb2.Delta] = []
        for event in events(self._cutter.whole(piece)):
            data = data_of(event)
            if data == b"[DONE]":
                self._ended = True
                continue
            if not data:
                continue
            try:
                deltas += self._gathered.take(orjson.loads(data))
            except orjson.JSONDecodeError:
                raise malformed("no JSON in an event") from None
        return execution_service_pb2.DeltaBatch(deltas=deltas) if deltas else None

    def end(self) -> Completed:
        """The answer. Raises AttemptFailed when it isn't whole."""
        return _ended(self._gathered, self._ended, 0)
