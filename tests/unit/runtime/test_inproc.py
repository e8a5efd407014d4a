from __future__ import annotations

import asyncio
from typing import Any

import pytest

from services.runtime.call import ANONYMOUS
from services.runtime.deadlines import bounded
from services.runtime.dispatch import Kind, Method, Table
from services.runtime.errors import Failure, NotSent, Reason
from services.runtime.inproc import InprocChannel
from services.runtime.metrics import Registry
from sluice.tokenization.v1 import tokenization_service_pb2
from sluice.tokenization.v1.tokenization_service_pb2 import CountTextsRequest
from sluice.tokenization.v1.tokenization_service_pb2_grpc import TokenizationServiceStub
from tests.unit.runtime.fakes import Lines, Script, inproc


async def test_messages_are_handed_over_without_a_copy() -> None:
    class Same:
        async def CountTexts(self, request: Any, call: Any) -> Any:
            return request

    method = tokenization_service_pb2.DESCRIPTOR.services_by_name["TokenizationService"].methods_by_name["CountTexts"]
    path = f"/{method.containing_service.full_name}/{method.name}"
    table = Table([Method(path, "s", method.name, Kind.UNARY, CountTextsRequest, CountTextsRequest, unary=Same().CountTexts)])
    stub: Any = TokenizationServiceStub(InprocChannel(lambda: table, ANONYMOUS))  # type: ignore[call-overload]
    request = CountTextsRequest(model="x")
    assert await stub.CountTexts(request) is request


async def test_a_method_that_nothing_serves_is_unavailable() -> None:
    channel = InprocChannel(lambda: Table(()), ANONYMOUS)
    stub: Any = TokenizationServiceStub(channel)  # type: ignore[call-overload]
    with pytest.raises(NotSent) as raised:
        await stub.CountTexts(CountTextsRequest())
    assert raised.value.reason is Reason.DEPENDENCY_UNAVAILABLE


async def test_only_what_belongs_to_the_request_is_forwarded() -> None:
    script = Script()
    stub: Any = TokenizationServiceStub(inproc(script, Lines(), Registry()))  # type: ignore[call-overload]
    metadata = [("authorization", "Bearer sk-sluice-x"), ("x-request-id", "r")]
    await stub.CountTexts(CountTextsRequest(), metadata=metadata)
    assert script.calls[0].forward == (("x-request-id", "r"),)
    assert script.calls[0].metadata["authorization"] == "Bearer sk-sluice-x"


async def test_calls_may_run_as_tasks_of_their_own() -> None:
    stub: Any = TokenizationServiceStub(inproc(Script(), Lines(), Registry()))  # type: ignore[call-overload]
    tasks = [asyncio.create_task(stub.CountTexts(CountTextsRequest(model="sleep0.01"), timeout=5)) for _ in range(20)]
    assert len(await asyncio.gather(*tasks)) == 20


async def test_bounded_does_not_disturb_the_cancellation_of_others() -> None:
    async def work() -> None:
        await asyncio.sleep(30)

    loop = asyncio.get_running_loop()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await bounded(work(), loop.time() + 30, "x")
    with pytest.raises(Failure):
        async with asyncio.timeout(5):
            await bounded(work(), loop.time() + 0.05, "x")
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_bounded_gives_the_result_of_work_that_ends_at_once() -> None:
    async def work() -> int:
        return 7

    assert await bounded(work(), -1.0, "x") == 7


async def test_bounded_raises_what_work_raises_at_its_deadline() -> None:
    async def work() -> None:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            raise KeyError("cleaning up went wrong") from None

    with pytest.raises(KeyError):
        await bounded(work(), asyncio.get_running_loop().time() + 0.02, "x")
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
