"""The chain of attempts, over real sockets and a real spool."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
from google.protobuf.duration_pb2 import Duration

from services.execution import counts
from services.execution.adapters.echo import EchoProvider
from services.execution.attempts import _Produced, lost
from services.execution.breaker import State
from services.execution.draining import Draining
from services.execution.errors import AllFailed, AttemptFailed, SpoolFull
from services.execution.spool import Spool
from services.runtime.errors import Failure, Reason, unavailable
from sluice.errors.v1 import error_reason_pb2
from sluice.execution.v1 import execution_service_pb2 as pb2
from sluice.inference.v1 import answer_pb2, receipt_pb2
from sluice.metering.v1 import metering_service_pb2
from sluice.routing.v1 import routing_service_pb2
from tests.unit.execution.adapters.recorded import OPENAI_WHOLE, RECORDED, TEXT, events, openai_chunk
from tests.unit.execution.examples import billing, candidate, conversation, heard, price, texts
from tests.unit.execution.upstream import PATIENCE, Exchange, Reply, chunk, chunked, document, hangs
from tests.unit.execution.world import World, attempts_of, outcomes, world

OPENAI: Final = RECORDED["openai"]
good: Final = document(OPENAI_WHOLE)
streams: Final = chunked([OPENAI.stream])
COST: Final = 40 * 1000 + 30 * 2000
"""Nano-dollars of the recorded answer: it has 40 tokens in, at the same price cached or not, and 30 out."""


def fails(status: int, **headers: str) -> Any:
    return document({"error": {"message": "scripted", "type": "x"}}, status, **headers)


async def resets(exchange: Exchange) -> None:
    exchange.reset()


async def begins_and_breaks(exchange: Exchange) -> None:
    await chunked([OPENAI.beginning], ends=False)(exchange)


async def begins_and_hangs(exchange: Exchange) -> None:
    await exchange.send(Reply().head(("transfer-encoding", "chunked")), chunk(OPENAI.beginning))
    await exchange.gone()


async def run(made: World, *providers: str, streaming: bool, **fields: Any) -> tuple[Any, answer_pb2.Answer]:
    """The operation and its answer."""
    if streaming:
        operation = made.stream(*providers, **fields)
        pieces = await operation.open_stream()
        opened = await anext(pieces)
        assert opened.attempt_id == f"{operation.id}/{operation._number}"
        got = await heard(pieces)
        return operation, got.answer
    operation = made.operation(*providers, **fields)
    return operation, (await operation.complete()).answer


@pytest.fixture(params=[False, True], ids=["unary", "stream"])
def streaming(request: pytest.FixtureRequest) -> bool:
    """Whole answers and streams."""
    return bool(request.param)


def answering(streaming: bool) -> Any:
    return streams if streaming else good


async def test_the_first_candidate_that_answers_is_the_last_that_is_asked(tmp_path: Path, streaming: bool) -> None:
    async with world(tmp_path, a=fails(500), b=fails(529), c=answering(streaming), d=answering(streaming)) as made:
        operation, answer = await run(made, "a", "b", "c", "d", streaming=streaming)
        settled = await made.settled()
        assert [made.asked(name) for name in "abcd"] == [1, 1, 1, 0]
    assert texts(answer) == TEXT
    assert answer.model == "c/m"
    expected = [("op/1", "a", "FAILED"), ("op/2", "b", "FAILED"), ("op/3", "c", "SUCCEEDED")]
    assert outcomes(attempts_of(operation)) == expected
    assert [attempt.provider_status for attempt in attempts_of(operation)] == [500, 529, 200]
    assert [attempt.cost_nano_usd for attempt in attempts_of(operation)] == [0, 0, COST]
    assert (operation.cost, operation.price_version) == (COST, "p1")
    # The ledger hears of each attempt once, and which is the last.
    assert [(one.attempt_id, one.cost_nano_usd, one.is_final) for one in settled] == [
        ("op/1", 0, False),
        ("op/2", 0, False),
        ("op/3", COST, True),
    ]
    assert {(one.operation_id, one.tenant_id, one.project_id, one.key_id, one.lease_id) for one in settled} == {
        ("op", "t", "p", "k", "l")
    }
    assert settled[2].usage.input_token_count == 40
    # So does routing.
    assert [report.record.model for report in made.reports] == ["a/m", "b/m", "c/m"]
    assert bool(made.reports[2].first_token_ns) == streaming


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_a_fault_of_the_caller_ends_the_chain(tmp_path: Path, streaming: bool, status: int) -> None:
    async with world(tmp_path, a=fails(status), b=answering(streaming)) as made:
        for _ in range(30):
            with pytest.raises(AttemptFailed) as caught:
                await run(made, "a", "b", streaming=streaming)
            assert caught.value.reason is Reason.PROVIDER_REJECTED
            assert "scripted" in caught.value.message
        assert made.asked("b") == 0
        # T15: nor does it ever open a breaker.
        assert made.asked("a") == 30
        assert {target.breaker.state for target in made.targets} == {State.CLOSED}
        assert {one.is_final for one in await made.settled()} == {True}


async def test_when_all_fail_the_failure_names_each_and_the_shortest_wait(tmp_path: Path, streaming: bool) -> None:
    async with world(tmp_path, a=fails(429, retry_after="9"), b=fails(401), c=fails(503, retry_after="4")) as made:
        with pytest.raises(AllFailed) as caught:
            await run(made, "a", "b", "c", "nowhere", streaming=streaming)
        settled = await made.settled()
    failure = caught.value
    assert failure.reason is Reason.ALL_CANDIDATES_FAILED
    assert failure.metadata == {
        "attempt/1": "a/m PROVIDER_RATE_LIMITED",
        "attempt/2": "b/m PROVIDER_AUTHENTICATION",
        "attempt/3": "c/m PROVIDER_OVERLOADED",
        "attempt/4": "nowhere/m PROVIDER_UNAVAILABLE",
    }
    assert failure.retry_delay == 4.0
    # What was never called has no record in the ledger.
    assert [one.attempt_id for one in settled] == ["op/1", "op/2", "op/3"]


async def test_the_failures_metadata_is_bounded(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        with pytest.raises(AllFailed) as caught:
            await made.operation(*(f"x{number}" for number in range(16))).complete()
    assert len(caught.value.metadata) == 12


async def test_retry_after_keeps_the_provider_uncalled_for_as_long(tmp_path: Path, streaming: bool) -> None:
    async with world(tmp_path, a=[fails(429, retry_after="7"), answering(streaming)]) as made:
        for expected in (Reason.PROVIDER_RATE_LIMITED, Reason.BREAKER_OPEN, Reason.BREAKER_OPEN):
            with pytest.raises(AllFailed) as caught:
                await run(made, "a", streaming=streaming)
            assert caught.value.metadata == {"attempt/1": f"a/m {expected.value}"}
            assert caught.value.retry_delay == 7.0
        made.clock.now += 6.9
        with pytest.raises(AllFailed):
            await run(made, "a", streaming=streaming)
        assert made.asked("a") == 1
        made.clock.now += 0.2
        await run(made, "a", streaming=streaming)
        assert made.asked("a") == 2


async def test_a_provider_that_is_down_is_called_five_times_and_then_probed_once_per_cooldown(tmp_path: Path) -> None:
    async with world(tmp_path, a=fails(500), b=good) as made:
        for number in range(50):
            operation = made.operation("a", "b", operation_id=f"op{number}")
            await operation.complete()
        assert made.asked("a") == 5
        assert made.asked("b") == 50
        assert outcomes(attempts_of(operation)) == [("op49/-", "a", "NOT_SENT"), ("op49/1", "b", "SUCCEEDED")]
        assert attempts_of(operation)[0].error_reason == error_reason_pb2.ERROR_REASON_BREAKER_OPEN
        made.clock.now += 36.0
        for _ in range(10):
            await made.operation("a", "b").complete()
        assert made.asked("a") == 6
        # It recovers: one call at a time, three successes, and traffic is back.
        made.servers["a"].plays(good)
        made.clock.now += 72.0
        for _ in range(10):
            await made.operation("a", "b").complete()
        assert made.asked("a") == 16


async def test_half_open_passes_one_call_at_a_time(tmp_path: Path) -> None:
    async with world(tmp_path, a=fails(500), b=good) as made:
        for _ in range(5):
            await made.operation("a", "b").complete()
        made.servers["a"].plays(hangs)
        made.servers["a"].asked.clear()
        made.clock.now += 36.0
        probe = asyncio.create_task(made.operation("a", "b").complete())
        await made.servers["a"].asked.wait()
        await asyncio.gather(*(made.operation("a", "b").complete() for _ in range(10)))
        assert made.asked("a") == 6
        # A probe whose caller leaves frees the place of the next.
        probe.cancel()
        await asyncio.gather(probe, return_exceptions=True)
        made.servers["a"].plays(good)
        await made.operation("a", "b").complete()
        assert made.asked("a") == 7


async def test_a_breaker_belongs_to_a_model_and_a_credential(tmp_path: Path) -> None:
    async with world(tmp_path, a=fails(401), b=good) as made:
        for _ in range(6):
            await made.operation("a", "b").complete()
        assert made.asked("a") == 5
        await made.operation(candidates=[candidate("a", "a/other"), candidate("b")]).complete()
        assert made.asked("a") == 6
        made.targets.providers["a"].credential = "env:another"  # type: ignore[misc]  # as a changed catalogue makes it
        await made.operation("a", "b").complete()
        assert made.asked("a") == 7


async def test_a_stale_connection_gets_the_same_candidate_a_second_recorded_attempt(tmp_path: Path, streaming: bool) -> None:
    answers = answering(streaming)
    async with world(tmp_path, a=[answers, resets, answers], b=answers) as made:
        await run(made, "a", "b", streaming=streaming)
        operation, _ = await run(made, "a", "b", streaming=streaming)
        settled = await made.settled()
        assert (made.asked("a"), made.asked("b")) == (3, 0)
        # A connection that was kept too long says nothing about the provider.
        assert [target.breaker._consecutive for target in made.targets] == [0]
    assert outcomes(attempts_of(operation)) == [("op/1", "a", "FAILED"), ("op/2", "a", "SUCCEEDED")]
    assert [one.is_final for one in settled[1:]] == [False, True]


async def test_stale_connections_never_open_a_breaker(tmp_path: Path) -> None:
    async with world(tmp_path, a=good) as made:
        for _ in range(12):
            await made.operation("a").complete()
            made.servers["a"].plays(resets, good)
        assert {target.breaker.state for target in made.targets} == {State.CLOSED}


async def test_a_fresh_connection_that_dies_is_not_tried_again(tmp_path: Path, streaming: bool) -> None:
    async with world(tmp_path, a=resets, b=answering(streaming)) as made:
        operation, _ = await run(made, "a", "b", streaming=streaming)
        assert (made.asked("a"), made.asked("b")) == (1, 1)
    assert outcomes(attempts_of(operation)) == [("op/1", "a", "FAILED"), ("op/2", "b", "SUCCEEDED")]


async def test_a_stale_connection_of_the_last_candidate_does_not_end_the_operation(tmp_path: Path) -> None:
    async with world(tmp_path, a=[good, resets]) as made:
        await made.operation("a").complete()
        with pytest.raises(AllFailed):
            await made.operation("a", operation_id="second").complete()
        settled = (await made.settled())[1:]
    assert [(one.attempt_id, one.is_final) for one in settled] == [("second/1", False), ("second/2", True)]


async def test_every_attempt_says_which_request_it_was_for(tmp_path: Path) -> None:
    async with world(tmp_path, a=[resets, good]) as made:
        await made.operation("a", "a", billing=billing(request_key=b"k" * 16)).complete()
        await made.operation("a", operation_id="second").complete()
        settled = await made.settled()
    assert [(one.attempt_id, one.request_key) for one in settled] == [
        ("op/1", b"k" * 16),
        ("op/2", b"k" * 16),
        ("second/1", b""),
    ]


async def test_the_deadline_is_spent_across_the_attempts(tmp_path: Path, streaming: bool) -> None:
    limit = Duration(nanos=100_000_000)
    plan = [candidate("a", attempt_timeout=limit), candidate("b", attempt_timeout=limit), candidate("c")]
    async with world(tmp_path, a=hangs, b=hangs, c=answering(streaming)) as made:
        operation, _ = await run(made, streaming=streaming, candidates=plan, seconds=PATIENCE)
    assert outcomes(attempts_of(operation)) == [("op/1", "a", "FAILED"), ("op/2", "b", "FAILED"), ("op/3", "c", "SUCCEEDED")]
    assert attempts_of(operation)[0].error_reason == error_reason_pb2.ERROR_REASON_PROVIDER_TIMEOUT


async def test_no_attempt_is_sent_after_the_deadline(tmp_path: Path, streaming: bool) -> None:
    async with world(tmp_path, a=hangs, b=answering(streaming)) as made:
        with pytest.raises(Failure) as caught:
            await run(made, "a", "b", streaming=streaming, seconds=0.15)
        assert caught.value.reason is Reason.DEADLINE_EXCEEDED
        assert (made.asked("a"), made.asked("b")) == (1, 0)
        settled = await made.settled()
        assert [one.outcome for one in settled] == [
            receipt_pb2.ATTEMPT_OUTCOME_FAILED,
            receipt_pb2.ATTEMPT_OUTCOME_NOT_SENT,
        ]
        async with asyncio.timeout(PATIENCE):
            await made.servers["a"].ended[0].wait()
        # Nor when it has passed before the first.
        with pytest.raises(Failure) as caught:
            await run(made, "b", streaming=streaming, seconds=0.0, operation_id="late")
        assert caught.value.reason is Reason.DEADLINE_EXCEEDED
        assert made.asked("b") == 0
        assert all(target.breaker.in_flight == 0 for target in made.targets)


async def test_the_last_candidate_has_all_the_time_that_is_left(tmp_path: Path) -> None:
    async def waits(exchange: Exchange) -> None:
        await asyncio.sleep(0.15)
        await good(exchange)

    plan = [candidate("a", attempt_timeout=Duration(nanos=50_000_000))]
    async with world(tmp_path, a=waits) as made:
        operation, _ = await run(made, streaming=False, candidates=plan)
    assert outcomes(attempts_of(operation)) == [("op/1", "a", "SUCCEEDED")]


@pytest.mark.parametrize("wire", [0, pb2.WIRE_FORMAT_OPENAI_CHAT])
@pytest.mark.parametrize(
    "script",
    [begins_and_breaks, chunked([OPENAI.beginning, OPENAI.error]), chunked([OPENAI.beginning])],
    ids=["cut", "error", "end"],
)
async def test_after_the_first_token_no_other_candidate_is_tried(tmp_path: Path, wire: int, script: Any) -> None:
    async with world(tmp_path, a=script, b=streams) as made:
        operation = made.stream("a", "b", accepted_wire=wire, input_count={"token_count": 11})
        seen: list[Any] = []
        with pytest.raises(AttemptFailed) as caught:
            async for piece in await operation.open_stream():
                seen.append(piece)  # noqa: PERF401 - what came before the failure is looked at
        assert made.asked("b") == 0
        assert isinstance(seen[0], pb2.CompletionOpened)
        assert (seen[0].attempt_id, seen[0].model, seen[0].is_wire) == ("op/1", "a/m", bool(wire))
        assert len(seen) == 2
        [settled] = await made.settled()
    assert not isinstance(caught.value, AllFailed)
    assert outcomes(attempts_of(operation)) == [("op/1", "a", "BROKEN")]
    # What was produced is paid for, by our own count, and marked so.
    assert settled.usage.source == answer_pb2.USAGE_SOURCE_ESTIMATED
    assert (settled.usage.input_token_count, settled.usage.output_token_count) == (11, 1)
    assert settled.cost_nano_usd == operation.cost == 13_000
    assert settled.is_final


async def test_before_the_first_token_another_candidate_is_tried(tmp_path: Path) -> None:
    broken = chunked([b": ping\n\n"], ends=False)
    empty = chunked([])
    async with world(tmp_path, a=broken, b=empty, c=chunked([OPENAI.error]), d=streams) as made:
        operation, _ = await run(made, "a", "b", "c", "d", streaming=True)
    assert [outcome for _, _, outcome in outcomes(attempts_of(operation))] == ["FAILED", "FAILED", "FAILED", "SUCCEEDED"]


@pytest.mark.parametrize("how", ["cancel", "close"])
@pytest.mark.parametrize("end", ["usage", "hangs", "breaks"])
async def test_where_the_catalogue_says_drain_a_stream_is_read_on_and_charged_by_its_providers_usage(
    tmp_path: Path, how: str, end: str
) -> None:
    has_left = asyncio.Event()

    async def goes_on(exchange: Exchange) -> None:
        await exchange.send(Reply().head(("transfer-encoding", "chunked")), chunk(OPENAI.beginning))
        await has_left.wait()
        if end == "hangs":
            await exchange.gone()
        elif end == "usage":
            await exchange.send(chunk(OPENAI.stream.removeprefix(OPENAI.beginning)), chunk(b""))
        else:
            exchange.reset()

    async with world(tmp_path, a=goes_on) as made:
        made.targets.drain_seconds = {"a": PATIENCE if end != "hangs" else 0.05}
        operation = made.stream("a", input_count={"token_count": 11}, billing=billing(hold_id="h"))
        pieces = await operation.open_stream()
        await anext(pieces)
        await anext(pieces)
        if how == "close":
            await pieces.aclose()
        else:
            waiting = asyncio.ensure_future(anext(pieces))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        operation.close()
        assert not operation.tried
        has_left.set()
        [settled] = await made.settled()
        [target] = made.targets
        assert target.breaker.in_flight == 0
        if end == "hangs":
            async with asyncio.timeout(PATIENCE):
                await made.servers["a"].ended[0].wait()
    assert settled.outcome == receipt_pb2.ATTEMPT_OUTCOME_CANCELLED
    assert (settled.hold_id, settled.is_final) == ("h", True)
    if end == "usage":
        assert (settled.cost_nano_usd, settled.usage.source) == (COST, answer_pb2.USAGE_SOURCE_REPORTED)
        assert (settled.observed_usage.input_token_count, settled.observed_usage.output_token_count) == (11, 8)
    else:
        assert not settled.HasField("observed_usage")
        assert (settled.cost_nano_usd, settled.usage.source) == (13_000, answer_pb2.USAGE_SOURCE_ESTIMATED)


async def test_a_stream_that_may_be_read_on_is_given_as_any_other(tmp_path: Path) -> None:
    async with world(tmp_path, a=[streams, begins_and_breaks, fails(500)], b=streams) as made:
        made.targets.drain_seconds = {"a": PATIENCE}
        operation, answer = await run(made, "a", streaming=True)
        assert (texts(answer), operation.cost) == (texts((await run(made, "b", streaming=True))[1]), COST)
        with pytest.raises(AttemptFailed) as caught:
            await run(made, "a", streaming=True, operation_id="second")
        assert caught.value.reason is Reason.PROVIDER_STREAM_BROKEN
        operation, _ = await run(made, "a", "b", streaming=True, operation_id="third")
        assert outcomes(attempts_of(operation)) == [("third/1", "a", "FAILED"), ("third/2", "b", "SUCCEEDED")]
        assert len(await made.settled()) == 5


async def test_a_provider_is_made_to_wait_for_a_slow_caller_also_where_it_is_read_on() -> None:
    given = 0

    async def endless() -> AsyncIterator[int]:
        nonlocal given
        while True:
            given += 1
            yield given

    pieces = Draining(endless())
    assert [await anext(pieces) for _ in range(3)] == [1, 2, 3]
    for _ in range(1000):
        await asyncio.sleep(0)
    assert given < 200
    await pieces.aclose()


@pytest.mark.parametrize("how", ["cancel", "close"])
async def test_a_caller_that_leaves_a_stream_finds_it_settled_and_closed(tmp_path: Path, how: str) -> None:
    async with world(tmp_path, a=begins_and_hangs) as made:
        operation = made.stream("a", input_count={"token_count": 11})
        pieces = await operation.open_stream()
        await anext(pieces)
        await anext(pieces)
        if how == "close":
            await pieces.aclose()
        else:
            waiting = asyncio.ensure_future(anext(pieces))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        # At once, not some turns of the loop later: the process may be about to end.
        assert outcomes(attempts_of(operation)) == [("op/1", "a", "CANCELLED")]
        assert made.spool.backlog == 1
        [target] = made.targets
        assert target.breaker.in_flight == 0
        async with asyncio.timeout(PATIENCE):
            await made.servers["a"].ended[0].wait()
        [settled] = await made.settled()
        assert settled.cost_nano_usd == 13_000
        assert settled.error_reason == error_reason_pb2.ERROR_REASON_CANCELLED


async def test_a_caller_that_leaves_before_an_answer_closes_the_socket_and_settles(tmp_path: Path, streaming: bool) -> None:
    async with world(tmp_path, a=hangs, b=answering(streaming)) as made:
        task = asyncio.create_task(run(made, "a", "b", streaming=streaming))
        await made.servers["a"].asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(PATIENCE):
            await made.servers["a"].ended[0].wait()
        [settled] = await made.settled()
        assert settled.outcome == receipt_pb2.ATTEMPT_OUTCOME_CANCELLED
        assert (settled.cost_nano_usd, settled.is_final) == (0, True)
        assert made.asked("b") == 0


async def test_a_fault_of_ours_settles_too(tmp_path: Path, streaming: bool) -> None:
    class Faulty:
        kind, address, wire, credential = "faulty", "", 0, ""

        async def complete(self, prompt: Any) -> Any:
            raise ZeroDivisionError

        async def stream(self, prompt: Any) -> Any:
            raise ZeroDivisionError
            yield

        async def embed(self, prompt: Any) -> Any:
            raise ZeroDivisionError

    async with world(tmp_path) as made:
        made.targets.use({"f": Faulty()})  # type: ignore[dict-item]  # a provider with a fault
        for kind in (pb2.EmbedRequest, pb2.CompleteRequest):
            operation = made.operation("f", kind=kind)
            with pytest.raises(ZeroDivisionError):
                await (operation.embed() if kind is pb2.EmbedRequest else run(made, "f", streaming=streaming))
        settled = await made.settled()
        assert [one.outcome for one in settled] == [receipt_pb2.ATTEMPT_OUTCOME_FAILED] * 2
        assert [one.error_reason for one in settled] == [error_reason_pb2.ERROR_REASON_INTERNAL] * 2
        assert all(target.breaker.in_flight == 0 for target in made.targets)


async def test_an_attempt_is_recorded_before_it_is_sent(tmp_path: Path) -> None:
    async with world(tmp_path / "one", a=hangs) as made:
        task = asyncio.create_task(made.operation("a").complete())
        await made.servers["a"].asked.wait()
        [left] = (tmp_path / "one").glob("*.spool")
        # As another process would find it after a crash.
        (tmp_path / "two").mkdir()
        (tmp_path / "two" / left.name).write_bytes(left.read_bytes())
        posted: list[Any] = []

        async def post(records: Any) -> None:
            posted.extend(records)

        spool = Spool(tmp_path / "two", post, group_seconds=0.0005, segment_bytes=1 << 20, most_bytes=1 << 24)
        assert spool.open(metering_service_pb2.Settlement.FromString, lost) == 1
        await spool._post_some()
        spool.close()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    [record] = posted
    assert (record.attempt_id, record.provider, record.tenant_id) == ("op/1", "a", "t")
    assert record.outcome == receipt_pb2.ATTEMPT_OUTCOME_LOST
    assert record.payer == metering_service_pb2.PAYER_PLATFORM
    assert record.is_final


async def test_nothing_is_sent_when_it_can_t_be_recorded(tmp_path: Path, streaming: bool) -> None:
    async with world(tmp_path, a=answering(streaming)) as made:
        made.spool._bytes = 1 << 40
        with pytest.raises(SpoolFull):
            await run(made, "a", streaming=streaming)
        assert made.asked("a") == 0
        assert all(target.breaker.in_flight == 0 for target in made.targets)


async def test_nothing_is_sent_when_the_disk_does_not_take_the_record(
    tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, a=answering(streaming)) as made:
        await run(made, "a", streaming=streaming)

        def full(descriptor: int, data: bytes) -> int:
            raise OSError(28, "No space left on device")

        # With a kept connection and with a new one.
        for _ in range(2):
            monkeypatch.setattr(os, "write", full)
            with pytest.raises(SpoolFull):
                await run(made, "a", streaming=streaming, operation_id="refused")
            monkeypatch.undo()
        assert made.asked("a") == 1
        assert all(target.breaker.in_flight == 0 for target in made.targets)
        await run(made, "a", streaming=streaming, operation_id="after")
        assert [record.operation_id for record in await made.settled()] == ["op", "after"]


async def test_who_leaves_before_the_request_is_sent_pays_nothing(tmp_path: Path, streaming: bool) -> None:
    count = {"token_count": 11}
    async with world(tmp_path, a=answering(streaming)) as made:
        await run(made, "a", streaming=streaming, input_count=count)
        leaving = asyncio.create_task(run(made, "a", streaming=streaming, input_count=count, operation_id="leaving"))
        # It has asked the kept connection to send, which it does at the end of this turn.
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        assert made.asked("a") == 1
        made.servers["a"].plays(hangs)
        caught = asyncio.create_task(run(made, "a", streaming=streaming, input_count=count, operation_id="caught"))
        async with asyncio.timeout(PATIENCE):
            while made.asked("a") < 2:
                await asyncio.sleep(0.001)
        caught.cancel()
        await asyncio.gather(caught, return_exceptions=True)
        costs = {record.operation_id: (record.cost_nano_usd, record.outcome) for record in await made.settled()}
    assert costs["leaving"] == (0, receipt_pb2.ATTEMPT_OUTCOME_CANCELLED)
    assert costs["caught"] == (11 * 1000, receipt_pb2.ATTEMPT_OUTCOME_CANCELLED)


async def test_beside_what_is_reported_stands_our_own_count(tmp_path: Path, streaming: bool) -> None:
    async with world(tmp_path, a=answering(streaming)) as made:
        await run(made, "a", streaming=streaming, input_count={"token_count": 11})
        [settled] = await made.settled()
    own = settled.observed_usage
    assert (settled.usage.source, own.source) == (answer_pb2.USAGE_SOURCE_REPORTED, answer_pb2.USAGE_SOURCE_ESTIMATED)
    assert own.input_token_count == 11
    # One for each piece; of a whole answer one for every three bytes.
    assert own.output_token_count == (7 if streaming else 25)


async def test_a_prompt_of_which_only_the_size_is_known_has_no_count(tmp_path: Path) -> None:
    async with world(tmp_path, a=good) as made:
        await run(made, "a", streaming=False, input_count={"token_count": 11}, count_when_needed=True)
        [settled] = await made.settled()
    assert (settled.observed_usage.input_token_count, settled.observed_usage.output_token_count) == (0, 25)


async def test_usage_that_is_not_reported_is_estimated_on_the_high_side(tmp_path: Path, streaming: bool) -> None:
    content = "日本語のテキスト" * 10
    whole = {"id": "x", "choices": [{"message": {"content": content}, "finish_reason": "stop"}]}
    piece = events(openai_chunk({"content": content}, "stop"), b"data: [DONE]")
    async with world(tmp_path, a=chunked([piece]) if streaming else document(whole)) as made:
        operation, answer = await run(made, "a", streaming=streaming, input_count={"token_count": 11})
    assert answer.usage.source == answer_pb2.USAGE_SOURCE_ESTIMATED
    assert answer.usage.input_token_count == 11
    # A token for every three bytes, which for this script is one for each character; never one for three characters.
    assert answer.usage.output_token_count >= len(content)
    assert operation.cost == 11 * 1000 + answer.usage.output_token_count * 2000


async def test_what_a_lost_gateway_cut_off_is_booked_to_the_platform(tmp_path: Path, streaming: bool) -> None:
    """Its caller got no answer from us, and asks again: it must not pay twice. Who leaves pays."""
    for is_lost in (True, False):
        async with world(tmp_path / str(is_lost), a=hangs) as made:
            operation = (made.stream if streaming else made.operation)("a", input_count={"token_count": 11})
            task: asyncio.Task[Any] = asyncio.create_task(operation.open_stream() if streaming else operation.complete())
            await made.servers["a"].asked.wait()
            operation._call.is_lost = is_lost
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            [settled] = await made.settled()
        assert settled.cost_nano_usd == 11 * 1000
        assert settled.is_final
        payer, outcome = (
            (metering_service_pb2.PAYER_PLATFORM, receipt_pb2.ATTEMPT_OUTCOME_LOST)
            if is_lost
            else (metering_service_pb2.PAYER_UNSPECIFIED, receipt_pb2.ATTEMPT_OUTCOME_CANCELLED)
        )
        assert (settled.payer, settled.outcome) == (payer, outcome)


async def test_a_stream_that_keeps_to_its_limit_is_charged_what_its_provider_reports(tmp_path: Path) -> None:
    """Each frame comes alone, and the last ones are shorter than those with text; that says nothing of how many tokens there were."""
    words = [" internationalization" if number % 3 == 0 else " a" for number in range(50)]
    frames = [
        events(openai_chunk({"role": "assistant", "content": ""})),
        *(events(openai_chunk({"content": word})) for word in words),
    ]
    frames += [events(openai_chunk({}, "stop"))]
    frames += [events({"id": "x", "choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 50}}), b"data: [DONE]\n\n"]
    async with world(tmp_path, a=chunked(frames)) as made:
        operation = made.stream(
            "a",
            conversation=conversation(max_output_tokens=50),
            billing=billing(hold_nano_usd=1),
            input_count={"token_count": 5},
            accepted_wire=pb2.WIRE_FORMAT_OPENAI_CHAT,
        )
        pieces = await operation.open_stream()
        await anext(pieces)
        got = await heard(pieces)
    usage = got.answer.usage
    assert (usage.input_token_count, usage.output_token_count, usage.source) == (12, 50, answer_pb2.USAGE_SOURCE_REPORTED)


async def test_a_stream_is_not_cut_once_its_model_has_stopped(tmp_path: Path) -> None:
    """A provider that gave more than it should and then ended: cut now, it would end twice, and its own count be lost."""
    frames = [events(openai_chunk({"content": "x"})) for _ in range(25)]
    frames += [events(openai_chunk({"content": "x"}, "stop"))]
    frames += [events({"id": "x", "choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 26}}), b"data: [DONE]\n\n"]
    async with world(tmp_path, a=chunked(frames)) as made:
        operation = made.stream(
            "a",
            conversation=conversation(max_output_tokens=9),
            billing=billing(hold_nano_usd=1),
            input_count={"token_count": 5},
            accepted_wire=pb2.WIRE_FORMAT_OPENAI_CHAT,
        )
        pieces = await operation.open_stream()
        await anext(pieces)
        got = await heard(pieces)
    assert got.answer.finish_reason == answer_pb2.FINISH_REASON_STOP
    assert got.answer.usage.output_token_count == 26


@pytest.mark.parametrize(
    ("own", "window", "wished", "told"),
    [
        (64, 0, 0, 64),
        (64, 0, 300, 64),
        (64, 0, 20, 20),
        (0, 0, 300, 300),
        (0, 2048, 0, 0),
        # With the prompt of 11 tokens beyond the window: left to the provider, unless the caller said something.
        (2040, 2048, 0, 0),
        (2040, 2048, 2048, 2040),
        (2037, 2048, 0, 2037),
    ],
)
async def test_a_provider_is_told_to_answer_with_no_more_than_is_held_for(
    tmp_path: Path, own: int, window: int, wished: int, told: int
) -> None:
    async with world(tmp_path, a=good) as made:
        operation = made.operation("a")
        operation.input_count = 11
        candidate = routing_service_pb2.Candidate(max_output_tokens=own, context_window=window)
        assert operation._longest(candidate, wished) == told


async def test_a_stream_that_passes_its_hold_is_cut(tmp_path: Path) -> None:
    many = [events(openai_chunk({"content": "x"})) for _ in range(200)]
    talk = conversation(max_output_tokens=10)
    async with world(tmp_path, a=chunked(many)) as made:
        operation = made.stream("a", conversation=talk, billing=billing(hold_nano_usd=1), input_count={"token_count": 5})
        pieces = await operation.open_stream()
        await anext(pieces)
        got = await heard(pieces)
        assert got.answer.finish_reason == answer_pb2.FINISH_REASON_BUDGET
        assert got.answer.usage.output_token_count < 200
        assert len(got.deltas) == got.answer.usage.output_token_count
        async with asyncio.timeout(PATIENCE):
            await made.servers["a"].ended[0].wait()
        [settled] = await made.settled()
        assert settled.usage == got.answer.usage


async def test_a_candidate_without_a_price_costs_nothing_and_says_no_version(tmp_path: Path) -> None:
    plan = [candidate("a")]
    plan[0].ClearField("price")
    async with world(tmp_path, a=good) as made:
        operation, _ = await run(made, streaming=False, candidates=plan)
        [settled] = await made.settled()
    assert (operation.cost, operation.price_version, settled.price_version) == (0, "", "")


async def test_each_candidate_is_charged_at_its_own_price(tmp_path: Path) -> None:
    plan = [candidate("a"), candidate("b")]
    plan[1].price.CopyFrom(price("p2", per_request=5))
    async with world(tmp_path, a=fails(500), b=good) as made:
        operation, _ = await run(made, streaming=False, candidates=plan)
    assert (operation.cost, operation.price_version) == (COST + 5, "p2")


async def test_embeddings_fall_back_too_and_are_estimated_when_they_report_nothing(tmp_path: Path) -> None:
    rows = {"data": [{"index": 0, "embedding": [0.5]}]}
    async with world(tmp_path, a=fails(500), b=document(rows), c=fails(400)) as made:
        operation = made.operation("a", "b", kind=pb2.EmbedRequest, inputs=["some text"])
        embedded, model = await operation.embed()
        assert (list(embedded.vectors[0]), model) == ([0.5], "b/m")
        assert embedded.usage.source == answer_pb2.USAGE_SOURCE_ESTIMATED
        assert embedded.usage.input_token_count == 4
        assert outcomes(attempts_of(operation)) == [("op/1", "a", "FAILED"), ("op/2", "b", "SUCCEEDED")]
        with pytest.raises(AttemptFailed) as caught:
            await made.operation("c", "b", kind=pb2.EmbedRequest).embed()
        assert caught.value.reason is Reason.PROVIDER_REJECTED


async def test_what_a_provider_has_read_is_booked_though_no_answer_came(tmp_path: Path, streaming: bool) -> None:
    """It bills the prompt: a caller that leaves or can't wait must not get it for nothing."""
    async with world(tmp_path, a=hangs) as made:
        task = asyncio.create_task(run(made, "a", streaming=streaming, input_count={"token_count": 11}))
        await made.servers["a"].asked.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        [left] = await made.settled()
        assert left.usage.input_token_count == 11
        assert left.usage.source == answer_pb2.USAGE_SOURCE_ESTIMATED
        assert left.cost_nano_usd == 11_000
        with pytest.raises(Failure):
            await run(made, "a", streaming=streaming, seconds=0.2, input_count={"token_count": 11}, operation_id="late")
        late = (await made.settled())[-1]
        assert (late.attempt_id, late.cost_nano_usd) == ("late/1", 11_000)


