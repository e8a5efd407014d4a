"""The bounds that the contract states for every field of a request.

A request that breaks one is refused with REQUEST_INVALID and the path of the field. The messages come as they were received: what
is read here is the contract itself, so the generated types are this module's domain.
"""

from __future__ import annotations

import re
from typing import Final

import orjson
from google.protobuf.duration_pb2 import Duration

from services.runtime.errors import Failure, Reason, invalid
from sluice.inference.v1 import conversation_pb2, inference_service_pb2, receipt_pb2

_MEBIBYTE: Final = 1024 * 1024
_MAX_MESSAGES: Final = 2048
_MAX_PARTS: Final = 256
_MAX_TOOLS: Final = 256
_MAX_OUTPUT_TOKENS: Final = 1_000_000
_MAX_SECONDS: Final = 315_576_000_000
_TOOL_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NAMESPACE: Final = re.compile(r"[a-z0-9_-]{0,64}")
_MEDIA_TYPES: Final = frozenset(("image/png", "image/jpeg", "image/gif", "image/webp"))
_DETAILS: Final = frozenset(("low", "high", "auto"))
_ID: Final = re.compile(r"[!-~]{1,128}")
_REQUEST_ID: Final = re.compile(r"[ -~]{1,128}")

_SYSTEM: Final = conversation_pb2.ROLE_SYSTEM
_USER: Final = conversation_pb2.ROLE_USER
_ASSISTANT: Final = conversation_pb2.ROLE_ASSISTANT
_TOOL: Final = conversation_pb2.ROLE_TOOL
_DEVELOPER: Final = conversation_pb2.ROLE_DEVELOPER
_LAST_TASK_TYPE: Final = receipt_pb2.TASK_TYPE_VISION
_LAST_RECEIPT_VIEW: Final = inference_service_pb2.RECEIPT_VIEW_FULL


class Shape:
    """What was seen of a conversation while it was checked."""

    __slots__ = (
        "byte_count", "conversation", "has_image_detail", "has_labels", "has_names", "image_bytes", "image_count", "is_plain",
        "last_user_text", "max_output_tokens", "message_count", "routing", "tool_count",
    )  # fmt: skip

    def __init__(self, byte_count: int) -> None:
        self.byte_count = byte_count
        """Bytes of the whole conversation as a message: at least the bytes of its texts and pictures."""
        self.image_count = 0
        self.image_bytes = 0
        self.message_count = 0
        self.tool_count = 0
        self.last_user_text = ""
        self.conversation: conversation_pb2.Conversation | None = None
        """What was checked. Kept since a message that nobody holds is wrapped anew at each read of its field."""
        self.is_plain = False
        """The conversation has turns without names, and nothing else."""
        self.has_names = False
        """A turn has a name that tells its speaker from others; in a tool turn it tells nobody apart."""
        self.has_image_detail = False
        """A picture asks for low or high detail; `auto` leaves it to the provider."""
        self.max_output_tokens = 0
        """As the conversation says; 0: it doesn't."""
        self.routing: inference_service_pb2.RoutingWishes | None = None
        """As the request says; None: it doesn't."""
        self.has_labels = False
        """The request has metadata or an end user."""

    def text_bytes(self) -> int:
        """Most bytes that its texts have; no tokenizer that works on bytes makes more tokens than that, its template's aside."""
        return self.byte_count - self.image_bytes


def check_generate(request: inference_service_pb2.GenerateRequest, max_bytes: int) -> Shape:
    """Checks a whole request. Failure REQUEST_INVALID, REQUEST_TOO_LARGE."""
    if not request.HasField("conversation"):
        raise invalid("conversation", "is required")
    request_id = request.request_id
    if request_id:
        check_request_id(request_id)
    shape = check_conversation(request.conversation, max_bytes)
    if request.HasField("routing"):
        shape.routing = routing = request.routing
        _check_routing(routing)
    if request.HasField("cache"):
        _check_cache(request.cache)
    if not 0 <= request.task_type <= _LAST_TASK_TYPE:
        raise invalid("task_type", f"has the unknown value {request.task_type}")
    if not 0 <= request.receipt_view <= _LAST_RECEIPT_VIEW:
        raise invalid("receipt_view", f"has the unknown value {request.receipt_view}")
    if request.metadata or request.end_user:
        shape.has_labels = True
        _check_labels(request)
    return shape


