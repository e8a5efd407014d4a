"""Anthropic's JSON and the messages of `sluice.inference.v1`, both ways. Pure.

Every field of a request is either carried over, or refused by name. Accepted without effect, since they ask for nothing that changes the
answer: `cache_control` (a hint to the provider's own prompt cache), `service_tier: auto`, `citations: {enabled: false}`; null asks for
nothing. `thinking` becomes the reasoning effort, since a budget of tokens means something to one provider only; `redacted_thinking` of
earlier turns can't be carried to another provider and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final

import orjson

from services.gateway.core import Completion, Opened
from services.gateway.edge import payload
from services.gateway.edge.openai import ChatCall, receipt_to_json
from services.gateway.edge.payload import FieldUnsupported, RequestInvalid
from sluice.execution.v1 import execution_service_pb2
from sluice.inference.v1 import answer_pb2, conversation_pb2, inference_service_pb2, receipt_pb2

_SYSTEM: Final = conversation_pb2.ROLE_SYSTEM
_USER: Final = conversation_pb2.ROLE_USER
_ASSISTANT: Final = conversation_pb2.ROLE_ASSISTANT
_TOOL: Final = conversation_pb2.ROLE_TOOL
_MAX_PAGE: Final = 1000
_PAGE: Final = 20
_LOW_BUDGET: Final = 4096
_MEDIUM_BUDGET: Final = 16_384
_MIN_BUDGET: Final = 1024
_CREATED: Final = "1970-01-01T00:00:00Z"
"""The catalogue doesn't know when a model was made."""

STOP_REASONS: Final[Mapping[int, str]] = MappingProxyType(
    {
        answer_pb2.FINISH_REASON_STOP: "end_turn",
        answer_pb2.FINISH_REASON_LENGTH: "max_tokens",
        answer_pb2.FINISH_REASON_TOOL_CALLS: "tool_use",
        answer_pb2.FINISH_REASON_CONTENT_FILTER: "refusal",
        # Anthropic has no word for these; all three mean that the text stops short.
        answer_pb2.FINISH_REASON_BUDGET: "max_tokens",
        answer_pb2.FINISH_REASON_ERROR: "max_tokens",
        answer_pb2.FINISH_REASON_CANCELLED: "max_tokens",
    }
)
_EFFORTS: Final[Mapping[str, conversation_pb2.ReasoningEffort.ValueType]] = MappingProxyType(
    {
        "low": conversation_pb2.REASONING_EFFORT_LOW,
        "medium": conversation_pb2.REASONING_EFFORT_MEDIUM,
        "high": conversation_pb2.REASONING_EFFORT_HIGH,
    }
)
_CHOICES: Final[Mapping[str, conversation_pb2.ToolChoiceMode.ValueType]] = MappingProxyType(
    {
        "auto": conversation_pb2.TOOL_CHOICE_MODE_AUTO,
        "any": conversation_pb2.TOOL_CHOICE_MODE_REQUIRED,
        "none": conversation_pb2.TOOL_CHOICE_MODE_NONE,
        "tool": conversation_pb2.TOOL_CHOICE_MODE_NAMED,
    }
)

# Requests


def message_from_json(body: bytes | bytearray) -> ChatCall:
    """The call that the body of POST /v1/messages asks for. RequestInvalid, FieldUnsupported."""
    call = _read(body, _FIELDS)
    if not call.request.conversation.HasField("max_output_tokens"):
        raise RequestInvalid("max_tokens", "is required")
    return call


def count_from_json(body: bytes | bytearray) -> ChatCall:
    """The call that the body of POST /v1/messages/count_tokens asks for. RequestInvalid, FieldUnsupported."""
    return _read(body, _COUNT_FIELDS)


def _read(body: bytes | bytearray, readers: Mapping[str, Callable[[ChatCall, object], None]]) -> ChatCall:
    fields = payload.read_object(body)
    call = ChatCall()
    # The system turns stand outside of the messages and come first.
    system = fields.get("system")
    if system is not None:
        _system(call, system)
    for name, value in fields.items():
        if name == "system":
            continue
        read = readers.get(name)
        if read is None:
            if value is None and name in _NULL_ONLY:
                continue
            raise FieldUnsupported(name)
        if value is not None:
            read(call, value)
    if fields.get("messages") is None:
        raise RequestInvalid("messages", "is required")
    if fields.get("model") is None:
        raise RequestInvalid("model", "is required; `auto` lets the default policy choose")
    return call


