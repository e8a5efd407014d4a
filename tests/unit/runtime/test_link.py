from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import pytest

from services.runtime.errors import Failure, NotSent, Reason
from services.runtime.frames import FIRST_CREDITS
from services.runtime.link import LinkChannel, _Link
from sluice.jobs.v1.job_service_pb2 import RedriveJobRequest, WatchJobRequest
from sluice.jobs.v1.job_service_pb2_grpc import JobServiceStub
from sluice.tokenization.v1.tokenization_service_pb2 import CalibrateRequest, CountTextsRequest, FitRequest
from sluice.tokenization.v1.tokenization_service_pb2_grpc import TokenizationServiceStub
from tests.unit.runtime.fakes import IDENTITY, Lines, eventually, link, serve


def tokens(channel: LinkChannel) -> Any:
    return TokenizationServiceStub(channel)  # type: ignore[call-overload]


def jobs(channel: LinkChannel) -> Any:
    return JobServiceStub(channel)  # type: ignore[call-overload]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def links(*addresses: str) -> LinkChannel:
    return LinkChannel("tokenization", addresses, identity=IDENTITY, log=Lines())


async def test_many_calls_at_once_get_their_own_answers() -> None:
    async with serve() as running, link(running.address, running.log) as channel:

        async def one(count: int) -> int:
            reply = await tokens(channel).CountTexts(CountTextsRequest(model="x", texts=["t"] * count), timeout=10)
            return len(reply.counts)

        assert await asyncio.gather(*(one(count) for count in range(300))) == list(range(300))


async def test_a_large_message_travels_and_one_over_the_limit_does_not() -> None:
    async with serve() as running, link(running.address, running.log) as channel:
        await tokens(channel).CountTexts(CountTextsRequest(texts=["x" * 1_000_000]), timeout=5)
        with pytest.raises(Failure) as raised:
            await tokens(channel).CountTexts(CountTextsRequest(texts=["x" * 2_000_000]), timeout=5)
        assert raised.value.reason is Reason.REQUEST_TOO_LARGE
        await tokens(channel).Fit(FitRequest(), timeout=5)


async def test_nobody_there_is_unavailable_within_a_second() -> None:
    async with links(f"127.0.0.1:{free_port()}") as channel:
        began = asyncio.get_running_loop().time()
        with pytest.raises(NotSent) as raised:
            await tokens(channel).Fit(FitRequest(), timeout=10)
        assert raised.value.reason is Reason.DEPENDENCY_UNAVAILABLE
        assert raised.value.retry_delay is not None
        assert asyncio.get_running_loop().time() - began < 1
        with pytest.raises(NotSent) as raised:
            await tokens(channel).Fit(FitRequest(), timeout=0.05)
        assert raised.value.reason is Reason.DEADLINE_EXCEEDED
        with pytest.raises(NotSent) as raised:
            [reply async for reply in jobs(channel).WatchJob(WatchJobRequest(job_id="1"), timeout=0.05)]
        assert raised.value.reason is Reason.DEADLINE_EXCEEDED


async def test_a_lost_server_fails_open_calls_and_later_ones_succeed_after_its_restart() -> None:
    port = free_port()
    loop = asyncio.get_running_loop()
    async with links(f"127.0.0.1:{port}") as channel:
        async with serve(port=port) as running:
            unary = asyncio.create_task(tokens(channel).Calibrate(CalibrateRequest(), timeout=30))
            await eventually(lambda: running.script.calls)
            lost = loop.time()
        with pytest.raises(Failure) as raised:
            await unary
        assert raised.value.reason is Reason.DEPENDENCY_UNAVAILABLE
        # It may have been carried out.
        assert not isinstance(raised.value, NotSent)
        assert loop.time() - lost < 1
        with pytest.raises(Failure):
            await tokens(channel).Fit(FitRequest(), timeout=5)
        async with serve(port=port):
            async with asyncio.timeout(5):
                while True:
                    with contextlib.suppress(Failure):
                        await tokens(channel).Fit(FitRequest(), timeout=5)
                        break


