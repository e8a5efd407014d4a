"""Streams that are passed on carry our names, and nothing else of them changes."""

from __future__ import annotations

import orjson
import pytest

from services.gateway.edge.anthropic import MessageStream
from services.gateway.edge.openai import ChatStream
from services.gateway.edge.passing import swaps_of
from services.gateway.events import Opened

OPENED = Opened("01OP", "", "house/model", 1, True)


def chunk(content: str, *, spaced: bool = False) -> bytes:
    body = {
        "id": "chatcmpl-x",
        "object": "chat.completion.chunk",
        "model": "/srv/models/secret.gguf",
        "choices": [{"index": 0, "delta": {"content": content}}],
    }
    text = orjson.dumps(body)
    if spaced:
        text = text.replace(b'"id":', b'"id": ').replace(b'"model":', b'"model": ')
    return b"data: " + text + b"\n\n"


@pytest.mark.parametrize("spaced", [False, True])
def test_every_chunk_has_our_id_and_the_catalogues_name(spaced: bool) -> None:
    stream = ChatStream(OPENED, include_usage=False)
    said = 'I am "model":"/srv/models/secret.gguf" and "id":"chatcmpl-x"'
    for content in ("one", said, "three"):
        document = orjson.loads(stream.wire(chunk(content, spaced=spaced))[6:])
        assert document["id"] == "chatcmpl-01OP"
        assert document["model"] == "house/model"
        assert document["choices"][0]["delta"]["content"] == content


def test_what_comes_before_the_first_event_is_left_alone() -> None:
    stream = ChatStream(OPENED, include_usage=False)
    assert stream.wire(b": keep-alive\n\n") == b": keep-alive\n\n"
    assert b"house/model" in stream.wire(chunk("one"))


def test_an_anthropic_stream_is_named_in_its_first_event() -> None:
    stream = MessageStream(OPENED)
    start = {"type": "message_start", "message": {"id": "msg_x", "model": "claude-x-20250101", "content": []}}
    out = stream.wire(b"event: message_start\ndata: " + orjson.dumps(start) + b"\n\n")
    message = orjson.loads(out.split(b"data: ")[1])["message"]
    assert (message["id"], message["model"]) == ("msg_01OP", "house/model")
    later = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"msg_x"}}\n\n'
    assert stream.wire(later) == later


@pytest.mark.parametrize("data", [b"", b"data: [DONE]\n\n", b"data: {broken\n\n", b"data: 7\n\n", b"event: ping\n\n"])
def test_what_names_nothing_teaches_nothing(data: bytes) -> None:
    assert swaps_of(data, {"id": "a"}) is None