def _system(call: ChatCall, value: object) -> None:
    message = call.request.conversation.messages.add(role=_SYSTEM)
    if type(value) is str:
        message.parts.add().text = value
        return
    for index, item in enumerate(payload.array(value, "system")):
        path = f"system[{index}]"
        item = payload.mapping(item, path)
        if (kind := item.get("type")) != "text":
            raise FieldUnsupported(f"{path}.type", f"must be text here, is {payload.shown(kind)}")
        message.parts.add().text = _text_block(item, path)
    if not message.parts:
        raise RequestInvalid("system", "must not be empty")


def _model(call: ChatCall, value: object) -> None:
    call.request.routing.model = payload.text(value, "model")


def _messages(call: ChatCall, value: object) -> None:
    messages = call.request.conversation.messages
    for index, item in enumerate(payload.array(value, "messages")):
        path = f"messages[{index}]"
        item = payload.mapping(item, path)
        payload.only(item, ("role", "content"), path)
        role = payload.choice(payload.required(item, "role", path), f"{path}.role", ("user", "assistant"))
        content = payload.required(item, "content", path)
        if type(content) is str:
            messages.add(role=_USER if role == "user" else _ASSISTANT).parts.add().text = content
            continue
        blocks = payload.array(content, f"{path}.content")
        if not blocks:
            raise RequestInvalid(f"{path}.content", "must not be empty")
        if role == "user":
            _read_user(call.request.conversation, blocks, f"{path}.content")
        else:
            message = messages.add(role=_ASSISTANT)
            for number, block in enumerate(blocks):
                _read_assistant_block(message, block, f"{path}.content[{number}]")


def _read_user(conversation: conversation_pb2.Conversation, blocks: list[Any], path: str) -> None:
    """Results of tools are turns of their own with us; they stand before what the user says, as Anthropic demands too."""
    message: conversation_pb2.Message | None = None
    for number, block in enumerate(blocks):
        where = f"{path}[{number}]"
        block = payload.mapping(block, where)
        kind = block.get("type")
        if kind == "tool_result":
            if message is not None:
                raise RequestInvalid(where, "results of tools must come before other content of the turn")
            _read_result(conversation.messages.add(role=_TOOL).parts.add().tool_result, block, where)
            continue
        if message is None:
            message = conversation.messages.add(role=_USER)
        if kind == "text":
            message.parts.add().text = _text_block(block, where)
        elif kind == "image":
            _read_image(message.parts.add().image, block, where)
        else:
            _refuse_kind(kind, where, "text, image, tool_result")


def _read_assistant_block(message: conversation_pb2.Message, block: object, path: str) -> None:
    item = payload.mapping(block, path)
    kind = item.get("type")
    if kind == "text":
        message.parts.add().text = _text_block(item, path)
    elif kind == "tool_use":
        payload.only(item, ("type", "id", "name", "input", "cache_control", "caller"), path)
        call = message.parts.add().tool_call
        call.id = payload.text(payload.required(item, "id", path), f"{path}.id")
        call.name = payload.text(payload.required(item, "name", path), f"{path}.name")
        call.arguments_json = payload.json_text(payload.required(item, "input", path), f"{path}.input")
    elif kind == "thinking":
        payload.only(item, ("type", "thinking", "signature"), path)
        reasoning = message.parts.add().reasoning
        reasoning.text = payload.text(payload.required(item, "thinking", path), f"{path}.thinking")
        if (signature := item.get("signature")) is not None:
            reasoning.signature = payload.text(signature, f"{path}.signature")
    else:
        _refuse_kind(kind, path, "text, tool_use, thinking")


def _refuse_kind(kind: object, path: str, kinds: str) -> None:
    if kind is None:
        raise RequestInvalid(f"{path}.type", "is required")
    raise FieldUnsupported(f"{path}.type", f"must be one of {kinds} here, is {payload.shown(kind)}")


def _text_block(item: Mapping[str, Any], path: str) -> str:
    payload.only(item, ("type", "text", "cache_control", "citations"), path)
    if item.get("citations"):
        raise FieldUnsupported(f"{path}.citations")
    return payload.text(payload.required(item, "text", path), f"{path}.text")


