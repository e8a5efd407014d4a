from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.metering.adapters.sqlite import open_store
from services.metering.ports import Store
from tests.unit.metering.examples import Clock


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    """An empty ledger."""
    async with open_store(tmp_path / "ledger") as store:
        yield store


@pytest.fixture
def clock() -> Clock:
    return Clock()
