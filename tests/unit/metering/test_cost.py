from __future__ import annotations

import dataclasses
from fractions import Fraction
from math import ceil

from hypothesis import given, settings
from hypothesis import strategies as st

from services.metering.cost import Price, cost_of

PRICE = Price("v", "m", input=2_500_000_000, output=10_000_000_000)
DOLLAR = 1_000_000_000


def test_tokens_cost_their_price_per_million() -> None:
    assert cost_of(PRICE, input_tokens=1_000_000) == 2_500_000_000
    assert cost_of(PRICE, input_tokens=1000, output_tokens=100) == 2_500_000 + 1_000_000


def test_it_rounds_upwards_once() -> None:
    price = Price("v", "m", input=1, output=1)
    assert cost_of(price, input_tokens=1) == 1
    # Two roundings would give 2.
    assert cost_of(price, input_tokens=1, output_tokens=1) == 1
    assert cost_of(price, input_tokens=1_000_000) == 1
    assert cost_of(price, input_tokens=1_000_001) == 2
    assert cost_of(price, input_tokens=0) == 0


def test_parts_have_their_own_prices_and_are_not_counted_twice() -> None:
    price = dataclasses.replace(PRICE, cached_input=1 * DOLLAR, cache_write=3 * DOLLAR, reasoning=20 * DOLLAR)
    cost = cost_of(
        price,
        input_tokens=1000,
        cached_tokens=300,
        cache_write_tokens=200,
        output_tokens=100,
        reasoning_tokens=40,
    )
    assert cost == 500 * 2500 + 300 * 1000 + 200 * 3000 + 60 * 10_000 + 40 * 20_000


def test_a_part_without_a_price_costs_what_it_is_a_part_of() -> None:
    whole = cost_of(PRICE, input_tokens=1000, output_tokens=100)
    parts = cost_of(PRICE, input_tokens=1000, cached_tokens=400, cache_write_tokens=100, output_tokens=100, reasoning_tokens=70)
    assert parts == whole


def test_a_written_zero_is_a_price() -> None:
    free = dataclasses.replace(PRICE, cached_input=0, reasoning=0, cache_write=0)
    assert cost_of(free, input_tokens=9, cached_tokens=5, cache_write_tokens=4, output_tokens=3, reasoning_tokens=3) == 0


def test_pictures_and_the_request_itself_are_added() -> None:
    price = dataclasses.replace(PRICE, image=7, request=11)
    assert cost_of(price, input_tokens=0, images=3) == 32
    assert cost_of(price, input_tokens=0) == 11


def test_more_parts_than_the_whole_never_make_it_cheaper_than_nothing() -> None:
    assert cost_of(PRICE, input_tokens=10, cached_tokens=50) == 50 * 2500
    assert cost_of(PRICE, input_tokens=10, output_tokens=1, reasoning_tokens=5, images=-4) == 10 * 2500 + 5 * 10_000


@settings(deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.integers(0, 10**13), min_size=5, max_size=5),
    st.lists(st.integers(0, 10**9), min_size=4, max_size=4),
)
def test_it_is_the_exact_sum_rounded_up(prices: list[int], counts: list[int]) -> None:
    plain, cached, written, shown = counts
    price = Price("v", "m", prices[0], prices[1], prices[2], prices[3], prices[4])
    exact = sum(
        Fraction(count * each, 1_000_000)
        for count, each in zip((plain, shown, cached, written), (price.input, price.output, prices[2], prices[4]), strict=True)
    )
    cost = cost_of(
        price,
        input_tokens=plain + cached + written,
        cached_tokens=cached,
        cache_write_tokens=written,
        output_tokens=shown,
    )
    assert cost == ceil(exact)