def _read_image(image: conversation_pb2.Image, item: Mapping[str, Any], path: str) -> None:
    payload.only(item, ("type", "source", "cache_control"), path)
    where = f"{path}.source"
    source = payload.mapping(payload.required(item, "source", path), where)
    kind = payload.required(source, "type", where)
    if kind == "base64":
        payload.only(source, ("type", "media_type", "data"), where)
        media_type = payload.text(payload.required(source, "media_type", where), f"{where}.media_type")
        data = payload.text(payload.required(source, "data", where), f"{where}.data")
        payload.image_from_base64(image, data, media_type, f"{where}.data")
    elif kind == "url":
        payload.only(source, ("type", "url"), where)
        payload.image_from_url(image, payload.text(payload.required(source, "url", where), f"{where}.url"), f"{where}.url")
    else:
        raise FieldUnsupported(f"{where}.type", f"must be base64 or url, is {payload.shown(kind)}")


def _read_result(result: conversation_pb2.ToolResult, item: Mapping[str, Any], path: str) -> None:
    payload.only(item, ("type", "tool_use_id", "content", "is_error", "cache_control"), path)
    result.tool_call_id = payload.text(payload.required(item, "tool_use_id", path), f"{path}.tool_use_id")
    if (failed := item.get("is_error")) is not None:
        result.is_error = payload.boolean(failed, f"{path}.is_error")
    content = item.get("content")
    if content is None:
        return
    if type(content) is str:
        result.text = content
        return
    texts = []
    for number, block in enumerate(payload.array(content, f"{path}.content")):
        where = f"{path}.content[{number}]"
        block = payload.mapping(block, where)
        if (kind := block.get("type")) != "text":
            raise FieldUnsupported(f"{where}.type", f"a tool's result may have blocks of type text, not {payload.shown(kind)}")
        texts.append(_text_block(block, where))
    result.text = "".join(texts)


def _tools(call: ChatCall, value: object) -> None:
    for index, item in enumerate(payload.array(value, "tools")):
        path = f"tools[{index}]"
        item = payload.mapping(item, path)
        if (kind := item.get("type")) not in (None, "custom"):
            raise FieldUnsupported(f"{path}.type", f"only tools of your own are supported, not {payload.shown(kind)}")
        payload.only(item, ("type", "name", "description", "input_schema", "cache_control", "strict"), path)
        tool = call.request.conversation.tools.add()
        tool.name = payload.text(payload.required(item, "name", path), f"{path}.name")
        if (description := item.get("description")) is not None:
            tool.description = payload.text(description, f"{path}.description")
        tool.parameters_json_schema = payload.json_text(payload.required(item, "input_schema", path), f"{path}.input_schema")
        if (strict := item.get("strict")) is not None:
            tool.strict = payload.boolean(strict, f"{path}.strict")


def _tool_choice(call: ChatCall, value: object) -> None:
    item = payload.mapping(value, "tool_choice")
    kind = payload.choice(payload.required(item, "type", "tool_choice"), "tool_choice.type", tuple(_CHOICES))
    payload.only(item, ("type", "name", "disable_parallel_tool_use"), "tool_choice")
    conversation = call.request.conversation
    if kind != "auto":
        # `auto` is what happens without a choice; leaving it out keeps equal requests equal.
        conversation.tool_choice.mode = _CHOICES[kind]
    if kind == "tool":
        conversation.tool_choice.name = payload.text(payload.required(item, "name", "tool_choice"), "tool_choice.name")
    elif item.get("name") is not None:
        raise RequestInvalid("tool_choice.name", "may be set only with type: tool")
    if (alone := item.get("disable_parallel_tool_use")) is not None:
        conversation.parallel_tool_calls = not payload.boolean(alone, "tool_choice.disable_parallel_tool_use")


def _max_tokens(call: ChatCall, value: object) -> None:
    call.request.conversation.max_output_tokens = payload.integer(value, "max_tokens", 1, payload.INT32_MAX)


def _temperature(call: ChatCall, value: object) -> None:
    call.request.conversation.sampling.temperature = payload.number(value, "temperature", 0, 1)


def _top_p(call: ChatCall, value: object) -> None:
    call.request.conversation.sampling.top_p = payload.number(value, "top_p", 0, 1)