async def test_texts_that_a_provider_has_read_are_booked_too(tmp_path: Path) -> None:
    async with world(tmp_path / "one", a=hangs) as made:
        task = asyncio.create_task(made.operation("a", kind=pb2.EmbedRequest, inputs=["some text"]).embed())
        await made.servers["a"].asked.wait()
        began = [path.read_bytes() for path in (tmp_path / "one").glob("*.spool")]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        with pytest.raises(Failure):
            await made.operation("a", kind=pb2.EmbedRequest, inputs=["some text"], seconds=0.2, operation_id="late").embed()
        for settled in await made.settled():
            assert (settled.usage.input_token_count, settled.cost_nano_usd) == (4, 4_000)
            assert settled.usage.source == answer_pb2.USAGE_SOURCE_ESTIMATED
    # And what a crash of ours cost is known to the platform.
    (tmp_path / "two").mkdir()
    for number, content in enumerate(began, 1):
        (tmp_path / "two" / f"{number:010d}.spool").write_bytes(content)
    async with world(tmp_path / "two") as made:
        [crashed] = await made.settled()
    assert (crashed.outcome, crashed.cost_nano_usd) == (receipt_pb2.ATTEMPT_OUTCOME_LOST, 4_000)


async def test_the_deadline_of_a_caller_in_a_hurry_opens_no_breaker(tmp_path: Path) -> None:
    """One tenant must not be able to take a model away from all others."""
    async with world(tmp_path, a=hangs) as made:
        for number in range(8):
            with pytest.raises(Failure):
                await made.operation("a", seconds=0.08, operation_id=f"hurry-{number}").complete()
        assert {target.breaker.state for target in made.targets} == {State.CLOSED}
        made.servers["a"].plays(good)
        assert texts((await made.operation("a", operation_id="patient").complete()).answer) == TEXT


