from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from services.runtime import grpcserver
from services.runtime.settings import MeshSettings, Profile, Reflection
from sluice.jobs.v1.job_service_pb2 import GetJobRequest, WatchJobRequest
from sluice.jobs.v1.job_service_pb2_grpc import JobServiceStub
from sluice.tokenization.v1.tokenization_service_pb2 import CountTextsRequest
from sluice.tokenization.v1.tokenization_service_pb2_grpc import TokenizationServiceStub
from tests.unit.runtime.fakes import ADMIN_KEY, IDENTITY, SETTINGS, TOKENIZATION, Running, serve

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
COUNT = f"/{TOKENIZATION}/CountTexts"


@contextlib.asynccontextmanager
async def dial(running: Running) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(running.address) as channel:
        yield channel


def the_error_info(error: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo:
    details = [value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin"]
    assert len(details) == 1
    status = status_pb2.Status.FromString(details[0])
    assert status.code == error.code().value[0]
    infos = []
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            infos.append(info)
    assert len(infos) == 1
    return infos[0]


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code(), the_error_info(raised.value).reason


async def test_malformed_bytes_are_invalid_not_internal() -> None:
    async with serve() as running, dial(running) as channel:
        call: Any = channel.unary_unary(COUNT)
        for data in (b"\xff", b"\x0a\xff\xff\xff\xff\xff", b"\x0a\x05ab", b"\x0a\x02\xc3\x28"):
            assert await refused(call(data, metadata=IDENTITY)) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")


async def test_anonymous_callers_reach_only_what_is_public() -> None:
    async with serve() as running, dial(running) as channel:
        tokens: Any = TokenizationServiceStub(channel)
        assert await refused(tokens.CountTexts(CountTextsRequest())) == (
            grpc.StatusCode.UNAUTHENTICATED,
            "SERVICE_IDENTITY",
        )
        wrong = (("authorization", "Bearer wrong"),)
        assert (await refused(tokens.CountTexts(CountTextsRequest(), metadata=wrong)))[1] == "SERVICE_IDENTITY"
        jobs: Any = JobServiceStub(channel)
        await jobs.GetJob(GetJobRequest())
        await tokens.CountTexts(CountTextsRequest(), metadata=IDENTITY)
        await tokens.CountTexts(CountTextsRequest(), metadata=(("authorization", f"Bearer {ADMIN_KEY}"),))


async def test_an_unknown_method_has_a_reason() -> None:
    async with serve() as running, dial(running) as channel:
        unary: Any = channel.unary_unary("/sluice.routing.v1.RoutingService/Plan")
        assert await refused(unary(b"")) == (grpc.StatusCode.UNIMPLEMENTED, "ROUTE_NOT_FOUND")


async def test_a_message_over_the_limit_is_refused() -> None:
    async with serve() as running, dial(running) as channel:
        tokens: Any = TokenizationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await tokens.CountTexts(CountTextsRequest(texts=["x" * (8 * 1024 * 1024)]), metadata=IDENTITY)
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_more_calls_than_allowed_are_refused_as_overload() -> None:
    async with serve(limit=1) as running, dial(running) as channel:
        tokens: Any = TokenizationServiceStub(channel)
        first = asyncio.create_task(_wait(tokens.CountTexts(CountTextsRequest(model="sleep"), metadata=IDENTITY)))
        await asyncio.wait_for(running.script.begun.wait(), 5)
        assert await refused(tokens.CountTexts(CountTextsRequest(), metadata=IDENTITY)) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "OVERLOADED",
        )
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await asyncio.wait_for(running.script.cancelled.wait(), 5)
        await tokens.CountTexts(CountTextsRequest(), metadata=IDENTITY, timeout=5)


async def _wait(call: Any) -> Any:
    return await call


async def test_health_flips_for_every_name_and_watchers() -> None:
    async with serve(serving=False) as running, dial(running) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        for name in ("", "tokenization", TOKENIZATION):
            assert (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status == NOT_SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="tokenization"))
        assert (await watch.read()).status == NOT_SERVING
        await running.server.set_serving(True)
        assert (await asyncio.wait_for(watch.read(), 2)).status == SERVING
        await running.server.announce_stop()
        assert (await asyncio.wait_for(watch.read(), 2)).status == NOT_SERVING
        await running.server.set_serving(True)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service="tokenization"))
        assert answer.status == NOT_SERVING, "nothing comes back from a drain"
        watch.cancel()


