from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from services.caching.app import open_service
from services.caching.config import Config, Exact, Mode, Namespace, Semantic, Shared
from services.caching.errors import NotStorable, TicketInvalid
from services.caching.service import CachingServicer
from services.runtime.config import ConfigError
from services.runtime.errors import Failure, Reason
from services.runtime.process import Process
from services.runtime.settings import MeshSettings
from sluice.caching.v1 import caching_service_pb2 as pb2
from sluice.inference.v1 import answer_pb2, inference_service_pb2, receipt_pb2
from tests.unit.caching.examples import CALL, PARAPHRASE, QUESTION, SEMANTIC, answered, lookup, storing
from tests.unit.runtime.fakes import Lines
from tests.unit.runtime.test_link import free_port
from tests.unit.runtime.test_process import nats_server

ALONE = Config(shared=Shared(enabled=False), semantic=Semantic(enabled=False))
MEANING = Config(
    shared=Shared(enabled=False),
    namespaces={"loose": Namespace(mode=Mode.SEMANTIC, threshold=0.8), "off": Namespace(mode=Mode.OFF)},
)


@contextlib.asynccontextmanager
async def running(config: Config, directory: Path, **settings: Any) -> AsyncIterator[CachingServicer]:
    mesh = MeshSettings(state_dir=directory, **settings)
    async with Process("caching", mesh, log=Lines()) as process, open_service(config, process) as service:
        workers = [asyncio.create_task(worker()) for worker in service.workers]
        for ping in service.pings.values():
            await ping()
        yield service.bindings[0].servicer  # type: ignore[misc]
        assert not [worker for worker in workers if worker.done()]
        assert service.drain is not None
        await service.drain()
        for worker in workers:
            worker.cancel()
        await asyncio.wait(workers)


async def test_the_same_request_is_answered_and_one_that_differs_is_not(tmp_path: Path) -> None:
    async with running(ALONE, tmp_path) as cache:
        missed = await cache.Lookup(lookup(), CALL)
        assert missed.verdict.status == receipt_pb2.CACHE_STATUS_MISS
        assert not missed.HasField("answer")
        assert 0 < len(missed.ticket) <= 256
        stored = await cache.Store(storing(missed.ticket), CALL)
        assert (stored.stored_exact, stored.stored_semantic) == (True, False)

        hit = await cache.Lookup(lookup(), CALL)
        assert hit.verdict.status == receipt_pb2.CACHE_STATUS_HIT_EXACT
        assert hit.answer == answered()
        assert hit.verdict.entry_operation_id == "op-1"
        assert hit.verdict.entry_time == answered().create_time
        assert hit.verdict.cache_namespace == "default"
        assert hit.verdict.duration.nanos > 0
        assert hit.verdict.reason
        assert hit.ticket == b""
        others = [
            lookup(tenant="other"),
            lookup(namespace="x"),
            lookup(system="Be long."),
            lookup(model="x/y"),
            lookup(QUESTION + " "),
        ]
        for field, value in (("policy_version", "v2"), ("task_type", 3), ("routing_scope", "region=eu")):
            other = lookup()
            setattr(other, field, value)
            others.append(other)
        hot = lookup()
        hot.conversation.sampling.temperature = 0.0
        others.append(hot)
        for other in others:
            assert (await cache.Lookup(other, CALL)).verdict.status == receipt_pb2.CACHE_STATUS_MISS


async def test_off_and_refresh_are_honoured(tmp_path: Path) -> None:
    async with running(MEANING, tmp_path) as cache:
        await cache.Store(storing((await cache.Lookup(lookup(), CALL)).ticket), CALL)
        off = await cache.Lookup(lookup(mode=inference_service_pb2.CACHE_MODE_OFF), CALL)
        assert (off.verdict.status, off.ticket) == (receipt_pb2.CACHE_STATUS_BYPASS, b"")
        # A namespace that is off stays off, whatever the caller wishes.
        for mode in (0, 2, 3, 4):
            closed = await cache.Lookup(lookup(mode=inference_service_pb2.CacheMode.ValueType(mode), namespace="off"), CALL)
            assert (closed.verdict.status, closed.ticket) == (receipt_pb2.CACHE_STATUS_BYPASS, b"")
        fresh = await cache.Lookup(lookup(mode=inference_service_pb2.CACHE_MODE_REFRESH), CALL)
        assert fresh.verdict.status == receipt_pb2.CACHE_STATUS_REFRESH
        assert not fresh.HasField("answer")
        await cache.Store(storing(fresh.ticket, entry=answered("Still Paris.")), CALL)
        assert (await cache.Lookup(lookup(), CALL)).answer.answer.message.parts[0].text == "Still Paris."