async def test_a_refusal_that_repeats_the_callers_words_is_the_callers_fault(tmp_path: Path) -> None:
    refusal = document({"error": {"message": "Invalid schema for function 'billing_lookup'", "type": "x"}}, 400)
    async with world(tmp_path, a=refusal) as made:
        with pytest.raises(AttemptFailed) as caught:
            await made.operation("a").complete()
        assert caught.value.reason is Reason.PROVIDER_REJECTED


@pytest.mark.parametrize("count", [-5, 2 * 10**12])
async def test_usage_that_can_not_be_is_estimated_instead(tmp_path: Path, count: int) -> None:
    """The ledger would refuse such a settlement, and what was spent would never be booked."""
    body = document({**OPENAI_WHOLE, "usage": {"prompt_tokens": 10, "completion_tokens": count, "total_tokens": 10}})
    async with world(tmp_path, a=body) as made:
        completed = await made.operation("a", input_count={"token_count": 11}).complete()
        [settled] = await made.settled()
    assert completed.answer.usage == settled.usage
    assert settled.usage.source == answer_pb2.USAGE_SOURCE_ESTIMATED
    assert settled.usage.input_token_count == 11
    assert 0 < settled.usage.output_token_count < 100


async def test_the_start_of_an_attempt_says_what_a_crash_may_cost(tmp_path: Path) -> None:
    async with world(tmp_path, a=hangs) as made:
        operation = made.operation("a")
        operation.input_count = 11
        begun = operation._begin(operation.candidates[0])
        assert begun is not None
        record = lost(begun[1].record)
        assert (record.cost_nano_usd, record.price_version) == (11_000, "p1")
        assert record.payer == metering_service_pb2.PAYER_PLATFORM
        operation._dropped(begun[1], None, asyncio.CancelledError())


