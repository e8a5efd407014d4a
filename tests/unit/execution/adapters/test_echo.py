"""The echo provider: each directive."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from typing import Any

import jsonschema
import orjson
import pytest

from services.execution.adapters import echo
from services.execution.adapters.echo import EchoProvider, example
from services.execution.errors import AttemptFailed, SpoolFull
from services.runtime.errors import Reason
from sluice.inference.v1 import answer_pb2, conversation_pb2
from tests.unit.execution.adapters.recorded import TEXT
from tests.unit.execution.examples import Heard, conversation, embedding, heard, prompt, said, texts

FAR = 1000.0
"""Seconds that no test waits for."""


def block(**directives: Any) -> str:
    return f"[[echo {orjson.dumps(directives).decode()}]]"


async def answered(text: str = "hello there", metadata: dict[str, str] | None = None, **directives: Any) -> answer_pb2.Answer:
    """The whole answer, after a check that the stream's is equal."""
    talk = conversation(f"{text} {block(**directives)}" if directives else text)
    unary = (await EchoProvider().complete(prompt(talk, metadata=metadata))).answer
    streamed = await heard(EchoProvider().stream(prompt(talk, metadata=metadata)))
    assert streamed.answer == unary
    assert streamed.text == texts(unary)
    return unary  # type: ignore[no-any-return]  # carried as an opaque object


async def refused(text: str = "x", metadata: dict[str, str] | None = None, **directives: Any) -> AttemptFailed:
    talk = conversation(text + block(**directives) if directives else text)
    with pytest.raises(AttemptFailed) as caught:
        await EchoProvider().complete(prompt(talk, metadata=metadata))
    with pytest.raises(AttemptFailed) as streamed:
        await heard(EchoProvider().stream(prompt(talk, metadata=metadata)))
    assert streamed.value.reason is caught.value.reason
    return caught.value


async def test_nothing_runs_that_the_gate_holds_back() -> None:
    def held_back() -> None:
        raise SpoolFull

    provider = EchoProvider()
    with pytest.raises(SpoolFull):
        await provider.complete(replace(prompt(), gate=held_back))
    with pytest.raises(SpoolFull):
        await anext(aiter(provider.stream(replace(prompt(), gate=held_back))))
    with pytest.raises(SpoolFull):
        await provider.embed(replace(embedding("a"), gate=held_back))


async def test_it_says_the_last_user_turn() -> None:
    talk = conversation("first")
    talk.messages.append(said("an answer", conversation_pb2.ROLE_ASSISTANT))
    talk.messages.append(said(TEXT))
    answer = (await EchoProvider().complete(prompt(talk))).answer
    assert texts(answer) == f"echo: {TEXT}"
    assert answer.model == "catalogue/model"
    assert answer.finish_reason == answer_pb2.FINISH_REASON_STOP
    assert answer.usage.source == answer_pb2.USAGE_SOURCE_REPORTED
    assert answer.usage.input_token_count == len(f"first an answer {TEXT}".split())


async def test_every_directive_that_is_known_is_tested_here() -> None:
    tested = "delay chunk_delay chunks text error error_message retry_after break_after hang finish input_tokens output_tokens"
    assert set(f"{tested} cached_tokens reasoning_tokens no_usage tool_calls reasoning refusal".split()) == echo._KNOWN


async def test_text_from_the_block_wins_and_the_block_is_cut_out() -> None:
    assert texts(await answered(metadata={"echo.text": "meta"})) == "meta"
    assert texts(await answered(metadata={"echo.text": "meta"}, text="x " + block(text="block"))) == "block"
    assert texts(await answered(output_tokens=3)) == "echo: hello there"


async def test_metadata_of_other_names_is_not_read() -> None:
    assert texts(await answered(metadata={"text": "no", "team": "a"})) == "echo: hello there"


