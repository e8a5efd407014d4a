"""Anthropic's JSON and the messages of `sluice.inference.v1`, both ways. Pure.

Every field of a request is either carried over, or refused by name. Accepted without effect, since their only accepted value is what
happens anyway: `service_tier: auto`, `speed: standard`, `thinking.display: summarized`, a tool's `type: custom`,
`defer_loading: false` and `allowed_callers: ["direct"]`, a call's `caller: {"type": "direct"}`; null asks for nothing.
`cache_control` is checked and goes no further: it is a hint that may save money and never changes the answer. `redacted_thinking` of
earlier turns can't be carried to another provider and is refused.

Carried over with a change of unit: `thinking.budget_tokens` becomes the greatest reasoning effort whose usual budget it covers,
`thinking: adaptive` the effort of `output_config.effort`, by default high as at Anthropic. A user turn with results of tools becomes a
tool turn and a user turn, in the order of its blocks. `output_format` is the older spelling of `output_config.format`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import orjson

from services.gateway.core import Completion
from services.gateway.edge import payload
from services.gateway.edge.errors import EdgeError
from services.gateway.edge.openai import ChatCall, receipt_to_json
from services.gateway.edge.passing import swaps_of
from services.gateway.edge.payload import FieldUnsupported, RequestInvalid
from services.gateway.events import Opened
from services.runtime.errors import Reason
from sluice.execution.v1 import execution_service_pb2
from sluice.inference.v1 import answer_pb2, conversation_pb2, inference_service_pb2, receipt_pb2

INVALID_JSON: Final = "INVALID_JSON"
"""Key under which arguments stand that are no JSON object, in whole answers: `input` must be one. Anthropic's advice for such."""

_SYSTEM: Final = conversation_pb2.ROLE_SYSTEM
_USER: Final = conversation_pb2.ROLE_USER
_ASSISTANT: Final = conversation_pb2.ROLE_ASSISTANT
_TOOL: Final = conversation_pb2.ROLE_TOOL

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

_BUDGETS: Final = (
    # What the efforts usually cost, in tokens, greatest first. Execution's adapter spends the same.
    (24576, conversation_pb2.REASONING_EFFORT_HIGH),
    (8192, conversation_pb2.REASONING_EFFORT_MEDIUM),
    (2048, conversation_pb2.REASONING_EFFORT_LOW),
    (0, conversation_pb2.REASONING_EFFORT_MINIMAL),
)
_LEAST_BUDGET: Final = 1024

_EFFORTS: Final[Mapping[str, conversation_pb2.ReasoningEffort.ValueType]] = MappingProxyType(
    {
        "low": conversation_pb2.REASONING_EFFORT_LOW,
        "medium": conversation_pb2.REASONING_EFFORT_MEDIUM,
        "high": conversation_pb2.REASONING_EFFORT_HIGH,
    }
)

_CREATED: Final = "1970-01-01T00:00:00Z"
_DEFAULT_PAGE: Final = 20
_MAX_PAGE: Final = 1000


# Requests


def message_from_json(body: bytes | bytearray) -> ChatCall:
    """The call that the body of POST /v1/messages asks for. RequestInvalid, FieldUnsupported."""
    fields = payload.read_object(body)
    call = _read(fields, _FIELDS)
    if fields.get("max_tokens") is None:
        raise RequestInvalid("max_tokens", "is required")
    return call


def count_from_json(body: bytes | bytearray) -> ChatCall:
    """The call whose prompt the body of POST /v1/messages/count_tokens wants counted. RequestInvalid, FieldUnsupported."""
    return _read(payload.read_object(body), _COUNT_FIELDS)


def _read(fields: dict[str, Any], known: Mapping[str, Callable[[ChatCall, Any], None]]) -> ChatCall:
    call = ChatCall()
    # Standing instructions come first, wherever they stand in the JSON.
    if (system := fields.get("system")) is not None:
        _system(call, system)
    for name, value in fields.items():
        if name == "system":
            continue
        read = known.get(name)
        if read is None:
            if value is None and name in _NULL_ONLY:
                continue
            payload.only({name: value}, _NULL_ONLY, "")
            raise FieldUnsupported(name)
        if value is not None:
            read(call, value)
    if fields.get("messages") is None:
        raise RequestInvalid("messages", "is required")
    if fields.get("model") is None:
        raise RequestInvalid("model", "is required; `auto` lets the default policy choose")
    if fields.get("thinking") is not None or fields.get("output_config") is not None:
        _effort(call, fields)
    return call


