from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from services.runtime.channels import open_channel
from sluice.tokenization.v1.tokenization_service_pb2 import CountTextsRequest
from sluice.tokenization.v1.tokenization_service_pb2_grpc import TokenizationServiceStub
from tests.unit.runtime.fakes import IDENTITY, TOKENIZATION, serve


async def test_calls_go_round_what_serves_and_none_fails_in_a_drain() -> None:
    """Reliability M20: NOT_SERVING, a pause, stop; with health checking in the client nothing is lost."""
    async with serve() as first, serve() as second, serve() as third:
        addresses = [running.address for running in (first, second, third)]
        async with open_channel(addresses, [TOKENIZATION], health_service="tokenization") as channel:
            stub: Any = TokenizationServiceStub(channel)
            stop = asyncio.Event()
            count = 0

            async def call() -> None:
                nonlocal count
                while not stop.is_set():
                    await stub.CountTexts(CountTextsRequest(model="sleep0.005"), metadata=IDENTITY, timeout=5)
                    count += 1

            callers = [asyncio.create_task(call()) for _ in range(10)]
            await asyncio.sleep(0.5)
            assert all(running.script.calls for running in (first, second, third))
            await first.server.announce_stop()
            await asyncio.sleep(0.5)
            seen = len(first.script.calls)
            await asyncio.sleep(0.2)
            assert len(first.script.calls) == seen
            await first.server.stop(5)
            await asyncio.sleep(0.2)
            stop.set()
            await asyncio.gather(*callers)
            assert count > 100


async def test_without_a_serving_endpoint_a_call_fails() -> None:
    async with (
        serve(serving=False) as running,
        open_channel([running.address], [TOKENIZATION], health_service="tokenization") as channel,
    ):
        stub: Any = TokenizationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.CountTexts(CountTextsRequest(), metadata=IDENTITY, timeout=1)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


def test_endpoints_that_make_no_channel_are_refused() -> None:
    for endpoints in ([], ["name:1", "other:2"]):
        with pytest.raises(ValueError, match="endpoint"):
            open_channel(endpoints, [])