def _chunk(text: str, *, finish: str = "null", escaped: bool = False) -> bytes:
    delta = json.dumps({"content": text} if text else {}, ensure_ascii=escaped)
    return f'data: {{"id":"x","choices":[{{"index":0,"delta":{delta},"finish_reason":{finish}}}]}}\n\n'.encode()


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_a_piece_for_each_token_counts_as_one_whatever_stands_around_them(at_once: int) -> None:
    # As providers send them: a first one with the role alone, a last one without text, one with the usage; each alone or many together.
    words = [" the", " quick", " conversation", "\n", "    ", ".", " \u00e9t\u00e9", '"', " internationalization"] * 40
    frames = [
        b'data: {"id":"x","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n',
        *(_chunk(word, escaped=number % 2 == 0) for number, word in enumerate(words)),
        _chunk("", finish='"stop"'),
        b'data: {"id":"x","choices":[],"usage":{"prompt_tokens":12,"completion_tokens":50,"total_tokens":62}}\n\n',
    ]
    produced = _Produced()
    for start in range(0, len(frames), at_once):
        produced.add(b"".join(frames[start : start + at_once]))
    assert produced.tokens == len(words)


def test_anthropics_pieces_are_counted_too() -> None:
    produced = _Produced()
    produced.add(
        b'event: message_start\ndata: {"type":"message_start","message":{"content":[],"usage":{"input_tokens":3}}}\n\n'
    )
    for delta in (
        '"type":"text_delta","text":" hi"',
        '"type":"thinking_delta","thinking":"hm"',
        '"type":"input_json_delta","partial_json":"{"',
    ):
        produced.add(
            f'event: content_block_delta\ndata: {{"type":"content_block_delta","index":0,"delta":{{{delta}}}}}\n\n'.encode()
        )
    assert produced.tokens == 3


