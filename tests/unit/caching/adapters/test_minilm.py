from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from services.caching.adapters.minilm import DIMENSIONS, MAX_TOKENS, BatchingEmbedder, MiniLm
from services.caching.errors import TierUnavailable
from tests.unit.caching.examples import PARAPHRASE, QUESTION


@pytest.fixture(scope="module")
def model() -> MiniLm:
    return MiniLm()


@pytest.fixture
async def embedder(model: MiniLm) -> AsyncIterator[BatchingEmbedder]:
    with ThreadPoolExecutor(1) as executor:
        embedder = BatchingEmbedder(model, executor, batch=8, capacity=20)
        worker = asyncio.create_task(embedder.run())
        yield embedder
        worker.cancel()


def test_the_demo_pair_is_near_and_another_country_is_not(model: MiniLm) -> None:
    question, paraphrase, other = model.embed([QUESTION, PARAPHRASE, "What is the capital of Germany?"])
    assert question is not None
    assert paraphrase is not None
    assert other is not None
    assert question.shape == (DIMENSIONS,)
    assert np.linalg.norm(question) == pytest.approx(1.0, abs=1e-5)
    assert question @ paraphrase == pytest.approx(0.957, abs=0.01)
    assert question @ other < 0.8


def test_neighbours_in_a_batch_dont_change_a_vector(model: MiniLm) -> None:
    (alone,) = model.embed([QUESTION])
    together = model.embed([QUESTION, "Please explain in a few words how a heat pump works in winter. " * 10])[0]
    assert alone is not None
    assert together is not None
    assert alone @ together > 0.99999


def test_what_the_model_cannot_read_whole_has_no_vector(model: MiniLm) -> None:
    long = "word " * (MAX_TOKENS + 1)
    fits = "word " * (MAX_TOKENS - 2)
    unknown = "What is \U00013000?"
    vectors = model.embed([long, fits, unknown, "", "x" * 101, QUESTION])
    assert [vector is not None for vector in vectors] == [False, True, False, False, False, True]


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(TierUnavailable, match="can't be read"):
        MiniLm(tmp_path / "none.onnx")


async def test_texts_that_wait_together_get_each_its_own_vector(embedder: BatchingEmbedder, model: MiniLm) -> None:
    texts = [f"What is number {number}?" for number in range(15)]
    vectors = await asyncio.gather(*(embedder.embed(text, urgent=True) for text in texts))
    for text, vector in zip(texts, vectors, strict=True):
        (alone,) = model.embed([text])
        assert vector is not None
        assert alone is not None
        assert vector @ alone > 0.99999


async def test_a_full_queue_refuses_at_once(embedder: BatchingEmbedder) -> None:
    tasks = [asyncio.create_task(embedder.embed(QUESTION, urgent=True)) for _ in range(20)]
    await asyncio.sleep(0)
    began = time.perf_counter()
    with pytest.raises(TierUnavailable, match="too many"):
        await embedder.embed(QUESTION, urgent=True)
    assert time.perf_counter() - began < 0.5
    assert all(vector is not None for vector in await asyncio.gather(*tasks))


async def test_one_that_gave_up_doesnt_stop_the_worker(embedder: BatchingEmbedder) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.0001):
            await embedder.embed(QUESTION, urgent=True)
    assert await embedder.embed(QUESTION, urgent=False) is not None