def _model(call: ChatCall, value: object) -> None:
    call.request.routing.model = payload.text(value, "model")


def _system(call: ChatCall, value: object) -> None:
    if value == "" or value == []:
        return
    message = call.request.conversation.messages.add()
    message.role = _SYSTEM
    _read_texts(message, value, "system")


def _messages(call: ChatCall, value: object) -> None:
    conversation = call.request.conversation
    for index, item in enumerate(payload.array(value, "messages")):
        if type(item) is not dict:
            raise RequestInvalid(f"messages[{index}]", f"must be an object, is {payload.shown(item)}")
        role = item.get("role")
        read = _ROLES.get(role) if type(role) is str else None
        if read is None:
            if role is None:
                raise RequestInvalid(f"messages[{index}].role", "is required")
            raise RequestInvalid(f"messages[{index}].role", f"must be one of {', '.join(_ROLES)}, is {payload.shown(role)}")
        read(conversation, item, index)


def _read_user(conversation: conversation_pb2.Conversation, item: dict[str, Any], index: int) -> None:
    content = item.get("content")
    if type(content) is str and len(item) == 2:
        message = conversation.messages.add()
        message.role = _USER
        message.parts.add().text = content
        return
    path = f"messages[{index}]"
    payload.only(item, ("role", "content"), path)
    content = payload.required(item, "content", path)
    path += ".content"
    if content == []:
        raise RequestInvalid(path, "must not be empty")
    current: conversation_pb2.Message | None = None
    for number, block in enumerate(_blocks(content, path)):
        where = f"{path}[{number}]"
        kind = _kind(block, where, ("text", "image", "tool_result"))
        role = _TOOL if kind == "tool_result" else _USER
        if current is None or current.role != role:
            current = conversation.messages.add()
            current.role = role
        if kind == "text":
            current.parts.add().text = _text(block, where)
        elif kind == "image":
            _read_image(current.parts.add().image, block, where)
        else:
            _read_result(current.parts.add().tool_result, block, where)


def _read_assistant(conversation: conversation_pb2.Conversation, item: dict[str, Any], index: int) -> None:
    message = conversation.messages.add()
    message.role = _ASSISTANT
    content = item.get("content")
    if type(content) is str and len(item) == 2:
        message.parts.add().text = content
        return
    path = f"messages[{index}]"
    payload.only(item, ("role", "content"), path)
    content = payload.required(item, "content", path)
    path += ".content"
    if content == []:
        # The model's own answer when it had nothing to say.
        message.parts.add().text = ""
    for number, block in enumerate(_blocks(content, path)):
        where = f"{path}[{number}]"
        kind = _kind(block, where, ("text", "thinking", "tool_use"))
        if kind == "text":
            message.parts.add().text = _text(block, where)
        elif kind == "thinking":
            payload.only(block, ("type", "thinking", "signature"), where)
            reasoning = message.parts.add().reasoning
            reasoning.text = payload.text(payload.required(block, "thinking", where), f"{where}.thinking")
            if (signature := block.get("signature")) is not None:
                reasoning.signature = payload.text(signature, f"{where}.signature")
        else:
            _read_use(message.parts.add().tool_call, block, where)


def _read_standing(conversation: conversation_pb2.Conversation, item: dict[str, Any], index: int) -> None:
    path = f"messages[{index}]"
    payload.only(item, ("role", "content"), path)
    content = payload.required(item, "content", path)
    if content == []:
        raise RequestInvalid(f"{path}.content", "must not be empty")
    message = conversation.messages.add()
    message.role = _SYSTEM
    _read_texts(message, content, f"{path}.content")


def _read_texts(message: conversation_pb2.Message, content: object, path: str) -> None:
    for number, block in enumerate(_blocks(content, path)):
        where = f"{path}[{number}]"
        _kind(block, where, ("text",))
        message.parts.add().text = _text(block, where)


def _read_image(image: conversation_pb2.Image, block: dict[str, Any], where: str) -> None:
    payload.only(block, ("type", "source", "cache_control", "transformations"), where)
    _check_cache_control(block, where)
    if block.get("transformations"):
        raise FieldUnsupported(f"{where}.transformations")
    source = payload.mapping(payload.required(block, "source", where), f"{where}.source")
    where += ".source"
    kind = _kind(source, where, ("base64", "url"))
    if kind == "url":
        payload.only(source, ("type", "url"), where)
        url = payload.text(payload.required(source, "url", where), f"{where}.url")
        if not url.startswith("https://"):
            raise RequestInvalid(f"{where}.url", "must be an https: address")
        payload.image_from_url(image, url, f"{where}.url")
        return
    payload.only(source, ("type", "media_type", "data"), where)
    media_type = payload.text(payload.required(source, "media_type", where), f"{where}.media_type")
    encoded = payload.text(payload.required(source, "data", where), f"{where}.data")
    path = f"{where}.data" if media_type in payload.MEDIA_TYPES else f"{where}.media_type"
    payload.image_from_base64(image, encoded, media_type, path)