def test_pieces_with_many_tokens_count_for_many() -> None:
    produced = _Produced()
    produced.add(_chunk("a") * 3)
    assert produced.tokens == 3
    produced.add(_chunk("word " * 1000))
    assert produced.tokens == 1000
    assert produced.most_tokens == 1667
    other = _Produced()
    other.add(pb2.DeltaBatch(deltas=[answer_pb2.Delta(text="a"), answer_pb2.Delta(text="word " * 400), answer_pb2.Delta()]))
    assert other.tokens == 400
    short = _Produced()
    short.add(pb2.DeltaBatch(deltas=[answer_pb2.Delta(text=" something")] * 50))
    assert short.tokens == 50


# Prompts that were sent uncounted.

_BY_SIZE: Final[dict[str, Any]] = {"input_count": {"token_count": 400}, "count_when_needed": True}
"""What their size said."""


async def test_a_prompt_whose_usage_is_reported_is_never_counted(tmp_path: Path) -> None:
    async with world(tmp_path, a=fails(500), b=good) as made:
        operation, answer = await run(made, "a", "b", streaming=False, **_BY_SIZE)
        assert made.tokenization.asked == []
    assert answer.usage.source == answer_pb2.USAGE_SOURCE_REPORTED
    assert operation.cost == COST


async def test_an_answer_without_usage_is_charged_by_a_count(tmp_path: Path) -> None:
    whole = {"id": "x", "choices": [{"message": {"content": "abc"}, "finish_reason": "stop"}]}
    async with world(tmp_path, a=document(whole)) as made:
        operation, answer = await run(made, "a", streaming=False, **_BY_SIZE)
        [settled] = await made.settled()
        assert made.tokenization.asked == ["a/m"]
    assert (answer.usage.input_token_count, answer.usage.source) == (11, answer_pb2.USAGE_SOURCE_ESTIMATED)
    assert operation.cost == settled.cost_nano_usd == 11 * 1000 + answer.usage.output_token_count * 2000