async def test_the_demo_paraphrase_hits_with_its_score_and_survives_a_restart(tmp_path: Path) -> None:
    async with running(MEANING, tmp_path) as cache:
        missed = await cache.Lookup(lookup(mode=SEMANTIC), CALL)
        assert missed.verdict.threshold == 0.92
        stored = await cache.Store(storing(missed.ticket), CALL)
        assert (stored.stored_exact, stored.stored_semantic) == (True, True)
        hit = await until_hit(cache, lookup(PARAPHRASE, mode=SEMANTIC))
        assert hit.verdict.status == receipt_pb2.CACHE_STATUS_HIT_SEMANTIC
        assert 0.92 <= hit.verdict.score < 1
        assert hit.answer == answered()
        # Exact mode, another tenant, another scope: never.
        for other in (
            lookup(PARAPHRASE),
            lookup(PARAPHRASE, mode=SEMANTIC, tenant="other"),
            lookup(PARAPHRASE, mode=SEMANTIC, namespace="x"),
            lookup(PARAPHRASE, mode=SEMANTIC, system="Be long."),
            lookup(PARAPHRASE, mode=SEMANTIC, model="x/y"),
        ):
            assert (await cache.Lookup(other, CALL)).verdict.status == receipt_pb2.CACHE_STATUS_MISS
        tight = lookup(PARAPHRASE, mode=SEMANTIC)
        tight.wishes.min_similarity = 0.99
        refused = await cache.Lookup(tight, CALL)
        assert refused.verdict.status == receipt_pb2.CACHE_STATUS_MISS
        assert refused.verdict.threshold == 0.99
        assert refused.verdict.score == pytest.approx(hit.verdict.score)
        germany = await cache.Lookup(lookup("What is the capital of Germany?", mode=SEMANTIC), CALL)
        assert germany.verdict.status == receipt_pb2.CACHE_STATUS_MISS
        assert germany.verdict.reason
    async with running(MEANING, tmp_path) as cache:
        again = await cache.Lookup(lookup(PARAPHRASE, mode=SEMANTIC), CALL)
        assert again.verdict.status == receipt_pb2.CACHE_STATUS_HIT_SEMANTIC
        assert again.answer == answered()


async def until_hit(cache: CachingServicer, request: pb2.LookupRequest) -> pb2.LookupResponse:
    for _ in range(200):
        found = await cache.Lookup(request, CALL)
        if found.HasField("answer"):
            return found
        await asyncio.sleep(0.01)
    return found


async def test_a_loose_wish_doesnt_loosen_and_the_namespaces_threshold_counts(tmp_path: Path) -> None:
    far = "In France, what is the capital?"
    async with running(MEANING, tmp_path) as cache:
        for namespace in ("strict", "loose"):
            missed = await cache.Lookup(lookup(mode=SEMANTIC, namespace=namespace), CALL)
            await cache.Store(storing(missed.ticket), CALL)
        wish = lookup(far, mode=SEMANTIC, namespace="strict")
        wish.wishes.min_similarity = 0.5
        assert (await cache.Lookup(wish, CALL)).verdict.threshold == 0.92
        # The namespace's own mode asks the semantic tier without a wish.
        assert (await cache.Lookup(lookup(far, namespace="loose"), CALL)).verdict.threshold == 0.8


async def test_the_guard_refuses_and_says_why(tmp_path: Path) -> None:
    async with running(MEANING, tmp_path) as cache:
        question = "How many grams are in 10 ounces of flour?"
        missed = await cache.Lookup(lookup(question, namespace="loose"), CALL)
        await cache.Store(storing(missed.ticket), CALL)
        same = await until_hit(cache, lookup(question.replace("How many", "how many"), namespace="loose"))
        assert same.verdict.status == receipt_pb2.CACHE_STATUS_HIT_SEMANTIC
        refused = await cache.Lookup(lookup(question.replace("10", "100"), namespace="loose"), CALL)
        assert refused.verdict.status == receipt_pb2.CACHE_STATUS_MISS
        assert refused.verdict.score > 0.8
        assert "numbers differ" in refused.verdict.reason


