"""Anthropic's own: requests, streams that pass through, formats, usage."""

from __future__ import annotations

from typing import Any, Final

import orjson
import pytest

from services.execution.adapters.anthropic import request_of
from services.execution.errors import AttemptFailed
from services.runtime.errors import Reason
from sluice.execution.v1 import execution_service_pb2
from sluice.inference.v1 import answer_pb2, conversation_pb2
from tests.unit.execution.adapters.recorded import ANTHROPIC_SHOWN, ANTHROPIC_START, ANTHROPIC_WHOLE, RECORDED, TEXT, named
from tests.unit.execution.examples import SCHEMA, conversation, embedding, heard, prompt, said, texts
from tests.unit.execution.upstream import Exchange, chunked, document, pool_to, upstream

WIRE: Final = execution_service_pb2.WIRE_FORMAT_ANTHROPIC_MESSAGES
ANTHROPIC: Final = RECORDED["anthropic"]
FORMAT: Final = conversation_pb2.ResponseFormat(
    kind=conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA, json_schema=SCHEMA, description="the place"
)
FORMAT_STREAM: Final = named(
    ANTHROPIC_START,
    {
        "type": "content_block_start",
        "index": 0,
        "content_block": {"type": "tool_use", "id": "t", "name": "answer", "input": {}},
    },
    {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": '{"city":'}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": '"Rome"}'}},
    {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 5}},
    {"type": "message_stop"},
)


async def test_the_simplest_request() -> None:
    assert request_of(prompt(), streaming=False) == {
        "model": "upstream-model",
        "max_tokens": 4096,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
    }
    streamed = request_of(prompt(most=7, user="u"), streaming=True)
    assert (streamed["stream"], streamed["max_tokens"], streamed["metadata"]) == (True, 7, {"user_id": "u"})


async def test_turns_alternate_and_every_part_has_its_block() -> None:
    signed = conversation_pb2.Reasoning(text="hm", signature="s")
    call = conversation_pb2.ToolCall(id="c1", name="f", arguments_json='{"a":1}')
    results = [
        conversation_pb2.Part(tool_result=conversation_pb2.ToolResult(tool_call_id="c1", text="one")),
        conversation_pb2.Part(tool_result=conversation_pb2.ToolResult(tool_call_id="c2", text="two", is_error=True)),
    ]
    talk = conversation_pb2.Conversation(
        messages=[
            said("first", conversation_pb2.ROLE_SYSTEM),
            said("second", conversation_pb2.ROLE_DEVELOPER),
            said("a"),
            conversation_pb2.Message(
                role=conversation_pb2.ROLE_USER,
                parts=[
                    conversation_pb2.Part(image=conversation_pb2.Image(url="https://x/y.png")),
                    conversation_pb2.Part(image=conversation_pb2.Image(data=b"\x01\x02")),
                ],
            ),
            conversation_pb2.Message(
                role=conversation_pb2.ROLE_ASSISTANT,
                parts=[
                    conversation_pb2.Part(reasoning=signed),
                    conversation_pb2.Part(reasoning=conversation_pb2.Reasoning(text="unsigned")),
                    conversation_pb2.Part(text=""),
                    conversation_pb2.Part(tool_call=call),
                ],
            ),
            conversation_pb2.Message(role=conversation_pb2.ROLE_TOOL, parts=results[:1]),
            conversation_pb2.Message(role=conversation_pb2.ROLE_TOOL, parts=results[1:]),
        ],
        sampling=conversation_pb2.Sampling(temperature=0.0, top_k=4, seed=9),
        stop_sequences=["END"],
    )
    body = request_of(prompt(talk), streaming=False)
    assert body["system"] == "first\n\nsecond"
    assert body["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "a"},
                {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AQI="}},
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": "one"},
                {"type": "tool_result", "tool_use_id": "c2", "content": "two", "is_error": True},
            ],
        },
    ]
    assert (body["temperature"], body["top_k"], body["stop_sequences"]) == (0.0, 4, ["END"])
    assert "seed" not in body


