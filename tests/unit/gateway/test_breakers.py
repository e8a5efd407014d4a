"""The breaker."""

from __future__ import annotations

from services.gateway.breakers import Breaker


def test_it_opens_after_failures_in_a_row_and_lets_one_try_later() -> None:
    breaker = Breaker(failures=2, open_seconds=5.0)
    breaker.failed(0.0)
    breaker.succeeded()
    breaker.failed(1.0)
    assert breaker.allows(1.0)
    breaker.failed(1.0)
    assert not breaker.allows(2.0)
    assert breaker.allows(6.0)
    assert not breaker.allows(6.0)
    breaker.succeeded()
    assert breaker.allows(6.0)