@pytest.mark.parametrize(
    ("text", "why"), [("Was ist die Hauptstadt von Frankreich?", "English"), ("what is " + "x" * 5000, "4096 bytes")]
)
async def test_what_cannot_be_compared_is_said_and_stored_exactly(tmp_path: Path, text: str, why: str) -> None:
    async with running(MEANING, tmp_path) as cache:
        missed = await cache.Lookup(lookup(text, mode=SEMANTIC), CALL)
        assert why in missed.verdict.reason
        assert not missed.verdict.HasField("threshold")
        stored = await cache.Store(storing(missed.ticket), CALL)
        assert (stored.stored_exact, stored.stored_semantic) == (True, False)


@pytest.mark.parametrize(
    "entry",
    [
        answered(finish=answer_pb2.FINISH_REASON_CONTENT_FILTER),
        answered(finish=answer_pb2.FINISH_REASON_ERROR),
        answered(finish=answer_pb2.FINISH_REASON_CANCELLED),
        answered(finish=answer_pb2.FINISH_REASON_BUDGET),
        answered(finish=answer_pb2.FINISH_REASON_UNSPECIFIED),
        answered(""),
    ],
)
async def test_incomplete_and_filtered_answers_are_refused(tmp_path: Path, entry: pb2.CachedAnswer) -> None:
    async with running(ALONE, tmp_path) as cache:
        missed = await cache.Lookup(lookup(), CALL)
        with pytest.raises(NotStorable) as raised:
            await cache.Store(storing(missed.ticket, entry=entry), CALL)
        assert raised.value.reason is Reason.STATE_CONFLICT
        assert (await cache.Lookup(lookup(), CALL)).verdict.status == receipt_pb2.CACHE_STATUS_MISS


async def test_a_ticket_serves_its_tenant_only(tmp_path: Path) -> None:
    async with running(ALONE, tmp_path) as cache:
        missed = await cache.Lookup(lookup(), CALL)
        for request in (storing(missed.ticket, tenant="other"), storing(b""), storing(missed.ticket[:-1] + b"x")):
            with pytest.raises(TicketInvalid):
                await cache.Store(request, CALL)


async def test_a_batch_stores_each_and_says_which_it_refused(tmp_path: Path) -> None:
    async with running(ALONE, tmp_path) as cache:
        questions = [f"What is {number}?" for number in range(4)]
        tickets = [(await cache.Lookup(lookup(question), CALL)).ticket for question in questions]
        stores = [storing(ticket, entry=answered(f"It is {number}.")) for number, ticket in enumerate(tickets)]
        stores[1].tenant_id = "other"
        stores[2].answer.answer.finish_reason = answer_pb2.FINISH_REASON_ERROR
        results = (await cache.BatchStore(pb2.BatchStoreRequest(requests=stores), CALL)).results
        assert [result.stored_exact for result in results] == [True, False, False, True]
        codes = [result.status.code if result.HasField("status") else 0 for result in results]
        assert codes == [0, TicketInvalid().code, NotStorable("").code, 0]
        found = [(await cache.Lookup(lookup(question), CALL)).HasField("answer") for question in questions]
        assert found == [True, False, False, True]


@pytest.mark.parametrize("count", [0, 101])
async def test_a_batch_has_bounds(tmp_path: Path, count: int) -> None:
    async with running(ALONE, tmp_path) as cache:
        with pytest.raises(Failure) as raised:
            await cache.BatchStore(pb2.BatchStoreRequest(requests=[storing(b"")] * count), CALL)
        assert raised.value.reason is Reason.REQUEST_INVALID
        assert raised.value.metadata["field"] == "requests"