async def test_a_lost_stream_fails_after_what_had_arrived() -> None:
    async with serve() as running, links(running.address) as channel:
        got = []
        with pytest.raises(Failure) as raised:
            async for reply in jobs(channel).WatchJob(WatchJobRequest(job_id="2:hang"), timeout=30):
                got.append(reply)
                if len(got) == 2:
                    await running.server.stop(0)
        assert raised.value.reason is Reason.DEPENDENCY_UNAVAILABLE


async def test_calls_go_round_the_serving_replicas() -> None:
    async with contextlib.AsyncExitStack() as stack:
        first, second = [await stack.enter_async_context(serve()) for _ in range(2)]
        third = await stack.enter_async_context(serve(serving=False))
        channel = await stack.enter_async_context(links(first.address, second.address, third.address))
        await eventually(lambda: len(channel.ready_endpoints) == 2)
        for _ in range(10):
            await tokens(channel).CountTexts(CountTextsRequest(), timeout=5)
        assert (len(first.script.calls), len(second.script.calls), len(third.script.calls)) == (5, 5, 0)
        await third.server.set_serving(True)
        await first.server.announce_stop()
        await eventually(lambda: set(channel.ready_endpoints) == {second.address, third.address})
        for _ in range(10):
            await tokens(channel).CountTexts(CountTextsRequest(), timeout=5)
        assert (len(first.script.calls), len(second.script.calls), len(third.script.calls)) == (5, 10, 5)


async def test_an_idempotent_call_is_repeated_once_elsewhere_and_another_is_not() -> None:
    async with serve() as first, serve() as second, links(first.address, second.address) as channel:
        await eventually(lambda: len(channel.ready_endpoints) == 2)
        repeated = [
            asyncio.create_task(tokens(channel).CountTexts(CountTextsRequest(model="sleep1"), timeout=30)) for _ in range(2)
        ]
        once = [asyncio.create_task(tokens(channel).Calibrate(CalibrateRequest(), timeout=30)) for _ in range(2)]
        await eventually(lambda: len(first.script.calls) == 2 and len(second.script.calls) == 2)
        await first.server.stop(0)
        await asyncio.gather(*repeated)
        assert len(second.script.calls) == 3
        done, pending = await asyncio.wait(once, timeout=0.5)
        assert (len(done), len(pending)) == (1, 1)
        (failed,) = done
        assert isinstance(failed.exception(), Failure)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


async def test_a_draining_replica_finishes_what_it_has_and_passes_on_what_comes() -> None:
    async with serve() as first, serve() as second, links(first.address, second.address) as channel:
        await eventually(lambda: len(channel.ready_endpoints) == 2)
        open_calls = [
            asyncio.create_task(tokens(channel).CountTexts(CountTextsRequest(model="sleep0.4"), timeout=5)) for _ in range(2)
        ]
        await eventually(lambda: first.script.calls and second.script.calls)
        # Without a notice, so that calls still go to the one that drains.
        stopping = asyncio.create_task(first.server.stop(5))
        await asyncio.sleep(0)
        for _ in range(10):
            # RedriveJob isn't idempotent, but a call that was refused as DRAINING has not begun.
            await jobs(channel).RedriveJob(RedriveJobRequest(), timeout=5)
        await asyncio.gather(*open_calls)
        await stopping


async def test_a_stream_is_not_produced_far_ahead_of_its_reader() -> None:
    async with serve() as running, links(running.address) as channel:
        replies = jobs(channel).WatchJob(WatchJobRequest(job_id="5000"), timeout=30)
        async with contextlib.aclosing(replies):
            for _ in range(3):
                await anext(replies)
            await asyncio.sleep(0.2)
            assert running.script.produced <= FIRST_CREDITS + 1
            for _ in range(997):
                await anext(replies)
            await asyncio.sleep(0.1)
            assert running.script.produced <= 1000 + FIRST_CREDITS + 1


async def test_a_link_needs_the_service_token() -> None:
    log = Lines()
    async with serve() as running:
        for identity in ((), (("authorization", "Bearer wrong"),)):
            async with link(running.address, log, identity) as channel:
                with pytest.raises(Failure) as raised:
                    await tokens(channel).Fit(FitRequest(), timeout=2)
                assert raised.value.reason is Reason.DEPENDENCY_UNAVAILABLE
    assert {values["reason"] for _, event, values in log.lines if event == "link lost"} == {"SERVICE_IDENTITY"}


