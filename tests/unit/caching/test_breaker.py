from __future__ import annotations

from services.caching.breaker import Breaker


def test_it_opens_after_failures_in_a_row_and_lets_one_call_try() -> None:
    breaker = Breaker(failures=2, open_seconds=5)
    breaker.failed(0)
    breaker.succeeded()
    breaker.failed(1)
    assert breaker.allows(1)
    breaker.failed(1)
    assert not breaker.allows(5.9)
    assert breaker.allows(6)
    assert not breaker.allows(6)
    breaker.failed(6)
    assert not breaker.allows(10.9)
    assert breaker.allows(11)
    breaker.succeeded()
    assert breaker.allows(11)