def check_embed(request: inference_service_pb2.EmbedRequest, max_bytes: int) -> Shape:
    """Checks an embedding request; the shape counts the bytes of its texts. Failure REQUEST_INVALID, REQUEST_TOO_LARGE."""
    if request.request_id:
        check_request_id(request.request_id)
    check_model(request.model, "model")
    count = len(request.inputs)
    if not 1 <= count <= 2048:
        raise invalid("inputs", f"must have 1 to 2,048 texts, has {count}")
    byte_count = 0
    for index, text in enumerate(request.inputs):
        size = _size(text)
        byte_count += size
        if not 1 <= size <= 64 * 1024:
            raise invalid(f"inputs[{index}]", f"must have 1 byte to 64 KiB, has {size} bytes")
    if byte_count > max_bytes:
        raise _too_large(byte_count, max_bytes)
    if request.HasField("dimension_count") and not 1 <= request.dimension_count <= 65_536:
        raise invalid("dimension_count", f"must be 1 to 65,536, is {request.dimension_count}")
    _check_labels(request)
    shape = Shape(byte_count)
    shape.message_count = count
    return shape


def check_model(model: str, field: str) -> None:
    """Checks the required name of a model."""
    if not model:
        raise invalid(field, "is required; `sluice models` lists what there is")
    _bounded(model, 128, field)


def check_request_id(request_id: str) -> None:
    """Checks an idempotency key."""
    if _REQUEST_ID.fullmatch(request_id) is None:
        raise invalid("request_id", "must have 1 to 128 printable ASCII characters")


def check_conversation(conversation: conversation_pb2.Conversation, max_bytes: int) -> Shape:
    """Checks a conversation. Failure REQUEST_INVALID, REQUEST_TOO_LARGE."""
    byte_count = conversation.ByteSize()
    if byte_count > max_bytes:
        raise _too_large(byte_count, max_bytes)
    # What is set, in one call: where it is the turns alone, nothing else needs to be asked for.
    fields = conversation.ListFields()
    messages = conversation.messages
    count = len(messages)
    if not 1 <= count <= _MAX_MESSAGES:
        raise invalid("conversation.messages", f"must have 1 to 2,048 turns, has {count}")
    shape = Shape(byte_count)
    shape.conversation = conversation
    shape.message_count = count
    for index, message in enumerate(messages):
        _check_message(message, index, shape)
    if len(fields) == 1:
        shape.is_plain = not shape.has_names
        return shape
    if conversation.tools:
        _check_tools(conversation, shape)
    if conversation.HasField("tool_choice"):
        _check_tool_choice(conversation)
    if conversation.HasField("response_format"):
        _check_response_format(conversation.response_format)
    if conversation.HasField("sampling"):
        _check_sampling(conversation.sampling)
    if conversation.HasField("max_output_tokens"):
        shape.max_output_tokens = limit = conversation.max_output_tokens
        if not 1 <= limit <= _MAX_OUTPUT_TOKENS:
            raise invalid("conversation.max_output_tokens", f"must be 1 to 1,000,000, is {limit}")
    stops = conversation.stop_sequences
    if stops:
        if len(stops) > 8:
            raise invalid("conversation.stop_sequences", f"may have at most 8 texts, has {len(stops)}")
        for index, stop in enumerate(stops):
            if not 1 <= _size(stop) <= 256:
                raise invalid(f"conversation.stop_sequences[{index}]", f"must have 1 to 256 bytes, has {_size(stop)}")
    if not 0 <= conversation.reasoning_effort <= conversation_pb2.REASONING_EFFORT_HIGH:
        raise invalid("conversation.reasoning_effort", f"has the unknown value {conversation.reasoning_effort}")
    return shape


def check_outcome(request: inference_service_pb2.ReportOutcomeRequest) -> None:
    """Checks a report. Failure REQUEST_INVALID."""
    if _ID.fullmatch(request.operation_id) is None:
        raise invalid("operation_id", "must be the id of an operation, 26 characters")
    if request.outcome not in (inference_service_pb2.OUTCOME_SERVED, inference_service_pb2.OUTCOME_FAILED):
        raise invalid("outcome", "must be OUTCOME_SERVED or OUTCOME_FAILED")
    if request.HasField("score") and not 0.0 <= request.score <= 1.0:
        raise invalid("score", f"must be 0 to 1, is {request.score}")
    _bounded(request.comment, 1024, "comment")