async def test_who_leaves_is_charged_by_a_count_for_which_nobody_waits(tmp_path: Path) -> None:
    async with world(tmp_path, a=hangs) as made:
        made.tokenization.gate.clear()
        task = asyncio.create_task(run(made, "a", streaming=False, **_BY_SIZE))
        await made.servers["a"].asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # The socket isn't kept open by it.
        async with asyncio.timeout(PATIENCE):
            await made.servers["a"].ended[0].wait()
        assert made.spool.backlog == 0
        made.tokenization.gate.set()
        [settled] = await made.settled()
    assert made.tokenization.asked == ["a/m"]
    assert (settled.usage.input_token_count, settled.cost_nano_usd) == (11, 11_000)
    assert settled.outcome == receipt_pb2.ATTEMPT_OUTCOME_CANCELLED
    [target] = made.targets
    assert target.breaker.in_flight == 0


async def test_who_leaves_while_it_is_counted_pays_for_the_answer_that_had_come(tmp_path: Path) -> None:
    whole = {"id": "x", "choices": [{"message": {"content": "abcdef"}, "finish_reason": "stop"}]}
    async with world(tmp_path, a=document(whole)) as made:
        made.tokenization.gate.clear()
        task = asyncio.create_task(run(made, "a", streaming=False, **_BY_SIZE))
        async with asyncio.timeout(PATIENCE):
            while not made.tokenization.asked:
                await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        made.tokenization.gate.set()
        [settled] = await made.settled()
    assert (settled.usage.input_token_count, settled.usage.output_token_count) == (11, 3)
    assert settled.cost_nano_usd == 11 * 1000 + 3 * 2000


