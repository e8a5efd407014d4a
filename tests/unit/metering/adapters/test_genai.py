from __future__ import annotations

import importlib.metadata
from decimal import Decimal
from types import SimpleNamespace

import pytest

from services.metering.adapters import genai
from services.metering.pricebook import versioned


@pytest.mark.parametrize(
    ("kind", "model"), [("openai", "gpt-4o-mini"), ("anthropic", "claude-3-5-haiku-latest"), ("gemini", "gemini-2.0-flash")]
)
def test_models_of_the_great_providers_have_prices_with_their_source(kind: str, model: str) -> None:
    rows = genai.seed(kind, model, 0)
    assert rows
    for row in rows:
        assert row.input > 0
        assert row.output > row.input
        assert row.source == f"genai-prices {importlib.metadata.version('genai-prices')}"
    dated = versioned("m", rows)
    assert [row.effective_from for row in dated] == sorted({row.effective_from for row in rows})


def test_a_well_known_price_is_what_it_is() -> None:
    (row,) = genai.seed("openai", "gpt-4o-mini", 0)
    assert (row.input, row.cached_input, row.output) == (150_000_000, 75_000_000, 600_000_000)


@pytest.mark.parametrize(("kind", "model"), [("openai", "no-such-model-9"), ("local", "gpt-4o"), ("echo", "echo"), ("", "")])
def test_what_is_unknown_has_no_price(kind: str, model: str) -> None:
    assert genai.seed(kind, model, 0) == []


def test_of_tiers_the_dearest_is_taken_and_fractions_are_rounded_upwards() -> None:
    tiered = SimpleNamespace(
        base=Decimal("1.25"), tiers=[SimpleNamespace(price=Decimal("2.5")), SimpleNamespace(price=Decimal(2))]
    )
    assert genai._nano(tiered, 0) == 2_500_000_000
    assert genai._nano(Decimal("0.0000000001"), 0) == 1
    assert genai._nano(None, 0) is None


def test_a_price_per_thousand_requests_is_one_per_request() -> None:
    row = genai._price(SimpleNamespace(input_mtok=Decimal(1), requests_kcount=Decimal(5)), 3.0, "s", 0)
    assert row is not None
    assert (row.request, row.output, row.effective_from) == (5_000_000, 0, 3.0)
    assert genai._price(SimpleNamespace(), 0.0, "s", 0) is None


@pytest.mark.parametrize(
    ("window", "dollars"), [(0, (6, 22.5)), (200_000, (3, 15)), (200_001, (6, 22.5)), (1_000_000, (6, 22.5))]
)
def test_a_dear_tier_counts_only_where_a_prompt_can_reach_it(window: int, dollars: tuple[float, float]) -> None:
    (row,) = genai.seed("anthropic", "claude-sonnet-4-5", window)
    assert (row.input / 1e9, row.output / 1e9) == dollars
