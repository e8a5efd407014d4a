"""OpenAI's JSON and the messages of `sluice.inference.v1`, both ways. Pure.

Every field of a request is either carried over, or refused by name. Accepted without effect, since their only accepted value is what
happens anyway: `n: 1`, `store: false`, `service_tier: auto|default`, `modalities: ["text"]`, `verbosity: medium`,
`stream_options.include_obfuscation: false`; null asks for nothing. `prompt_cache_key` becomes the affinity key, `safety_identifier`
the end user; `top_k` and an assistant's `reasoning_content` are spellings of other servers that OpenAI's SDK can send too.
"""

from __future__ import annotations

import array
import base64
import sys
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final

import orjson
from google.protobuf import json_format

from services.gateway.core import Completion
from services.gateway.edge import payload
from services.gateway.edge.passing import Swaps, swaps_of
from services.gateway.edge.payload import FieldUnsupported, RequestInvalid
from services.gateway.events import Opened
from sluice.execution.v1 import execution_service_pb2
from sluice.inference.v1 import answer_pb2, conversation_pb2, inference_service_pb2, receipt_pb2

DONE: Final = b"data: [DONE]\n\n"

_SYSTEM: Final = conversation_pb2.ROLE_SYSTEM
_USER: Final = conversation_pb2.ROLE_USER
_ASSISTANT: Final = conversation_pb2.ROLE_ASSISTANT
_TOOL: Final = conversation_pb2.ROLE_TOOL
_DEVELOPER: Final = conversation_pb2.ROLE_DEVELOPER

FINISH_REASONS: Final[Mapping[int, str]] = MappingProxyType(
    {
        answer_pb2.FINISH_REASON_STOP: "stop",
        answer_pb2.FINISH_REASON_LENGTH: "length",
        answer_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
        answer_pb2.FINISH_REASON_CONTENT_FILTER: "content_filter",
        # OpenAI has no word for these; all three mean that the text stops short.
        answer_pb2.FINISH_REASON_BUDGET: "length",
        answer_pb2.FINISH_REASON_ERROR: "length",
        answer_pb2.FINISH_REASON_CANCELLED: "length",
    }
)

_FINISH_BYTES: Final[Mapping[int, bytes]] = MappingProxyType({number: name.encode() for number, name in FINISH_REASONS.items()})

_EFFORTS: Final[Mapping[str, conversation_pb2.ReasoningEffort.ValueType]] = MappingProxyType(
    {
        "none": conversation_pb2.REASONING_EFFORT_NONE,
        "minimal": conversation_pb2.REASONING_EFFORT_MINIMAL,
        "low": conversation_pb2.REASONING_EFFORT_LOW,
        "medium": conversation_pb2.REASONING_EFFORT_MEDIUM,
        "high": conversation_pb2.REASONING_EFFORT_HIGH,
    }
)


class ChatCall:
    """A chat completion that was asked for."""

    __slots__ = ("include_usage", "request", "stream")

    def __init__(self) -> None:
        self.request = inference_service_pb2.GenerateRequest()
        self.stream = False
        self.include_usage = False


class EmbedCall:
    """An embedding that was asked for."""

    __slots__ = ("is_base64", "request")

    def __init__(self) -> None:
        self.request = inference_service_pb2.EmbedRequest()
        self.is_base64 = False


# Requests


def chat_from_json(body: bytes | bytearray) -> ChatCall:
    """The call that the body of POST /v1/chat/completions asks for. RequestInvalid, FieldUnsupported."""
    fields = payload.read_object(body)
    call = ChatCall()
    for name, value in fields.items():
        read = _FIELDS.get(name)
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
    if call.include_usage and not call.stream:
        raise RequestInvalid("stream_options", "may be set only with stream: true")
    return call