def _read_use(call: conversation_pb2.ToolCall, block: dict[str, Any], where: str) -> None:
    payload.only(block, ("type", "id", "name", "input", "cache_control", "caller", "toolset_name"), where)
    _check_cache_control(block, where)
    payload.null_only(block, ("toolset_name",), where)
    if block.get("caller") not in (None, {"type": "direct"}):
        raise FieldUnsupported(f"{where}.caller", "only direct calls are supported")
    call.id = payload.text(payload.required(block, "id", where), f"{where}.id")
    call.name = payload.text(payload.required(block, "name", where), f"{where}.name")
    call.arguments_json = payload.json_text(payload.required(block, "input", where), f"{where}.input")


def _read_result(result: conversation_pb2.ToolResult, block: dict[str, Any], where: str) -> None:
    payload.only(block, ("type", "tool_use_id", "content", "is_error", "cache_control", "toolset_name"), where)
    _check_cache_control(block, where)
    payload.null_only(block, ("toolset_name",), where)
    result.tool_call_id = payload.text(payload.required(block, "tool_use_id", where), f"{where}.tool_use_id")
    if (is_error := block.get("is_error")) is not None:
        result.is_error = payload.boolean(is_error, f"{where}.is_error")
    content = block.get("content")
    if content is None:
        return
    if type(content) is str:
        result.text = content
        return
    texts = []
    for number, part in enumerate(_blocks(content, f"{where}.content")):
        inner = f"{where}.content[{number}]"
        _kind(part, inner, ("text",))
        texts.append(_text(part, inner))
    result.text = "".join(texts)


def _blocks(content: object, path: str) -> list[dict[str, Any]]:
    """The blocks of a content, which may be a bare text."""
    if type(content) is str:
        return [{"type": "text", "text": content}]
    if type(content) is not list:
        raise RequestInvalid(path, f"must be a string or an array of blocks, is {payload.shown(content)}")
    for number, block in enumerate(content):
        if type(block) is not dict:
            raise RequestInvalid(f"{path}[{number}]", f"must be an object, is {payload.shown(block)}")
    return content


def _kind(block: dict[str, Any], where: str, kinds: tuple[str, ...]) -> str:
    """The type of a block, one of `kinds`."""
    kind = block.get("type")
    if kind is None:
        raise RequestInvalid(f"{where}.type", "is required")
    if type(kind) is not str:
        raise RequestInvalid(f"{where}.type", f"must be a string, is {payload.shown(kind)}")
    if kind not in kinds:
        raise FieldUnsupported(f"{where}.type", f"must be one of {', '.join(kinds)} here, is {payload.shown(kind)}")
    return kind


def _text(block: dict[str, Any], where: str) -> str:
    """The text of a text block."""
    if len(block) > 2:
        payload.only(block, ("type", "text", "cache_control", "citations"), where)
        _check_cache_control(block, where)
        # The SDK's own answer, sent back whole, has null.
        if block.get("citations"):
            raise FieldUnsupported(f"{where}.citations")
    return payload.text(payload.required(block, "text", where), f"{where}.text")


def _check_cache_control(item: Mapping[str, Any], where: str) -> None:
    value = item.get("cache_control")
    if value is None:
        return
    where = payload.inside(where, "cache_control")
    control = payload.mapping(value, where)
    payload.only(control, ("type", "ttl"), where)
    payload.choice(payload.required(control, "type", where), f"{where}.type", ("ephemeral",))
    if (ttl := control.get("ttl")) is not None:
        payload.choice(ttl, f"{where}.ttl", ("5m", "1h"))


