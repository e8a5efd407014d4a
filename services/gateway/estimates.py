"""Token counts by size alone, for when no tokenizer can be asked.

The estimate is a quarter of the bytes; its error bound reaches up to one token per byte, which no tokenizer that works on bytes passes.
"""

from __future__ import annotations

from typing import Final

from services.gateway.validation import Shape
from sluice.inference.v1 import receipt_pb2

_IMAGE_TOKENS: Final = 2000
"""Tokens of one picture: more than any provider's published formula gives for a picture it doesn't shrink."""
_MESSAGE_TOKENS: Final = 8
"""Tokens of a turn's frame."""
_ERROR_BOUND: Final = 3.0


def estimated_tokens(shape: Shape) -> int:
    """Tokens of a prompt by its size."""
    # Written out, as is the next: both are asked for by every request.
    return (
        -((shape.image_bytes - shape.byte_count) // 4)
        + shape.message_count * _MESSAGE_TOKENS
        + shape.image_count * _IMAGE_TOKENS
    )


def byte_bound(shape: Shape) -> int:
    """Most tokens that a prompt can have at any provider."""
    return shape.byte_count - shape.image_bytes + shape.message_count * _MESSAGE_TOKENS + shape.image_count * _IMAGE_TOKENS


def estimated_count(shape: Shape) -> receipt_pb2.TokenCount:
    """The estimate, marked as such."""
    return receipt_pb2.TokenCount(
        token_count=estimated_tokens(shape),
        method=receipt_pb2.TOKEN_COUNT_METHOD_ESTIMATED,
        tokenizer="bytes@1",
        error_bound=_ERROR_BOUND,
    )
