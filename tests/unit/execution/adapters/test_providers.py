"""What every adapter of a wire format does alike, each against the answers of its own provider."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Final

import orjson
import pytest

from services.execution.errors import AttemptFailed, SpoolFull
from services.runtime.errors import Reason
from sluice.inference.v1 import answer_pb2, conversation_pb2
from tests.unit.execution.adapters.recorded import RECORDED, TEXT, THOUGHT, Adapter, Recorded
from tests.unit.execution.examples import SECRET, conversation, embedding, heard, prompt, said, texts
from tests.unit.execution.upstream import (
    PATIENCE,
    Exchange,
    Reply,
    Script,
    Upstream,
    chunk,
    chunked,
    document,
    hangs,
    pool_to,
    upstream,
    whole,
)

STATUSES: Final = {
    400: Reason.PROVIDER_REJECTED,
    401: Reason.PROVIDER_AUTHENTICATION,
    403: Reason.PROVIDER_AUTHENTICATION,
    404: Reason.PROVIDER_UNAVAILABLE,
    429: Reason.PROVIDER_RATE_LIMITED,
    500: Reason.PROVIDER_UNAVAILABLE,
    529: Reason.PROVIDER_OVERLOADED,
}


@pytest.fixture(params=RECORDED)
def recorded(request: pytest.FixtureRequest) -> Recorded:
    """Each provider in turn."""
    return RECORDED[request.param]


@contextlib.asynccontextmanager
async def playing(recorded: Recorded, *scripts: Script) -> AsyncIterator[tuple[Adapter, Upstream]]:
    async with upstream(*scripts) as server, pool_to(server.url) as pool:
        yield recorded.make(pool), server


def is_right(answer: answer_pb2.Answer, recorded: Recorded) -> None:
    """The answer that every recording is of."""
    assert answer.model == "catalogue/model"
    assert answer.provider_response_id == recorded.response_id
    assert answer.finish_reason == answer_pb2.FINISH_REASON_TOOL_CALLS
    assert answer.message.role == conversation_pb2.ROLE_ASSISTANT
    parts = answer.message.parts
    assert [part.WhichOneof("kind") for part in parts] == ["reasoning", "text", "tool_call", "tool_call"]
    assert parts[0].reasoning.text == THOUGHT
    assert parts[1].text == TEXT
    assert [(part.tool_call.id, part.tool_call.name) for part in parts[2:]] == [("call_a", "weather"), ("call_b", "clock")]
    assert orjson.loads(parts[2].tool_call.arguments_json) == {"city": "Köln"}
    assert parts[3].tool_call.arguments_json == "{}"
    usage = answer.usage
    assert (usage.input_token_count, usage.cached_input_token_count, usage.output_token_count) == (40, 16, 30)
    if recorded.has_written:
        assert usage.cache_write_token_count == 10
        assert parts[0].reasoning.signature == "EqQBCg=="
    else:
        assert usage.reasoning_token_count == 12
    assert usage.source == answer_pb2.USAGE_SOURCE_REPORTED


async def test_a_whole_answer(recorded: Recorded) -> None:
    async with playing(recorded, document(recorded.whole)) as (provider, server):
        completed = await provider.complete(prompt())
    is_right(completed.answer, recorded)
    [asked] = server.exchanges
    assert (asked.method, asked.path) == ("POST", recorded.unary_path)
    name, value = recorded.key_header
    assert asked.headers[name] == value
    assert asked.headers["x-extra"] == "1"
    assert asked.headers["content-type"] == "application/json"
    assert SECRET.encode() not in asked.body


async def test_a_streamed_answer_is_the_same_wherever_it_is_cut(recorded: Recorded) -> None:
    raw = recorded.stream
    cut = 0

    async def answers(exchange: Exchange) -> None:
        await chunked([raw[:cut], raw[cut:]] if cut else [raw])(exchange)

    async with playing(recorded, answers) as (provider, server):
        whole_one = await heard(provider.stream(prompt()))
        is_right(whole_one.answer, recorded)
        assert whole_one.text == TEXT
        assert whole_one.reasoning == THOUGHT
        assert whole_one.calls() == {
            0: ("call_a", "weather", '{"city":"Köln"}'),
            1: ("call_b", "clock", whole_one.calls()[1][2]),
        }
        assert whole_one.calls()[1][2] in ("", "{}")
        # What arrived together comes together.
        assert whole_one.count <= 4
        for at in range(1, len(raw)):
            cut = at
            other = await heard(provider.stream(prompt()))
            assert other.answer == whole_one.answer
            assert other.deltas == whole_one.deltas
    assert server.exchanges[0].path == recorded.stream_path
    # Every stream was read to its end: its connection was kept.
    assert len(server.streams) == 1


async def test_a_streamed_answer_in_pieces_of_one_byte(recorded: Recorded) -> None:
    raw = recorded.stream
    async with playing(recorded, chunked([raw[n : n + 1] for n in range(len(raw))])) as (provider, _):
        got = await heard(provider.stream(prompt()))
    is_right(got.answer, recorded)
    # Nothing is held back: text came while the stream ran.
    assert got.count > 5


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("status", STATUSES)
async def test_errors(recorded: Recorded, status: int, streaming: bool) -> None:
    async with playing(recorded, document(recorded.error_body("some words"), status, retry_after="7")) as (provider, server):
        for _ in range(2):
            with pytest.raises(AttemptFailed) as caught:
                await (heard(provider.stream(prompt())) if streaming else provider.complete(prompt()))
            failure = caught.value
            assert failure.reason is STATUSES[status]
            assert failure.status == status
            assert failure.retry_delay == (7.0 if status in (429, 500, 529) else None)
            assert ("some words" in failure.message) == (status == 400)
        # An error that was read to its end costs no connection.
        assert len(server.streams) == 1


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("status", STATUSES)
async def test_the_key_is_in_no_error(recorded: Recorded, status: int, streaming: bool) -> None:
    async with playing(recorded, document(recorded.error_body(f"key {SECRET} is bad"), status)) as (provider, _):
        with pytest.raises(AttemptFailed) as caught:
            await (heard(provider.stream(prompt())) if streaming else provider.complete(prompt()))
    failure = caught.value
    assert SECRET not in f"{failure} {failure!r} {dict(failure.metadata)} {failure.__cause__!r} {failure.__context__!r}"


async def test_an_error_of_a_stream_that_goes_on_for_ever_is_not_read_for_ever(recorded: Recorded) -> None:
    async def rants(exchange: Exchange) -> None:
        with contextlib.suppress(ConnectionError):
            await exchange.send(Reply(500).head(("transfer-encoding", "chunked")))
            while True:
                await exchange.send(chunk(b"x" * 8192))

    async with playing(recorded, rants) as (provider, server), asyncio.timeout(PATIENCE):
        with pytest.raises(AttemptFailed) as caught:
            await heard(provider.stream(prompt(seconds=1000)))
        assert caught.value.reason is Reason.PROVIDER_UNAVAILABLE
        await server.ended[0].wait()


async def test_an_error_in_the_middle_of_a_stream(recorded: Recorded) -> None:
    async with playing(recorded, chunked([recorded.beginning, recorded.error])) as (provider, server):
        pieces = provider.stream(prompt())
        first = await anext(pieces)
        assert first.deltas[0].text == "begun"
        with pytest.raises(AttemptFailed) as caught:
            async for _ in pieces:
                pass
        assert caught.value.reason in (Reason.PROVIDER_OVERLOADED, Reason.PROVIDER_RATE_LIMITED)
        async with asyncio.timeout(PATIENCE):
            await server.ended[0].wait()


@pytest.mark.parametrize("ends", [True, False])
async def test_a_stream_that_ends_before_its_answer_is_broken(recorded: Recorded, ends: bool) -> None:
    async with playing(recorded, chunked([recorded.beginning], ends=ends)) as (provider, _):
        with pytest.raises(AttemptFailed) as caught:
            await heard(provider.stream(prompt()))
    assert caught.value.reason is Reason.PROVIDER_STREAM_BROKEN


async def test_usage_that_is_missing_is_not_taken_for_none(recorded: Recorded) -> None:
    streamed = chunked([recorded.without_usage])
    async with playing(recorded, document(recorded.whole_without_usage), streamed) as (provider, _):
        completed = await provider.complete(prompt())
        assert completed.answer.usage.source == answer_pb2.USAGE_SOURCE_UNSPECIFIED
        got = await heard(provider.stream(prompt()))
        # REPORTED with no tokens would be an answer for nothing.
        assert got.answer.usage.source == answer_pb2.USAGE_SOURCE_UNSPECIFIED
        assert got.answer.message.parts[1].text == TEXT


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"{}", b'"x"', b'{"choices":[]}', b'{"content":3}', b"\xff", b"<html>"])
async def test_an_answer_that_is_none_is_malformed_or_has_no_end(recorded: Recorded, body: bytes) -> None:
    async with playing(recorded, whole(body)) as (provider, _):
        with pytest.raises(AttemptFailed) as caught:
            await provider.complete(prompt())
        assert caught.value.reason in (Reason.PROVIDER_MALFORMED, Reason.PROVIDER_STREAM_BROKEN)
        assert not caught.value.ends_chain


@pytest.mark.parametrize(
    "data", [b"{", b"null", b"3", b"[1]", b'{"choices":3}', b'{"type":"content_block_delta"}', b"\xff\xfe"]
)
async def test_an_event_that_is_none_is_malformed(recorded: Recorded, data: bytes) -> None:
    async with playing(recorded, chunked([recorded.beginning, b"data: " + data + b"\n\n"])) as (provider, _):
        with pytest.raises(AttemptFailed) as caught:
            await heard(provider.stream(prompt()))
        assert caught.value.reason in (Reason.PROVIDER_MALFORMED, Reason.PROVIDER_STREAM_BROKEN)


@pytest.mark.parametrize("moment", ["unary", "before", "within", "left"])
async def test_cancelling_closes_the_providers_socket(recorded: Recorded, moment: str) -> None:
    async def talks_on(exchange: Exchange) -> None:
        await exchange.send(Reply().head(("transfer-encoding", "chunked")), chunk(recorded.beginning))
        await exchange.gone()

    began = asyncio.Event()

    async def follow(provider: Adapter) -> None:
        if moment == "unary":
            await provider.complete(prompt())
        pieces = provider.stream(prompt())
        async for _ in pieces:
            began.set()
            if moment == "left":
                break
        await pieces.aclose()  # type: ignore[attr-defined]  # an async generator

    async with playing(recorded, hangs if moment in ("unary", "before") else talks_on) as (provider, server):
        task = asyncio.create_task(follow(provider))
        async with asyncio.timeout(PATIENCE):
            await (server.asked if moment in ("unary", "before") else began).wait()
            if moment != "left":
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await server.ended[0].wait()


async def test_a_deadline_in_the_middle_of_a_stream(recorded: Recorded) -> None:
    async def falls_silent(exchange: Exchange) -> None:
        await exchange.send(Reply().head(("transfer-encoding", "chunked")), chunk(recorded.beginning))
        await exchange.gone()

    async with playing(recorded, falls_silent) as (provider, server):
        with pytest.raises(AttemptFailed) as caught:
            await heard(provider.stream(prompt(seconds=0.1)))
        assert caught.value.reason is Reason.PROVIDER_TIMEOUT
        async with asyncio.timeout(PATIENCE):
            await server.ended[0].wait()


async def test_probes_are_free_calls_with_the_key(recorded: Recorded) -> None:
    async with playing(recorded, document({"data": []}), document(recorded.error_body("x"), 401)) as (provider, server):
        deadline = asyncio.get_running_loop().time() + PATIENCE
        await provider.probe(deadline)
        with pytest.raises(AttemptFailed) as caught:
            await provider.probe(deadline)
        assert caught.value.reason is Reason.PROVIDER_AUTHENTICATION
    asked = server.exchanges[0]
    assert asked.method == "GET"
    assert "models" in asked.path
    assert asked.headers[recorded.key_header[0]] == recorded.key_header[1]
    assert asked.body == b""


async def test_json_of_a_caller_that_is_none_is_the_callers_fault(recorded: Recorded) -> None:
    schema = conversation_pb2.ToolDefinition(name="f", parameters_json_schema="{")
    formatted = conversation_pb2.ResponseFormat(kind=conversation_pb2.RESPONSE_FORMAT_KIND_JSON_SCHEMA, json_schema="nope")
    async with playing(recorded, document(recorded.whole)) as (provider, server):
        for talk in (conversation(tools=[schema]), conversation(response_format=formatted)):
            with pytest.raises(AttemptFailed) as caught:
                await provider.complete(prompt(talk))
            assert caught.value.reason is Reason.REQUEST_INVALID
            assert caught.value.ends_chain
    assert not server.exchanges


async def test_arguments_of_an_earlier_call_need_not_be_json_for_openai_alone(recorded: Recorded) -> None:
    broken = conversation_pb2.Part(tool_call=conversation_pb2.ToolCall(id="c", name="f", arguments_json='{"a":'))
    talk = conversation()
    talk.messages.add(role=conversation_pb2.ROLE_ASSISTANT).parts.append(broken)
    talk.messages.append(said("and?"))
    async with playing(recorded, document(recorded.whole)) as (provider, server):
        if recorded is RECORDED["openai"]:
            assert texts((await provider.complete(prompt(talk))).answer) == TEXT
            assert server.exchanges[0].document["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"a":'
        else:
            with pytest.raises(AttemptFailed) as caught:
                await provider.complete(prompt(talk))
            assert caught.value.reason is Reason.REQUEST_INVALID


@pytest.mark.parametrize("call", ["complete", "stream", "embed"])
async def test_nothing_is_sent_that_the_gate_holds_back(recorded: Recorded, call: str) -> None:
    def held_back() -> None:
        raise SpoolFull

    async with playing(recorded, document(recorded.whole)) as (provider, server):
        # AttemptFailed: Anthropic makes no embeddings.
        with pytest.raises((SpoolFull, AttemptFailed)):
            match call:
                case "complete":
                    await provider.complete(replace(prompt(), gate=held_back))
                case "stream":
                    await heard(provider.stream(replace(prompt(), gate=held_back)))
                case _:
                    await provider.embed(replace(embedding("a"), gate=held_back))
        await asyncio.sleep(0.02)
        assert not server.exchanges
