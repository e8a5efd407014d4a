"""Gemini's own: requests, blocked prompts, embeddings."""

from __future__ import annotations

from typing import Final

import orjson
import pytest

from services.execution.adapters.gemini import request_of
from services.execution.errors import AttemptFailed
from services.runtime.errors import Reason
from sluice.inference.v1 import answer_pb2, conversation_pb2
from tests.unit.execution.adapters.recorded import RECORDED, gemini_chunk
from tests.unit.execution.examples import SCHEMA, conversation, embedding, prompt, said, texts
from tests.unit.execution.upstream import document, pool_to, upstream, whole

GEMINI: Final = RECORDED["gemini"]


async def test_the_simplest_request() -> None:
    assert request_of(prompt()) == {"contents": [{"role": "user", "parts": [{"text": "hello"}]}]}


async def test_every_field_of_a_conversation() -> None:
    call = conversation_pb2.ToolCall(id="c1", name="f", arguments_json='{"a":1}')
    result = conversation_pb2.ToolResult(tool_call_id="c1", text="one")
    failed = conversation_pb2.ToolResult(tool_call_id="c1", text="two", is_error=True)
    talk = conversation_pb2.Conversation(
        messages=[
            said("be brief", conversation_pb2.ROLE_SYSTEM),
            said("a"),
            conversation_pb2.Message(
                role=conversation_pb2.ROLE_USER,
                parts=[
                    conversation_pb2.Part(image=conversation_pb2.Image(url="https://x/y.png", media_type="image/webp")),
                    conversation_pb2.Part(image=conversation_pb2.Image(data=b"\x01\x02")),
                ],
            ),
            conversation_pb2.Message(role=conversation_pb2.ROLE_ASSISTANT, parts=[conversation_pb2.Part(tool_call=call)]),
            conversation_pb2.Message(
                role=conversation_pb2.ROLE_TOOL,
                parts=[conversation_pb2.Part(tool_result=result), conversation_pb2.Part(tool_result=failed)],
            ),
        ],
        tools=[conversation_pb2.ToolDefinition(name="f", description="d", parameters_json_schema=SCHEMA)],
        tool_choice=conversation_pb2.ToolChoice(mode=conversation_pb2.TOOL_CHOICE_MODE_NAMED, name="f"),
        response_format=conversation_pb2.ResponseFormat(
            kind=conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA, json_schema=SCHEMA
        ),
        sampling=conversation_pb2.Sampling(temperature=0.0, top_p=0.5, top_k=4, seed=9),
        stop_sequences=["END"],
        reasoning_effort=conversation_pb2.REASONING_EFFORT_NONE,
    )
    schema = orjson.loads(SCHEMA)
    assert request_of(prompt(talk, most=7)) == {
        "contents": [
            {
                "role": "user",
                "parts": [
                    {"text": "a"},
                    {"fileData": {"fileUri": "https://x/y.png", "mimeType": "image/webp"}},
                    {"inlineData": {"mimeType": "image/png", "data": "AQI="}},
                ],
            },
            {"role": "model", "parts": [{"functionCall": {"id": "c1", "name": "f", "args": {"a": 1}}}]},
            {
                "role": "user",
                "parts": [
                    {"functionResponse": {"id": "c1", "name": "f", "response": {"output": "one"}}},
                    {"functionResponse": {"id": "c1", "name": "f", "response": {"error": "two"}}},
                ],
            },
        ],
        "systemInstruction": {"parts": [{"text": "be brief"}]},
        "tools": [{"functionDeclarations": [{"name": "f", "description": "d", "parametersJsonSchema": schema}]}],
        "toolConfig": {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["f"]}},
        "generationConfig": {
            "maxOutputTokens": 7,
            "temperature": 0.0,
            "topP": 0.5,
            "topK": 4,
            "seed": 9,
            "stopSequences": ["END"],
            "responseMimeType": "application/json",
            "responseJsonSchema": schema,
            "thinkingConfig": {"thinkingBudget": 0, "includeThoughts": False},
        },
    }


async def test_a_result_bears_the_name_of_the_call_before_it() -> None:
    def turns(call: str, name: str, turn: str = "") -> list[conversation_pb2.Message]:
        made = conversation_pb2.Part(tool_call=conversation_pb2.ToolCall(id="c1", name=name, arguments_json="{}"))
        result = conversation_pb2.Part(tool_result=conversation_pb2.ToolResult(tool_call_id=call, text="t"))
        return [
            conversation_pb2.Message(role=conversation_pb2.ROLE_ASSISTANT, parts=[made]),
            conversation_pb2.Message(role=conversation_pb2.ROLE_TOOL, name=turn, parts=[result]),
        ]

    talk = conversation()
    talk.messages.extend([*turns("c1", "f"), *turns("c1", "g"), *turns("cut off", "g", "h"), *turns("lost", "g")])
    results = [
        part["functionResponse"]
        for turn in request_of(prompt(talk))["contents"]
        for part in turn["parts"][:1]
        if "functionResponse" in part
    ]
    assert [(result["id"], result["name"]) for result in results] == [
        ("c1", "f"),
        ("c1", "g"),
        ("cut off", "h"),
        ("lost", "lost"),
    ]