def _top_k(call: ChatCall, value: object) -> None:
    call.request.conversation.sampling.top_k = payload.integer(value, "top_k", 1, payload.INT32_MAX)


def _stop_sequences(call: ChatCall, value: object) -> None:
    for index, item in enumerate(payload.array(value, "stop_sequences")):
        call.request.conversation.stop_sequences.append(payload.text(item, f"stop_sequences[{index}]"))


def _stream(call: ChatCall, value: object) -> None:
    call.stream = payload.boolean(value, "stream")


def _metadata(call: ChatCall, value: object) -> None:
    item = payload.mapping(value, "metadata")
    payload.only(item, ("user_id",), "metadata")
    if (user := item.get("user_id")) is not None:
        call.request.end_user = payload.text(user, "metadata.user_id")


def _thinking(call: ChatCall, value: object) -> None:
    item = payload.mapping(value, "thinking")
    kind = payload.choice(payload.required(item, "type", "thinking"), "thinking.type", ("enabled", "disabled", "adaptive"))
    conversation = call.request.conversation
    if kind == "disabled":
        payload.only(item, ("type",), "thinking")
        conversation.reasoning_effort = conversation_pb2.REASONING_EFFORT_NONE
        return
    if kind == "adaptive":
        payload.only(item, ("type", "display"), "thinking")
        _display(item)
        if not conversation.reasoning_effort:
            conversation.reasoning_effort = conversation_pb2.REASONING_EFFORT_MEDIUM
        return
    payload.only(item, ("type", "budget_tokens", "display"), "thinking")
    _display(item)
    budget = payload.integer(
        payload.required(item, "budget_tokens", "thinking"), "thinking.budget_tokens", _MIN_BUDGET, payload.INT32_MAX
    )
    if budget <= _LOW_BUDGET:
        conversation.reasoning_effort = conversation_pb2.REASONING_EFFORT_LOW
    elif budget <= _MEDIUM_BUDGET:
        conversation.reasoning_effort = conversation_pb2.REASONING_EFFORT_MEDIUM
    else:
        conversation.reasoning_effort = conversation_pb2.REASONING_EFFORT_HIGH


def _display(item: Mapping[str, Any]) -> None:
    if item.get("display") not in (None, "summarized"):
        raise FieldUnsupported("thinking.display", "what the provider shows of its thinking is passed on as it comes")


def _output_config(call: ChatCall, value: object) -> None:
    item = payload.mapping(value, "output_config")
    payload.only(item, ("format", "effort"), "output_config")
    if (effort := item.get("effort")) is not None:
        call.request.conversation.reasoning_effort = _EFFORTS[payload.choice(effort, "output_config.effort", tuple(_EFFORTS))]
    form = item.get("format")
    if form is not None:
        path = "output_config.format"
        form = payload.mapping(form, path)
        payload.only(form, ("type", "schema"), path)
        payload.choice(payload.required(form, "type", path), f"{path}.type", ("json_schema",))
        wanted = call.request.conversation.response_format
        wanted.kind = conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA
        wanted.json_schema = payload.json_text(payload.required(form, "schema", path), f"{path}.schema")
        wanted.name = "answer"


def _service_tier(call: ChatCall, value: object) -> None:
    payload.choice(value, "service_tier", ("auto", "standard_only"))


def _cache_control(call: ChatCall, value: object) -> None:
    """A hint to the provider's own cache."""
    payload.mapping(value, "cache_control")


_COUNT_FIELDS: Final[Mapping[str, Callable[[ChatCall, object], None]]] = MappingProxyType(
    {
        "model": _model,
        "messages": _messages,
        "tools": _tools,
        "tool_choice": _tool_choice,
        "thinking": _thinking,
        "output_config": _output_config,
        "cache_control": _cache_control,
    }
)
_FIELDS: Final[Mapping[str, Callable[[ChatCall, object], None]]] = MappingProxyType(
    {
        **_COUNT_FIELDS,
        "max_tokens": _max_tokens,
        "temperature": _temperature,
        "top_p": _top_p,
        "top_k": _top_k,
        "stop_sequences": _stop_sequences,
        "stream": _stream,
        "metadata": _metadata,
        "service_tier": _service_tier,
    }
)
_NULL_ONLY: Final = frozenset({"container", "context_management", "inference_geo", "mcp_servers", "output_format", "speed"})

# Answers


