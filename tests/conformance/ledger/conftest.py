from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import postgres

# Their names are not those of tests, and a bare AssertionError says little.
pytest.register_assert_rewrite("tests.conformance.ledger.suite", "tests.conformance.ledger.machine")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres.Server]:
    """A PostgreSQL server of this session."""
    with postgres.server() as started:
        yield started
