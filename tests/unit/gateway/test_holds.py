"""The formula of price.proto at its dearest, and its inverse."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.holds import Prompt, Tariff, clamp, covered_output, reckon, worst_cost

PRICES = st.integers(0, 10**12)
TOKENS = st.integers(0, 10**7)


@dataclass(frozen=True)
class Candidate:
    """What the formula reads."""

    provider: str = "a"
    tariff: Tariff | None = Tariff(1_000_000_000, 2_000_000_000, 0, 0)  # noqa: RUF009  # frozen
    context_window: int = 0
    max_output_tokens: int = 100


def prompt(tokens: int = 10, *, bound: float = 0.0, wanted: int = 0, images: int = 0) -> Prompt:
    """A prompt of 400 bytes."""
    return Prompt(tokens, bound, 400, images, wanted, 4096, 16)


def test_the_formula_rounds_once_and_upwards() -> None:
    assert worst_cost(Tariff(1, 1, 0, 0), 1, 0, 0) == 1
    assert worst_cost(Tariff(500_000, 500_000, 0, 0), 1, 1, 0) == 1
    assert worst_cost(Tariff(1_000_000, 3_000_000, 7, 5), 10, 20, 2) == 10 + 60 + 14 + 5


@settings(max_examples=200)
@given(rate_in=PRICES, rate_out=PRICES, per_image=PRICES, per_request=PRICES, tokens=TOKENS, images=st.integers(0, 9),
       amount=st.integers(0, 10**15), wanted=st.integers(1, 10**6))  # fmt: skip
def test_what_is_covered_costs_no_more_and_one_token_more_does(
    rate_in: int, rate_out: int, per_image: int, per_request: int, tokens: int, images: int, amount: int, wanted: int
) -> None:
    tariff = Tariff(rate_in, rate_out, per_image, per_request)
    covered = covered_output(tariff, tokens, images, amount, wanted)
    if covered < 0:
        assert worst_cost(tariff, tokens, 0, images) > amount
    else:
        assert worst_cost(tariff, tokens, covered, images) <= amount
        assert covered == wanted or worst_cost(tariff, tokens, covered + 1, images) > amount


def test_bounds_of_input() -> None:
    assert prompt(10).bounds(Candidate(), "a")[0] == 10
    assert prompt(10, bound=0.15).bounds(Candidate(), "a")[0] == 12
    assert prompt(10).bounds(Candidate(provider="b"), "a")[0] == 400


def test_bounds_of_output() -> None:
    assert prompt().bounds(Candidate(), "a")[1] == 100
    assert prompt(wanted=50).bounds(Candidate(), "a")[1] == 50
    assert prompt(wanted=500).bounds(Candidate(), "a")[1] == 100
    assert prompt().bounds(Candidate(max_output_tokens=0), "a")[1] == 4096
    assert prompt().bounds(Candidate(max_output_tokens=0, context_window=30), "a")[1] == 20


def test_the_worst_is_over_all_and_the_least_is_of_use() -> None:
    cheap = Candidate(tariff=Tariff(0, 1_000_000_000, 0, 0))
    reckoning = reckon([Candidate(), cheap], prompt())
    assert reckoning.worst == 10 * 1000 + 100 * 2000
    assert reckoning.least == 16 * 1000
    assert reckon([Candidate(), Candidate(tariff=None)], prompt()).least == 0


def test_a_clamp_keeps_who_is_paid_for() -> None:
    dear = Candidate(tariff=Tariff(10**12, 10**12, 0, 0))
    free = Candidate(tariff=None)
    clamped = clamp([Candidate(), dear, free], prompt(), 110_000)
    assert clamped.candidates == (Candidate(), free)
    assert clamped.max_output == 50
    assert clamp([dear], prompt(), 110_000).candidates == ()
    assert clamp([Candidate()], prompt(), 10**9).max_output == 0


def test_free() -> None:
    assert Tariff(0, 0, 0, 0).is_free()
    assert not Tariff(0, 0, 0, 1).is_free()
