from __future__ import annotations

import asyncio
from typing import Any

import pytest

from services.runtime.authentication import Authenticator
from services.runtime.call import Call, Caller, CallerKind
from services.runtime.dispatch import Table, build_table
from services.runtime.errors import Failure, Reason
from services.runtime.interceptors import border_chain, inner_chain
from services.runtime.metrics import Registry
from sluice.tokenization.v1.tokenization_service_pb2 import CountTextsRequest
from tests.unit.runtime.fakes import SERVICE_TOKEN, Lines, Script, bindings

PATH = "/sluice.tokenization.v1.TokenizationService/CountTexts"
SERVICE = {"authorization": f"Bearer {SERVICE_TOKEN}"}


def border(script: Script, log: Lines, slow_seconds: float = 5.0) -> Table:
    chain = border_chain(
        log=log, registry=Registry(), authenticator=Authenticator(SERVICE_TOKEN, ""), slow_seconds=slow_seconds
    )
    return build_table(bindings(script), chain)


async def run(table: Table, data: bytes, metadata: dict[str, str], *, seconds: float = 5.0) -> Any:
    handler = table[PATH].unary
    assert handler is not None
    return await handler(data, Call(PATH, asyncio.get_running_loop().time() + seconds, metadata))


def request(model: str = "x") -> bytes:
    return CountTextsRequest(model=model).SerializeToString()


def test_the_chain_is_named_and_ordered() -> None:
    chain, messages = border_chain(log=Lines(), registry=Registry(), authenticator=Authenticator("", ""), slow_seconds=1)
    assert (*chain.names, messages.name) == (
        "request_id",
        "logging",
        "metrics",
        "deadline",
        "authentication",
        "errors",
        "message",
    )
    (inner,) = inner_chain(log=Lines(), registry=Registry(), slow_seconds=1)
    assert inner.names == ("logging", "metrics", "errors")


async def test_a_request_id_is_made_when_there_is_none_worth_keeping() -> None:
    script = Script()
    table = border(script, Lines())
    for given in ({}, {"x-request-id": ""}, {"x-request-id": "a\nb"}, {"x-request-id": "x" * 129}):
        await run(table, request(), {**SERVICE, **given})
    made = [dict(call.forward)["x-request-id"] for call in script.calls]
    assert len(set(made)) == 4
    assert all(len(name) == 32 for name in made)
    await run(table, request(), {**SERVICE, "x-request-id": "mine"})
    assert dict(script.calls[-1].forward)["x-request-id"] == "mine"


async def test_what_proves_the_caller_is_not_forwarded() -> None:
    script = Script()
    await run(border(script, Lines()), request(), {**SERVICE, "traceparent": "t"})
    assert {key for key, _ in script.calls[0].forward} == {"x-request-id", "traceparent"}


async def test_malformed_bytes_are_the_callers_fault() -> None:
    log = Lines()
    with pytest.raises(Failure) as raised:
        await run(border(Script(), log), b"\xff\xff\xff", SERVICE)
    assert raised.value.reason is Reason.REQUEST_INVALID
    assert log.events("error") == []


async def test_an_unknown_caller_is_refused_before_the_request_is_parsed() -> None:
    with pytest.raises(Failure) as raised:
        await run(border(Script(), Lines()), b"\xff\xff\xff", {})
    assert raised.value.reason is Reason.SERVICE_IDENTITY


async def test_a_caller_proved_by_the_transport_is_believed() -> None:
    script = Script()
    handler = border(script, Lines())[PATH].unary
    assert handler is not None
    caller = Caller(CallerKind.SERVICE, "gateway")
    metadata = {"authorization": "Bearer sk-sluice-of-a-tenant"}
    await handler(request(), Call(PATH, asyncio.get_running_loop().time() + 5, metadata, caller))
    assert script.calls[0].caller is caller


async def test_slow_calls_and_failures_are_logged_and_fast_ones_are_not() -> None:
    log = Lines()
    await run(border(Script(), log, slow_seconds=5.0), request(), SERVICE)
    assert log.lines == []
    await run(border(Script(), log, slow_seconds=0.01), request("sleep0.02"), SERVICE)
    with pytest.raises(Failure):
        await run(border(Script(), log), request("crash"), SERVICE)
    assert log.events("warning") == ["slow call", "call failed"]
    assert log.events("error") == ["unexpected error"]


async def test_a_flood_of_failures_is_not_a_flood_of_lines() -> None:
    log = Lines()
    table = border(Script(), log)
    for _ in range(500):
        with pytest.raises(Failure):
            await run(table, b"\xff", SERVICE)
    assert len(log.lines) < 60


async def test_cancellation_stays_cancellation() -> None:
    script = Script()
    task = asyncio.create_task(run(border(script, Lines()), request("sleep"), SERVICE))
    await script.begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert script.cancelled.is_set()
