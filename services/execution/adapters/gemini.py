"""Google's Gemini API: `generateContent` and `streamGenerateContent`."""

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

_SYSTEM: Final = (conversation_pb2.ROLE_SYSTEM, conversation_pb2.ROLE_DEVELOPER)
_BUDGETS: Final = {
    conversation_pb2.REASONING_EFFORT_NONE: 0,
    conversation_pb2.REASONING_EFFORT_MINIMAL: 512,
    conversation_pb2.REASONING_EFFORT_LOW: 1024,
    conversation_pb2.REASONING_EFFORT_MEDIUM: 8192,
    conversation_pb2.REASONING_EFFORT_HIGH: 24576,
}
_MODES: Final = {
    conversation_pb2.TOOL_CHOICE_MODE_AUTO: "AUTO",
    conversation_pb2.TOOL_CHOICE_MODE_NONE: "NONE",
    conversation_pb2.TOOL_CHOICE_MODE_REQUIRED: "ANY",
}
_FINISHES: Final = {
    "STOP": answer_pb2.FINISH_REASON_STOP,
    "MAX_TOKENS": answer_pb2.FINISH_REASON_LENGTH,
    "SAFETY": answer_pb2.FINISH_REASON_CONTENT_FILTER,
    "RECITATION": answer_pb2.FINISH_REASON_CONTENT_FILTER,
    "BLOCKLIST": answer_pb2.FINISH_REASON_CONTENT_FILTER,
    "PROHIBITED_CONTENT": answer_pb2.FINISH_REASON_CONTENT_FILTER,
    "SPII": answer_pb2.FINISH_REASON_CONTENT_FILTER,
    "MALFORMED_FUNCTION_CALL": answer_pb2.FINISH_REASON_ERROR,
}
_NUMBERS: Final = {
    "temperature": "temperature",
    "top_p": "topP",
    "top_k": "topK",
    "seed": "seed",
    "presence_penalty": "presencePenalty",
    "frequency_penalty": "frequencyPenalty",
}


def request_of(prompt: Prompt) -> dict[str, Any]:
    """The body of a generateContent request."""
    conversation: conversation_pb2.Conversation = prompt.conversation
    system: list[dict[str, Any]] = []
    contents: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for message in conversation.messages:
        if message.role in _SYSTEM:
            system += [{"text": part.text} for part in message.parts if part.text]
            continue
        role = "model" if message.role == conversation_pb2.ROLE_ASSISTANT else "user"
        # In order: an id may come again in a later turn, for another tool.
        names.update((part.tool_call.id, part.tool_call.name) for part in message.parts if part.HasField("tool_call"))
        parts = [made for part in message.parts if (made := _part(part, names, message.name)) is not None]
        if contents and contents[-1]["role"] == role:
            contents[-1]["parts"] += parts
        else:
            contents.append({"role": role, "parts": parts})
    body: dict[str, Any] = {"contents": contents}
    if system:
        body["systemInstruction"] = {"parts": system}
    if conversation.tools:
        declarations = []
        for tool in conversation.tools:
            declared: dict[str, Any] = {"name": tool.name, "description": tool.description}
            if tool.parameters_json_schema:
                declared["parametersJsonSchema"] = json_of(tool.parameters_json_schema, "conversation.tools")
            declarations.append(declared)
        body["tools"] = [{"functionDeclarations": declarations}]
        calling = _calling(conversation)
        if calling is not None:
            body["toolConfig"] = {"functionCallingConfig": calling}
    configuration = _configuration(conversation, prompt.max_output_tokens)
    if configuration:
        body["generationConfig"] = configuration
    return body


def _calling(conversation: conversation_pb2.Conversation) -> dict[str, Any] | None:
    choice = conversation.tool_choice
    mode = _MODES.get(choice.mode, "ANY") if conversation.HasField("tool_choice") else "AUTO"
    # Gemini has strictness for all tools at once: ANY holds the calls to their schemas, VALIDATED does where the model may also talk.
    if mode == "AUTO" and any(tool.strict for tool in conversation.tools):
        return {"mode": "VALIDATED"}
    if not conversation.HasField("tool_choice"):
        return None
    if choice.mode == conversation_pb2.TOOL_CHOICE_MODE_NAMED:
        return {"mode": mode, "allowedFunctionNames": [choice.name]}
    return {"mode": mode}


