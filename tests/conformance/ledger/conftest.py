from __future__ import annotations

import pytest

# Their names are not those of tests, and a bare AssertionError says little.
pytest.register_assert_rewrite("tests.conformance.ledger.suite", "tests.conformance.ledger.machine")