def embed_from_json(body: bytes | bytearray) -> EmbedCall:
    """The call that the body of POST /v1/embeddings asks for. RequestInvalid, FieldUnsupported."""
    fields = payload.read_object(body)
    payload.only(fields, ("model", "input", "encoding_format", "dimensions", "user"), "")
    call = EmbedCall()
    request = call.request
    request.model = payload.text(payload.required(fields, "model", ""), "model")
    texts = payload.required(fields, "input", "")
    if type(texts) is str:
        request.inputs.append(texts)
    else:
        payload.array(texts, "input")
        for index, item in enumerate(texts):
            if type(item) is int or type(item) is list:
                raise FieldUnsupported(
                    "input", "token arrays are not supported, since tokens belong to one model; send the text"
                )
            request.inputs.append(payload.text(item, f"input[{index}]"))
    if (value := fields.get("encoding_format")) is not None:
        call.is_base64 = payload.choice(value, "encoding_format", ("float", "base64")) == "base64"
    if (value := fields.get("dimensions")) is not None:
        request.dimension_count = payload.integer(value, "dimensions", 1, payload.INT32_MAX)
    if (value := fields.get("user")) is not None:
        request.end_user = payload.text(value, "user")
    return call


def _model(call: ChatCall, value: object) -> None:
    name = value if type(value) is str else payload.text(value, "model")
    if not name:
        # In the contract it means the default policy; here it is a variable that somebody forgot to set.
        raise RequestInvalid("model", "is empty; `auto` lets the default policy choose")
    call.request.routing.model = name


def _messages(call: ChatCall, value: object) -> None:
    add = call.request.conversation.messages.add
    for index, item in enumerate(payload.array(value, "messages")):
        if type(item) is not dict:
            raise RequestInvalid(f"messages[{index}]", f"must be an object, is {payload.shown(item)}")
        role = item.get("role")
        if role == "user" and len(item) == 2:
            content = item.get("content")
            if type(content) is str:
                # What most turns are; the same as in `_read_user`, without the way there.
                message = add()
                message.role = _USER
                message.parts.add().text = content
                continue
        read = _ROLES.get(role) if type(role) is str else None
        if read is None:
            if role is None:
                raise RequestInvalid(f"messages[{index}].role", "is required")
            raise RequestInvalid(f"messages[{index}].role", f"must be one of {', '.join(_ROLES)}, is {payload.shown(role)}")
        read(add(), item, index)


def _read_user(message: conversation_pb2.Message, item: dict[str, Any], index: int) -> None:
    message.role = _USER
    path = f"messages[{index}]"
    payload.only(item, ("role", "content", "name"), path)
    _read_name(message, item, path)
    _read_content(message, payload.required(item, "content", path), f"{path}.content", ("text", "image_url"))


def _read_standing(message: conversation_pb2.Message, item: dict[str, Any], index: int) -> None:
    message.role = _SYSTEM if item["role"] == "system" else _DEVELOPER
    content = item.get("content")
    if type(content) is str and len(item) == 2:
        message.parts.add().text = content
        return
    path = f"messages[{index}]"
    payload.only(item, ("role", "content", "name"), path)
    _read_name(message, item, path)
    _read_content(message, payload.required(item, "content", path), f"{path}.content", ("text",))


def _read_assistant(message: conversation_pb2.Message, item: dict[str, Any], index: int) -> None:
    message.role = _ASSISTANT
    content = item.get("content")
    if type(content) is str and len(item) == 2:
        message.parts.add().text = content
        return
    path = f"messages[{index}]"
    known = ("role", "content", "name", "refusal", "tool_calls", "reasoning_content", "audio", "function_call", "annotations")
    payload.only(item, known, path)
    # An SDK's own answer, sent back whole, has these as null or empty.
    payload.null_only(item, ("audio", "function_call"), path)
    annotations = item.get("annotations")
    if annotations is not None and payload.array(annotations, f"{path}.annotations"):
        raise FieldUnsupported(f"{path}.annotations")
    _read_name(message, item, path)
    if (reasoning := item.get("reasoning_content")) is not None:
        message.parts.add().reasoning.text = payload.text(reasoning, f"{path}.reasoning_content")
    if content is not None and content != "":
        _read_content(message, content, f"{path}.content", ("text", "refusal"))
    if (refusal := item.get("refusal")) is not None:
        message.parts.add().refusal = payload.text(refusal, f"{path}.refusal")
    calls = item.get("tool_calls")
    if calls is not None:
        for number, call in enumerate(payload.array(calls, f"{path}.tool_calls")):
            _read_tool_call(message.parts.add().tool_call, call, f"{path}.tool_calls[{number}]")
    if not message.parts:
        if content == "":
            message.parts.add().text = ""
        else:
            raise RequestInvalid(f"{path}.content", "is required when there are no tool_calls")