def _configuration(conversation: conversation_pb2.Conversation, most: int) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if most:
        made["maxOutputTokens"] = most
    sampling = conversation.sampling
    for name, theirs in _NUMBERS.items():
        if sampling.HasField(name):  # type: ignore[arg-type]  # all are literals of the stub
            made[theirs] = getattr(sampling, name)
    if conversation.stop_sequences:
        made["stopSequences"] = list(conversation.stop_sequences)
    wanted = conversation.response_format
    if wanted.kind in (conversation_pb2.RESPONSE_FORMAT_KIND_JSON_OBJECT, conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA):
        made["responseMimeType"] = "application/json"
        if wanted.json_schema:
            # Gemini draws the answer by a grammar of the schema: `strict` is what it does anyway.
            made["responseJsonSchema"] = described_schema(wanted)
    budget = _BUDGETS.get(conversation.reasoning_effort)
    if budget is not None:
        made["thinkingConfig"] = {"thinkingBudget": budget, "includeThoughts": budget > 0}
    return made


def _part(part: conversation_pb2.Part, names: Mapping[str, str], name: str) -> dict[str, Any] | None:
    """`names`: of the tools by call; `name`: the turn's own, for a result whose call isn't there."""
    match part.WhichOneof("kind"):
        case "text":
            return {"text": part.text} if part.text else None
        case "refusal":
            return {"text": part.refusal} if part.refusal else None
        case "image":
            image = part.image
            if image.WhichOneof("source") == "url":
                return {"fileData": {"fileUri": image.url, "mimeType": image.media_type or "image/png"}}
            return {"inlineData": {"mimeType": image.media_type or "image/png", "data": base64.b64encode(image.data).decode()}}
        case "tool_call":
            return {
                "functionCall": {
                    "id": part.tool_call.id,
                    "name": part.tool_call.name,
                    "args": json_of(part.tool_call.arguments_json or "{}", "conversation.messages"),
                }
            }
        case "tool_result":
            result = part.tool_result
            key = "error" if result.is_error else "output"
            return {
                "functionResponse": {
                    # Two calls of one tool can be told apart by their ids alone.
                    "id": result.tool_call_id,
                    "name": names.get(result.tool_call_id) or name or result.tool_call_id,
                    "response": {key: result.text},
                }
            }
        case _:
            # Thinking isn't taken back as words.
            return None


