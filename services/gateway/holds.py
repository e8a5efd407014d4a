"""The worst that an operation may cost, and how long an answer a sum of money covers.

The formula is the one of `sluice/metering/v1/price.proto`, taken at its dearest: all input at the dearest input price, all output at
the dearest output price. Money is integer nano-dollars throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_MILLION: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Tariff:
    """The dearest a model's price can become: nano-dollars per million tokens, per picture and per request."""

    input_nano_usd_per_million: int
    output_nano_usd_per_million: int
    image_nano_usd: int
    request_nano_usd: int

    def is_free(self) -> bool:
        """Whether nothing is ever charged."""
        return not (
            self.input_nano_usd_per_million or self.output_nano_usd_per_million or self.image_nano_usd or self.request_nano_usd
        )


def worst_cost(tariff: Tariff, input_tokens: int, output_tokens: int, image_count: int) -> int:
    """Most that one attempt costs with at most these counts."""
    tokens = input_tokens * tariff.input_nano_usd_per_million + output_tokens * tariff.output_nano_usd_per_million
    return -(-tokens // _MILLION) + image_count * tariff.image_nano_usd + tariff.request_nano_usd


def covered_output(tariff: Tariff, input_tokens: int, image_count: int, amount: int, wanted: int) -> int:
    """Longest answer, at most `wanted` tokens, for which `worst_cost` is no more than `amount`; -1: not even the prompt is covered."""
    left = amount - image_count * tariff.image_nano_usd - tariff.request_nano_usd
    tokens = left * _MILLION - input_tokens * tariff.input_nano_usd_per_million
    if left < 0 or tokens < 0:
        return -1
    if tariff.output_nano_usd_per_million == 0:
        return wanted
    return min(wanted, tokens // tariff.output_nano_usd_per_million)