def _read_tool_call(call: conversation_pb2.ToolCall, value: object, path: str) -> None:
    item = payload.mapping(value, path)
    payload.only(item, ("id", "type", "function", "index"), path)
    if item.get("type", "function") != "function":
        raise FieldUnsupported(f"{path}.type", "only function calls are supported")
    function = payload.mapping(payload.required(item, "function", path), f"{path}.function")
    payload.only(function, ("name", "arguments"), f"{path}.function")
    call.id = payload.text(payload.required(item, "id", path), f"{path}.id")
    call.name = payload.text(payload.required(function, "name", f"{path}.function"), f"{path}.function.name")
    call.arguments_json = payload.text(
        payload.required(function, "arguments", f"{path}.function"), f"{path}.function.arguments"
    )


def _read_tool(message: conversation_pb2.Message, item: dict[str, Any], index: int) -> None:
    message.role = _TOOL
    path = f"messages[{index}]"
    payload.only(item, ("role", "content", "tool_call_id", "name"), path)
    _read_name(message, item, path)
    result = message.parts.add().tool_result
    result.tool_call_id = payload.text(payload.required(item, "tool_call_id", path), f"{path}.tool_call_id")
    content = payload.required(item, "content", path)
    if type(content) is str:
        result.text = content
        return
    texts = []
    for number, part in enumerate(payload.array(content, f"{path}.content")):
        where = f"{path}.content[{number}]"
        part = payload.mapping(part, where)
        if (kind := part.get("type")) != "text":
            raise FieldUnsupported(f"{where}.type", f"a tool's result may have parts of type text, not {payload.shown(kind)}")
        payload.only(part, ("type", "text"), where)
        texts.append(payload.text(payload.required(part, "text", where), f"{where}.text"))
    result.text = "".join(texts)


def _read_name(message: conversation_pb2.Message, item: dict[str, Any], path: str) -> None:
    if (name := item.get("name")) is not None:
        message.name = payload.text(name, f"{path}.name")


def _read_content(message: conversation_pb2.Message, content: object, path: str, kinds: tuple[str, ...]) -> None:
    if type(content) is str:
        message.parts.add().text = content
        return
    if type(content) is not list:
        raise RequestInvalid(path, f"must be a string or an array of parts, is {payload.shown(content)}")
    if not content:
        raise RequestInvalid(path, "must not be empty")
    for number, part in enumerate(content):
        where = f"{path}[{number}]"
        if type(part) is not dict:
            raise RequestInvalid(where, f"must be an object, is {payload.shown(part)}")
        kind = part.get("type")
        if kind not in kinds:
            if kind is None:
                raise RequestInvalid(f"{where}.type", "is required")
            raise FieldUnsupported(f"{where}.type", f"must be one of {', '.join(kinds)} here, is {payload.shown(kind)}")
        if kind == "text":
            payload.only(part, ("type", "text"), where)
            message.parts.add().text = payload.text(payload.required(part, "text", where), f"{where}.text")
        elif kind == "refusal":
            payload.only(part, ("type", "refusal"), where)
            message.parts.add().refusal = payload.text(payload.required(part, "refusal", where), f"{where}.refusal")
        else:
            payload.only(part, ("type", "image_url"), where)
            where += ".image_url"
            source = payload.mapping(payload.required(part, "image_url", f"{path}[{number}]"), where)
            payload.only(source, ("url", "detail"), where)
            image = message.parts.add().image
            payload.image_from_url(image, payload.text(payload.required(source, "url", where), f"{where}.url"), f"{where}.url")
            if (detail := source.get("detail")) is not None:
                image.detail = payload.choice(detail, f"{where}.detail", ("low", "high", "auto"))