class Gathered:
    """An answer that is put together from one response or the chunks of a stream, which have the same shape."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._parts: list[tuple[str, list[str], Any]] = []
        self._calls = 0
        self._size = 0
        self._id = ""
        self.finish = answer_pb2.FINISH_REASON_UNSPECIFIED
        self._usage = answer_pb2.Usage()

    def take(self, document: Any) -> list[answer_pb2.Delta]:
        """Adds a response and returns its pieces. Raises AttemptFailed."""
        try:
            if document.get("error"):
                raise stream_fault(document["error"])
            self._id = self._id or str(document.get("responseId") or "")[:256]
            raw = document.get("usageMetadata")
            if raw:
                _usage_of(raw, self._usage)
            if document.get("promptFeedback", {}).get("blockReason"):
                self.finish = answer_pb2.FINISH_REASON_CONTENT_FILTER
            deltas: list[answer_pb2.Delta] = []
            for candidate in (document.get("candidates") or ())[:1]:
                for part in (candidate.get("content") or {}).get("parts") or ():
                    deltas += self._part(part)
                if candidate.get("finishReason"):
                    self.finish = _FINISHES.get(candidate["finishReason"], answer_pb2.FINISH_REASON_ERROR)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise malformed(f"no response ({type(error).__name__})") from None
        return deltas

    def _part(self, part: Mapping[str, Any]) -> list[answer_pb2.Delta]:
        if "functionCall" in part:
            call = part["functionCall"]
            arguments = orjson.dumps(call.get("args") or {}).decode()
            # Older models give no ids, and one must be unique in the conversation, not in the answer alone.
            identity = call.get("id") or f"call_{self._id[:64]}_{self._calls}"
            made = answer_pb2.ToolCallDelta(index=self._calls, id=identity, name=call["name"], arguments_json=arguments)
            self._calls += 1
            self._parts.append(("call", [arguments], made))
            return [answer_pb2.Delta(tool_call=made)]
        text = part.get("text")
        if not text:
            return []
        kind = "reasoning" if part.get("thought") else "text"
        self._size += len(text)
        if self._size <= MOST_KEPT:
            if not self._parts or self._parts[-1][0] != kind:
                self._parts.append((kind, [], None))
            self._parts[-1][1].append(text)
        if kind == "reasoning":
            return [answer_pb2.Delta(reasoning=conversation_pb2.Reasoning(text=text))]
        return [answer_pb2.Delta(text=text)]

    def answer(self) -> answer_pb2.Answer:
        """The whole answer. Raises AttemptFailed when the stream ended before it."""
        if self.finish == answer_pb2.FINISH_REASON_UNSPECIFIED:
            raise AttemptFailed(Reason.PROVIDER_STREAM_BROKEN, "the provider's answer has no end")
        answer = answer_pb2.Answer(model=self._model, provider_response_id=self._id, finish_reason=self.finish)
        answer.usage.CopyFrom(self._usage)
        answer.message.role = conversation_pb2.ROLE_ASSISTANT
        if self._calls and self.finish == answer_pb2.FINISH_REASON_STOP:
            answer.finish_reason = answer_pb2.FINISH_REASON_TOOL_CALLS
        if self._size <= MOST_KEPT:
            for kind, pieces, call in self._parts:
                part = answer.message.parts.add()
                if kind == "call":
                    part.tool_call.id, part.tool_call.name, part.tool_call.arguments_json = (
                        call.id,
                        call.name,
                        call.arguments_json,
                    )
                elif kind == "reasoning":
                    part.reasoning.text = "".join(pieces)
                else:
                    part.text = "".join(pieces)
        return answer


def _usage_of(raw: Mapping[str, Any], usage: answer_pb2.Usage) -> None:
    thoughts = raw.get("thoughtsTokenCount") or 0
    usage.input_token_count = raw.get("promptTokenCount") or 0
    usage.cached_input_token_count = raw.get("cachedContentTokenCount") or 0
    usage.output_token_count = (raw.get("candidatesTokenCount") or 0) + thoughts
    usage.reasoning_token_count = thoughts
    usage.source = answer_pb2.USAGE_SOURCE_REPORTED


class GeminiProvider:
    """Gemini."""

    kind: Final = "gemini"
    wire: Final = 0

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
        self._probe_path = probe_path or "/v1beta/models?pageSize=1"
        self._idle = idle_timeout

    def _head(self, method: str, path: str, accept: str) -> bytes:
        headers = {"content-type": "application/json", "accept": accept, "user-agent": "sluice/0.1", **self._headers}
        if secret := self._secret():
            headers["x-goog-api-key"] = secret
        return self._pool.head(method, path, headers)

    async def complete(self, prompt: Prompt) -> Completed:
        """See Provider."""
        head = self._head("POST", f"/v1beta/models/{prompt.upstream_model}:generateContent", "application/json")
        response = await self._pool.exchange(head, orjson.dumps(request_of(prompt)), prompt.deadline, prompt.gate)
        if response.status != 200:
            raise fault(response.status, response.headers, response.body, self._secret())
        gathered = Gathered(prompt.model)
        try:
            gathered.take(orjson.loads(response.body))
        except orjson.JSONDecodeError:
            raise malformed("no JSON") from None
        return Completed(gathered.answer())

    async def stream(self, prompt: Prompt) -> AsyncIterator[Any]:
        """See Provider."""
        head = self._head("POST", f"/v1beta/models/{prompt.upstream_model}:streamGenerateContent?alt=sse", "text/event-stream")
        connection, response = await self._pool.open_stream(
            head, orjson.dumps(request_of(prompt)), prompt.deadline, prompt.gate
        )
        pieces = connection.pieces(self._idle, prompt.deadline)
        gathered = Gathered(prompt.model)
        cutter = EventCutter()
        try:
            if response.status != 200:
                raise fault(response.status, response.headers, await beginning(pieces), self._secret())
            async for piece in pieces:
                deltas: list[answer_pb2.Delta] = []
                for event in events(cutter.whole(piece)):
                    data = data_of(event)
                    if not data:
                        continue
                    try:
                        deltas += gathered.take(orjson.loads(data))
                    except orjson.JSONDecodeError:
                        raise malformed("no JSON in an event") from None
                if deltas:
                    yield execution_service_pb2.DeltaBatch(deltas=deltas)
            yield Completed(gathered.answer())
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]  # an async generator

    async def embed(self, prompt: EmbeddingPrompt) -> Embedded:
        """See Provider."""
        requests = []
        for text in prompt.inputs:
            one: dict[str, Any] = {"model": f"models/{prompt.upstream_model}", "content": {"parts": [{"text": text}]}}
            if prompt.dimensions is not None:
                one["outputDimensionality"] = prompt.dimensions
            requests.append(one)
        head = self._head("POST", f"/v1beta/models/{prompt.upstream_model}:batchEmbedContents", "application/json")
        response = await self._pool.exchange(head, orjson.dumps({"requests": requests}), prompt.deadline, prompt.gate)
        if response.status != 200:
            raise fault(response.status, response.headers, response.body, self._secret())
        try:
            vectors = [row["values"] for row in orjson.loads(response.body)["embeddings"]]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            raise malformed("no embeddings") from None
        if len(vectors) != len(prompt.inputs):
            raise malformed(f"{len(vectors)} vectors for {len(prompt.inputs)} texts")
        return Embedded(vectors, answer_pb2.Usage())

    async def probe(self, deadline: float) -> None:
        """See Provider."""
        response = await self._pool.exchange(self._head("GET", self._probe_path, "application/json"), b"", deadline, ungated)
        if response.status >= 400:
            raise fault(response.status, response.headers, b"", self._secret())

    async def close(self) -> None:
        """See Provider."""
        self._pool.close()