def check_page(page_size: int, page_token: str) -> None:
    """Checks the paging fields of a list request. Failure REQUEST_INVALID."""
    if not 0 <= page_size <= 1000:
        raise invalid("page_size", f"must be 0 to 1,000, is {page_size}")
    _bounded(page_token, 1024, "page_token")


def _check_message(message: conversation_pb2.Message, index: int, shape: Shape) -> None:
    role = message.role
    if not _SYSTEM <= role <= _DEVELOPER:
        raise invalid(f"conversation.messages[{index}].role", "is required" if role == 0 else f"has the unknown value {role}")
    if message.name:
        _bounded(message.name, 64, f"conversation.messages[{index}].name")
        if role != _TOOL:
            shape.has_names = True
    parts = message.parts
    count = len(parts)
    if count > _MAX_PARTS:
        raise invalid(f"conversation.messages[{index}].parts", f"may have at most 256 parts, has {count}")
    last_text = ""
    for number, part in enumerate(parts):
        kind = part.WhichOneof("kind")
        if kind == "text":
            if role == _TOOL:
                raise _misplaced(index, number, "text", "may not stand in a tool turn; use `tool_result`")
            if role == _USER:
                # Each read makes a new string.
                last_text = part.text
        elif kind == "image":
            if role != _USER:
                raise _misplaced(index, number, "image", "may stand in user turns only")
            _check_image(part.image, f"conversation.messages[{index}].parts[{number}].image", shape)
        elif kind == "tool_result":
            if role != _TOOL:
                raise _misplaced(index, number, "tool_result", "may stand in tool turns only")
            _check_tool_result(part.tool_result, f"conversation.messages[{index}].parts[{number}].tool_result")
        elif kind is None:
            raise invalid(f"conversation.messages[{index}].parts[{number}]", "has no content; set one of its fields")
        else:
            if role != _ASSISTANT:
                raise _misplaced(index, number, kind, "may stand in assistant turns only")
            if kind == "tool_call":
                _check_tool_call(part.tool_call, f"conversation.messages[{index}].parts[{number}].tool_call")
            elif kind == "reasoning":
                _bounded(
                    part.reasoning.signature, 64 * 1024, f"conversation.messages[{index}].parts[{number}].reasoning.signature"
                )
    if last_text:
        shape.last_user_text = last_text


def _check_image(image: conversation_pb2.Image, path: str, shape: Shape) -> None:
    shape.image_count += 1
    source = image.WhichOneof("source")
    if source == "data":
        size = len(image.data)
        shape.image_bytes += size
        if not 1 <= size <= 8 * _MEBIBYTE:
            raise invalid(f"{path}.data", f"must have 1 byte to 8 MiB, has {size} bytes")
        if image.media_type not in _MEDIA_TYPES:
            raise invalid(
                f"{path}.media_type", f"must be image/png, image/jpeg, image/gif or image/webp, is {image.media_type[:64]!r}"
            )
    elif source == "url":
        _bounded(image.url, 2048, f"{path}.url")
        if not image.url.startswith("https://") or len(image.url) == 8:
            raise invalid(f"{path}.url", "must be an https address")
    else:
        raise invalid(path, "needs `data` or `url`")
    detail = image.detail
    if detail:
        if detail not in _DETAILS:
            raise invalid(f"{path}.detail", f"must be low, high or auto, is {detail[:64]!r}")
        if detail != "auto":
            shape.has_image_detail = True


def _check_tool_call(call: conversation_pb2.ToolCall, path: str) -> None:
    if not call.id:
        raise invalid(f"{path}.id", "is required")
    _bounded(call.id, 128, f"{path}.id")
    if not call.name:
        raise invalid(f"{path}.name", "is required")
    _bounded(call.name, 64, f"{path}.name")
    _bounded(call.arguments_json, _MEBIBYTE, f"{path}.arguments_json")