def _tools(call: ChatCall, value: object) -> None:
    add = call.request.conversation.tools.add
    for index, item in enumerate(payload.array(value, "tools")):
        path = f"tools[{index}]"
        item = payload.mapping(item, path)
        if (kind := item.get("type")) != "function":
            raise FieldUnsupported(f"{path}.type", f"only function tools are supported, not {payload.shown(kind)}")
        payload.only(item, ("type", "function"), path)
        path += ".function"
        function = payload.mapping(payload.required(item, "function", f"tools[{index}]"), path)
        payload.only(function, ("name", "description", "parameters", "strict"), path)
        tool = add()
        tool.name = payload.text(payload.required(function, "name", path), f"{path}.name")
        if (description := function.get("description")) is not None:
            tool.description = payload.text(description, f"{path}.description")
        if (parameters := function.get("parameters")) is not None:
            tool.parameters_json_schema = payload.json_text(parameters, f"{path}.parameters")
        if (strict := function.get("strict")) is not None:
            tool.strict = payload.boolean(strict, f"{path}.strict")


def _tool_choice(call: ChatCall, value: object) -> None:
    if type(value) is str:
        mode = _TOOL_CHOICES.get(value)
        if mode is None:
            raise RequestInvalid("tool_choice", f"must be none, auto, required or a named function, is {payload.shown(value)}")
        if mode != conversation_pb2.TOOL_CHOICE_MODE_AUTO:
            # `auto` is what happens without a choice; leaving it out keeps equal requests equal.
            call.request.conversation.tool_choice.mode = mode
        return
    item = payload.mapping(value, "tool_choice")
    if (kind := item.get("type")) != "function":
        raise FieldUnsupported("tool_choice.type", f"only function is supported, not {payload.shown(kind)}")
    payload.only(item, ("type", "function"), "tool_choice")
    function = payload.mapping(payload.required(item, "function", "tool_choice"), "tool_choice.function")
    payload.only(function, ("name",), "tool_choice.function")
    choice = call.request.conversation.tool_choice
    choice.mode = conversation_pb2.TOOL_CHOICE_MODE_NAMED
    choice.name = payload.text(payload.required(function, "name", "tool_choice.function"), "tool_choice.function.name")


def _response_format(call: ChatCall, value: object) -> None:
    item = payload.mapping(value, "response_format")
    kind = payload.required(item, "type", "response_format")
    payload.choice(kind, "response_format.type", ("text", "json_object", "json_schema"))
    if kind == "json_schema":
        payload.only(item, ("type", "json_schema"), "response_format")
        path = "response_format.json_schema"
        form = payload.mapping(payload.required(item, "json_schema", "response_format"), path)
        payload.only(form, ("name", "schema", "strict", "description"), path)
        wanted = call.request.conversation.response_format
        wanted.kind = conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA
        wanted.json_schema = payload.json_text(payload.required(form, "schema", path), f"{path}.schema")
        wanted.name = payload.text(payload.required(form, "name", path), f"{path}.name")
        if (strict := form.get("strict")) is not None:
            wanted.strict = payload.boolean(strict, f"{path}.strict")
        if (description := form.get("description")) is not None:
            wanted.description = payload.text(description, f"{path}.description")
        return
    payload.only(item, ("type",), "response_format")
    if kind == "json_object":
        call.request.conversation.response_format.kind = conversation_pb2.RESPONSE_FORMAT_KIND_JSON_OBJECT


def _temperature(call: ChatCall, value: object) -> None:
    call.request.conversation.sampling.temperature = payload.number(value, "temperature", 0, 2)


def _top_p(call: ChatCall, value: object) -> None:
    call.request.conversation.sampling.top_p = payload.number(value, "top_p", 0, 1)


def _top_k(call: ChatCall, value: object) -> None:
    call.request.conversation.sampling.top_k = payload.integer(value, "top_k", 1, payload.INT32_MAX)


def _seed(call: ChatCall, value: object) -> None:
    call.request.conversation.sampling.seed = payload.integer(value, "seed", -payload.INT64_MAX - 1, payload.INT64_MAX)


def _presence_penalty(call: ChatCall, value: object) -> None:
    call.request.conversation.sampling.presence_penalty = payload.number(value, "presence_penalty", -2, 2)


def _frequency_penalty(call: ChatCall, value: object) -> None:
    call.request.conversation.sampling.frequency_penalty = payload.number(value, "frequency_penalty", -2, 2)