def _tools(call: ChatCall, value: object) -> None:
    add = call.request.conversation.tools.add
    for index, item in enumerate(payload.array(value, "tools")):
        path = f"tools[{index}]"
        item = payload.mapping(item, path)
        if (kind := item.get("type")) not in (None, "custom"):
            raise FieldUnsupported(f"{path}.type", f"only custom tools are supported, not {payload.shown(kind)}")
        payload.only(item, _TOOL_KEYS, path)
        _check_cache_control(item, path)
        payload.null_only(item, ("eager_input_streaming",), path)
        if item.get("defer_loading"):
            raise FieldUnsupported(f"{path}.defer_loading", "may be false only")
        if item.get("input_examples"):
            raise FieldUnsupported(f"{path}.input_examples")
        if item.get("allowed_callers") not in (None, ["direct"]):
            raise FieldUnsupported(f"{path}.allowed_callers", 'may be ["direct"] only')
        tool = add()
        tool.name = payload.text(payload.required(item, "name", path), f"{path}.name")
        tool.parameters_json_schema = payload.json_text(payload.required(item, "input_schema", path), f"{path}.input_schema")
        if (description := item.get("description")) is not None:
            tool.description = payload.text(description, f"{path}.description")
        if (strict := item.get("strict")) is not None:
            tool.strict = payload.boolean(strict, f"{path}.strict")


def _tool_choice(call: ChatCall, value: object) -> None:
    item = payload.mapping(value, "tool_choice")
    kind = payload.choice(payload.required(item, "type", "tool_choice"), "tool_choice.type", _TOOL_CHOICES)
    payload.only(item, _TOOL_CHOICES[kind], "tool_choice")
    conversation = call.request.conversation
    if kind == "tool":
        conversation.tool_choice.mode = conversation_pb2.TOOL_CHOICE_MODE_NAMED
        conversation.tool_choice.name = payload.text(payload.required(item, "name", "tool_choice"), "tool_choice.name")
    elif kind == "any":
        conversation.tool_choice.mode = conversation_pb2.TOOL_CHOICE_MODE_REQUIRED
    elif kind == "none":
        conversation.tool_choice.mode = conversation_pb2.TOOL_CHOICE_MODE_NONE
    # `auto`, and several calls in a turn, are what happens anyway; leaving them out keeps equal requests equal, and models that
    # don't know the field stay candidates.
    disable = item.get("disable_parallel_tool_use")
    if disable is not None and payload.boolean(disable, "tool_choice.disable_parallel_tool_use"):
        conversation.parallel_tool_calls = False


def _max_tokens(call: ChatCall, value: object) -> None:
    call.request.conversation.max_output_tokens = payload.integer(value, "max_tokens", 1, 1_000_000)


def _temperature(call: ChatCall, value: object) -> None:
    call.request.conversation.sampling.temperature = payload.number(value, "temperature", 0, 1)


def _top_p(call: ChatCall, value: object) -> None:
    call.request.conversation.sampling.top_p = payload.number(value, "top_p", 0, 1)


def _top_k(call: ChatCall, value: object) -> None:
    call.request.conversation.sampling.top_k = payload.integer(value, "top_k", 1, payload.INT32_MAX)


def _stop_sequences(call: ChatCall, value: object) -> None:
    stops = call.request.conversation.stop_sequences
    for index, item in enumerate(payload.array(value, "stop_sequences")):
        stops.append(payload.text(item, f"stop_sequences[{index}]"))


def _stream(call: ChatCall, value: object) -> None:
    call.stream = payload.boolean(value, "stream")


def _metadata(call: ChatCall, value: object) -> None:
    item = payload.mapping(value, "metadata")
    payload.only(item, ("user_id",), "metadata")
    if (user := item.get("user_id")) is not None:
        call.request.end_user = payload.text(user, "metadata.user_id")


def _service_tier(call: ChatCall, value: object) -> None:
    if value != "auto":
        raise FieldUnsupported("service_tier", f"may be auto only, is {payload.shown(value)}")


def _speed(call: ChatCall, value: object) -> None:
    if value != "standard":
        raise FieldUnsupported("speed", f"may be standard only, is {payload.shown(value)}")


def _cache_control(call: ChatCall, value: object) -> None:
    _check_cache_control({"cache_control": value}, "")


def _output_config(call: ChatCall, value: object) -> None:
    item = payload.mapping(value, "output_config")
    payload.only(item, ("effort", "format"), "output_config")
    if (form := item.get("format")) is not None:
        _read_format(call, form, "output_config.format")


def _output_format(call: ChatCall, value: object) -> None:
    _read_format(call, value, "output_format")


def _read_format(call: ChatCall, value: object, path: str) -> None:
    item = payload.mapping(value, path)
    payload.choice(payload.required(item, "type", path), f"{path}.type", ("json_schema",))
    payload.only(item, ("type", "schema"), path)
    schema = payload.json_text(payload.required(item, "schema", path), f"{path}.schema")
    wanted = call.request.conversation.response_format
    if wanted.json_schema and wanted.json_schema != schema:
        raise RequestInvalid(path, "output_format and output_config.format contradict each other; send one of them")
    wanted.kind = conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA
    wanted.json_schema = schema
    # Anthropic's format is a promise, not a wish.
    wanted.strict = True