@pytest.mark.parametrize(
    "make",
    [{"nonsense": 1}, {"delay": -1}, {"delay": "soon"}, {"delay": True}, {"tool_calls": "f"}, {"tool_calls": [{"x": 1}]}],
)
async def test_directives_that_are_none_are_the_callers_fault(make: dict[str, Any]) -> None:
    failure = await refused(**make)
    assert (failure.reason, failure.status) == (Reason.PROVIDER_REJECTED, 400)


async def test_a_block_that_is_not_json_is_the_callers_fault() -> None:
    assert (await refused(text="[[echo {nope}]]")).reason is Reason.PROVIDER_REJECTED
    assert (await refused(metadata={"echo.delay": "NaN"})).reason is Reason.PROVIDER_REJECTED


@pytest.mark.parametrize("directive", [{"delay": FAR}, {"hang": True}])
async def test_delay_and_hang_last_until_the_deadline(directive: dict[str, Any]) -> None:
    talk = conversation(block(**directive))
    with pytest.raises(AttemptFailed) as caught:
        await EchoProvider().complete(prompt(talk, seconds=0.02))
    assert caught.value.reason is Reason.PROVIDER_TIMEOUT
    with pytest.raises(AttemptFailed) as caught:
        await heard(EchoProvider().stream(prompt(talk, seconds=0.02)))
    assert caught.value.reason is Reason.PROVIDER_TIMEOUT


async def test_a_short_delay_delays() -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    await EchoProvider().complete(prompt(conversation(block(delay=0.03))))
    assert loop.time() - began >= 0.03


async def test_chunk_delay_lies_between_two_pieces_and_ends_with_the_deadline() -> None:
    got = Heard()
    with pytest.raises(AttemptFailed) as caught:
        async for piece in EchoProvider().stream(prompt(conversation(f"a b {block(chunk_delay=FAR)}"), seconds=0.05)):
            got.take(piece)
    assert caught.value.reason is Reason.PROVIDER_TIMEOUT
    assert got.text == "echo: "


@pytest.mark.parametrize("chunks", [1, 2, 5])
async def test_chunks(chunks: int) -> None:
    got = await heard(EchoProvider().stream(prompt(conversation(f"some words {block(chunks=chunks)}"))))
    assert len(got.deltas) == chunks
    assert got.text == "echo: some words"


async def test_without_chunks_there_is_a_piece_for_each_word() -> None:
    got = await heard(EchoProvider().stream(prompt(conversation("three short words"))))
    assert [delta.text for delta in got.deltas] == ["echo: ", "three ", "short ", "words"]


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (400, Reason.PROVIDER_REJECTED),
        (401, Reason.PROVIDER_AUTHENTICATION),
        (429, Reason.PROVIDER_RATE_LIMITED),
        (500, Reason.PROVIDER_UNAVAILABLE),
        (529, Reason.PROVIDER_OVERLOADED),
    ],
)
async def test_error_error_message_and_retry_after(status: int, reason: Reason) -> None:
    failure = await refused(error=status, error_message="in these words", retry_after=3)
    assert (failure.reason, failure.status) == (reason, status)
    assert failure.retry_delay == (3.0 if status in (429, 500, 529) else None)
    assert ("in these words" in failure.message) == (status == 400)
    # As metadata they are texts.
    assert (await refused(metadata={"echo.error": str(status)})).reason is reason


@pytest.mark.parametrize("after", [0, 2])
async def test_break_after(after: int) -> None:
    got = Heard()
    with pytest.raises(AttemptFailed) as caught:
        async for piece in EchoProvider().stream(prompt(conversation(f"a b c {block(break_after=after)}"))):
            got.take(piece)
    assert caught.value.reason is Reason.PROVIDER_STREAM_BROKEN
    assert len(got.deltas) == after


async def test_finish() -> None:
    for name, reason in echo._FINISHES.items():
        assert (await answered(finish=name)).finish_reason == reason


async def test_usage() -> None:
    usage = (await answered(input_tokens=100, output_tokens=50, cached_tokens=40, reasoning_tokens=20)).usage
    assert (usage.input_token_count, usage.output_token_count) == (100, 50)
    assert (usage.cached_input_token_count, usage.reasoning_token_count) == (40, 20)
    assert (await answered(no_usage=True)).usage.source == answer_pb2.USAGE_SOURCE_UNSPECIFIED