async def test_what_a_provider_read_before_it_failed_is_charged_by_a_count(tmp_path: Path) -> None:
    async with world(tmp_path, a=hangs, b=good) as made:
        candidates = [candidate("a", attempt_timeout=Duration(nanos=50_000_000)), candidate("b")]
        operation = made.operation(candidates=candidates, **_BY_SIZE)
        await operation.complete()
        read, answered = await made.settled()
        assert made.tokenization.asked == ["a/m"]
    assert (read.usage.input_token_count, read.cost_nano_usd) == (11, 11_000)
    assert answered.cost_nano_usd == COST
    assert operation.cost == 11_000 + COST


async def test_what_was_not_sent_is_neither_counted_nor_charged(tmp_path: Path) -> None:
    async with world(tmp_path, a=good) as made:
        task = asyncio.create_task(run(made, "a", streaming=False, **_BY_SIZE))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        settled = await made.settled()
        assert made.asked("a") == 0
    assert made.tokenization.asked == []
    assert [one.cost_nano_usd for one in settled] == [0] * len(settled)


async def test_without_tokenization_it_is_charged_by_its_size_and_not_asked_for_a_second(tmp_path: Path) -> None:
    whole = {"id": "x", "choices": [{"message": {"content": "abc"}, "finish_reason": "stop"}]}
    async with world(tmp_path, a=document(whole)) as made:
        made.tokenization.failure = unavailable("tokenization", "down")
        for number in range(2):
            _, answer = await run(made, "a", streaming=False, operation_id=f"op-{number}", **_BY_SIZE)
            assert (answer.usage.input_token_count, answer.usage.source) == (400, answer_pb2.USAGE_SOURCE_ESTIMATED)
        assert made.tokenization.asked == ["a/m"]
        assert made.counts.failure_count == 2
        made.tokenization.failure = None
        made.clock.now += 1.1
        _, answer = await run(made, "a", streaming=False, operation_id="op-2", **_BY_SIZE)
        assert answer.usage.input_token_count == 11