def _thinking(call: ChatCall, value: object) -> None:
    item = payload.mapping(value, "thinking")
    kind = _kind(item, "thinking", ("enabled", "disabled", "adaptive"))
    payload.only(item, _THINKING_KEYS[kind], "thinking")
    display = item.get("display")
    if display is not None and display != "summarized":
        raise FieldUnsupported("thinking.display", f"may be summarized only, is {payload.shown(display)}")
    conversation = call.request.conversation
    if kind == "disabled":
        conversation.reasoning_effort = conversation_pb2.REASONING_EFFORT_NONE
    elif kind == "adaptive":
        conversation.reasoning_effort = conversation_pb2.REASONING_EFFORT_HIGH
    else:
        budget = payload.required(item, "budget_tokens", "thinking")
        budget = payload.integer(budget, "thinking.budget_tokens", _LEAST_BUDGET, payload.INT32_MAX)
        conversation.reasoning_effort = next(effort for least, effort in _BUDGETS if budget >= least)


def _effort(call: ChatCall, fields: Mapping[str, Any]) -> None:
    """What `thinking`, `output_config` and `max_tokens` mean together; each was checked alone."""
    thinking = fields.get("thinking") or {}
    conversation = call.request.conversation
    limit = conversation.max_output_tokens
    if limit and thinking.get("type") == "enabled" and thinking["budget_tokens"] >= limit:
        raise RequestInvalid("thinking.budget_tokens", f"must be less than max_tokens, which is {limit}")
    effort = (fields.get("output_config") or {}).get("effort")
    if effort is None:
        return
    if type(effort) is not str:
        raise RequestInvalid("output_config.effort", f"must be a string, is {payload.shown(effort)}")
    if effort not in _EFFORTS:
        raise FieldUnsupported("output_config.effort", f"must be one of {', '.join(_EFFORTS)}, is {payload.shown(effort)}")
    if thinking.get("type") not in (None, "adaptive"):
        raise FieldUnsupported("output_config.effort", "goes with thinking of type adaptive only; leave one of them out")
    conversation.reasoning_effort = _EFFORTS[effort]


_TOOL_KEYS: Final = frozenset(
    {
        "type", "name", "description", "input_schema", "strict", "cache_control", "eager_input_streaming", "defer_loading",
        "input_examples", "allowed_callers",
    }
)  # fmt: skip

_TOOL_CHOICES: Final[Mapping[str, Collection[str]]] = MappingProxyType(
    {
        "auto": ("type", "disable_parallel_tool_use"),
        "any": ("type", "disable_parallel_tool_use"),
        "tool": ("type", "name", "disable_parallel_tool_use"),
        "none": ("type",),
    }
)

_THINKING_KEYS: Final[Mapping[str, Collection[str]]] = MappingProxyType(
    {"enabled": ("type", "budget_tokens", "display"), "disabled": ("type",), "adaptive": ("type", "display")}
)

_ROLES: Final[Mapping[str, Callable[[conversation_pb2.Conversation, dict[str, Any], int], None]]] = MappingProxyType(
    {"user": _read_user, "assistant": _read_assistant, "system": _read_standing}
)

_COUNT_FIELDS: Final[Mapping[str, Callable[[ChatCall, Any], None]]] = MappingProxyType(
    {
        "model": _model,
        "messages": _messages,
        "tools": _tools,
        "tool_choice": _tool_choice,
        "thinking": _thinking,
        "output_config": _output_config,
        "output_format": _output_format,
        "cache_control": _cache_control,
        "speed": _speed,
    }
)

