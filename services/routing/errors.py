"""Errors of the routing service.

Failure
└── RoutingError
    └── ModelNotFound    no model, alias or policy of that name is there for the caller
"""

from __future__ import annotations

from collections.abc import Sequence

from services.runtime.errors import Failure, Reason


class RoutingError(Failure):
    """Base of the service's own errors."""


class ModelNotFound(RoutingError):
    """No model, alias or policy of that name is there for the caller."""

    def __init__(self, model: str, near: Sequence[str] = ()) -> None:
        """`near` are names that may be meant."""
        advice = f"did you mean {' or '.join(near)}?" if near else "GET /v1/models or `sluice models` lists what is"
        super().__init__(
            Reason.MODEL_NOT_FOUND,
            f"no model or policy {model[:200]!r} is in the catalogue for this key; {advice}",
            metadata={"model": model[:200]},
        )
