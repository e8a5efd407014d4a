"""Counts by size."""

from __future__ import annotations

from services.gateway.estimates import byte_bound, estimated_count, estimated_tokens
from services.gateway.validation import Shape
from sluice.inference.v1 import receipt_pb2


def test_the_bound_covers_one_token_per_byte() -> None:
    shape = Shape(1000)
    shape.message_count = 2
    count = estimated_count(shape)
    assert count.method == receipt_pb2.TOKEN_COUNT_METHOD_ESTIMATED
    assert count.token_count == estimated_tokens(shape) == 250 + 16
    assert count.token_count * (1 + count.error_bound) >= byte_bound(shape) == 1000 + 16


def test_pictures_weigh_by_count_not_by_bytes() -> None:
    shape = Shape(1_000_000)
    shape.image_bytes = 999_000
    shape.image_count = 1
    assert estimated_tokens(shape) == 250 + 2000
