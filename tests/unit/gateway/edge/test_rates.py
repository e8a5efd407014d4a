"""What a client is told of its limits."""

from __future__ import annotations

from services.gateway.edge.rates import rate_head
from services.gateway.leases import Standing


def test_every_limit_has_its_lines_and_rates_a_time() -> None:
    head = rate_head(
        [Standing("requests", 120, 57, 31.50049), Standing("tokens", 5, 5, 0.0), Standing("concurrency", 50, 49, None)]
    )
    assert head.decode().splitlines() == [
        "x-ratelimit-limit-requests: 120",
        "x-ratelimit-remaining-requests: 57",
        "x-ratelimit-reset-requests: 31.5s",
        "x-ratelimit-limit-tokens: 5",
        "x-ratelimit-remaining-tokens: 5",
        "x-ratelimit-reset-tokens: 0s",
        "x-ratelimit-limit-concurrency: 50",
        "x-ratelimit-remaining-concurrency: 49",
    ]
    assert head.endswith(b"\r\n")


def test_without_limits_nothing_is_said() -> None:
    assert rate_head([]) == b""