async def test_times_can_only_be_shortened(tmp_path: Path) -> None:
    short = dataclasses.replace(ALONE, default=Namespace(ttl=1.0))
    async with running(short, tmp_path) as cache:
        request = lookup()
        request.wishes.ttl.seconds = 3600
        missed = await cache.Lookup(request, CALL)
        store = storing(missed.ticket)
        store.ttl.seconds = 3600
        await cache.Store(store, CALL)
        assert (await cache.Lookup(lookup(), CALL)).HasField("answer")
        await asyncio.sleep(1.05)
        assert not (await cache.Lookup(lookup(), CALL)).HasField("answer")
    async with running(ALONE, tmp_path) as cache:
        request = lookup()
        request.wishes.ttl.seconds = 0
        assert (await cache.Lookup(request, CALL)).ticket == b""
        store = storing((await cache.Lookup(lookup(), CALL)).ticket)
        store.ttl.nanos = 1
        await cache.Store(store, CALL)
        assert not (await cache.Lookup(lookup(), CALL)).HasField("answer")


async def test_a_picture_at_an_address_is_not_cached(tmp_path: Path) -> None:
    async with running(ALONE, tmp_path) as cache:
        request = lookup("Look at http://a.example")
        assert (await cache.Lookup(request, CALL)).verdict.status == receipt_pb2.CACHE_STATUS_MISS
        request.conversation.messages[1].parts.add().image.url = "https://a.example/x.png"
        found = await cache.Lookup(request, CALL)
        assert (found.verdict.status, found.ticket) == (receipt_pb2.CACHE_STATUS_BYPASS, b"")


async def test_a_purge_removes_everything_and_what_was_asked_before_stays_out(tmp_path: Path) -> None:
    async with running(MEANING, tmp_path) as cache:
        for namespace in ("x", "y"):
            missed = await cache.Lookup(lookup(mode=SEMANTIC, namespace=namespace), CALL)
            await cache.Store(storing(missed.ticket), CALL)
            assert (await until_hit(cache, lookup(PARAPHRASE, mode=SEMANTIC, namespace=namespace))).HasField("answer")
        early = await cache.Lookup(lookup("What is early?", mode=SEMANTIC, namespace="x"), CALL)
        dry = await cache.Purge(pb2.PurgeRequest(tenant_id="acme", cache_namespace="x", dry_run=True), CALL)
        assert dry.entry_count == 2
        assert (await cache.Purge(pb2.PurgeRequest(tenant_id="other"), CALL)).entry_count == 0
        assert (await cache.Purge(pb2.PurgeRequest(tenant_id="acme", cache_namespace="x"), CALL)).entry_count == 2
        for text in (QUESTION, PARAPHRASE):
            assert not (await cache.Lookup(lookup(text, mode=SEMANTIC, namespace="x"), CALL)).HasField("answer")
            assert (await cache.Lookup(lookup(text, mode=SEMANTIC, namespace="y"), CALL)).HasField("answer")
        late = await cache.Store(storing(early.ticket), CALL)
        assert (late.stored_exact, late.stored_semantic) == (False, False)
        stats = await cache.GetStats(pb2.GetStatsRequest(tenant_id="acme"), CALL)
        assert (stats.exact_entry_count, stats.semantic_entry_count) == (1, 1)
        assert (await cache.Purge(pb2.PurgeRequest(tenant_id="acme"), CALL)).entry_count == 2


async def test_counts_are_a_tenants_own(tmp_path: Path) -> None:
    async with running(ALONE, tmp_path) as cache:
        for namespace in ("x", "y"):
            missed = await cache.Lookup(lookup(namespace=namespace), CALL)
            await cache.Store(storing(missed.ticket), CALL)
        await cache.Lookup(lookup(namespace="x"), CALL)
        all_of_it = await cache.GetStats(pb2.GetStatsRequest(tenant_id="acme"), CALL)
        one = await cache.GetStats(pb2.GetStatsRequest(tenant_id="acme", cache_namespace="y"), CALL)
        other = await cache.GetStats(pb2.GetStatsRequest(tenant_id="other"), CALL)
        assert (all_of_it.exact_entry_count, all_of_it.exact_hit_count, all_of_it.miss_count) == (2, 1, 2)
        assert (one.exact_entry_count, one.exact_hit_count, one.miss_count) == (1, 0, 1)
        assert all_of_it.exact_byte_count == 2 * one.exact_byte_count > 0
        assert other == pb2.GetStatsResponse()