def _check_tool_result(result: conversation_pb2.ToolResult, path: str) -> None:
    if not result.tool_call_id:
        raise invalid(f"{path}.tool_call_id", "is required")
    _bounded(result.tool_call_id, 128, f"{path}.tool_call_id")
    _bounded(result.text, _MEBIBYTE, f"{path}.text")


def _check_tools(conversation: conversation_pb2.Conversation, shape: Shape) -> None:
    tools = conversation.tools
    shape.tool_count = len(tools)
    if len(tools) > _MAX_TOOLS:
        raise invalid("conversation.tools", f"may have at most 256 tools, has {len(tools)}")
    names = set()
    for index, tool in enumerate(tools):
        path = f"conversation.tools[{index}]"
        name = tool.name
        if _TOOL_NAME.fullmatch(name) is None:
            raise invalid(f"{path}.name", f"must have 1 to 64 characters of [A-Za-z0-9_-], is {name[:64]!r}")
        if name in names:
            raise invalid(f"{path}.name", f"repeats the name {name!r}")
        names.add(name)
        _bounded(tool.description, 16 * 1024, f"{path}.description")
        if tool.parameters_json_schema:
            _check_schema(tool.parameters_json_schema, f"{path}.parameters_json_schema")


def _check_tool_choice(conversation: conversation_pb2.Conversation) -> None:
    choice = conversation.tool_choice
    mode = choice.mode
    path = "conversation.tool_choice"
    if not conversation_pb2.TOOL_CHOICE_MODE_AUTO <= mode <= conversation_pb2.TOOL_CHOICE_MODE_NAMED:
        raise invalid(f"{path}.mode", "is required" if mode == 0 else f"has the unknown value {mode}")
    if mode == conversation_pb2.TOOL_CHOICE_MODE_NAMED:
        if all(tool.name != choice.name for tool in conversation.tools):
            raise invalid(f"{path}.name", f"must be the name of one of the tools, is {choice.name[:64]!r}")
    elif choice.name:
        raise invalid(f"{path}.name", "may be set only with mode NAMED")
    elif mode == conversation_pb2.TOOL_CHOICE_MODE_REQUIRED and not conversation.tools:
        raise invalid(f"{path}.mode", "can't be REQUIRED without tools")


def _check_response_format(wanted: conversation_pb2.ResponseFormat) -> None:
    kind = wanted.kind
    path = "conversation.response_format"
    if not conversation_pb2.RESPONSE_FORMAT_KIND_TEXT <= kind <= conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA:
        raise invalid(f"{path}.kind", "is required" if kind == 0 else f"has the unknown value {kind}")
    if kind == conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA:
        if not wanted.json_schema:
            raise invalid(f"{path}.json_schema", "is required with kind JSON_SCHEMA")
        _check_schema(wanted.json_schema, f"{path}.json_schema")
    elif wanted.json_schema:
        raise invalid(f"{path}.json_schema", "may be set only with kind JSON_SCHEMA")
    if wanted.name and _TOOL_NAME.fullmatch(wanted.name) is None:
        raise invalid(f"{path}.name", f"must have at most 64 characters of [A-Za-z0-9_-], is {wanted.name[:64]!r}")
    _bounded(wanted.description, 1024, f"{path}.description")


def _check_sampling(sampling: conversation_pb2.Sampling) -> None:
    path = "conversation.sampling"
    # Written so that a value that is not a number fails.
    if sampling.HasField("temperature") and not 0.0 <= sampling.temperature <= 2.0:
        raise invalid(f"{path}.temperature", f"must be 0 to 2, is {sampling.temperature}")
    if sampling.HasField("top_p") and not 0.0 < sampling.top_p <= 1.0:
        raise invalid(f"{path}.top_p", f"must be more than 0 and at most 1, is {sampling.top_p}")
    if sampling.HasField("top_k") and sampling.top_k < 1:
        raise invalid(f"{path}.top_k", f"must be at least 1, is {sampling.top_k}")
    if sampling.HasField("presence_penalty") and not -2.0 <= sampling.presence_penalty <= 2.0:
        raise invalid(f"{path}.presence_penalty", f"must be -2 to 2, is {sampling.presence_penalty}")
    if sampling.HasField("frequency_penalty") and not -2.0 <= sampling.frequency_penalty <= 2.0:
        raise invalid(f"{path}.frequency_penalty", f"must be -2 to 2, is {sampling.frequency_penalty}")
    if sampling.logit_bias:
        if len(sampling.logit_bias) > 1024:
            raise invalid(f"{path}.logit_bias", f"may have at most 1,024 tokens, has {len(sampling.logit_bias)}")
        for token, bias in sampling.logit_bias.items():
            if token < 0 or not -100.0 <= bias <= 100.0:
                raise invalid(
                    f"{path}.logit_bias[{token}]", f"needs a token id of 0 or more and a bias of -100 to 100, is {bias}"
                )
    if not 0 <= sampling.top_logprob_count <= 20:
        raise invalid(f"{path}.top_logprob_count", f"must be 0 to 20, is {sampling.top_logprob_count}")
    if sampling.top_logprob_count and not sampling.logprobs:
        raise invalid(f"{path}.top_logprob_count", "may be set only with `logprobs`")