def _logit_bias(call: ChatCall, value: object) -> None:
    biases = call.request.conversation.sampling.logit_bias
    for token, bias in payload.mapping(value, "logit_bias").items():
        if not token.isascii() or not token.isdigit() or len(token) > 10 or int(token) > payload.INT32_MAX:
            raise RequestInvalid("logit_bias", f"keys must be token ids, {payload.shown(token)} is none")
        if int(token) in biases:
            raise RequestInvalid("logit_bias", f"has the token {int(token)} twice")
        biases[int(token)] = payload.number(bias, f"logit_bias.{token}", -100, 100)


def _logprobs(call: ChatCall, value: object) -> None:
    if payload.boolean(value, "logprobs"):
        call.request.conversation.sampling.logprobs = True


def _top_logprobs(call: ChatCall, value: object) -> None:
    count = payload.integer(value, "top_logprobs", 0, 20)
    if count:
        call.request.conversation.sampling.top_logprob_count = count


def _max_tokens(call: ChatCall, value: object) -> None:
    _limit_output(call, value, "max_tokens")


def _max_completion_tokens(call: ChatCall, value: object) -> None:
    _limit_output(call, value, "max_completion_tokens")


def _limit_output(call: ChatCall, value: object, path: str) -> None:
    conversation = call.request.conversation
    limit = payload.integer(value, path, 1, 1_000_000)
    if conversation.HasField("max_output_tokens") and conversation.max_output_tokens != limit:
        raise RequestInvalid(path, "max_tokens and max_completion_tokens contradict each other; send one of them")
    conversation.max_output_tokens = limit


def _stop(call: ChatCall, value: object) -> None:
    stops = call.request.conversation.stop_sequences
    if type(value) is str:
        stops.append(value)
        return
    if type(value) is not list:
        raise RequestInvalid("stop", f"must be a string or an array of strings, is {payload.shown(value)}")
    for index, item in enumerate(value):
        stops.append(payload.text(item, f"stop[{index}]"))


def _reasoning_effort(call: ChatCall, value: object) -> None:
    effort = _EFFORTS.get(value) if type(value) is str else None
    if effort is None:
        raise RequestInvalid("reasoning_effort", f"must be one of {', '.join(_EFFORTS)}, is {payload.shown(value)}")
    call.request.conversation.reasoning_effort = effort


def _parallel_tool_calls(call: ChatCall, value: object) -> None:
    call.request.conversation.parallel_tool_calls = payload.boolean(value, "parallel_tool_calls")


def _metadata(call: ChatCall, value: object) -> None:
    call.request.metadata.update(payload.labels(value, "metadata"))


def _user(call: ChatCall, value: object) -> None:
    _end_user(call, value, "user")


def _safety_identifier(call: ChatCall, value: object) -> None:
    _end_user(call, value, "safety_identifier")


def _end_user(call: ChatCall, value: object, path: str) -> None:
    name = payload.text(value, path)
    if call.request.end_user and call.request.end_user != name:
        raise RequestInvalid(path, "user and safety_identifier contradict each other; send one of them")
    call.request.end_user = name


def _prompt_cache_key(call: ChatCall, value: object) -> None:
    call.request.routing.affinity_key = payload.text(value, "prompt_cache_key")


def _stream(call: ChatCall, value: object) -> None:
    call.stream = payload.boolean(value, "stream")


def _stream_options(call: ChatCall, value: object) -> None:
    options = payload.mapping(value, "stream_options")
    payload.only(options, ("include_usage", "include_obfuscation"), "stream_options")
    if (include := options.get("include_usage")) is not None:
        call.include_usage = payload.boolean(include, "stream_options.include_usage")
    obfuscation = options.get("include_obfuscation")
    if obfuscation is not None and payload.boolean(obfuscation, "stream_options.include_obfuscation"):
        raise FieldUnsupported("stream_options.include_obfuscation")


def _n(call: ChatCall, value: object) -> None:
    if payload.integer(value, "n", 1, 128) != 1:
        raise FieldUnsupported("n", "one answer per request; send the request again for another")