async def test_no_more_than_a_bounded_number_waits_for_its_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "_MOST_AT_ONCE", 3)
    async with world(tmp_path) as made:
        made.tokenization.gate.clear()
        asked = [asyncio.create_task(made.counts.count("m", conversation())) for _ in range(5)]
        await asyncio.sleep(0)
        assert [task.result() for task in asked if task.done()] == [None, None]
        made.tokenization.gate.set()
        assert await asyncio.gather(*asked) == [11, 11, 11, None, None]


async def test_the_start_of_an_uncounted_attempt_says_what_its_size_says(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        made.targets.use({"e": EchoProvider()})
        began: list[metering_service_pb2.Settlement] = []
        begin = made.spool.begin

        def noticed(record: Any) -> Any:
            began.append(metering_service_pb2.Settlement.FromString(record.SerializeToString()))
            return begin(record)

        made.spool.begin = noticed  # type: ignore[method-assign]
        await made.operation("e", **_BY_SIZE).complete()
    [record] = began
    assert (record.usage.input_token_count, record.cost_nano_usd) == (400, 400_000)


@pytest.mark.parametrize("script", ["usage", "no usage", "read, then another"])
async def test_who_leaves_at_any_step_leaves_one_settlement_for_each_attempt(tmp_path: Path, script: str) -> None:
    whole = {"id": "x", "choices": [{"message": {"content": "abcdef"}, "finish_reason": "stop"}]}
    scripts = {"usage": good, "no usage": document(whole), "read, then another": hangs}
    charges = {0, 11_000, COST, 11 * 1000 + 3 * 2000}
    ends: set[str] = set()
    async with world(tmp_path, a=scripts[script], b=good) as made:
        candidates = [candidate("a", attempt_timeout=Duration(nanos=15_000_000)), candidate("b")]
        # The steps are not the same every time: sockets and a timer are among them.
        for turns in range(120):
            before = len(await made.settled())
            operation = made.operation(candidates=candidates, operation_id=f"op-{turns}", **_BY_SIZE)
            task = asyncio.create_task(operation.complete())
            for _ in range(turns):
                await asyncio.sleep(0 if turns % 2 else 0.0005)
                if task.done():
                    break
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            ends.add("cancelled" if task.cancelled() else "answered")
            settled = (await made.settled())[before:]
            assert not made.spool._open
            ids = [one.attempt_id for one in settled]
            assert ids == [f"op-{turns}/{number + 1}" for number in range(len(ids))]
            assert {one.cost_nano_usd for one in settled} <= charges
            assert sum(one.is_final for one in settled) <= 1
            if task.done() and not task.cancelled():
                assert sum(one.cost_nano_usd for one in settled) == operation.cost
        assert all(target.breaker.in_flight == 0 for target in made.targets)
    assert ends == {"cancelled", "answered"}
