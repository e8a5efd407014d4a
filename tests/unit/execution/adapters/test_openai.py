"""OpenAI's own: requests, streams that pass through, embeddings."""

from __future__ import annotations

from typing import Any, Final

import orjson
import pytest

from services.execution.adapters.openai import MOST_KEPT, OpenAIProvider, request_of
from services.execution.errors import AttemptFailed
from services.runtime.errors import Reason
from sluice.execution.v1 import execution_service_pb2
from sluice.inference.v1 import answer_pb2, conversation_pb2
from tests.unit.execution.adapters.recorded import (
    OPENAI_CHUNKS,
    OPENAI_USAGE,
    OPENAI_USAGE_CHUNK,
    RECORDED,
    TEXT,
    events,
    openai_chunk,
)
from tests.unit.execution.examples import SCHEMA, Heard, conversation, embedding, heard, prompt, said, texts
from tests.unit.execution.upstream import PATIENCE, Exchange, chunked, document, pool_to, upstream, whole

WIRE: Final = execution_service_pb2.WIRE_FORMAT_OPENAI_CHAT
OPENAI: Final = RECORDED["openai"]
DONE: Final = b"data: [DONE]\n\n"


async def passed(*pieces: bytes) -> Heard:
    async with upstream(chunked(pieces)) as server, pool_to(server.url) as pool:
        return await heard(OPENAI.make(pool).stream(prompt(wire=WIRE)))


async def test_the_simplest_request() -> None:
    body = request_of(prompt(), streaming=False)
    assert body == {"model": "upstream-model", "messages": [{"role": "user", "content": "hello"}]}
    streamed = request_of(prompt(most=7, user="u"), streaming=True, limit_field="max_tokens")
    assert streamed["stream"] is True
    assert streamed["stream_options"] == {"include_usage": True}
    assert (streamed["max_tokens"], streamed["user"]) == (7, "u")


async def test_a_tool_s_name_stands_at_each_of_its_results_and_refusals_are_joined() -> None:
    results = [
        conversation_pb2.Part(tool_result=conversation_pb2.ToolResult(tool_call_id=call, text="t")) for call in ("c1", "c2")
    ]
    talk = conversation()
    refusals = [conversation_pb2.Part(refusal="no, "), conversation_pb2.Part(refusal="never")]
    talk.messages.add(role=conversation_pb2.ROLE_ASSISTANT, parts=refusals)
    talk.messages.add(role=conversation_pb2.ROLE_TOOL, name="f", parts=results)
    assert request_of(prompt(talk), streaming=False)["messages"][1:] == [
        {"role": "assistant", "content": None, "refusal": "no, never"},
        {"role": "tool", "tool_call_id": "c1", "content": "t", "name": "f"},
        {"role": "tool", "tool_call_id": "c2", "content": "t", "name": "f"},
    ]


async def test_a_format_without_a_name_has_the_contract_s() -> None:
    wanted = conversation_pb2.ResponseFormat(kind=conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA, json_schema=SCHEMA)
    body = request_of(prompt(conversation(response_format=wanted)), streaming=False)
    assert body["response_format"]["json_schema"]["name"] == "response"


