"""What metering needs of a ledger store. Every call raises StoreUnavailable when the store can't be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.metering.accounts import Key, Limits, Payer, Project, Tenant
from services.metering.ledger import Entry, Head, Hold, HoldState, PostState, Replica, Settlement, Slice, Verdict


@dataclass(frozen=True, slots=True)
class Chain:
    """A key with everything above it."""

    key: Key
    project: Project
    tenant: Tenant


Change = Callable[[Limits], Limits]
"""New limits made of those in force. Called inside the store's transaction, so that two changes at once both count."""


@dataclass(frozen=True, slots=True)
class UsageFilter:
    """Which entries count. Empty and None: all."""

    tenant_id: str = ""
    project_id: str = ""
    key_id: str = ""
    model: str = ""
    start: float | None = None
    """Unix seconds; the first moment."""
    end: float | None = None
    """Unix seconds; the first moment no longer counted."""
    provider: str = ""
    task_type: int = 0
    """As entries have it."""


@dataclass(frozen=True, slots=True)
class UsageRow:
    """Sums of one group."""

    group: tuple[str, ...]
    requests: int
    succeeded: int
    """Of the requests, those with an attempt that answered, or a hit of the cache; without those booked to the platform."""
    cache_hits: int
    attempts: int
    fallbacks: int
    input_tokens: int
    cached_tokens: int
    cache_write_tokens: int
    output_tokens: int
    reasoning_tokens: int
    images: int
    cost: int
    saved: int
    usage_source: int
    """Of all rows that have tokens: 0 when one doesn't know it, else the least certain."""


@dataclass(frozen=True, slots=True)
class Posted:
    """An entry as the journal has it."""

    sequence: int
    entry: Entry


class Store(Protocol):
    """The ledger store. What a call says is committed when it returns."""

    async def ping(self) -> None:
        """Returns when the store can be used."""

    async def chain_by_digest(self, sha256: bytes) -> Chain | None:
        """The key with this digest, whether active or not."""

    async def chain_by_key(self, key_id: str) -> Chain | None:
        """The key with this id, whether active or not."""

    async def create_tenant(self, tenant: Tenant, request_id: str) -> Tenant:
        """Inserts a tenant with a project `default`. Raises Exists unless the same `request_id` made it."""

    async def tenant(self, tenant_id: str) -> Tenant | None:
        """A tenant."""

    async def tenants(self, after: str, limit: int) -> list[Tenant]:
        """Tenants by id, those after `after`."""

    async def update_tenant(self, tenant_id: str, display_name: str | None, change: Change) -> Tenant:
        """Changes limits, and the name unless None. Raises NotFound."""

    async def create_project(self, project: Project, request_id: str) -> Project:
        """Inserts a project. Raises NotFound for its tenant, Exists unless the same `request_id` made it."""

    async def project(self, tenant_id: str, project_id: str) -> Project | None:
        """A project."""

    async def projects(self, tenant_id: str, after: str, limit: int) -> list[Project]:
        """Projects of a tenant by id."""

    async def update_project(self, tenant_id: str, project_id: str, display_name: str | None, change: Change) -> Project:
        """As update_tenant."""

    async def create_key(self, key: Key) -> Key:
        """Inserts a key. Raises NotFound for its project, Exists for its id or digest."""

    async def keys(self, tenant_id: str, project_id: str, after: str, limit: int) -> list[Key]:
        """Keys of a tenant, or of one of its projects, by id."""

    async def revoke_key(self, key_id: str, now: float) -> Key:
        """Ends a key; a second time changes nothing. Raises NotFound."""

    async def hold(self, operation_id: str, payer: Payer, amount: int, least: int, expire_time: float, holder: Replica) -> Hold:
        """Reserves at all three accounts or at none. Idempotent per operation. Raises BudgetExhausted, and Exists when another
        payer has a hold for the operation.
        """

    async def void_hold(self, hold_id: str, expire_time: float | None = None) -> HoldState:
        """Frees an open hold, at `expire_time` unless it ends sooner (None: at once); returns the state that it has then. Raises NotFound."""

    async def grant_slice(
        self, lease_id: str, payer: Payer, wanted: int, reserve: int, expire_time: float, holder: Replica
    ) -> Slice:
        """Deducts `wanted` for a lease as long as every budget keeps `reserve` besides, else grants 0. Extends the lease in any
        case. Raises NotFound when the lease is another payer's.
        """

    async def return_lease(self, lease_id: str, owed: int, expire_time: float) -> None:
        """Frees what a lease has left. What of `owed` was not posted against it yet stays reserved until it is, or until `expire_time`.

        Repeated calls change nothing. Unknown leases are ignored.
        """

    async def end_reservations(self, survivor: Replica, expire_time: float) -> int:
        """Leases and open holds of other incarnations of this slot end at `expire_time` unless they end sooner; returns how many there are."""

    async def post(self, settlements: Sequence[Settlement]) -> list[PostState]:
        """Posts each once by its attempt id, all or none in one transaction."""

    async def expire(self, now: float) -> int:
        """Frees holds and leases whose time is over; returns how many."""

    async def usage(self, wanted: UsageFilter, group_by: Sequence[str], after: Sequence[str], limit: int) -> list[UsageRow]:
        """Sums per group, by group, of those behind the group `after`; empty: from the first.

        `group_by` of: tenant, project, key, model, provider, task_type, hour, day. `after` has a value for each of them, or none. Task types
        are their numbers.
        """

    async def entries(self, tenant_id: str, operation_id: str, before: int | None, limit: int) -> list[Posted]:
        """Journal rows, newest first, those with a sequence below `before`. Empty filters and None: all.

        Those of an operation are found by their attempt ids, which are `<operation>/...`.
        """

    async def journal(self, wanted: UsageFilter, after: int, limit: int) -> list[Posted]:
        """Journal rows, oldest first, those with a sequence above `after`."""

    async def head(self) -> Head:
        """The last entry's place and hash."""

    async def verify(self, expected: Head | None = None) -> Verdict:
        """Checks the whole ledger: the hash chain, that `expected`, a head of earlier, is in it, that balances are what the journal and
        reservations say, and what the database itself can check. Damage is a problem, not an error.
        """
