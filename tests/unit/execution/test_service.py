"""The servicer: what it refuses, what it translates."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from services.execution.catalogue import Entry
from services.execution.service import ExecutionServicer, Reports
from services.runtime.call import Call
from services.runtime.errors import Failure, Reason
from sluice.execution.v1 import execution_service_pb2 as pb2
from sluice.inference.v1 import conversation_pb2, receipt_pb2
from tests.unit.execution.adapters.recorded import OPENAI_WHOLE, RECORDED, TEXT
from tests.unit.execution.examples import billing, candidate, conversation, texts
from tests.unit.execution.upstream import PATIENCE, chunked, document, hangs
from tests.unit.execution.world import World, world

COST = 40 * 1000 + 30 * 2000
BAD: list[dict[str, Any]] = [
    {"operation_id": ""},
    {"operation_id": "x" * 129},
    {"candidates": []},
    {"candidates": [candidate("a")] * 17},
    {"billing": pb2.Billing(tenant_id="t", project_id="p")},
    {"conversation": conversation_pb2.Conversation()},
]


def call() -> Call:
    return Call("/x/Y", asyncio.get_running_loop().time() + PATIENCE)


def servicer_of(made: World, entries: Mapping[str, Entry] | None = None) -> ExecutionServicer:
    return ExecutionServicer(made.targets, made.spool, Reports(), list, lambda: entries or {}, made.counts, first_byte=PATIENCE)


def request(kind: Any = pb2.CompleteRequest, **fields: Any) -> Any:
    content = {"inputs": ["a"]} if kind is pb2.EmbedRequest else {"conversation": conversation()}
    return kind(**{"operation_id": "op", "candidates": [candidate("a")], "billing": billing(), **content, **fields})


@pytest.mark.parametrize("fields", BAD)
async def test_requests_that_break_the_contract(tmp_path: Path, fields: dict[str, Any]) -> None:
    async with world(tmp_path, a=document(OPENAI_WHOLE)) as made:
        servicer = servicer_of(made)
        with pytest.raises(Failure) as caught:
            await servicer.Complete(request(**fields), call())
        assert caught.value.reason is Reason.REQUEST_INVALID
        assert caught.value.metadata["field"] in fields
        with pytest.raises(Failure) as caught:
            await anext(servicer.StreamComplete(request(pb2.StreamCompleteRequest, **fields), call()))
        assert caught.value.reason is Reason.REQUEST_INVALID
        assert made.asked("a") == 0
        assert await made.settled() == []


async def test_a_whole_answer(tmp_path: Path) -> None:
    async with world(tmp_path, a=document(OPENAI_WHOLE)) as made:
        response = await servicer_of(made).Complete(request(), call())
    assert texts(response.answer) == TEXT
    assert (response.cost_nano_usd, response.price_version) == (COST, "p1")
    assert [attempt.attempt_id for attempt in response.attempts] == ["op/1"]
    assert response.attempt_count == 1


@pytest.mark.parametrize("wire", [pb2.WIRE_FORMAT_UNSPECIFIED, pb2.WIRE_FORMAT_OPENAI_CHAT, pb2.WIRE_FORMAT_ANTHROPIC_MESSAGES])
async def test_a_stream_is_opened_first_and_finished_last(tmp_path: Path, wire: pb2.WireFormat.ValueType) -> None:
    async with world(tmp_path, a=chunked([RECORDED["openai"].stream])) as made:
        asked = request(pb2.StreamCompleteRequest, accepted_wire=wire)
        events = [event async for event in servicer_of(made).StreamComplete(asked, call())]
    passes = wire == pb2.WIRE_FORMAT_OPENAI_CHAT
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "opened"
    assert set(kinds[1:-1]) == {"wire" if passes else "deltas"}
    assert kinds[-1] == "finished"
    assert events[0].opened.is_wire == passes
    assert events[-1].finished.cost_nano_usd == COST
    assert texts(events[-1].finished.answer) == TEXT


async def test_attempts_are_left_out_where_nobody_wants_them_and_counted_all_the_same(tmp_path: Path) -> None:
    both = [candidate("broken"), candidate("a")]
    async with world(
        tmp_path, broken=document({"error": {}}, status=500), a=[document(OPENAI_WHOLE), chunked([RECORDED["openai"].stream])]
    ) as made:
        servicer = servicer_of(made)
        whole = await servicer.Complete(request(candidates=both, omit_attempts=True), call())
        asked = request(pb2.StreamCompleteRequest, operation_id="other", candidates=both, omit_attempts=True)
        last = [event async for event in servicer.StreamComplete(asked, call())][-1]
        assert len(await made.settled()) == 4
    for finished in (whole, last.finished):
        assert not finished.attempts
        assert finished.attempt_count == 2
        assert finished.cost_nano_usd == COST


async def test_an_operation_runs_once(tmp_path: Path) -> None:
    async with world(tmp_path, a=[hangs, document(OPENAI_WHOLE)]) as made:
        servicer = servicer_of(made)
        running = asyncio.create_task(servicer.Complete(request(), call()))
        await made.servers["a"].asked.wait()
        with pytest.raises(Failure) as caught:
            await servicer.Complete(request(), call())
        assert caught.value.reason is Reason.STATE_CONFLICT
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        # Also after it has ended: its attempts have their ids in the ledger.
        with pytest.raises(Failure) as caught:
            await servicer.Complete(request(), call())
        assert caught.value.reason is Reason.STATE_CONFLICT
        assert made.asked("a") == 1
        await servicer.Complete(request(operation_id="other"), call())


async def test_a_failure_says_what_it_cost(tmp_path: Path) -> None:
    async with world(tmp_path, a=chunked([RECORDED["openai"].beginning], ends=False), b=document({}, 500)) as made:
        servicer = servicer_of(made)
        asked = request(pb2.StreamCompleteRequest, input_count={"token_count": 11})
        with pytest.raises(Failure) as caught:
            [event async for event in servicer.StreamComplete(asked, call())]
        assert caught.value.reason is Reason.PROVIDER_STREAM_BROKEN
        assert caught.value.metadata["cost_nano_usd"] == "13000"
        assert caught.value.metadata["model"] == "a/m"
        with pytest.raises(Failure) as caught:
            await servicer.Complete(request(operation_id="second", candidates=[candidate("b")]), call())
        assert caught.value.metadata == {"attempt/1": "b/m PROVIDER_UNAVAILABLE", "cost_nano_usd": "0"}


@pytest.mark.parametrize("kind", [pb2.CompleteRequest, pb2.StreamCompleteRequest])
async def test_a_hold_ends_though_the_candidate_that_was_to_follow_could_not_be_called(tmp_path: Path, kind: Any) -> None:
    plan = [candidate("a", attempt_timeout=Duration(nanos=50_000_000)), candidate("gone")]
    async with world(tmp_path, a=hangs) as made:
        servicer = servicer_of(made)
        asked = request(kind, candidates=plan, billing=billing(hold_id="h", hold_nano_usd=1), input_count={"token_count": 11})
        with pytest.raises(Failure) as caught:
            if kind is pb2.CompleteRequest:
                await servicer.Complete(asked, call())
            else:
                await anext(servicer.StreamComplete(asked, call()))
        assert caught.value.reason is Reason.ALL_CANDIDATES_FAILED
        assert caught.value.metadata["cost_nano_usd"] == "11000"
        settled = await made.settled()
    assert [(one.attempt_id, one.cost_nano_usd, one.is_final, one.hold_id) for one in settled] == [
        ("op/1", 11_000, False, "h"),
        ("op/2", 0, True, "h"),
    ]
    assert settled[1].outcome == receipt_pb2.ATTEMPT_OUTCOME_NOT_SENT


async def test_without_a_hold_of_its_own_an_operation_needs_no_end(tmp_path: Path) -> None:
    async with world(tmp_path, a=document({}, 500)) as made:
        with pytest.raises(Failure):
            await servicer_of(made).Complete(request(candidates=[candidate("a"), candidate("gone")]), call())
        assert [(one.attempt_id, one.is_final) for one in await made.settled()] == [("op/1", False)]


async def test_it_is_idle_only_when_nothing_runs(tmp_path: Path) -> None:
    async with world(tmp_path, a=chunked([RECORDED["openai"].stream])) as made:
        servicer = servicer_of(made)
        events = servicer.StreamComplete(request(pb2.StreamCompleteRequest), call())
        await anext(events)
        waiting = asyncio.create_task(servicer.wait_idle(PATIENCE))
        await asyncio.sleep(0)
        assert not waiting.done()
        await events.aclose()  # type: ignore[attr-defined]  # an async generator
        # What ran is in the spool before the service calls itself idle: a drain posts it.
        assert made.spool.backlog == 1
        await waiting


async def test_embeddings(tmp_path: Path) -> None:
    rows = {"data": [{"index": 0, "embedding": [0.5, 1.0]}], "usage": {"prompt_tokens": 3}}
    async with world(tmp_path, a=document(rows)) as made:
        servicer = servicer_of(made)
        response = await servicer.Embed(request(pb2.EmbedRequest), call())
        assert list(response.embeddings[0].values) == [0.5, 1.0]
        assert (response.cost_nano_usd, response.model) == (3000, "a/m")
        for inputs in ([], ["x"] * 2049):
            with pytest.raises(Failure) as caught:
                await servicer.Embed(request(pb2.EmbedRequest, inputs=inputs, operation_id="b"), call())
            assert caught.value.metadata["field"] == "inputs"


async def test_providers_are_listed_in_pages_and_without_their_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY_KEY", "sk-canary-list")
    entries = {
        name: Entry(name, "openai", "https://x", source)
        for name, source in (("b", "env:CANARY_KEY"), ("a", "env:NOT_THERE"), ("c", ""))
    }
    async with world(tmp_path) as made:
        servicer = servicer_of(made, entries)
        first = await servicer.ListProviders(pb2.ListProvidersRequest(page_size=2), call())
        second = await servicer.ListProviders(pb2.ListProvidersRequest(page_size=2, page_token=first.next_page_token), call())
        with pytest.raises(Failure):
            await servicer.ListProviders(pb2.ListProvidersRequest(page_size=1001), call())
    listed = [*first.providers, *second.providers]
    assert [(one.id, one.credential_present) for one in listed] == [("a", False), ("b", True), ("c", True)]
    assert listed[1].credential_source == "env:CANARY_KEY"
    assert not second.next_page_token
    assert b"sk-canary-list" not in first.SerializeToString() + second.SerializeToString()
