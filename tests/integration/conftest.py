"""Fixtures that need the whole mesh: each test here runs in both topologies unless it says why not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from services.cli.client import Client
from tests.running import Running, running

# Limits far above what a test sends: the limits have tests of their own.
SECTIONS = {"metering": {"bootstrap_requests_per_minute": -1, "bootstrap_concurrency": -1}}


@pytest.fixture(scope="session", params=["compact", "mesh"])
def mesh(request: pytest.FixtureRequest) -> Iterator[Running]:
    """A running Sluice: all services in one process, then each in its own with real gRPC between them."""
    with running(request.param, sections=SECTIONS) as started:
        yield started


@pytest.fixture
def client(mesh: Running) -> Iterator[Client]:
    """Blocking stubs of the running mesh."""
    with mesh.client() as connected:
        yield connected