def message_to_json(completion: Completion, receipt: receipt_pb2.Receipt | None = None) -> bytes:
    """The body of a whole message; with a receipt it stands in the field `sluice`."""
    answer = completion.answer
    body: dict[str, Any] = {
        "id": "msg_" + completion.operation_id,
        "type": "message",
        "role": "assistant",
        "model": answer.model,
        "content": content_to_json(answer.message),
        **_stop(answer),
        "usage": usage_to_json(answer.usage),
    }
    if receipt is not None:
        body["sluice"] = receipt_to_json(receipt)
    return orjson.dumps(body)


def content_to_json(message: conversation_pb2.Message) -> list[dict[str, Any]]:
    """An assistant's turn as Anthropic has it."""
    blocks: list[dict[str, Any]] = []
    for part in message.parts:
        kind = part.WhichOneof("kind")
        if kind == "text":
            if part.text:
                blocks.append({"type": "text", "text": part.text, "citations": None})
        elif kind == "refusal":
            blocks.append({"type": "text", "text": part.refusal, "citations": None})
        elif kind == "tool_call":
            call = part.tool_call
            blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": _input(call.arguments_json)})
        elif kind == "reasoning":
            blocks.append({"type": "thinking", "thinking": part.reasoning.text, "signature": part.reasoning.signature})
    return blocks


def _input(arguments: str) -> Any:
    """A tool's input must be an object. A model that wrote none has its text kept where it can be seen."""
    try:
        value = orjson.loads(arguments) if arguments else {}
    except orjson.JSONDecodeError:
        return {"_malformed": arguments}
    return value if isinstance(value, dict) else {"_malformed": arguments}


def _stop(answer: answer_pb2.Answer) -> dict[str, Any]:
    if answer.stop_sequence and answer.finish_reason == answer_pb2.FINISH_REASON_STOP:
        return {"stop_reason": "stop_sequence", "stop_sequence": answer.stop_sequence}
    return {"stop_reason": STOP_REASONS.get(answer.finish_reason, "end_turn"), "stop_sequence": None}


def usage_to_json(usage: answer_pb2.Usage) -> dict[str, Any]:
    """Token counts as Anthropic has them: its input leaves out what its cache gave or took."""
    cached, written = usage.cached_input_token_count, usage.cache_write_token_count
    return {
        "input_tokens": max(0, usage.input_token_count - cached - written),
        "output_tokens": usage.output_token_count,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": written,
    }


def count_to_json(count: receipt_pb2.TokenCount) -> bytes:
    """The body of a token count. Where it is an estimate its bound is said beside it."""
    body: dict[str, Any] = {"input_tokens": count.token_count}
    if count.error_bound:
        body["sluice"] = {"error_bound": count.error_bound, "tokenizer": count.tokenizer}
    return orjson.dumps(body)


def model_to_json(model: inference_service_pb2.Model) -> dict[str, Any]:
    """A model as Anthropic lists it."""
    return {"type": "model", "id": model.id, "display_name": model.display_name or model.id, "created_at": _CREATED}


def models_to_json(models: Iterable[inference_service_pb2.Model], query: Mapping[str, str]) -> bytes:
    """The body of GET /v1/models: the page that `limit`, `after_id` and `before_id` ask for. RequestInvalid."""
    payload.only(query, ("limit", "after_id", "before_id"), "")
    limit = query.get("limit", str(_PAGE))
    if not (limit.isascii() and limit.isdigit() and len(limit) <= 4 and 1 <= int(limit) <= _MAX_PAGE):
        raise RequestInvalid("limit", f"must be 1 to {_MAX_PAGE}, is {payload.shown(limit)}")
    size = int(limit)
    listed = [model_to_json(model) for model in models]
    ids = [row["id"] for row in listed]
    if "before_id" in query:
        if "after_id" in query:
            raise RequestInvalid("before_id", "may not be set together with after_id")
        end = _place(ids, query["before_id"], "before_id")
        page = listed[max(0, end - size) : end]
        has_more = end > size
    else:
        start = _place(ids, query["after_id"], "after_id") + 1 if "after_id" in query else 0
        page = listed[start : start + size]
        has_more = start + size < len(listed)
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    return orjson.dumps({"data": page, "has_more": has_more, "first_id": first, "last_id": last})


