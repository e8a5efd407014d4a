"""What the domain of the gateway needs from metering, in its own terms.

Times are Unix seconds, money is nano-dollars, timeouts are seconds. Every method raises `Failure`: DEPENDENCY_UNAVAILABLE when
metering isn't there, DEADLINE_EXCEEDED when it didn't answer in time, and what its own line says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from services.gateway.principals import Principal
from services.runtime.errors import Reason

OUTAGES: Final = frozenset((Reason.DEPENDENCY_UNAVAILABLE, Reason.DEADLINE_EXCEEDED, Reason.OVERLOADED, Reason.DRAINING))
"""Why a service of the mesh couldn't be asked, or didn't answer in time: it may be later."""
UNLIMITED: Final = -1
"""In a grant: there is no such limit."""


@dataclass(frozen=True, slots=True)
class LeaseWish:
    """What a replica asks for one key. Sending an equal wish again returns the same grant."""

    sequence: int
    key_id: str
    lease_id: str
    request_count: int
    token_count: int
    concurrency: int
    nano_usd: int
    left_request_count: int
    left_token_count: int
    tenant_id: str
    """Whose limits they are: one metering process counts all of a tenant's."""
    model: str = ""
    """Whose limits alone are asked for, without money; empty: those that hold whatever the model."""


@dataclass(frozen=True, slots=True)
class LimitState:
    """One limit, over all replicas."""

    level: str
    limit: int
    remaining: int


@dataclass(frozen=True, slots=True)
class Grant:
    """What metering granted on top of what is left; -1: unlimited. An empty `lease_id` grants no money."""

    lease_id: str
    expire_time: float
    request_count: int
    token_count: int
    concurrency: int
    nano_usd: int
    retry_delay: float | None = None
    request_limit: LimitState | None = None
    token_limit: LimitState | None = None
    concurrency_limit: LimitState | None = None
    budget: LimitState | None = None
    """The tightest budget; None: no budget is set."""


@dataclass(frozen=True, slots=True)
class HoldGrant:
    """Money reserved for one operation."""

    hold_id: str
    amount_nano_usd: int
    budget_before_nano_usd: int | None
    budget_level: str


@dataclass(frozen=True, slots=True)
class Authentication:
    """An identity and for how many seconds it may be reused."""

    principal: Principal
    reuse_seconds: float


class Metering(Protocol):
    """Identities, limits and holds."""

    async def authenticate(self, key_sha256: bytes, *, timeout: float) -> Authentication:
        """The identity of a key. Failure KEY_INVALID when unknown, expired or revoked."""

    async def acquire(self, wish: LeaseWish, *, timeout: float) -> Grant:
        """Slices of a key's limits."""

    async def end_reservations(self, *, timeout: float) -> None:
        """This replica has started: what the process in its place had is for others."""

    async def give_back(self, tenant_id: str, lease_id: str, owed_nano_usd: int, *, timeout: float) -> None:
        """Ends a lease; `owed_nano_usd` is all of it that was spent since it was granted, or is held for what is under way."""

    async def hold(
        self,
        operation_id: str,
        key_id: str,
        amount_nano_usd: int,
        min_amount_nano_usd: int,
        expire_time: float,
        *,
        timeout: float,
    ) -> HoldGrant:
        """Reserves money for one operation. Failure BUDGET_EXHAUSTED when not even the least amount is there."""

    async def void(self, hold_id: str, *, may_have_run: bool, timeout: float) -> None:
        """Frees a hold: at once, or when what may have run for it is settled. Failure RESOURCE_NOT_FOUND when there is none."""