def _store(call: ChatCall, value: object) -> None:
    if payload.boolean(value, "store"):
        raise FieldUnsupported("store", "Sluice keeps no conversations; send false or leave it out")


def _service_tier(call: ChatCall, value: object) -> None:
    if value not in ("auto", "default"):
        raise FieldUnsupported("service_tier", f"may be auto or default, is {payload.shown(value)}")


def _modalities(call: ChatCall, value: object) -> None:
    if value != ["text"]:
        raise FieldUnsupported("modalities", 'may be ["text"] only')


def _verbosity(call: ChatCall, value: object) -> None:
    if value != "medium":
        raise FieldUnsupported("verbosity", "may be medium only")


_TOOL_CHOICES: Final[Mapping[str, conversation_pb2.ToolChoiceMode.ValueType]] = MappingProxyType(
    {
        "auto": conversation_pb2.TOOL_CHOICE_MODE_AUTO,
        "none": conversation_pb2.TOOL_CHOICE_MODE_NONE,
        "required": conversation_pb2.TOOL_CHOICE_MODE_REQUIRED,
    }
)

_ROLES: Final[Mapping[str, Callable[[conversation_pb2.Message, dict[str, Any], int], None]]] = MappingProxyType(
    {
        "system": _read_standing,
        "developer": _read_standing,
        "user": _read_user,
        "assistant": _read_assistant,
        "tool": _read_tool,
    }
)

_FIELDS: Final[Mapping[str, Callable[[ChatCall, Any], None]]] = MappingProxyType(
    {
        "model": _model,
        "messages": _messages,
        "tools": _tools,
        "tool_choice": _tool_choice,
        "parallel_tool_calls": _parallel_tool_calls,
        "response_format": _response_format,
        "temperature": _temperature,
        "top_p": _top_p,
        "top_k": _top_k,
        "seed": _seed,
        "stop": _stop,
        "presence_penalty": _presence_penalty,
        "frequency_penalty": _frequency_penalty,
        "logit_bias": _logit_bias,
        "logprobs": _logprobs,
        "top_logprobs": _top_logprobs,
        "max_tokens": _max_tokens,
        "max_completion_tokens": _max_completion_tokens,
        "reasoning_effort": _reasoning_effort,
        "metadata": _metadata,
        "user": _user,
        "safety_identifier": _safety_identifier,
        "prompt_cache_key": _prompt_cache_key,
        "stream": _stream,
        "stream_options": _stream_options,
        "n": _n,
        "store": _store,
        "service_tier": _service_tier,
        "modalities": _modalities,
        "verbosity": _verbosity,
    }
)

_NULL_ONLY: Final = frozenset(
    {
        "audio", "function_call", "functions", "moderation", "prediction", "prompt_cache_options", "prompt_cache_retention",
        "web_search_options",
    }
)  # fmt: skip


# Answers


def chat_to_json(completion: Completion, receipt: receipt_pb2.Receipt | None = None) -> bytes:
    """The body of a whole chat completion; with a receipt it stands in the field `sluice`."""
    answer = completion.answer
    if receipt is None and not answer.logprobs_json:
        parts = answer.message.parts
        if len(parts) == 1 and (part := parts[0]).HasField("text"):
            return _text_to_json(completion, answer, part.text)
    body: dict[str, Any] = {
        "id": "chatcmpl-" + completion.operation_id,
        "object": "chat.completion",
        "created": completion.created,
        "model": answer.model,
        "choices": [
            {
                "index": 0,
                "message": message_to_json(answer.message),
                "logprobs": _logprobs_of(answer),
                "finish_reason": FINISH_REASONS.get(answer.finish_reason, "stop"),
            }
        ],
        "usage": usage_to_json(answer.usage),
    }
    if receipt is not None:
        body["sluice"] = receipt_to_json(receipt)
    return orjson.dumps(body)


