"""The cost of an attempt by the price that its candidate carries: the formula of `sluice/metering/v1/price.proto`."""

from __future__ import annotations

from typing import Final

from sluice.inference.v1 import answer_pb2
from sluice.metering.v1 import price_pb2

_MILLION: Final = 1_000_000


def prompt_cost(price: price_pb2.Price, token_count: int) -> int:
    """Nano-dollars of a prompt alone: `cost_of` where nothing else was used."""
    return -(-token_count * price.input_nano_usd_per_million // _MILLION) + price.request_nano_usd


def cost_of(price: price_pb2.Price, usage: answer_pb2.Usage) -> int:
    """Nano-dollars."""
    cached, written = usage.cached_input_token_count, usage.cache_write_token_count
    reasoning = usage.reasoning_token_count
    plain = usage.input_token_count - cached - written
    shown = usage.output_token_count - reasoning
    input_price, output_price = price.input_nano_usd_per_million, price.output_nano_usd_per_million
    micro = (plain * input_price if plain > 0 else 0) + (shown * output_price if shown > 0 else 0)
    if cached > 0:
        has = price.HasField("cached_input_nano_usd_per_million")
        micro += cached * (price.cached_input_nano_usd_per_million if has else input_price)
    if written > 0:
        has = price.HasField("cache_write_nano_usd_per_million")
        micro += written * (price.cache_write_nano_usd_per_million if has else input_price)
    if reasoning > 0:
        has = price.HasField("reasoning_nano_usd_per_million")
        micro += reasoning * (price.reasoning_nano_usd_per_million if has else output_price)
    images = usage.image_count
    if images > 0:
        return -(-micro // _MILLION) + images * price.image_nano_usd + price.request_nano_usd
    return -(-micro // _MILLION) + price.request_nano_usd
