"""The cost of an attempt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.execution.pricing import cost_of
from sluice.inference.v1 import answer_pb2
from sluice.metering.v1 import price_pb2


def usage(**counts: int) -> answer_pb2.Usage:
    made = answer_pb2.Usage()
    for name, count in counts.items():
        setattr(made, f"{name}_token_count", count)
    return made


FULL = price_pb2.Price(
    input_nano_usd_per_million=3_000_000_000,
    cached_input_nano_usd_per_million=300_000_000,
    cache_write_nano_usd_per_million=3_750_000_000,
    output_nano_usd_per_million=15_000_000_000,
    reasoning_nano_usd_per_million=10_000_000_000,
    request_nano_usd=5,
)


@pytest.mark.parametrize(
    ("used", "nano"),
    [
        ({}, 5),
        ({"input": 100}, 300_005),
        ({"input": 100, "cached_input": 40}, 60 * 3000 + 40 * 300 + 5),
        ({"input": 100, "cached_input": 40, "cache_write": 10}, 50 * 3000 + 40 * 300 + 10 * 3750 + 5),
        ({"output": 10}, 150_005),
        ({"output": 10, "reasoning": 4}, 6 * 15000 + 4 * 10000 + 5),
    ],
)
def test_each_kind_of_token_has_its_price(used: dict[str, int], nano: int) -> None:
    assert cost_of(FULL, usage(**used)) == nano


def test_without_a_price_of_their_own_they_cost_as_the_others() -> None:
    plain = price_pb2.Price(input_nano_usd_per_million=3_000_000_000, output_nano_usd_per_million=15_000_000_000)
    assert cost_of(plain, usage(input=100, cached_input=40, cache_write=10, output=10, reasoning=4)) == 450_000


def test_a_price_of_nothing_for_cached_tokens_is_a_price() -> None:
    free = price_pb2.Price(input_nano_usd_per_million=3_000_000_000, cached_input_nano_usd_per_million=0)
    assert cost_of(free, usage(input=100, cached_input=100)) == 0


def test_fractions_are_rounded_up_once() -> None:
    small = price_pb2.Price(input_nano_usd_per_million=1, output_nano_usd_per_million=1)
    assert cost_of(small, usage(input=1)) == 1
    assert cost_of(small, usage(input=500_000, output=500_000)) == 1
    assert cost_of(small, usage(input=1_000_000, output=1)) == 2


@given(*(st.integers(-5, 10**7) for _ in range(5)))
def test_no_report_makes_a_cost_negative(fresh: int, cached: int, written: int, shown: int, reasoning: int) -> None:
    assert cost_of(FULL, usage(input=fresh, cached_input=cached, cache_write=written, output=shown, reasoning=reasoning)) >= 5


def test_a_huge_answer_is_exact() -> None:
    assert cost_of(FULL, usage(input=10**12 + 1)) == (10**12 + 1) * 3000 + 5
