"""Scorers: each gives every candidate a number in [0, 1]; more is better. They see the whole field, since cost is relative to it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, Protocol

from services.routing.filters import Ask, Prospect

NEUTRAL: Final = 0.5
"""Where nothing is known."""
_HALF_LOAD: Final = 16
"""Attempts under way at which the score is a half."""


class Scorer(Protocol):
    """Scores of a field, in its order."""

    def __call__(self, ask: Ask, field: Sequence[Prospect], latency_target: float) -> list[float]: ...


def cost(ask: Ask, field: Sequence[Prospect], latency_target: float) -> list[float]:
    """1 for the cheapest of this request, 0 for the dearest, in between in proportion; an unknown price is the dearest."""
    costs = [prospect.cost(ask) for prospect in field]
    low, high = min(costs), max(costs)
    span = high - low
    return [
        0.0 if prospect.rates is None else 1.0 if not span else (high - amount) / span
        for prospect, amount in zip(field, costs, strict=True)
    ]


def latency(ask: Ask, field: Sequence[Prospect], latency_target: float) -> list[float]:
    """A half at the target of the task type, more below it; neutral while unknown."""
    return [NEUTRAL if prospect.latency is None else latency_target / (latency_target + prospect.latency) for prospect in field]


def load(ask: Ask, field: Sequence[Prospect], latency_target: float) -> list[float]:
    """1 when idle, falling with the attempts under way."""
    return [_HALF_LOAD / (_HALF_LOAD + prospect.in_flight) for prospect in field]


def affinity(ask: Ask, field: Sequence[Prospect], latency_target: float) -> list[float]:
    """The same model for the same bucket as long as it is there, so that the provider's own prompt cache hits; neutral without one."""
    if ask.affinity < 0:
        return [NEUTRAL] * len(field)
    weights = [zlib.crc32(f"{ask.affinity} {prospect.model.id}".encode()) for prospect in field]
    best = max(weights)
    return [1.0 if weight == best else 0.0 for weight in weights]


ALL: Final[Mapping[str, Scorer]] = MappingProxyType({"cost": cost, "latency": latency, "load": load, "affinity": affinity})
"""By the names that policies weigh them by."""
