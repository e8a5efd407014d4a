"""The cost of an answer: the formula of `sluice/metering/v1/price.proto`, in integers, one rounding upwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_MILLION: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Price:
    """A row of the price book: nano-dollars per million tokens. None: as the price it refines."""

    version: str
    model: str
    input: int
    output: int
    cached_input: int | None = None
    reasoning: int | None = None
    cache_write: int | None = None
    image: int = 0
    """Nano-dollars per picture."""
    request: int = 0
    """Nano-dollars per request."""
    effective_from: float = 0.0
    effective_to: float | None = None
    source: str = ""


def cost_of(
    price: Price,
    input_tokens: int,
    cached_tokens: int = 0,
    cache_write_tokens: int = 0,
    output_tokens: int = 0,
    reasoning_tokens: int = 0,
    images: int = 0,
) -> int:
    """Nano-dollars."""
    plain = input_tokens - cached_tokens - cache_write_tokens
    shown = output_tokens - reasoning_tokens
    micro = (plain * price.input if plain > 0 else 0) + (shown * price.output if shown > 0 else 0)
    if cached_tokens > 0:
        micro += cached_tokens * (price.input if price.cached_input is None else price.cached_input)
    if cache_write_tokens > 0:
        micro += cache_write_tokens * (price.input if price.cache_write is None else price.cache_write)
    if reasoning_tokens > 0:
        micro += reasoning_tokens * (price.output if price.reasoning is None else price.reasoning)
    cost = -(-micro // _MILLION) + price.request
    return cost + images * price.image if images > 0 else cost
