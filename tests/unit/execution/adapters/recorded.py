"""Answers in the shapes in which the providers give them, and the adapters that read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import orjson

from services.execution.adapters.anthropic import AnthropicProvider
from services.execution.adapters.gemini import GeminiProvider
from services.execution.adapters.http1 import Pool
from services.execution.adapters.openai import OpenAIProvider
from tests.unit.execution.examples import SECRET
from tests.unit.execution.upstream import PATIENCE

Adapter = OpenAIProvider | AnthropicProvider | GeminiProvider
TEXT: Final = "Grüße 🙂, it is 21 °C."
THOUGHT: Final = "The user greets — answer."


def events(*documents: Any, ends: bytes = b"\n\n") -> bytes:
    """Server-sent events of documents; bytes stand for themselves."""
    lines = (document if isinstance(document, bytes) else b"data: " + orjson.dumps(document) for document in documents)
    return b"".join(line + ends for line in lines)


def named(*documents: Any) -> bytes:
    """Server-sent events as Anthropic sends them, with their names."""
    return b"".join(b"event: %b\ndata: %b\n\n" % (str(one["type"]).encode(), orjson.dumps(one)) for one in documents)


# OpenAI


def openai_chunk(delta: Any = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    """A chunk of a chat completion."""
    return {
        "id": "chatcmpl-A1",
        "object": "chat.completion.chunk",
        "created": 1760000000,
        "model": "gpt-5-mini-2025-08-07",
        "service_tier": "default",
        "choices": [{"index": 0, "delta": delta or {}, "logprobs": None, "finish_reason": finish}],
        "usage": None,
        **more,
    }


OPENAI_USAGE: Final = {
    "prompt_tokens": 40,
    "completion_tokens": 30,
    "total_tokens": 70,
    "prompt_tokens_details": {"cached_tokens": 16, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 12, "audio_tokens": 0},
}
OPENAI_CALLS: Final = [
    {"id": "call_a", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Köln"}'}},
    {"id": "call_b", "type": "function", "function": {"name": "clock", "arguments": "{}"}},
]
OPENAI_WHOLE: Final = {
    "id": "chatcmpl-A1",
    "object": "chat.completion",
    "created": 1760000000,
    "model": "gpt-5-mini-2025-08-07",
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": TEXT,
                "reasoning_content": THOUGHT,
                "refusal": None,
                "tool_calls": OPENAI_CALLS,
                "annotations": [],
            },
            "logprobs": None,
            "finish_reason": "tool_calls",
        }
    ],
    "usage": OPENAI_USAGE,
}


def _call(index: int, **fields: Any) -> dict[str, Any]:
    return {"tool_calls": [{"index": index, **fields}]}


OPENAI_CHUNKS: Final = [
    openai_chunk({"role": "assistant", "content": "", "refusal": None}),
    openai_chunk({"reasoning_content": THOUGHT[:9]}),
    openai_chunk({"reasoning_content": THOUGHT[9:]}),
    openai_chunk({"content": TEXT[:7]}),
    openai_chunk({"content": TEXT[7:]}),
    openai_chunk(_call(0, id="call_a", type="function", function={"name": "weather", "arguments": ""})),
    openai_chunk(_call(0, function={"arguments": '{"city":'})),
    openai_chunk(_call(0, function={"arguments": '"Köln"}'})),
    openai_chunk(_call(1, id="call_b", type="function", function={"name": "clock", "arguments": "{}"})),
    openai_chunk(finish="tool_calls"),
]
OPENAI_USAGE_CHUNK: Final = {**openai_chunk(), "choices": [], "usage": OPENAI_USAGE}

# Anthropic

ANTHROPIC_USAGE: Final = {
    "input_tokens": 14,
    "cache_creation_input_tokens": 10,
    "cache_read_input_tokens": 16,
    "output_tokens": 30,
    "service_tier": "standard",
}
ANTHROPIC_WHOLE: Final = {
    "id": "msg_01A",
    "type": "message",
    "role": "assistant",
    "model": "claude-sonnet-4-5-20250929",
    "content": [
        {"type": "thinking", "thinking": THOUGHT, "signature": "EqQBCg=="},
        {"type": "text", "text": TEXT},
        {"type": "tool_use", "id": "call_a", "name": "weather", "input": {"city": "Köln"}},
        {"type": "tool_use", "id": "call_b", "name": "clock", "input": {}},
    ],
    "stop_reason": "tool_use",
    "stop_sequence": None,
    "usage": ANTHROPIC_USAGE,
}


def _block(index: int, start: dict[str, Any], *deltas: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"type": "content_block_start", "index": index, "content_block": start},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


ANTHROPIC_START: Final = {
    "type": "message_start",
    "message": {**ANTHROPIC_WHOLE, "content": [], "stop_reason": None, "usage": {**ANTHROPIC_USAGE, "output_tokens": 1}},
}
ANTHROPIC_SHOWN: Final = [
    ANTHROPIC_START,
    {"type": "ping"},
    *_block(
        0,
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "thinking_delta", "thinking": THOUGHT[:9]},
        {"type": "thinking_delta", "thinking": THOUGHT[9:]},
        {"type": "signature_delta", "signature": "EqQBCg=="},
    ),
    *_block(
        1,
        {"type": "text", "text": ""},
        {"type": "text_delta", "text": TEXT[:7]},
        {"type": "text_delta", "text": TEXT[7:]},
    ),
    *_block(
        2,
        {"type": "tool_use", "id": "call_a", "name": "weather", "input": {}},
        {"type": "input_json_delta", "partial_json": ""},
        {"type": "input_json_delta", "partial_json": '{"city":'},
        {"type": "input_json_delta", "partial_json": '"Köln"}'},
    ),
    *_block(3, {"type": "tool_use", "id": "call_b", "name": "clock", "input": {}}),
]
ANTHROPIC_END: Final = [
    {
        "type": "message_delta",
        "delta": {"stop_reason": "tool_use", "stop_sequence": None},
        "usage": {"input_tokens": None, "cache_read_input_tokens": None, "output_tokens": 30},
    },
    {"type": "message_stop"},
]

# Gemini

GEMINI_USAGE: Final = {
    "promptTokenCount": 40,
    "cachedContentTokenCount": 16,
    "candidatesTokenCount": 18,
    "thoughtsTokenCount": 12,
    "totalTokenCount": 70,
}
GEMINI_PARTS: Final = [
    {"text": THOUGHT, "thought": True},
    {"text": TEXT},
    {"functionCall": {"id": "call_a", "name": "weather", "args": {"city": "Köln"}}},
    {"functionCall": {"id": "call_b", "name": "clock", "args": {}}},
]


def gemini_chunk(*parts: Any, finish: str | None = None, **more: Any) -> dict[str, Any]:
    """A response of generateContent."""
    one: dict[str, Any] = {"content": {"parts": list(parts), "role": "model"}, "index": 0}
    if finish:
        one["finishReason"] = finish
    return {"candidates": [one], "modelVersion": "gemini-2.5-flash", "responseId": "resp-1", **more}


GEMINI_WHOLE: Final = gemini_chunk(*GEMINI_PARTS, finish="STOP", usageMetadata=GEMINI_USAGE)
GEMINI_CHUNKS: Final = [
    gemini_chunk({"text": THOUGHT[:9], "thought": True}, usageMetadata={"promptTokenCount": 40, "totalTokenCount": 40}),
    gemini_chunk({"text": THOUGHT[9:], "thought": True}),
    gemini_chunk({"text": TEXT[:7]}),
    gemini_chunk({"text": TEXT[7:]}, GEMINI_PARTS[2]),
    gemini_chunk(GEMINI_PARTS[3], finish="STOP", usageMetadata=GEMINI_USAGE),
]


@dataclass(frozen=True, slots=True)
class Recorded:
    """One provider: how to reach it, and the same answer from it whole and streamed."""

    make: Callable[[Pool], Adapter]
    unary_path: str
    stream_path: str
    key_header: tuple[str, str]
    whole: Any
    stream: bytes
    response_id: str
    """The end of the stream without its usage."""
    without_usage: bytes
    whole_without_usage: Any
    beginning: bytes
    """A first event with text, after which the stream may break."""
    error: bytes
    """An error event: the provider is overloaded."""
    error_body: Callable[[str], Any]
    has_written: bool = False


def _options() -> dict[str, Any]:
    return {
        "address": "",
        "credential": lambda: SECRET,
        "credential_name": "env:KEY",
        "headers": {"x-extra": "1"},
        "idle_timeout": PATIENCE,
    }


RECORDED: Final = {
    "openai": Recorded(
        lambda pool: OpenAIProvider(pool, first_byte_timeout=PATIENCE, **_options()),
        "/chat/completions",
        "/chat/completions",
        ("authorization", f"Bearer {SECRET}"),
        OPENAI_WHOLE,
        events(*OPENAI_CHUNKS, OPENAI_USAGE_CHUNK, b"data: [DONE]"),
        "chatcmpl-A1",
        events(*OPENAI_CHUNKS, b"data: [DONE]"),
        {key: value for key, value in OPENAI_WHOLE.items() if key != "usage"},
        events(openai_chunk({"content": "begun"})),
        events({"error": {"type": "overloaded_error", "message": "busy", "param": None, "code": None}}),
        lambda text: {"error": {"message": text, "type": "x", "param": None, "code": None}},
    ),
    "anthropic": Recorded(
        lambda pool: AnthropicProvider(pool, **_options()),
        "/v1/messages",
        "/v1/messages",
        ("x-api-key", SECRET),
        ANTHROPIC_WHOLE,
        named(*ANTHROPIC_SHOWN, *ANTHROPIC_END),
        "msg_01A",
        named(*ANTHROPIC_SHOWN, {"type": "message_delta", "delta": {"stop_reason": "tool_use"}}, {"type": "message_stop"}),
        {key: value for key, value in ANTHROPIC_WHOLE.items() if key != "usage"},
        named(
            ANTHROPIC_START,
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "begun"}},
        ),
        named({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}),
        lambda text: {"type": "error", "error": {"type": "x", "message": text}},
        has_written=True,
    ),
    "gemini": Recorded(
        lambda pool: GeminiProvider(pool, **_options()),
        "/v1beta/models/upstream-model:generateContent",
        "/v1beta/models/upstream-model:streamGenerateContent?alt=sse",
        ("x-goog-api-key", SECRET),
        GEMINI_WHOLE,
        events(*GEMINI_CHUNKS, ends=b"\r\n\r\n"),
        "resp-1",
        events(*GEMINI_CHUNKS[1:-1], gemini_chunk(GEMINI_PARTS[3], finish="STOP")),
        {key: value for key, value in GEMINI_WHOLE.items() if key != "usageMetadata"},
        events(gemini_chunk({"text": "begun"})),
        events({"error": {"code": 429, "message": "quota", "status": "RESOURCE_EXHAUSTED"}}),
        lambda text: {"error": {"code": 1, "message": text, "status": "X"}},
    ),
}
