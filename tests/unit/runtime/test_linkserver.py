"""The serving side against frames that our own calling side would never send."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from services.runtime.errors import Reason
from services.runtime.status import failure_from_status
from sluice.link.v1 import link_service_pb2
from sluice.link.v1.link_service_pb2 import CallFrame, Cancel, Credit, ExchangeRequest, Open
from sluice.link.v1.link_service_pb2_grpc import LinkServiceStub
from tests.unit.runtime.fakes import IDENTITY, TOKENIZATION, Running, eventually, serve

FIT = f"/{TOKENIZATION}/Fit"
WATCH = "/sluice.jobs.v1.JobService/WatchJob"
CALIBRATE = f"/{TOKENIZATION}/Calibrate"


@contextlib.asynccontextmanager
async def exchange() -> AsyncIterator[tuple[Any, Running]]:
    async with serve() as running, grpc.aio.insecure_channel(running.address) as channel:
        stub: Any = LinkServiceStub(channel)
        call = stub.Exchange(metadata=IDENTITY)
        yield call, running
        call.cancel()


async def answer(call: Any, *frames: CallFrame) -> Any:
    await call.write(ExchangeRequest(frames=frames))
    response = await asyncio.wait_for(call.read(), 5)
    return response.frames[0]


def opened(call_id: int, method: str, **fields: Any) -> CallFrame:
    return CallFrame(call_id=call_id, open=Open(method=method, **fields))


async def test_what_is_refused_says_why_and_the_link_lives_on() -> None:
    async with exchange() as (call, _):
        for frame, reason in (
            (opened(1, "/none/Such"), Reason.ROUTE_NOT_FOUND),
            (opened(2, FIT, request=b"\xff"), Reason.REQUEST_INVALID),
            (opened(3, FIT, metadata=["odd"]), Reason.REQUEST_INVALID),
            (opened(4, FIT, metadata=["k", "v"] * 33), Reason.REQUEST_INVALID),
        ):
            reply = await answer(call, frame)
            assert reply.call_id == frame.call_id
            assert failure_from_status(reply.end).reason is reason
        reply = await answer(call, opened(5, FIT))
        assert reply.WhichOneof("kind") == "unary"


async def test_a_call_id_that_is_open_is_refused() -> None:
    async with exchange() as (call, _):
        reply = await answer(call, opened(1, CALIBRATE), opened(1, FIT))
        assert failure_from_status(reply.end).reason is Reason.REQUEST_INVALID


async def test_frames_for_unknown_calls_and_empty_frames_are_ignored() -> None:
    async with exchange() as (call, _):
        noise = [
            CallFrame(call_id=9, cancel=link_service_pb2.Cancel()),
            CallFrame(call_id=9, credit=Credit(message_count=5)),
            CallFrame(call_id=9),
            CallFrame(),
        ]
        reply = await answer(call, *noise, opened(1, FIT))
        assert (reply.call_id, reply.WhichOneof("kind")) == (1, "unary")


async def test_negative_credit_takes_nothing_away() -> None:
    async with exchange() as (call, running):
        await call.write(
            ExchangeRequest(
                frames=[
                    opened(1, WATCH, request=b"\x0a\x0510000"),
                    CallFrame(call_id=1, credit=Credit(message_count=-1000)),
                ]
            )
        )
        await eventually(lambda: running.script.produced >= 64)


async def test_a_lost_link_cancels_what_it_had_begun() -> None:
    async with exchange() as (call, running):
        await call.write(ExchangeRequest(frames=[opened(1, f"/{TOKENIZATION}/CountTexts", request=b"\x0a\x05sleep")]))
        await asyncio.wait_for(running.script.begun.wait(), 5)
        call.cancel()
        await asyncio.wait_for(running.script.cancelled.wait(), 5)


@pytest.mark.parametrize("is_lost", [True, False])
async def test_a_call_knows_whether_its_link_was_lost_or_its_caller_has_left(is_lost: bool) -> None:
    async with exchange() as (call, running):
        await call.write(ExchangeRequest(frames=[opened(1, f"/{TOKENIZATION}/CountTexts", request=b"\x0a\x05sleep")]))
        await asyncio.wait_for(running.script.begun.wait(), 5)
        if is_lost:
            call.cancel()
        else:
            await call.write(ExchangeRequest(frames=[CallFrame(call_id=1, cancel=Cancel())]))
        await asyncio.wait_for(running.script.cancelled.wait(), 5)
        assert running.script.calls[-1].is_lost is is_lost


async def test_an_answer_that_cannot_be_sent_is_internal() -> None:
    async with exchange() as (call, running):
        reply = await answer(call, opened(1, f"/{TOKENIZATION}/CountTexts", request=b"\x0a\x0aunsendable"))
        assert failure_from_status(reply.end).reason is Reason.INTERNAL
        assert running.log.events("error") == ["unsendable answer"]
