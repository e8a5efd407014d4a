"""What every transport promises alike: in-process, link and plain gRPC. (Behaviour of one alone is in that module's tests.)"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from services.runtime.call import CallerKind
from services.runtime.errors import Failure, Reason
from sluice.jobs.v1.job_service_pb2 import WatchJobRequest
from sluice.jobs.v1.job_service_pb2_grpc import JobServiceStub
from sluice.tokenization.v1.tokenization_service_pb2 import CountTextsRequest
from sluice.tokenization.v1.tokenization_service_pb2_grpc import TokenizationServiceStub
from tests.unit.runtime.fakes import BUDGET, Transport, parts, transport


@pytest_asyncio.fixture(params=["inproc", "link", "grpc"])
async def over(request: pytest.FixtureRequest) -> AsyncIterator[Transport]:
    async with transport(request.param) as opened:
        yield opened


# The typed stubs know gRPC's own call objects; what our channels return can do a part of that.
def tokens(over: Transport) -> Any:
    return TokenizationServiceStub(over.channel)


def jobs(over: Transport) -> Any:
    return JobServiceStub(over.channel)


async def test_a_unary_call_answers(over: Transport) -> None:
    reply = await tokens(over).CountTexts(CountTextsRequest(model="x", texts=["a", "b"]), timeout=5)
    assert len(reply.counts) == 2


@pytest.mark.parametrize("name", ["link", "grpc"])
async def test_every_reply_passes_the_barrier_before_it_is_sent(name: str) -> None:
    passed: list[tuple[int, int]] = []
    async with transport(name, lambda: passed.append((len(made.script.calls), made.script.produced))) as made:
        for number in range(1, 4):
            passed.clear()
            await tokens(made).CountTexts(CountTextsRequest(model="x"), timeout=5)
            assert passed[-1] == (number, 0)
        passed.clear()
        with pytest.raises(Failure):
            await tokens(made).CountTexts(CountTextsRequest(model="budget"), timeout=5)
        assert passed[-1] == (4, 0)
        passed.clear()
        stream = jobs(made).WatchJob(WatchJobRequest(job_id="3:hang"), timeout=5)
        async with contextlib.aclosing(stream):
            async for _ in stream:
                assert passed[-1][1] > 0
                if made.script.produced == 3:
                    break
        assert passed


async def test_the_callee_sees_caller_deadline_and_metadata(over: Transport) -> None:
    loop = asyncio.get_running_loop()
    forward = (("x-request-id", "r-1"), ("traceparent", "00-" + "1" * 32 + "-" + "2" * 16 + "-01"))
    await tokens(over).CountTexts(CountTextsRequest(model="x"), timeout=7, metadata=forward)
    call = over.script.calls[-1]
    assert call.caller.kind is CallerKind.SERVICE
    assert call.caller.name == "tester"
    assert 5 < call.deadline - loop.time() <= 7.01
    assert call.metadata["x-request-id"] == "r-1"
    assert dict(call.forward) == dict(forward)
    assert call.method == "/sluice.tokenization.v1.TokenizationService/CountTexts"


async def test_a_call_without_timeout_gets_the_default_deadline(over: Transport) -> None:
    await tokens(over).CountTexts(CountTextsRequest(model="x"))
    assert 50 < over.script.calls[-1].time_left() <= 60


async def test_a_failure_arrives_equal(over: Transport) -> None:
    with pytest.raises(Failure) as raised:
        await tokens(over).CountTexts(CountTextsRequest(model="budget"), timeout=5)
    assert parts(raised.value) == parts(BUDGET)


async def test_an_unexpected_error_says_an_incident_and_nothing_else(over: Transport) -> None:
    with pytest.raises(Failure) as raised:
        await tokens(over).CountTexts(CountTextsRequest(model="crash"), timeout=5)
    failure = raised.value
    assert failure.reason is Reason.INTERNAL
    assert "inside" not in failure.message
    assert failure.metadata["incident"] in failure.message
    logged = [values for level, event, values in over.log.lines if event == "unexpected error"]
    assert [values["incident"] for values in logged] == [failure.metadata["incident"]]
    assert "the inside of an engine" in str(logged[0]["exc_info"][1])


async def test_the_deadline_ends_call_and_handler(over: Transport) -> None:
    began = asyncio.get_running_loop().time()
    with pytest.raises(Failure) as raised:
        await tokens(over).CountTexts(CountTextsRequest(model="sleep"), timeout=0.2)
    assert raised.value.reason is Reason.DEADLINE_EXCEEDED
    assert asyncio.get_running_loop().time() - began < 1
    await asyncio.wait_for(over.script.cancelled.wait(), 2)


async def test_a_deadline_that_has_passed_begins_nothing(over: Transport) -> None:
    with pytest.raises(Failure) as raised:
        await tokens(over).CountTexts(CountTextsRequest(model="x"), timeout=-1)
    assert raised.value.reason is Reason.DEADLINE_EXCEEDED
    assert over.script.calls == []


async def test_cancelling_the_caller_reaches_the_handler(over: Transport) -> None:
    task = asyncio.create_task(tokens(over).CountTexts(CountTextsRequest(model="sleep"), timeout=30))
    await asyncio.wait_for(over.script.begun.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(over.script.cancelled.wait(), 2)


async def test_a_stream_arrives_whole_and_in_order(over: Transport) -> None:
    got = [reply.job.attempt_count async for reply in jobs(over).WatchJob(WatchJobRequest(job_id="500"), timeout=10)]
    assert got == list(range(500))


async def test_a_failure_after_items_arrives_after_them(over: Transport) -> None:
    got = []
    with pytest.raises(Failure) as raised:
        async for reply in jobs(over).WatchJob(WatchJobRequest(job_id="3:fail"), timeout=5):
            got.append(reply.job.attempt_count)  # noqa: PERF401  # the error ends the loop
    assert got == [0, 1, 2]
    assert parts(raised.value) == parts(BUDGET)


async def test_closing_a_stream_reaches_the_handler(over: Transport) -> None:
    replies = jobs(over).WatchJob(WatchJobRequest(job_id="1:hang"), timeout=30)
    async with contextlib.aclosing(replies) as opened:
        async for _ in opened:
            # In process nothing is produced ahead of the reader, so the handler is cancelled where it yielded.
            if over.name != "inproc":
                await asyncio.wait_for(over.script.begun.wait(), 5)
            break
    if over.name != "inproc":
        await asyncio.wait_for(over.script.cancelled.wait(), 2)


async def test_the_deadline_of_a_stream_ends_it(over: Transport) -> None:
    got = []
    with pytest.raises(Failure) as raised:
        async for reply in jobs(over).WatchJob(WatchJobRequest(job_id="2:hang"), timeout=0.3):
            got.append(reply)  # noqa: PERF401  # the error ends the loop
    assert raised.value.reason is Reason.DEADLINE_EXCEEDED
    assert len(got) == 2
    await asyncio.wait_for(over.script.cancelled.wait(), 2)


async def test_calls_are_counted_by_method_and_code(over: Transport) -> None:
    await tokens(over).CountTexts(CountTextsRequest(model="x"), timeout=5)
    with pytest.raises(Failure):
        await tokens(over).CountTexts(CountTextsRequest(model="budget"), timeout=5)
    text = over.registry.exposition().decode()
    path = "/sluice.tokenization.v1.TokenizationService/CountTexts"
    assert f'sluice_calls_total{{code="OK",method="{path}"}} 1.0' in text
    assert f'sluice_calls_total{{code="RESOURCE_EXHAUSTED",method="{path}"}} 1.0' in text
    assert f'sluice_call_seconds_count{{method="{path}"}} 2.0' in text