def _text_to_json(completion: Completion, answer: answer_pb2.Answer, text: str) -> bytes:
    """The same body for what most answers are, one text: written out, which takes half the time of objects and their rendering."""
    usage = answer.usage
    prompt = usage.input_token_count
    output = usage.output_token_count
    return (
        b'{"id":"chatcmpl-%b","object":"chat.completion","created":%d,"model":%b,"choices":[{"index":0,"message":{"role":"assistant",'
        b'"content":%b,"refusal":null},"logprobs":null,"finish_reason":"%b"}],"usage":{"prompt_tokens":%d,"completion_tokens":%d,'
        b'"total_tokens":%d,"prompt_tokens_details":{"cached_tokens":%d},"completion_tokens_details":{"reasoning_tokens":%d}}}'
    ) % (
        completion.operation_id.encode(),
        completion.created,
        orjson.dumps(completion.model),
        orjson.dumps(text),
        _FINISH_BYTES.get(answer.finish_reason, b"stop"),
        prompt,
        output,
        prompt + output,
        usage.cached_input_token_count,
        usage.reasoning_token_count,
    )


def message_to_json(message: conversation_pb2.Message) -> dict[str, Any]:
    """An assistant's turn as OpenAI has it."""
    parts = message.parts
    result: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
    if len(parts) == 1:
        part = parts[0]
        if part.HasField("text"):
            result["content"] = part.text
            return result
    texts: list[str] = []
    refusals: list[str] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    for part in parts:
        kind = part.WhichOneof("kind")
        if kind == "text":
            texts.append(part.text)
        elif kind == "tool_call":
            call = part.tool_call
            calls.append({"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments_json}})
        elif kind == "refusal":
            refusals.append(part.refusal)
        elif kind == "reasoning":
            reasoning.append(part.reasoning.text)
    if texts or not (calls or refusals):
        result["content"] = "".join(texts)
    if refusals:
        result["refusal"] = "".join(refusals)
    if calls:
        result["tool_calls"] = calls
    if any(reasoning):
        result["reasoning_content"] = "".join(reasoning)
    return result


def usage_to_json(usage: answer_pb2.Usage) -> dict[str, Any]:
    """Token counts as OpenAI has them."""
    prompt = usage.input_token_count
    output = usage.output_token_count
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": usage.cached_input_token_count},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_token_count},
    }


def receipt_to_json(receipt: receipt_pb2.Receipt) -> dict[str, Any]:
    """A receipt in protobuf's JSON form, with the names of the proto. 64-bit numbers are strings there."""
    return json_format.MessageToDict(receipt, preserving_proto_field_name=True)


def embed_to_json(response: inference_service_pb2.EmbedResponse, *, is_base64: bool) -> bytes:
    """The body of an embedding. base64 is of little-endian 32-bit floats."""
    rows: list[dict[str, Any]] = []
    for index, embedding in enumerate(response.embeddings):
        values: Any = embedding.values
        if is_base64:
            packed = array.array("f", values)
            if sys.byteorder == "big":
                packed.byteswap()
            values = base64.b64encode(packed.tobytes()).decode("ascii")
        else:
            values = list(values)
        rows.append({"object": "embedding", "index": index, "embedding": values})
    tokens = response.usage.input_token_count
    return orjson.dumps(
        {
            "object": "list",
            "data": rows,
            "model": response.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


def model_to_json(model: inference_service_pb2.Model) -> dict[str, Any]:
    """A model as OpenAI lists it. The catalogue doesn't know when a model was made: `created` is 0."""
    return {"id": model.id, "object": "model", "created": 0, "owned_by": model.provider}


def models_to_json(models: Iterable[inference_service_pb2.Model]) -> bytes:
    """The body of GET /v1/models."""
    return orjson.dumps({"object": "list", "data": [model_to_json(model) for model in models]})


class ChatStream:
    """The events of one streamed chat completion."""

    __slots__ = ("_frame", "_include_usage", "_is_wire", "_names", "_swaps")

    def __init__(self, opened: Opened, *, include_usage: bool) -> None:
        self._include_usage = include_usage
        self._names = {"id": "chatcmpl-" + opened.operation_id, "model": opened.model}
        self._swaps: Swaps | None = None
        self._is_wire = opened.is_wire
        # The part that all chunks have in common is written once: a chunk then costs one string's escaping.
        frame = orjson.dumps(
            {
                "id": "chatcmpl-" + opened.operation_id,
                "object": "chat.completion.chunk",
                "created": opened.created,
                "model": opened.model,
            }
        )
        self._frame = b"data: " + frame[:-1]

    def wire(self, data: bytes) -> bytes:
        """Wire bytes as they go out, with our id and the catalogue's name of the model."""
        swaps = self._swaps
        if swaps is None:
            swaps = self._swaps = swaps_of(data, self._names)
            if swaps is None:
                return data
        for theirs, ours in swaps:
            data = data.replace(theirs, ours)
        return data

    def begin(self) -> bytes:
        """What comes before the first piece; empty with wire bytes, which have their own."""
        if self._is_wire:
            return b""
        return self._choice(b'{"role":"assistant","content":"","refusal":null}', b"null", b"null")

    def pieces(self, batch: execution_service_pb2.DeltaBatch) -> bytes:
        """The chunks of what arrived together; neighbouring texts become one chunk."""
        deltas = batch.deltas
        if len(deltas) == 1:
            delta = deltas[0]
            if delta.HasField("text"):
                return self._choice(b'{"content":%b}' % orjson.dumps(delta.text), b"null", b"null")
        chunks: list[bytes] = []
        texts: list[str] = []
        for delta in deltas:
            kind = delta.WhichOneof("kind")
            if kind == "text":
                texts.append(delta.text)
                continue
            if texts:
                chunks.append(self._choice(b'{"content":%b}' % orjson.dumps("".join(texts)), b"null", b"null"))
                texts = []
            if kind == "tool_call":
                chunks.append(self._choice(orjson.dumps({"tool_calls": [_tool_call_piece(delta.tool_call)]}), b"null", b"null"))
            elif kind == "refusal":
                chunks.append(self._choice(b'{"refusal":%b}' % orjson.dumps(delta.refusal), b"null", b"null"))
            elif kind == "reasoning" and delta.reasoning.text:
                chunks.append(self._choice(b'{"reasoning_content":%b}' % orjson.dumps(delta.reasoning.text), b"null", b"null"))
        if texts:
            chunks.append(self._choice(b'{"content":%b}' % orjson.dumps("".join(texts)), b"null", b"null"))
        return b"".join(chunks)

    def end(self, completion: Completion, receipt: receipt_pb2.Receipt | None = None) -> bytes:
        """What comes after the last piece: the finish, the usage where it is wanted, a receipt where there is one, the end mark."""
        answer = completion.answer
        reason = answer.finish_reason
        chunks: list[bytes] = []
        # The provider's own finish went through with the wire bytes, unless we cut the stream ourselves.
        if not self._is_wire or reason == answer_pb2.FINISH_REASON_BUDGET:
            logprobs = orjson.dumps(_logprobs_of(answer)) if answer.logprobs_json else b"null"
            chunks.append(self._choice(b"{}", logprobs, b'"%b"' % FINISH_REASONS.get(reason, "stop").encode()))
        if self._include_usage or receipt is not None:
            tail: dict[str, Any] = {"choices": []}
            if self._include_usage:
                tail["usage"] = usage_to_json(answer.usage)
            if receipt is not None:
                tail["sluice"] = receipt_to_json(receipt)
            chunks.append(self._frame + b"," + orjson.dumps(tail)[1:] + b"\n\n")
        chunks.append(DONE)
        return b"".join(chunks)

    def _choice(self, delta: bytes, logprobs: bytes, finish_reason: bytes) -> bytes:
        return b'%b,"choices":[{"index":0,"delta":%b,"logprobs":%b,"finish_reason":%b}]}\n\n' % (
            self._frame, delta, logprobs, finish_reason,
        )  # fmt: skip


def _tool_call_piece(piece: answer_pb2.ToolCallDelta) -> dict[str, Any]:
    result: dict[str, Any] = {"index": piece.index}
    if piece.id:
        result["id"] = piece.id
        result["type"] = "function"
    function: dict[str, Any] = {}
    if piece.name:
        function["name"] = piece.name
    function["arguments"] = piece.arguments_json
    result["function"] = function
    return result


def _logprobs_of(answer: answer_pb2.Answer) -> Any:
    return orjson.loads(answer.logprobs_json) if answer.logprobs_json else None
