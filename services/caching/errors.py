"""Errors of the caching service.

Failure
└── CachingError
    ├── TicketInvalid       the ticket was not made by this mesh, or for another tenant
    └── NotStorable         the answer is one that must not be stored
Exception
└── TierUnavailable         a tier can't be asked now; never leaves the service
"""

from __future__ import annotations

from services.runtime.errors import Failure, Reason


class CachingError(Failure):
    """Base of the service's own errors."""


class TicketInvalid(CachingError):
    """The ticket was not made by this mesh, or for another tenant."""

    def __init__(self) -> None:
        super().__init__(
            Reason.REQUEST_INVALID,
            "ticket: must be the one that Lookup gave for this tenant, unchanged; replicas need the same mesh.service_token",
            metadata={"field": "ticket"},
        )


class NotStorable(CachingError):
    """The answer is one that must not be stored."""

    def __init__(self, why: str) -> None:
        super().__init__(Reason.STATE_CONFLICT, f"the answer is not stored: {why}", metadata={"state": "not storable"})


class TierUnavailable(Exception):
    """A tier can't be asked now. The text says why, in words for a verdict."""