@pytest.mark.parametrize(
    ("mode", "name", "parallel", "choice"),
    [
        (conversation_pb2.TOOL_CHOICE_MODE_AUTO, "", None, {"type": "auto"}),
        (conversation_pb2.TOOL_CHOICE_MODE_NONE, "", None, {"type": "none"}),
        (conversation_pb2.TOOL_CHOICE_MODE_REQUIRED, "", False, {"type": "any", "disable_parallel_tool_use": True}),
        (conversation_pb2.TOOL_CHOICE_MODE_NAMED, "f", None, {"type": "tool", "name": "f"}),
        (conversation_pb2.TOOL_CHOICE_MODE_NONE, "", False, {"type": "none"}),
        (None, "", True, {"type": "auto", "disable_parallel_tool_use": False}),
        (None, "", None, None),
    ],
)
async def test_tools(mode: Any, name: str, parallel: bool | None, choice: Any) -> None:
    talk = conversation(tools=[conversation_pb2.ToolDefinition(name="f", description="d", parameters_json_schema=SCHEMA)])
    if mode is not None:
        talk.tool_choice.mode, talk.tool_choice.name = mode, name
    if parallel is not None:
        talk.parallel_tool_calls = parallel
    body = request_of(prompt(talk), streaming=False)
    assert body["tools"] == [{"name": "f", "description": "d", "input_schema": orjson.loads(SCHEMA)}]
    assert body.get("tool_choice") == choice


async def test_thinking_has_a_budget_below_the_limit_and_is_left_out_where_it_is_refused() -> None:
    high = conversation_pb2.REASONING_EFFORT_HIGH
    assert request_of(prompt(conversation(reasoning_effort=high), most=8000), streaming=False)["thinking"] == {
        "type": "enabled",
        "budget_tokens": 4000,
    }
    for most, wanted in ((1024, None), (8000, FORMAT)):
        body = request_of(prompt(conversation(reasoning_effort=high, response_format=wanted), most=most), streaming=False)
        assert "thinking" not in body


STRICT: Final = conversation_pb2.ResponseFormat(
    kind=conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA, json_schema=SCHEMA, description="the place", strict=True
)


async def test_a_strict_tool_says_so() -> None:
    tools = [conversation_pb2.ToolDefinition(name=name, strict=strict) for name, strict in (("f", True), ("g", False))]
    body = request_of(prompt(conversation(tools=tools)), streaming=False)
    assert [tool.get("strict") for tool in body["tools"]] == [True, None]


async def test_a_strict_format_is_a_grammar_beside_which_the_model_thinks_calls_tools_and_passes_through() -> None:
    talk = conversation(
        response_format=STRICT,
        reasoning_effort=conversation_pb2.REASONING_EFFORT_HIGH,
        tools=[conversation_pb2.ToolDefinition(name="f")],
    )
    body = request_of(prompt(talk, most=8000), streaming=False)
    schema = {**orjson.loads(SCHEMA), "description": "the place"}
    assert body["output_config"] == {"format": {"type": "json_schema", "schema": schema}}
    assert body["thinking"] == {"type": "enabled", "budget_tokens": 4000}
    assert [tool["name"] for tool in body["tools"]] == ["f"]
    assert "tool_choice" not in body
    async with upstream(chunked([ANTHROPIC.stream])) as server, pool_to(server.url) as pool:
        got = await heard(ANTHROPIC.make(pool).stream(prompt(talk, wire=WIRE)))
    assert got.wire
    assert texts(got.answer) == TEXT


@pytest.mark.parametrize(
    ("mode", "name", "tools", "choice"),
    [
        (0, "", ["f", "answer"], {"type": "any", "disable_parallel_tool_use": True}),
        (conversation_pb2.TOOL_CHOICE_MODE_AUTO, "", ["f", "answer"], {"type": "any", "disable_parallel_tool_use": True}),
        (conversation_pb2.TOOL_CHOICE_MODE_NONE, "", ["f", "answer"], {"type": "tool", "name": "answer"}),
        (conversation_pb2.TOOL_CHOICE_MODE_REQUIRED, "", ["f"], {"type": "any", "disable_parallel_tool_use": True}),
        (
            conversation_pb2.TOOL_CHOICE_MODE_NAMED,
            "f",
            ["f"],
            {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
        ),
    ],
)
async def test_a_format_leaves_the_callers_tools_their_choice(
    mode: conversation_pb2.ToolChoiceMode.ValueType, name: str, tools: list[str], choice: dict[str, Any]
) -> None:
    talk = conversation(response_format=FORMAT, tools=[conversation_pb2.ToolDefinition(name="f")], parallel_tool_calls=False)
    if mode:
        talk.tool_choice.CopyFrom(conversation_pb2.ToolChoice(mode=mode, name=name))
    body = request_of(prompt(talk), streaming=False)
    assert [tool["name"] for tool in body["tools"]] == tools
    assert body["tool_choice"] == choice


async def test_a_call_in_place_of_a_formatted_answer_is_one() -> None:
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    stream = named(
        ANTHROPIC_START,
        {"type": "content_block_start", "index": 0, "content_block": call},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 5}},
        {"type": "message_stop"},
    )
    talk = conversation(response_format=FORMAT, tools=[conversation_pb2.ToolDefinition(name="f")])
    script = (document({**ANTHROPIC_WHOLE, "content": [call], "stop_reason": "tool_use"}), chunked([stream]))
    async with upstream(*script) as server, pool_to(server.url) as pool:
        provider = ANTHROPIC.make(pool)
        unary = (await provider.complete(prompt(talk))).answer
        streamed = (await heard(provider.stream(prompt(talk, wire=WIRE)))).answer
    for answer in (unary, streamed):
        assert [part.tool_call.name for part in answer.message.parts] == ["f"]
        assert answer.finish_reason == answer_pb2.FINISH_REASON_TOOL_CALLS


