"""Seed prices out of the package `genai-prices`, which carries its data.

What a row of our book can't say is left out on the safe side: of prices that depend on the prompt's length the dearest tier that the
catalogue's context window lets a prompt reach is taken, and of prices that depend on the time of day the one without condition.
"""

from __future__ import annotations

import datetime
import importlib.metadata
from decimal import ROUND_CEILING, Decimal
from functools import cache
from types import MappingProxyType
from typing import Any, Final

from services.metering.cost import Price

_PROVIDERS: Final = MappingProxyType({"openai": "openai", "anthropic": "anthropic", "gemini": "google"})
_NANO: Final = 1_000_000_000
_FIELDS: Final = MappingProxyType(
    {
        "input": "input_mtok",
        "output": "output_mtok",
        "cached_input": "cache_read_mtok",
        "cache_write": "cache_write_mtok",
    }
)


@cache
def _providers() -> dict[str, Any]:
    from genai_prices.data import providers  # noqa: PLC0415 - takes 0.3 s and some MB; only metering needs it

    return {provider.id: provider for provider in providers}


def seed(kind: str, upstream_model: str, context_window: int) -> list[Price]:
    """Dated prices of a provider's model; see pricebook.Seed."""
    provider = _providers().get(_PROVIDERS.get(kind, ""))
    if provider is None:
        return []
    model = next((model for model in provider.models if model.match.is_match(upstream_model.lower())), None)
    if model is None:
        return []
    source = f"genai-prices {importlib.metadata.version('genai-prices')}"
    if not isinstance(model.prices, list):
        row = _price(model.prices, 0.0, source, context_window)
        return [row] if row is not None else []
    rows = []
    for conditional in model.prices:
        constraint = conditional.constraint
        start = getattr(constraint, "start_date", None)
        if constraint is not None and start is None:
            continue
        began = datetime.datetime.combine(start, datetime.time(), datetime.UTC).timestamp() if start is not None else 0.0
        row = _price(conditional.prices, began, source, context_window)
        if row is not None:
            rows.append(row)
    return rows


def _price(prices: Any, start: float, source: str, context_window: int) -> Price | None:
    amounts = {name: _nano(getattr(prices, field, None), context_window) for name, field in _FIELDS.items()}
    if amounts["input"] is None and amounts["output"] is None:
        return None
    requests = getattr(prices, "requests_kcount", None)
    return Price(
        version="",
        model="",
        input=amounts["input"] or 0,
        output=amounts["output"] or 0,
        cached_input=amounts["cached_input"],
        cache_write=amounts["cache_write"],
        request=0 if requests is None else _ceiling(Decimal(requests) * _NANO / 1000),
        effective_from=start,
        source=source,
    )


def _nano(value: Any, context_window: int) -> int | None:
    if value is None:
        return None
    tiers = getattr(value, "tiers", None)
    if tiers is not None:
        # A prompt is always shorter than the window, which has to hold its answer, too.
        reachable = [tier.price for tier in tiers if not context_window or tier.start < context_window]
        value = max([value.base, *reachable])
    return _ceiling(Decimal(value) * _NANO)


def _ceiling(value: Decimal) -> int:
    return int(value.to_integral_value(ROUND_CEILING))