def _place(ids: list[str], wanted: str, path: str) -> int:
    try:
        return ids.index(wanted)
    except ValueError:
        raise RequestInvalid(path, f"{payload.shown(wanted)} is not in the list") from None


class MessageStream:
    """The events of one streamed message."""

    __slots__ = ("_block", "_index", "_is_wire", "_opened")

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._is_wire = opened.is_wire
        self._index = -1
        self._block = ""
        """What the open block is: a kind, or `tool_call:<index>`; empty: none is open."""

    def begin(self) -> bytes:
        """What comes before the first piece; empty with wire bytes, which have their own."""
        if self._is_wire:
            return b""
        start = {
            "type": "message_start",
            "message": {
                "id": "msg_" + self._opened.operation_id,
                "type": "message",
                "role": "assistant",
                "model": self._opened.model,
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                # The provider's own count comes with the last event.
                "usage": {"input_tokens": 0, "output_tokens": 0},
            },
        }
        return _event(b"message_start", orjson.dumps(start)) + b'event: ping\ndata: {"type":"ping"}\n\n'

    def pieces(self, batch: execution_service_pb2.DeltaBatch) -> bytes:
        """The events of what arrived together; neighbouring texts become one."""
        deltas = batch.deltas
        if len(deltas) == 1 and self._block == "text":
            delta = deltas[0]
            if delta.HasField("text"):
                return self._piece(b'{"type":"text_delta","text":%b}' % orjson.dumps(delta.text))
        events: list[bytes] = []
        for delta in deltas:
            kind = delta.WhichOneof("kind")
            if kind == "text":
                self._enter(events, "text", b'{"type":"text","text":""}')
                events.append(self._piece(b'{"type":"text_delta","text":%b}' % orjson.dumps(delta.text)))
            elif kind == "refusal":
                self._enter(events, "text", b'{"type":"text","text":""}')
                events.append(self._piece(b'{"type":"text_delta","text":%b}' % orjson.dumps(delta.refusal)))
            elif kind == "tool_call":
                self._tool_call(events, delta.tool_call)
            elif kind == "reasoning":
                self._enter(events, "thinking", b'{"type":"thinking","thinking":"","signature":""}')
                if delta.reasoning.text:
                    text = orjson.dumps(delta.reasoning.text)
                    events.append(self._piece(b'{"type":"thinking_delta","thinking":%b}' % text))
                if delta.reasoning.signature:
                    signature = orjson.dumps(delta.reasoning.signature)
                    events.append(self._piece(b'{"type":"signature_delta","signature":%b}' % signature))
        return b"".join(events)

    def end(self, completion: Completion, receipt: receipt_pb2.Receipt | None = None) -> bytes:
        """What comes after the last piece: the end of the block, the stop reason and usage, a receipt where there is one, the end.

        With wire bytes, the provider's events up to the end of its last block went through; these two it does not get to write.
        """
        events: list[bytes] = []
        self._leave(events)
        answer = completion.answer
        last: dict[str, Any] = {"type": "message_delta", "delta": _stop(answer), "usage": usage_to_json(answer.usage)}
        if receipt is not None:
            last["sluice"] = receipt_to_json(receipt)
        events.append(_event(b"message_delta", orjson.dumps(last)))
        events.append(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')
        return b"".join(events)

    def _tool_call(self, events: list[bytes], piece: answer_pb2.ToolCallDelta) -> None:
        name = f"tool_call:{piece.index}"
        if self._block != name:
            block = {"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}}
            self._enter(events, name, orjson.dumps(block))
        if piece.arguments_json:
            events.append(self._piece(b'{"type":"input_json_delta","partial_json":%b}' % orjson.dumps(piece.arguments_json)))

    def _enter(self, events: list[bytes], block: str, start: bytes) -> None:
        if self._block == block:
            return
        self._leave(events)
        self._index += 1
        self._block = block
        data = b'{"type":"content_block_start","index":%d,"content_block":%b}' % (self._index, start)
        events.append(_event(b"content_block_start", data))

    def _leave(self, events: list[bytes]) -> None:
        if self._block:
            self._block = ""
            events.append(_event(b"content_block_stop", b'{"type":"content_block_stop","index":%d}' % self._index))

    def _piece(self, delta: bytes) -> bytes:
        return b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":%b}\n\n' % (
            self._index,
            delta,
        )


def _event(name: bytes, data: bytes) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name, data)
