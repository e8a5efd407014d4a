from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.caching.adapters.numpy_index import Limits, NumpyIndex, open_index
from services.caching.ports import VectorIndex
from tests.conformance.vector_index.suite import Clock, VectorIndexSuite

LIMITS = Limits(entries_per_partition=10_000, entries=10_000, bytes=100_000_000)


class TestInMemory(VectorIndexSuite):
    @pytest.fixture
    async def index(self, clock: Clock) -> AsyncIterator[NumpyIndex]:
        async with open_index(LIMITS, clock, None) as index:
            yield index


class TestWithFile(VectorIndexSuite):
    @pytest.fixture
    async def index(self, clock: Clock, tmp_path: Path) -> AsyncIterator[VectorIndex]:
        async with open_index(LIMITS, clock, tmp_path / "semantic.sqlite") as index:
            yield index