def _check_routing(routing: inference_service_pb2.RoutingWishes) -> None:
    model = routing.model
    if len(model) > 32:
        _bounded(model, 128, "routing.model")
    if routing.HasField("max_cost_nano_usd") and routing.max_cost_nano_usd < 0:
        raise invalid("routing.max_cost_nano_usd", f"must be 0 or more, is {routing.max_cost_nano_usd}")
    if routing.HasField("max_latency"):
        _check_duration(routing.max_latency, "routing.max_latency")
    region = routing.region
    if region:
        _bounded(region, 32, "routing.region")
    affinity_key = routing.affinity_key
    if affinity_key:
        _bounded(affinity_key, 128, "routing.affinity_key")


def _check_cache(cache: inference_service_pb2.CacheWishes) -> None:
    if not 0 <= cache.mode <= inference_service_pb2.CACHE_MODE_REFRESH:
        raise invalid("cache.mode", f"has the unknown value {cache.mode}")
    if _NAMESPACE.fullmatch(cache.cache_namespace) is None:
        raise invalid(
            "cache.cache_namespace", f"must have at most 64 characters of [a-z0-9_-], is {cache.cache_namespace[:64]!r}"
        )
    if cache.HasField("min_similarity") and not 0.5 <= cache.min_similarity <= 1.0:
        raise invalid("cache.min_similarity", f"must be 0.5 to 1, is {cache.min_similarity}")
    if cache.HasField("ttl"):
        _check_duration(cache.ttl, "cache.ttl")


def _check_labels(request: inference_service_pb2.GenerateRequest | inference_service_pb2.EmbedRequest) -> None:
    metadata = request.metadata
    if metadata:
        if len(metadata) > 16:
            raise invalid("metadata", f"may have at most 16 pairs, has {len(metadata)}")
        for key, value in metadata.items():
            if not 1 <= _size(key) <= 64:
                raise invalid("metadata", f"keys must have 1 to 64 bytes, {key[:64]!r} has {_size(key)}")
            _bounded(value, 512, f"metadata[{key}]")
    end_user = request.end_user
    if end_user:
        _bounded(end_user, 256, "end_user")


def _check_duration(duration: Duration, field: str) -> None:
    seconds, nanos = duration.seconds, duration.nanos
    if not (0 <= seconds <= _MAX_SECONDS and 0 <= nanos <= 999_999_999) or (seconds == 0 and nanos == 0):
        raise invalid(field, f"must be more than 0, is {seconds} s and {nanos} ns")


def _check_schema(text: str, field: str) -> None:
    _bounded(text, 256 * 1024, field)
    try:
        schema = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise invalid(field, f"is not JSON: {error.msg} at character {error.pos}") from error
    if not isinstance(schema, dict):
        raise invalid(field, "must be a JSON object")


def _bounded(text: str, max_bytes: int, field: str) -> None:
    if len(text) * 4 > max_bytes and _size(text) > max_bytes:
        raise invalid(field, f"may have at most {max_bytes} bytes, has {_size(text)}")


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _misplaced(index: int, number: int, kind: str, message: str) -> Failure:
    return invalid(f"conversation.messages[{index}].parts[{number}].{kind}", message)


def _too_large(size: int, limit: int) -> Failure:
    return Failure(
        Reason.REQUEST_TOO_LARGE,
        f"the request has {size} bytes and may have {limit}; shorten it",
        metadata={"limit_bytes": str(limit)},
    )