@pytest.mark.parametrize("namespace", ["X", "a.b", "a" * 65, "é", "a*", "a b"])
async def test_a_namespace_keeps_to_its_letters(tmp_path: Path, namespace: str) -> None:
    async with running(ALONE, tmp_path) as cache:
        with pytest.raises(Failure) as raised:
            await cache.Lookup(lookup(namespace=namespace), CALL)
        assert raised.value.reason is Reason.REQUEST_INVALID
        with pytest.raises(Failure):
            await cache.Purge(pb2.PurgeRequest(tenant_id="acme", cache_namespace=namespace), CALL)


async def test_what_is_missing_or_out_of_range_is_refused(tmp_path: Path) -> None:
    async with running(ALONE, tmp_path) as cache:
        for request in (lookup(tenant=""), lookup(tenant="t" * 257), pb2.LookupRequest(tenant_id="acme")):
            with pytest.raises(Failure) as raised:
                await cache.Lookup(request, CALL)
            assert raised.value.reason is Reason.REQUEST_INVALID
        for similarity in (0.4, 1.1, math.nan, math.inf):
            request = lookup()
            request.wishes.min_similarity = similarity
            with pytest.raises(Failure):
                await cache.Lookup(request, CALL)
        with pytest.raises(Failure):
            await cache.GetStats(pb2.GetStatsRequest(), CALL)


async def test_large_answers_are_not_stored(tmp_path: Path) -> None:
    small = dataclasses.replace(ALONE, exact=Exact(max_entry_bytes=1000))
    async with running(small, tmp_path) as cache:
        missed = await cache.Lookup(lookup(), CALL)
        stored = await cache.Store(storing(missed.ticket, entry=answered("x" * 1000)), CALL)
        assert not stored.stored_exact


async def test_without_the_model_the_exact_tier_serves_and_the_verdict_names_it(tmp_path: Path) -> None:
    gone = Config(shared=Shared(enabled=False), semantic=Semantic(model=tmp_path / "none.onnx"))
    async with running(gone, tmp_path) as cache:
        missed = await cache.Lookup(lookup(mode=SEMANTIC), CALL)
        assert missed.verdict.status == receipt_pb2.CACHE_STATUS_MISS
        assert "semantic tier could not be opened" in missed.verdict.reason
        assert (await cache.Store(storing(missed.ticket), CALL)).stored_exact


async def test_two_replicas_share_answers_and_tickets(tmp_path: Path) -> None:
    port = free_port()
    mesh = {"nats_url": f"nats://127.0.0.1:{port}", "service_token": "token"}
    config = Config(semantic=Semantic(enabled=False))
    async with (
        nats_server(port, tmp_path / "js"),
        running(config, tmp_path / "1", **mesh) as one,
        running(config, tmp_path / "2", **mesh) as two,
    ):
        missed = await one.Lookup(lookup(), CALL)
        assert (await two.Store(storing(missed.ticket), CALL)).stored_exact
        found = await until_hit(one, lookup())
        assert found.verdict.status == receipt_pb2.CACHE_STATUS_HIT_EXACT
        assert found.answer == answered()
        await two.Purge(pb2.PurgeRequest(tenant_id="acme"), CALL)
        for _ in range(200):
            if not (await one.Lookup(lookup(), CALL)).HasField("answer"):
                break
            await asyncio.sleep(0.01)
        assert not (await one.Lookup(lookup(), CALL)).HasField("answer")
        assert not (await two.Lookup(lookup(), CALL)).HasField("answer")


async def test_a_store_at_another_replica_fills_the_exact_tier_alone(tmp_path: Path) -> None:
    async with (
        running(MEANING, tmp_path / "1", service_token="t") as one,
        running(MEANING, tmp_path / "2", service_token="t") as two,
    ):
        missed = await one.Lookup(lookup(mode=SEMANTIC), CALL)
        stored = await two.Store(storing(missed.ticket), CALL)
        assert (stored.stored_exact, stored.stored_semantic) == (True, False)


async def test_a_namespace_of_the_settings_keeps_to_the_letters_too(tmp_path: Path) -> None:
    wrong = dataclasses.replace(ALONE, namespaces={"Bad Name": Namespace()})
    with pytest.raises(ConfigError, match="Bad Name"):
        async with running(wrong, tmp_path):
            pass