async def test_a_json_format_is_a_tool_that_nobody_sees() -> None:
    content = [{"type": "tool_use", "id": "t", "name": "answer", "input": {"city": "Rome"}}]
    script = (document({**ANTHROPIC_WHOLE, "content": content}), chunked([FORMAT_STREAM]))
    async with upstream(*script) as server, pool_to(server.url) as pool:
        provider = ANTHROPIC.make(pool)
        talk = conversation(response_format=FORMAT)
        unary = (await provider.complete(prompt(talk))).answer
        # Asked to pass through, it translates all the same: the tool must not be seen.
        got = await heard(provider.stream(prompt(talk, wire=WIRE)))
    for answer in (unary, got.answer):
        assert orjson.loads(texts(answer)) == {"city": "Rome"}
        assert answer.finish_reason == answer_pb2.FINISH_REASON_STOP
        assert not any(part.HasField("tool_call") for part in answer.message.parts)
    assert got.text == '{"city":"Rome"}'
    assert not got.wire
    asked = server.exchanges[0].document
    assert asked["tools"] == [{"name": "answer", "description": "the place", "input_schema": orjson.loads(SCHEMA)}]
    assert asked["tool_choice"] == {"type": "tool", "name": "answer"}


async def test_a_stream_that_passes_through_lacks_only_usage_and_end_mark_wherever_it_is_cut() -> None:
    raw, shown = ANTHROPIC.stream, named(*ANTHROPIC_SHOWN)
    cut = 1

    async def answers(exchange: Exchange) -> None:
        await chunked([raw[:cut], raw[cut:]])(exchange)

    async with upstream(answers) as server, pool_to(server.url) as pool:
        provider = ANTHROPIC.make(pool)
        for at in range(1, len(raw), 3):
            cut = at
            got = await heard(provider.stream(prompt(wire=WIRE)))
            assert got.wire == shown
            assert not got.deltas
            assert got.answer.usage.input_token_count == 40
            assert texts(got.answer) == TEXT


async def test_an_error_in_a_stream_that_passes_through_is_not_passed_on() -> None:
    async with upstream(chunked([ANTHROPIC.beginning, ANTHROPIC.error])) as server, pool_to(server.url) as pool:
        wire = b""
        with pytest.raises(AttemptFailed) as caught:
            async for piece in ANTHROPIC.make(pool).stream(prompt(wire=WIRE)):
                wire += piece
    assert caught.value.reason is Reason.PROVIDER_OVERLOADED
    assert wire == ANTHROPIC.beginning


@pytest.mark.parametrize(
    ("stop", "finish"),
    [
        ("end_turn", answer_pb2.FINISH_REASON_STOP),
        ("stop_sequence", answer_pb2.FINISH_REASON_STOP),
        ("max_tokens", answer_pb2.FINISH_REASON_LENGTH),
        ("refusal", answer_pb2.FINISH_REASON_CONTENT_FILTER),
        ("something_new", answer_pb2.FINISH_REASON_ERROR),
    ],
)
async def test_ends(stop: str, finish: answer_pb2.FinishReason.ValueType) -> None:
    whole = {**ANTHROPIC_WHOLE, "stop_reason": stop, "stop_sequence": "END"}
    async with upstream(document(whole)) as server, pool_to(server.url) as pool:
        answer = (await ANTHROPIC.make(pool).complete(prompt())).answer
    assert (answer.finish_reason, answer.stop_sequence) == (finish, "END")


async def test_it_names_its_version_and_makes_no_embeddings() -> None:
    async with upstream(document(ANTHROPIC_WHOLE)) as server, pool_to(server.url) as pool:
        provider = ANTHROPIC.make(pool)
        await provider.complete(prompt())
        with pytest.raises(AttemptFailed) as caught:
            await provider.embed(embedding("a"))
    assert caught.value.reason is Reason.PROVIDER_REJECTED
    assert [exchange.headers["anthropic-version"] for exchange in server.exchanges] == ["2023-06-01"]