async def test_a_silent_replica_is_avoided_while_others_answer() -> None:
    """A process that is stopped keeps its sockets; only its silence tells."""

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            pass
        writer.close()

    silent = await asyncio.start_server(swallow, "127.0.0.1", 0)
    address = f"127.0.0.1:{silent.sockets[0].getsockname()[1]}"
    async with serve() as running, links(address, running.address) as channel:
        for _ in range(20):
            await tokens(channel).Fit(FitRequest(), timeout=2)
        assert channel.ready_endpoints == (running.address,)
    silent.close()


async def test_a_name_stands_for_its_addresses() -> None:
    async with serve() as running:
        port = running.address.rpartition(":")[2]
        async with links(f"localhost:{port}") as channel:
            await tokens(channel).Fit(FitRequest(), timeout=5)
            assert running.address in channel.ready_endpoints


async def test_leaving_the_channel_ends_open_calls() -> None:
    async with serve() as running:
        async with links(running.address) as channel:
            call = asyncio.create_task(tokens(channel).Calibrate(CalibrateRequest(), timeout=30))
            await eventually(lambda: running.script.calls)
        with pytest.raises(Failure):
            await call


@pytest.mark.parametrize(
    "error", [asyncio.InvalidStateError("RPC already finished"), RuntimeError("a fault of gRPC"), asyncio.CancelledError()]
)
async def test_whatever_ends_a_session_the_link_is_dialled_again(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """gRPC's writer raises InvalidStateError where it finds the call over; a link that died of it was gone until a restart."""
    session = _Link._session
    begun = 0

    async def fails_once(link: _Link) -> None:
        nonlocal begun
        begun += 1
        if begun == 1:
            raise error
        await session(link)

    monkeypatch.setattr(_Link, "_session", fails_once)
    async with serve() as running, links(running.address) as channel:
        await eventually(lambda: channel.ready_endpoints)
        await tokens(channel).CountTexts(CountTextsRequest(model="x", texts=["t"]), timeout=5)
    assert begun >= 2


async def test_a_channel_knows_who_is_at_each_end_and_calls_one_of_them_alone() -> None:
    async with (
        serve(replica_id="tokenization-1.abc") as one,
        serve(replica_id="tokenization-2.def") as two,
        links(one.address, two.address) as channel,
    ):
        await eventually(lambda: len(channel.replicas) == 2)
        assert {replica.endpoint: replica.replica_id for replica in channel.replicas} == {
            one.address: "tokenization-1.abc",
            two.address: "tokenization-2.def",
        }
        only: Any = TokenizationServiceStub(channel.only(two.address))  # type: ignore[call-overload]
        for _ in range(5):
            await only.CountTexts(CountTextsRequest(texts=["t"]), timeout=5)
        assert (len(one.script.calls), len(two.script.calls)) == (0, 5)


async def test_one_that_is_gone_fails_at_once_and_is_used_again_when_it_is_back() -> None:
    port = free_port()
    async with serve(replica_id="first") as other, links(other.address, f"127.0.0.1:{port}") as channel:
        only: Any = TokenizationServiceStub(channel.only(f"127.0.0.1:{port}"))  # type: ignore[call-overload]
        began = asyncio.get_running_loop().time()
        with pytest.raises(Failure) as raised:
            await only.CountTexts(CountTextsRequest(), timeout=5)
        assert raised.value.metadata == {"dependency": "tokenization"}
        assert asyncio.get_running_loop().time() - began < 0.2
        async with serve(port=port, replica_id="second"):
            await eventually(lambda: len(channel.replicas) == 2)
            await only.CountTexts(CountTextsRequest(), timeout=5)
        await eventually(lambda: [replica.replica_id for replica in channel.replicas] == ["first"])
        async with serve(port=port, replica_id="third"):
            # The same place, and another process.
            await eventually(lambda: {replica.replica_id for replica in channel.replicas} == {"first", "third"})


async def test_one_that_drains_is_no_longer_among_those_that_take_calls() -> None:
    async with serve() as one, serve() as two, links(one.address, two.address) as channel:
        await eventually(lambda: len(channel.replicas) == 2)
        await one.server.set_serving(False)
        await eventually(lambda: [replica.endpoint for replica in channel.replicas] == [two.address])
