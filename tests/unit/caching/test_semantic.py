from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import numpy as np
import pytest

from services.caching.adapters.numpy_index import Limits, NumpyIndex, open_index
from services.caching.errors import TierUnavailable
from services.caching.ports import Match, Vector
from services.caching.semantic import SemanticTier, Waiting, judge
from tests.conformance.vector_index.suite import SCOPE, A, Clock, vector
from tests.unit.runtime.fakes import eventually

LIMITS = Limits(entries_per_partition=100, entries=100, bytes=10_000_000)
THRESHOLD = 0.92


class ScriptedEmbedder:
    """Gives the vectors it was told; waits, refuses or can't read when it was told so."""

    def __init__(self) -> None:
        self.vectors: dict[str, Vector] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.calls = 0
        self.is_broken = False

    async def embed(self, text: str, *, urgent: bool) -> Vector | None:
        self.calls += 1
        if self.is_broken:
            raise TierUnavailable("the model failed")
        await self.gate.wait()
        return self.vectors.get(text)


@contextlib.asynccontextmanager
async def running(embedder: ScriptedEmbedder, clock: Clock) -> AsyncIterator[tuple[SemanticTier, NumpyIndex]]:
    async with open_index(LIMITS, clock, None) as index:
        tier = SemanticTier(embedder, index, time.monotonic, timeout=0.05, candidates=3, queue_entries=5, queue_bytes=1000)
        worker = asyncio.create_task(tier.run())
        yield tier, index
        worker.cancel()


def waiting(text: str, *, namespace: str = "default", size: int = 6, number: int = 1) -> Waiting:
    payload = b"answer" if size == 6 else bytes(size)
    return Waiting(A, SCOPE, number.to_bytes(32, "big"), namespace, text, payload, 1_700_000_000.0, 1_700_000_100.0)


async def test_a_stored_answer_is_found_by_a_near_question() -> None:
    embedder = ScriptedEmbedder()
    embedder.vectors = {"how are you": vector(0), "how is it": vector(1, vector(0), 0.95)}
    async with running(embedder, Clock()) as (tier, _):
        assert (await tier.find(A, SCOPE, "how is it", THRESHOLD)).match is None
        assert tier.add(waiting("how are you"))
        await tier.flush(1)
        found = await tier.find(A, SCOPE, "how is it", THRESHOLD)
        assert found.match is not None
        assert found.match.payload == b"answer"
        assert found.score == pytest.approx(0.95, abs=1e-3)
        tight = await tier.find(A, SCOPE, "how is it", 0.96)
        assert tight.match is None
        assert "threshold" in tight.reason


async def test_a_slow_model_costs_its_timeout_then_nothing() -> None:
    embedder = ScriptedEmbedder()
    embedder.gate.clear()
    async with running(embedder, Clock()) as (tier, _):
        for _ in range(3):
            began = time.perf_counter()
            with pytest.raises(TierUnavailable, match="50 ms"):
                await tier.find(A, SCOPE, "q", THRESHOLD)
            assert time.perf_counter() - began < 0.2
        calls = embedder.calls
        with pytest.raises(TierUnavailable, match="lately"):
            await tier.find(A, SCOPE, "q", THRESHOLD)
        assert embedder.calls == calls


async def test_a_question_that_cannot_be_read_says_so_and_breaks_nothing() -> None:
    async with running(ScriptedEmbedder(), Clock()) as (tier, index):
        for _ in range(10):
            assert "too long" in (await tier.find(A, SCOPE, "?", THRESHOLD)).reason
        tier.add(waiting("?"))
        await tier.flush(1)
        assert len(index) == 0


async def test_what_waits_is_bounded_by_number_and_size() -> None:
    embedder = ScriptedEmbedder()
    embedder.gate.clear()
    async with running(embedder, Clock()) as (tier, _):
        assert [tier.add(waiting("q")) for _ in range(7)].count(True) == 5
    async with running(embedder, Clock()) as (tier, _):
        assert tier.add(waiting("q", size=900))
        assert not tier.add(waiting("q", size=101))


async def test_a_purge_takes_what_waits_and_what_is_being_embedded() -> None:
    embedder = ScriptedEmbedder()
    embedder.vectors = {f"q{number}": vector(number) for number in range(4)}
    embedder.gate.clear()
    async with running(embedder, Clock()) as (tier, index):
        tier.add(waiting("q0", namespace="x", number=0))
        await eventually(lambda: embedder.calls == 1)
        tier.add(waiting("q1", namespace="x", number=1))
        tier.add(waiting("q2", namespace="y", number=2))
        assert await tier.purge(A, "x") == 0
        embedder.gate.set()
        await tier.flush(1)
        assert await index.count(A, "x") == 0
        assert await index.count(A, "y") == 1


async def test_a_failed_store_is_counted_and_the_worker_goes_on() -> None:
    embedder = ScriptedEmbedder()
    embedder.vectors = {"q": vector(0)}
    embedder.is_broken = True
    async with running(embedder, Clock()) as (tier, index):
        tier.add(waiting("q"))
        await eventually(lambda: tier.failed_count == 1)
        embedder.is_broken = False
        tier.add(waiting("q"))
        await eventually(lambda: len(index) == 1)


def match(score: float, text: str) -> Match:
    return Match(score, np.zeros(1).tobytes(), text, text.encode(), 0.0)


def test_the_first_that_passes_the_guard_serves() -> None:
    found = judge("Can I take 10 mg?", [match(0.99, "Can I take 100 mg?"), match(0.95, "May I take 10 mg?")], THRESHOLD)
    assert found.match is not None
    assert found.match.text == "May I take 10 mg?"
    assert found.score == 0.95


def test_a_veto_is_the_reason() -> None:
    found = judge("Can I take 10 mg?", [match(0.99, "Can I take 100 mg?"), match(0.5, "May I take 10 mg?")], THRESHOLD)
    assert found.match is None
    assert found.score == 0.99
    assert "guard" in found.reason
    assert "numbers differ" in found.reason