@pytest.mark.parametrize(
    ("mode", "strict", "expected"),
    [
        (0, True, {"mode": "VALIDATED"}),
        (0, False, None),
        (conversation_pb2.TOOL_CHOICE_MODE_AUTO, True, {"mode": "VALIDATED"}),
        (conversation_pb2.TOOL_CHOICE_MODE_AUTO, False, {"mode": "AUTO"}),
        (conversation_pb2.TOOL_CHOICE_MODE_REQUIRED, True, {"mode": "ANY"}),
        (conversation_pb2.TOOL_CHOICE_MODE_NONE, True, {"mode": "NONE"}),
        (conversation_pb2.TOOL_CHOICE_MODE_NAMED, True, {"mode": "ANY", "allowedFunctionNames": ["f"]}),
    ],
)
async def test_strict_tools_are_held_to_their_schemas(
    mode: conversation_pb2.ToolChoiceMode.ValueType, strict: bool, expected: dict[str, object] | None
) -> None:
    talk = conversation(tools=[conversation_pb2.ToolDefinition(name="f", strict=strict)])
    if mode:
        talk.tool_choice.CopyFrom(
            conversation_pb2.ToolChoice(mode=mode, name="f" if mode == conversation_pb2.TOOL_CHOICE_MODE_NAMED else "")
        )
    assert request_of(prompt(talk)).get("toolConfig") == (expected and {"functionCallingConfig": expected})


@pytest.mark.parametrize(("schema", "expected"), [("{}", "the place"), ('{"description":"a city"}', "the place\n\na city")])
async def test_a_description_of_the_format_stands_in_its_schema(schema: str, expected: str) -> None:
    wanted = conversation_pb2.ResponseFormat(
        kind=conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA, json_schema=schema, description="the place"
    )
    made = request_of(prompt(conversation(response_format=wanted)))
    assert made["generationConfig"]["responseJsonSchema"] == {"description": expected}


async def test_calls_without_ids_get_ones_that_no_other_answer_has() -> None:
    def called(identity: str) -> dict[str, object]:
        parts = [{"functionCall": {"name": "f", "args": {}}}, {"functionCall": {"name": "f", "args": {}}}]
        return {"candidates": [{"content": {"parts": parts}, "finishReason": "STOP"}], "responseId": identity}

    async with upstream(document(called("r1")), document(called("r2"))) as server, pool_to(server.url) as pool:
        provider = GEMINI.make(pool)
        answers = [(await provider.complete(prompt())).answer for _ in range(2)]
    ids = [part.tool_call.id for answer in answers for part in answer.message.parts]
    assert ids == ["call_r1_0", "call_r1_1", "call_r2_0", "call_r2_1"]


async def test_a_blocked_prompt_is_an_answer_that_was_filtered() -> None:
    blocked = {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 5}, "responseId": "r"}
    async with upstream(document(blocked)) as server, pool_to(server.url) as pool:
        answer = (await GEMINI.make(pool).complete(prompt())).answer
    assert answer.finish_reason == answer_pb2.FINISH_REASON_CONTENT_FILTER
    assert answer.usage.input_token_count == 5
    assert not answer.message.parts


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("STOP", answer_pb2.FINISH_REASON_STOP),
        ("MAX_TOKENS", answer_pb2.FINISH_REASON_LENGTH),
        ("SAFETY", answer_pb2.FINISH_REASON_CONTENT_FILTER),
        ("MALFORMED_FUNCTION_CALL", answer_pb2.FINISH_REASON_ERROR),
    ],
)
async def test_ends(theirs: str, ours: answer_pb2.FinishReason.ValueType) -> None:
    async with upstream(document(gemini_chunk({"text": "x"}, finish=theirs))) as server, pool_to(server.url) as pool:
        answer = (await GEMINI.make(pool).complete(prompt())).answer
    assert (answer.finish_reason, texts(answer)) == (ours, "x")


async def test_embeddings() -> None:
    async with (
        upstream(document({"embeddings": [{"values": [1.0]}, {"values": [2.0]}]})) as server,
        pool_to(server.url) as pool,
    ):
        embedded = await GEMINI.make(pool).embed(embedding("a", "b", dimensions=1))
    assert [list(vector) for vector in embedded.vectors] == [[1.0], [2.0]]
    assert embedded.usage.source == answer_pb2.USAGE_SOURCE_UNSPECIFIED
    [asked] = server.exchanges
    assert asked.path == "/v1beta/models/upstream-model:batchEmbedContents"
    assert asked.document["requests"][1] == {
        "model": "models/upstream-model",
        "content": {"parts": [{"text": "b"}]},
        "outputDimensionality": 1,
    }


@pytest.mark.parametrize("answer", [b"{}", b"null", b"x", b'{"embeddings":[{}]}', b'{"embeddings":[{"values":[1]}]}'])
async def test_embeddings_that_are_none_are_malformed(answer: bytes) -> None:
    async with upstream(whole(answer)) as server, pool_to(server.url) as pool:
        with pytest.raises(AttemptFailed) as caught:
            await GEMINI.make(pool).embed(embedding("a", "b"))
        assert caught.value.reason is Reason.PROVIDER_MALFORMED


async def test_a_conversation_with_a_system_turn_alone_is_sent_as_it_is() -> None:
    talk = conversation_pb2.Conversation(messages=[said("x", conversation_pb2.ROLE_SYSTEM)])
    assert request_of(prompt(talk)) == {"contents": [], "systemInstruction": {"parts": [{"text": "x"}]}}
    assert request_of(prompt(conversation("y")))["contents"][0]["role"] == "user"