async def test_every_field_of_a_conversation() -> None:
    talk = conversation_pb2.Conversation(
        messages=[
            said("be brief", conversation_pb2.ROLE_SYSTEM),
            conversation_pb2.Message(
                role=conversation_pb2.ROLE_USER,
                name="ann",
                parts=[
                    conversation_pb2.Part(text="what is this?"),
                    conversation_pb2.Part(image=conversation_pb2.Image(url="https://x/y.png", detail="low")),
                    conversation_pb2.Part(image=conversation_pb2.Image(data=b"\x01\x02", media_type="image/gif")),
                ],
            ),
            conversation_pb2.Message(
                role=conversation_pb2.ROLE_ASSISTANT,
                parts=[
                    conversation_pb2.Part(reasoning=conversation_pb2.Reasoning(text="hm")),
                    conversation_pb2.Part(tool_call=conversation_pb2.ToolCall(id="c1", name="f", arguments_json='{"a":1}')),
                    conversation_pb2.Part(tool_call=conversation_pb2.ToolCall(id="c2", name="f", arguments_json="{}")),
                ],
            ),
            conversation_pb2.Message(
                role=conversation_pb2.ROLE_TOOL,
                parts=[
                    conversation_pb2.Part(tool_result=conversation_pb2.ToolResult(tool_call_id="c1", text="one")),
                    conversation_pb2.Part(tool_result=conversation_pb2.ToolResult(tool_call_id="c2", text="two")),
                ],
            ),
        ],
        tools=[conversation_pb2.ToolDefinition(name="f", description="d", parameters_json_schema=SCHEMA, strict=True)],
        tool_choice=conversation_pb2.ToolChoice(mode=conversation_pb2.TOOL_CHOICE_MODE_NAMED, name="f"),
        parallel_tool_calls=False,
        response_format=conversation_pb2.ResponseFormat(
            kind=conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA, json_schema=SCHEMA, name="n", strict=False, description="e"
        ),
        sampling=conversation_pb2.Sampling(
            temperature=0.0, top_p=0.5, seed=3, logit_bias={7: -1.0}, logprobs=True, top_logprob_count=2
        ),
        stop_sequences=["END"],
        reasoning_effort=conversation_pb2.REASONING_EFFORT_LOW,
    )
    body = request_of(prompt(talk), streaming=False)
    schema = orjson.loads(SCHEMA)
    assert body == {
        "model": "upstream-model",
        "messages": [
            {"role": "system", "content": "be brief"},
            {
                "role": "user",
                "name": "ann",
                "content": [
                    {"type": "text", "text": "what is this?"},
                    {"type": "image_url", "image_url": {"url": "https://x/y.png", "detail": "low"}},
                    {"type": "image_url", "image_url": {"url": "data:image/gif;base64,AQI="}},
                ],
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
                    {"id": "c2", "type": "function", "function": {"name": "f", "arguments": "{}"}},
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "one"},
            {"role": "tool", "tool_call_id": "c2", "content": "two"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": schema, "strict": True}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": False,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": schema, "strict": False, "description": "e"},
        },
        "temperature": 0.0,
        "top_p": 0.5,
        "seed": 3,
        "logit_bias": {"7": -1.0},
        "logprobs": True,
        "top_logprobs": 2,
        "stop": ["END"],
        "reasoning_effort": "low",
    }


async def test_a_stream_that_passes_through_lacks_only_usage_and_end_mark_wherever_it_is_cut() -> None:
    raw, shown = OPENAI.stream, events(*OPENAI_CHUNKS)
    cut = 1

    async def answers(exchange: Exchange) -> None:
        await chunked([raw[:cut], raw[cut:]])(exchange)

    async with upstream(answers) as server, pool_to(server.url) as pool:
        provider = OPENAI.make(pool)
        for at in range(1, len(raw)):
            cut = at
            got = await heard(provider.stream(prompt(wire=WIRE)))
            assert got.wire == shown
            assert not got.deltas
            assert got.answer.usage.input_token_count == 40
            assert got.answer.usage.source == answer_pb2.USAGE_SOURCE_REPORTED
            assert got.answer.finish_reason == answer_pb2.FINISH_REASON_TOOL_CALLS
            assert got.answer.message.parts[1].text == TEXT
            assert got.answer.message.parts[2].tool_call.arguments_json == '{"city":"Köln"}'


async def test_usage_beside_a_choice_is_counted_and_its_event_is_passed_on() -> None:
    # Some servers put usage into the last chunk that has a choice.
    last = {**openai_chunk({"content": "x"}, "stop"), "usage": OPENAI_USAGE}
    got = await passed(events(last), DONE)
    assert got.wire == events(last)
    assert got.answer.usage.output_token_count == 30


async def test_usage_written_with_spaces_is_withheld_too() -> None:
    spaced = b'data: {"id": "a", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}\n\n'
    got = await passed(events(openai_chunk({"content": "x"}, "stop")) + spaced + DONE)
    assert got.wire == events(openai_chunk({"content": "x"}, "stop"))
    assert got.answer.usage.output_token_count == 4


async def test_text_that_looks_like_a_mark_is_passed_on() -> None:
    text = 'say [DONE] or "usage":{"x"} or "error" or data: {}'
    got = await passed(events(openai_chunk({"content": text}, "stop")) + DONE)
    assert got.wire == events(openai_chunk({"content": text}, "stop"))
    assert texts(got.answer) == text


async def test_comments_that_keep_the_connection_alive_are_no_answer() -> None:
    got = await passed(b": ping\n\n", events(openai_chunk({"content": "x"}, "stop")), b": ping\n\n", DONE)
    assert texts(got.answer) == "x"
    translated = [b": ping\n\n", events(openai_chunk({"content": "x"}, "stop")), DONE]
    async with upstream(chunked(translated)) as server, pool_to(server.url) as pool:
        assert (await heard(OPENAI.make(pool).stream(prompt()))).text == "x"


async def test_events_with_cr_lf_pass_through_too() -> None:
    got = await passed(OPENAI.stream.replace(b"\n", b"\r\n"))
    assert got.answer.usage.input_token_count == 40
    assert b"[DONE]" not in got.wire
    assert b"prompt_tokens" not in got.wire
    assert got.wire.replace(b"\r\n", b"\n") == events(*OPENAI_CHUNKS)


async def test_an_error_in_a_stream_that_passes_through_is_not_passed_on() -> None:
    async with upstream(chunked([OPENAI.beginning, OPENAI.error])) as server, pool_to(server.url) as pool:
        got = Heard()
        with pytest.raises(AttemptFailed) as caught:
            async for piece in OPENAI.make(pool).stream(prompt(wire=WIRE)):
                got.take(piece)
    assert caught.value.reason is Reason.PROVIDER_OVERLOADED
    assert got.wire == OPENAI.beginning


@pytest.mark.parametrize("wire", [0, WIRE])
async def test_a_stream_without_an_end_mark_counts_when_its_answer_has_a_finish(wire: int) -> None:
    async with upstream(chunked([events(*OPENAI_CHUNKS)])) as server, pool_to(server.url) as pool:
        got = await heard(OPENAI.make(pool).stream(prompt(wire=wire)))
        assert got.answer.finish_reason == answer_pb2.FINISH_REASON_TOOL_CALLS
        server.plays(chunked([events(*OPENAI_CHUNKS[:-1])]))
        with pytest.raises(AttemptFailed) as caught:
            await heard(OPENAI.make(pool).stream(prompt(wire=wire)))
        assert caught.value.reason is Reason.PROVIDER_STREAM_BROKEN


@pytest.mark.parametrize("wire", [0, WIRE])
async def test_a_stream_too_long_to_keep_has_an_empty_message_and_its_usage(wire: int) -> None:
    long = [events(openai_chunk({"content": "x" * 65536})) for _ in range(MOST_KEPT // 65536 + 1)]
    ends = [events(openai_chunk(finish="length"), OPENAI_USAGE_CHUNK), DONE]
    async with upstream(chunked(long + ends)) as server, pool_to(server.url) as pool:
        got = await heard(OPENAI.make(pool).stream(prompt(wire=wire)))
    assert len(got.wire if wire else got.text) > MOST_KEPT
    assert not got.answer.message.parts
    assert got.answer.usage.output_token_count == 30
    assert got.answer.finish_reason == answer_pb2.FINISH_REASON_LENGTH


async def test_refusals_and_log_probabilities() -> None:
    token = {"token": "no", "logprob": -0.5, "bytes": [110, 111], "top_logprobs": []}
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": None, "refusal": "I won't."},
        "logprobs": {"content": [token]},
        "finish_reason": "content_filter",
    }
    streamed = [
        openai_chunk({"refusal": "I "}, choices=[{"index": 0, "delta": {"refusal": "I "}, "logprobs": {"content": [token]}}]),
        openai_chunk({"refusal": "won't."}, "content_filter"),
    ]
    script = (document({**OPENAI.whole, "choices": [choice]}), chunked([events(*streamed), DONE]))
    async with upstream(*script) as server, pool_to(server.url) as pool:
        provider = OPENAI.make(pool)
        answers = [(await provider.complete(prompt())).answer, (await heard(provider.stream(prompt()))).answer]
    for answer in answers:
        assert [part.refusal for part in answer.message.parts] == ["I won't."]
        assert answer.finish_reason == answer_pb2.FINISH_REASON_CONTENT_FILTER
        assert orjson.loads(answer.logprobs_json)["content"] == [token]


async def test_embeddings_are_in_the_order_of_the_inputs() -> None:
    rows = [{"object": "embedding", "index": index, "embedding": [float(index), 0.5]} for index in (1, 0)]
    answer = {"object": "list", "data": rows, "model": "e", "usage": {"prompt_tokens": 9, "total_tokens": 9}}
    async with upstream(document(answer)) as server, pool_to(server.url) as pool:
        embedded = await OPENAI.make(pool).embed(embedding("a", "b", dimensions=2))
    assert [list(vector) for vector in embedded.vectors] == [[0.0, 0.5], [1.0, 0.5]]
    assert embedded.usage.input_token_count == 9
    assert server.exchanges[0].path == "/embeddings"
    assert server.exchanges[0].document == {
        "model": "upstream-model",
        "input": ["a", "b"],
        "encoding_format": "float",
        "dimensions": 2,
    }


@pytest.mark.parametrize(
    "answer", [b"{}", b"null", b"x", b'{"data":[]}', b'{"data":[{"index":0,"embedding":[1]}]}', b'{"data":[{"index":0}]}']
)
async def test_embeddings_that_are_none_are_malformed(answer: bytes) -> None:
    async with upstream(whole(answer)) as server, pool_to(server.url) as pool:
        with pytest.raises(AttemptFailed) as caught:
            await OPENAI.make(pool).embed(embedding("a", "b"))
        assert caught.value.reason is Reason.PROVIDER_MALFORMED


async def test_a_rotated_key_is_used_by_the_next_call() -> None:
    keys = ["one", "one", "two"]
    options: dict[str, Any] = {"address": "", "credential_name": "", "headers": {}, "idle_timeout": PATIENCE}
    async with upstream(document(OPENAI.whole)) as server, pool_to(server.url) as pool:
        provider = OpenAIProvider(pool, credential=lambda: keys.pop(0), first_byte_timeout=PATIENCE, **options)
        while keys:
            await provider.complete(prompt(conversation()))
    assert [exchange.headers["authorization"] for exchange in server.exchanges] == ["Bearer one", "Bearer one", "Bearer two"]