async def services_by_reflection(settings: MeshSettings, metadata: tuple[tuple[str, str], ...] = ()) -> set[str] | None:
    async with serve(settings) as running, dial(running) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="*")
        try:
            async for answer in stub.ServerReflectionInfo(iter([asked]), metadata=metadata):
                return {service.name for service in answer.list_services_response.service}
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
                raise
    return None


async def test_reflection_by_profile() -> None:
    production = dataclasses.replace(SETTINGS, profile=Profile.PRODUCTION)
    admin = (("authorization", f"Bearer {ADMIN_KEY}"),)
    expected = {
        TOKENIZATION,
        "sluice.jobs.v1.JobService",
        "sluice.link.v1.LinkService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert await services_by_reflection(SETTINGS) == expected
    assert await services_by_reflection(production) is None
    assert await services_by_reflection(production, admin) is None
    gated = dataclasses.replace(production, reflection=Reflection.AUTHENTICATED)
    assert await services_by_reflection(gated) is None
    assert await services_by_reflection(gated, IDENTITY) is None
    assert await services_by_reflection(gated, admin) == expected
    assert await services_by_reflection(dataclasses.replace(SETTINGS, reflection=Reflection.OFF)) is None


async def test_a_taken_port_is_an_error() -> None:
    async with serve() as running:
        with pytest.raises(OSError, match="is the port taken"):
            async with serve(port=int(running.address.rpartition(":")[2])):
                pass


async def test_stopping_lets_open_calls_end() -> None:
    async with serve() as running, dial(running) as channel:
        tokens: Any = TokenizationServiceStub(channel)
        call = asyncio.create_task(_wait(tokens.CountTexts(CountTextsRequest(model="sleep0.3"), metadata=IDENTITY)))
        await asyncio.wait_for(running.script.begun.wait(), 5)
        await running.server.stop(5)
        await call


async def test_an_answer_that_cannot_be_sent_is_internal() -> None:
    async with serve() as running, dial(running) as channel:
        tokens: Any = TokenizationServiceStub(channel)
        call = tokens.CountTexts(CountTextsRequest(model="unsendable"), metadata=IDENTITY)
        assert await refused(call) == (grpc.StatusCode.INTERNAL, "INTERNAL")
        assert running.log.events("error") == ["unsendable answer"]


@pytest.mark.parametrize("job_id", ["3", "2:fail"])
async def test_streams_that_have_ended_take_no_place_of_their_connection(monkeypatch: pytest.MonkeyPatch, job_id: str) -> None:
    """A cycle that has a call's context in it keeps its stream counted until it is found; the server refuses streams beyond its limit."""
    monkeypatch.setattr(grpcserver, "_MAX_CONCURRENT_STREAMS", 10)
    gc.collect()
    gc.disable()
    try:
        async with serve() as running, dial(running) as channel:
            stub: Any = JobServiceStub(channel)

            async def watch() -> str:
                try:
                    async for _ in stub.WatchJob(WatchJobRequest(job_id=job_id), metadata=IDENTITY, timeout=10):
                        pass
                except grpc.aio.AioRpcError as error:
                    return str(error.details())
                return "ended"

            seen = set()
            for _ in range(20):
                seen.update(await asyncio.gather(*(watch() for _ in range(5))))
    finally:
        gc.enable()
    assert len(seen) == 1
    assert "RST_STREAM" not in seen.pop()