async def test_tool_calls() -> None:
    calls = [{"name": "f", "arguments": {"a": "Köln"}}, {"name": "g"}]
    answer = await answered(tool_calls=calls)
    assert answer.finish_reason == answer_pb2.FINISH_REASON_TOOL_CALLS
    assert [part.tool_call.name for part in answer.message.parts] == ["f", "g"]
    assert orjson.loads(answer.message.parts[0].tool_call.arguments_json) == {"a": "Köln"}
    got = await heard(EchoProvider().stream(prompt(conversation(block(tool_calls=calls)))))
    assert got.calls() == {0: ("call_echo_0", "f", '{"a":"Köln"}'), 1: ("call_echo_1", "g", "{}")}
    # Arguments come in pieces, as providers send them.
    assert len(got.deltas) == 4


async def test_reasoning_and_refusal() -> None:
    answer = await answered(reasoning="hm", refusal="no")
    assert [part.WhichOneof("kind") for part in answer.message.parts] == ["reasoning", "refusal"]
    got = await heard(EchoProvider().stream(prompt(conversation(block(reasoning="hm", refusal="no")))))
    assert (got.reasoning, got.deltas[1].refusal) == ("hm", "no")


SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}, "required": ["a", "b"]},
    {
        "type": "object",
        "properties": {"n": {"type": "number", "minimum": 3}, "ok": {"type": "boolean"}, "no": {"type": "null"}},
    },
    {"type": "array", "items": {"enum": ["x", "y"]}, "minItems": 3},
    {
        "type": "object",
        "properties": {"c": {"const": 7}, "d": {"anyOf": [{"type": "string", "minLength": 9}, {"type": "null"}]}},
    },
    {"type": ["string", "null"], "maxLength": 3},
]


@pytest.mark.parametrize("schema", SCHEMAS)
async def test_formats(schema: dict[str, Any]) -> None:
    kinds = conversation_pb2.ResponseFormatKind
    wanted = conversation_pb2.ResponseFormat(
        kind=kinds.RESPONSE_FORMAT_KIND_JSON_SCHEMA, json_schema=orjson.dumps(schema).decode()
    )
    answer = (await EchoProvider().complete(prompt(conversation("some words", response_format=wanted)))).answer
    jsonschema.validate(orjson.loads(texts(answer)), schema)
    loose = conversation_pb2.ResponseFormat(kind=kinds.RESPONSE_FORMAT_KIND_JSON_OBJECT)
    answer = (await EchoProvider().complete(prompt(conversation("some words", response_format=loose)))).answer
    assert orjson.loads(texts(answer)) == {"echo": "some words"}


async def test_a_schema_without_an_end_ends() -> None:
    endless: dict[str, Any] = {"type": "object", "required": ["a"]}
    endless["properties"] = {"a": endless}
    assert example(endless, "x")


async def test_a_schema_that_is_no_json_is_the_callers_fault() -> None:
    wanted = conversation_pb2.ResponseFormat(kind=conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA, json_schema="{")
    with pytest.raises(AttemptFailed) as caught:
        await EchoProvider().complete(prompt(conversation(response_format=wanted)))
    assert caught.value.ends_chain


async def test_vectors_are_of_unit_length_and_belong_to_their_text() -> None:
    embedded = await EchoProvider().embed(embedding("a b", "c", "a b"))
    first, second, third = embedded.vectors
    assert list(first) == list(third)
    assert len(first) == 384
    assert math.isclose(sum(value * value for value in first), 1.0)
    assert abs(sum(a * b for a, b in zip(first, second, strict=True))) < 0.3
    assert embedded.usage.input_token_count == 5
    assert len((await EchoProvider().embed(embedding("a", dimensions=7))).vectors[0]) == 7
    with pytest.raises(AttemptFailed) as caught:
        await EchoProvider().embed(embedding("a", dimensions=5000))
    assert caught.value.reason is Reason.PROVIDER_REJECTED