_FIELDS: Final[Mapping[str, Callable[[ChatCall, Any], None]]] = MappingProxyType(
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

_NULL_ONLY: Final = frozenset({"container", "context_management", "diagnostics", "inference_geo", "mcp_servers"})


# Answers


def message_to_json(completion: Completion, receipt: receipt_pb2.Receipt | None = None) -> bytes:
    """The body of a whole answer; with a receipt it stands in the field `sluice`."""
    answer = completion.answer
    parts = answer.message.parts
    body: dict[str, Any] = {
        "id": "msg_" + completion.operation_id,
        "type": "message",
        "role": "assistant",
        "model": answer.model,
        "content": [block for part in parts if (block := _block(part)) is not None],
        "stop_reason": _stop_reason(answer, is_refusal=any(part.HasField("refusal") for part in parts)),
        "stop_sequence": answer.stop_sequence or None,
        "usage": usage_to_json(answer.usage),
    }
    if receipt is not None:
        body["sluice"] = receipt_to_json(receipt)
    return orjson.dumps(body)


def _block(part: conversation_pb2.Part) -> dict[str, Any] | None:
    """A part as a block. None: it says nothing, and Anthropic takes no empty texts back."""
    kind = part.WhichOneof("kind")
    if kind == "text":
        return {"type": "text", "text": part.text} if part.text else None
    if kind == "tool_call":
        call = part.tool_call
        return {"type": "tool_use", "id": call.id, "name": call.name, "input": _input(call.arguments_json)}
    if kind == "reasoning":
        reasoning = part.reasoning
        if reasoning.text or reasoning.signature:
            return {"type": "thinking", "thinking": reasoning.text, "signature": reasoning.signature}
    elif kind == "refusal" and part.refusal:
        return {"type": "text", "text": part.refusal}
    return None


def _input(arguments: str) -> Any:
    """The arguments of a call as a JSON object. Those of a model that erred are a text in one."""
    if not arguments.strip():
        return {}
    if _is_object(arguments):
        # As the model wrote it: numbers that don't fit a machine's stay what they are.
        return orjson.Fragment(arguments)
    return {INVALID_JSON: arguments}


def _is_object(text: str) -> bool:
    try:
        return type(orjson.loads(text)) is dict
    except orjson.JSONDecodeError:
        return False


def _stop_reason(answer: answer_pb2.Answer, *, is_refusal: bool) -> str:
    reason = answer.finish_reason
    if reason == answer_pb2.FINISH_REASON_STOP:
        if is_refusal:
            # OpenAI's way to refuse is a text and an ordinary end.
            return "refusal"
        if answer.stop_sequence:
            return "stop_sequence"
    return STOP_REASONS.get(reason, "end_turn")


def usage_to_json(usage: answer_pb2.Usage) -> dict[str, Any]:
    """Token counts as Anthropic has them: its input tokens leave out those read from and written to the provider's cache."""
    cached = usage.cached_input_token_count
    written = usage.cache_write_token_count
    result: dict[str, Any] = {
        "input_tokens": max(0, usage.input_token_count - cached - written),
        "cache_creation_input_tokens": written,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.output_token_count,
    }
    if usage.reasoning_token_count:
        result["output_tokens_details"] = {"thinking_tokens": usage.reasoning_token_count}
    return result


def count_to_json(count: receipt_pb2.TokenCount) -> bytes:
    """The body of a count. Where it is an estimate its bound is said beside it."""
    body: dict[str, Any] = {"input_tokens": count.token_count}
    if count.error_bound:
        body["sluice"] = {"error_bound": count.error_bound, "tokenizer": count.tokenizer}
    return orjson.dumps(body)


def model_to_json(model: inference_service_pb2.Model) -> dict[str, Any]:
    """A model as Anthropic lists it. The catalogue doesn't know when a model was made: `created_at` is the epoch."""
    return {
        "type": "model",
        "id": model.id,
        "display_name": model.display_name or model.id,
        "created_at": _CREATED,
        "lifecycle": "active",
        "max_input_tokens": model.context_window or None,
        "max_tokens": model.max_output_tokens or None,
    }


def models_to_json(models: Sequence[inference_service_pb2.Model], query: Mapping[str, str] | None = None) -> bytes:
    """The body of GET /v1/models: one page of `models`, by `limit` (20), `after_id` and `before_id` of the query.

    RequestInvalid, FieldUnsupported.
    """
    query = query or {}
    # The SDK's beta client says so in the query.
    payload.only(query, ("limit", "after_id", "before_id", "beta"), "")
    limit = _limit(query.get("limit"))
    start, stop = 0, len(models)
    after, before = query.get("after_id"), query.get("before_id")
    if after is not None and before is not None:
        raise RequestInvalid("before_id", "may not stand with after_id")
    if before is not None:
        stop = _place(models, before, "before_id")
        start = max(0, stop - limit)
        has_more = start > 0
    else:
        if after is not None:
            start = _place(models, after, "after_id") + 1
        has_more = stop - start > limit
        stop = min(stop, start + limit)
    data = [model_to_json(model) for model in models[start:stop]]
    return orjson.dumps(
        {
            "data": data,
            "has_more": has_more,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
        }
    )


def _limit(value: str | None) -> int:
    if value is None:
        return _DEFAULT_PAGE
    if not value.isascii() or not value.isdigit() or len(value) > 9:
        raise RequestInvalid("limit", f"must be a whole number, is {payload.shown(value)}")
    return payload.integer(int(value), "limit", 1, _MAX_PAGE)


def _place(models: Sequence[inference_service_pb2.Model], name: str, path: str) -> int:
    for index, model in enumerate(models):
        if model.id == name:
            return index
    raise RequestInvalid(path, f"no model {payload.shown(name)} is there for this key")


# Streams

_PING: Final = b'event: ping\ndata: {"type":"ping"}\n\n'
_STOP: Final = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
_START: Final = b'event: content_block_start\ndata: {"type":"content_block_start","index":%d,"content_block":%b}\n\n'
_DELTA: Final = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":%b'
_TEXT: Final = b'{"type":"text","text":""}'
_THINKING: Final = b'{"type":"thinking","thinking":"","signature":""}'


class _OpenCall:
    """A tool call whose block isn't closed."""

    __slots__ = ("arguments", "block")

    def __init__(self, block: int) -> None:
        self.block = block
        self.arguments: list[str] = []


class MessageStream:
    """The events of one streamed answer.

    Blocks come one after the other. Only a tool call whose arguments aren't a whole JSON object yet when the next block begins is kept
    open beside it: its provider may write several calls at once, and a closed block can't be added to.
    """

    __slots__ = (
        "_block",
        "_calls",
        "_closed",
        "_head",
        "_is_refusal",
        "_is_wire",
        "_kind",
        "_last",
        "_named",
        "_next",
        "_opened",
    )

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._is_wire = opened.is_wire
        self._next = 0
        """Index of the next block."""
        self._kind = ""
        """Kind of the deltas that go into the open block that isn't a call's; empty: there is none."""
        self._block = 0
        self._head = b""
        """Beginning of every delta of that block."""
        self._calls: dict[int, _OpenCall] = {}
        self._closed: set[int] = set()
        """Calls that are complete."""
        self._is_refusal = False
        self._last = b""
        self._named = False
        """Whether the event that has the provider's names in it went through."""

    def begin(self) -> bytes:
        """What comes before the first piece; empty with wire bytes, which have their own. The prompt's tokens come with the end."""
        if self._is_wire:
            return b""
        message = orjson.dumps(
            {
                "id": "msg_" + self._opened.operation_id,
                "type": "message",
                "role": "assistant",
                "model": self._opened.model,
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                "usage": {
                    "input_tokens": 0,
                    "cache_creation_input_tokens": 0,
                    "cache_read_input_tokens": 0,
                    "output_tokens": 0,
                },
            }
        )
        return b'event: message_start\ndata: {"type":"message_start","message":%b}\n\n%b' % (message, _PING)

    def wire(self, data: bytes) -> bytes:
        """Wire bytes as they go out: `data` itself. What was passed is needed to close the open block when Sluice cuts the stream."""
        if b"content_block_" in data:
            self._last = data
        if not self._named:
            # The one event that has them is the first.
            names = {"id": "msg_" + self._opened.operation_id, "model": self._opened.model}
            swaps = swaps_of(data, names, "message")
            if swaps is not None:
                self._named = True
                for theirs, ours in swaps:
                    data = data.replace(theirs, ours, 1)
        return data

    def pieces(self, batch: execution_service_pb2.DeltaBatch) -> bytes:
        """The events of what arrived together; neighbouring texts become one delta."""
        deltas = batch.deltas
        if len(deltas) == 1 and self._kind == "text":
            delta = deltas[0]
            if delta.HasField("text"):
                return self._head + orjson.dumps(delta.text) + b"}}\n\n"
        events: list[bytes] = []
        texts: list[str] = []
        for delta in deltas:
            kind = delta.WhichOneof("kind")
            if kind == "text":
                texts.append(delta.text)
                continue
            if texts:
                self._write(events, "text", "".join(texts))
                texts = []
            if kind == "tool_call":
                self._write_call(events, delta.tool_call)
            elif kind == "refusal":
                self._is_refusal = True
                self._write(events, "refusal", delta.refusal)
            elif kind == "reasoning":
                self._write_reasoning(events, delta.reasoning)
        if texts:
            self._write(events, "text", "".join(texts))
        return b"".join(events)

    def wire_end(self, completion: Completion, receipt: receipt_pb2.Receipt | None = None) -> bytes:
        """What comes after the last wire bytes: the provider's own finish and usage were withheld."""
        events: list[bytes] = []
        if completion.answer.finish_reason == answer_pb2.FINISH_REASON_BUDGET:
            block = _open_block(self._last)
            if block is not None:
                events.append(_block_stop(block))
        self._finish(events, completion, receipt)
        return b"".join(events)

    def end(self, completion: Completion, receipt: receipt_pb2.Receipt | None = None) -> bytes:
        """What comes after the last piece: the end of the open block, the finish and the usage, a receipt where there is one."""
        if self._is_wire:
            return self.wire_end(completion, receipt)
        events: list[bytes] = []
        self._close(events)
        events += [_block_stop(call.block) for call in self._calls.values()]
        self._calls.clear()
        self._finish(events, completion, receipt)
        return b"".join(events)

    def _finish(self, events: list[bytes], completion: Completion, receipt: receipt_pb2.Receipt | None) -> None:
        answer = completion.answer
        event: dict[str, Any] = {
            "type": "message_delta",
            "delta": {
                "stop_reason": _stop_reason(answer, is_refusal=self._is_refusal),
                "stop_sequence": answer.stop_sequence or None,
            },
            "usage": usage_to_json(answer.usage),
        }
        if receipt is not None:
            event["sluice"] = receipt_to_json(receipt)
        events.append(b"event: message_delta\ndata: %b\n\n" % orjson.dumps(event))
        events.append(_STOP)

    def _write(self, events: list[bytes], kind: str, text: str) -> None:
        if not text:
            return
        if self._kind != kind:
            self._begin_block(events, kind)
        events.append(self._head + orjson.dumps(text) + b"}}\n\n")

    def _write_reasoning(self, events: list[bytes], reasoning: conversation_pb2.Reasoning) -> None:
        self._write(events, "thinking", reasoning.text)
        if reasoning.signature:
            if self._kind != "thinking":
                self._begin_block(events, "thinking")
            signature = b'{"type":"signature_delta","signature":%b}' % orjson.dumps(reasoning.signature)
            events.append(_block_delta(self._block, signature))
            # A signature ends its thinking: what comes after it is the next one's.
            self._close(events)

    def _write_call(self, events: list[bytes], piece: answer_pb2.ToolCallDelta) -> None:
        call = self._calls.get(piece.index)
        if call is None:
            if piece.index in self._closed:
                if piece.arguments_json.strip():
                    raise EdgeError(Reason.PROVIDER_MALFORMED, "the provider added to a tool call that was complete; try again")
                return
            self._close(events)
            self._calls[piece.index] = call = _OpenCall(self._next)
            block = {"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}}
            events.append(_block_start(self._next, orjson.dumps(block)))
            self._next += 1
        if piece.arguments_json:
            call.arguments.append(piece.arguments_json)
            events.append(
                _block_delta(call.block, b'{"type":"input_json_delta","partial_json":%b}' % orjson.dumps(piece.arguments_json))
            )

    def _begin_block(self, events: list[bytes], kind: str) -> None:
        self._close(events)
        self._kind = kind
        self._block = self._next
        self._next += 1
        is_thinking = kind == "thinking"
        events.append(_block_start(self._block, _THINKING if is_thinking else _TEXT))
        # What all deltas of a block have in common is written once: a delta then costs one string's escaping.
        delta = b'{"type":"thinking_delta","thinking":' if is_thinking else b'{"type":"text_delta","text":'
        self._head = _DELTA % (self._block, delta)

    def _close(self, events: list[bytes]) -> None:
        """Closes what can be closed before another block begins."""
        if self._kind:
            events.append(_block_stop(self._block))
            self._kind = ""
        for index, call in list(self._calls.items()):
            if _is_object("".join(call.arguments)):
                events.append(_block_stop(call.block))
                self._closed.add(index)
                del self._calls[index]


def _block_start(index: int, block: bytes) -> bytes:
    return _START % (index, block)


def _block_delta(index: int, delta: bytes) -> bytes:
    return b"%b}\n\n" % (_DELTA % (index, delta))


def _block_stop(index: int) -> bytes:
    return b'event: content_block_stop\ndata: {"type":"content_block_stop","index":%d}\n\n' % index


def _open_block(wire: bytes) -> int | None:
    """Index of the block that whole events leave open; None: none."""
    for line in reversed(wire.split(b"\n")):
        if not line.startswith(b"data:"):
            continue
        try:
            event = orjson.loads(line[5:])
        except orjson.JSONDecodeError:
            # Data in several lines; no server of this API writes them.
            return None
        kind = event.get("type")
        if kind in ("content_block_start", "content_block_delta"):
            index = event.get("index")
            return index if type(index) is int else None
        if kind == "content_block_stop":
            return None
    return None
