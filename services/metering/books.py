"""The rules of money over a part of the ledger that is in memory: what a store has locked and read, changes, and writes back.

A store that can hold its rows while several operations pass over them uses this (PostgreSQL). An operation either changes everything
that it should or raises before it changes anything, so one that is refused leaves nothing to undo for those beside it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from services.metering.accounts import Level, Payer
from services.metering.errors import BudgetExhausted, Exists, NotFound, StoreUnavailable
from services.metering.ledger import (
    PLATFORM,
    REQUEST_SECONDS,
    Entry,
    Head,
    Hold,
    HoldState,
    PostState,
    Replica,
    Settlement,
    Slice,
    chained,
    charged_once,
    claims,
)

_LEVELS: Final = (Level.KEY.value, Level.PROJECT.value, Level.TENANT.value)
_MOST: Final = (1 << 63) - 1
"""What a store can count."""


@dataclass(slots=True)
class Account:
    """What may still be held is `budget - spent - held`; budget None: any amount."""

    budget: int | None = None
    spent: int = 0
    held: int = 0


@dataclass(slots=True)
class Lease:
    """Money deducted for a replica."""

    payer: Payer
    outstanding: int
    expire_time: float
    holder: Replica
    posted: int = 0


@dataclass(slots=True)
class Wanted:
    """What a group of operations needs to have read before they can be applied."""

    payers: set[Payer] = field(default_factory=set)
    operation_ids: set[str] = field(default_factory=set)
    hold_ids: set[str] = field(default_factory=set)
    lease_ids: set[str] = field(default_factory=set)
    slots: set[str] = field(default_factory=set)
    """Whose leases and open holds."""
    attempt_ids: set[str] = field(default_factory=set)
    request_keys: set[bytes] = field(default_factory=set)
    due: float | None = None
    """Also reservations whose time is over then."""


class Books:
    """Rows as they were read, and which of them changed since."""

    def __init__(
        self,
        head: Head,
        accounts: dict[str, Account],
        holds: Sequence[Hold],
        leases: dict[str, Lease],
        posted: set[str],
        owners: dict[bytes, str],
    ) -> None:
        self.head = head
        self.accounts = accounts
        self.holds = {hold.id: hold for hold in holds}
        self.leases = leases
        self._by_operation = {hold.operation_id: hold.id for hold in holds}
        self._posted = posted
        self._owners = owners
        """The operations that were charged for requests, by the requests' keys."""
        self.claims: list[tuple[bytes, str, float]] = []
        """New in that: key, operation, and until when (Unix seconds)."""
        self.changed_accounts: set[str] = set()
        self.changed_holds: set[str] = set()
        self.changed_leases: set[str] = set()
        """Those that are no longer in `leases` have ended."""
        self.entries: list[tuple[Entry, bytes]] = []
        """Appended, each with its hash."""

    def hold(self, operation_id: str, payer: Payer, amount: int, least: int, expire_time: float, holder: Replica) -> Hold:
        """See Store.hold."""
        known = self._by_operation.get(operation_id)
        if known is not None:
            hold = self.holds[known]
            if hold.payer != payer:
                raise Exists(f"holds/{hold.id}")
            return hold
        left, level = self._tightest(payer)
        taken = amount
        if not self._reserve(payer, amount):
            if left is None or least <= 0 or left < least or not self._reserve(payer, left):
                raise BudgetExhausted(level, amount, left or 0)
            taken = left
        hold = Hold(f"hold-{operation_id}", operation_id, payer, taken, HoldState.OPEN, expire_time, left, level, holder)
        self._by_operation[operation_id] = hold.id
        self._set_hold(hold)
        return hold

    def void_hold(self, hold_id: str, expire_time: float | None) -> HoldState:
        """See Store.void_hold."""
        hold = self.holds.get(hold_id)
        if hold is None:
            raise NotFound(f"holds/{hold_id}")
        if hold.state is not HoldState.OPEN:
            return hold.state
        if expire_time is not None:
            self._end_hold_at(hold, expire_time)
            return HoldState.OPEN
        self._end_hold(hold, HoldState.VOIDED)
        return HoldState.VOIDED

    def grant_slice(self, lease_id: str, payer: Payer, wanted: int, reserve: int, expire_time: float, holder: Replica) -> Slice:
        """See Store.grant_slice."""
        lease = self.leases.get(lease_id)
        if lease is not None and lease.payer != payer:
            raise NotFound(f"leases/{lease_id}")
        left, level = self._tightest(payer)
        granted = 0
        if left is not None and wanted > 0 and left - wanted >= reserve and self._reserve(payer, wanted):
            granted = wanted
        if lease is None:
            lease = self.leases[lease_id] = Lease(payer, 0, expire_time, holder)
        lease.outstanding += granted
        lease.expire_time = expire_time
        self.changed_leases.add(lease_id)
        if left is None:
            return Slice(-1, None, None, "")
        budget = self.accounts[payer.accounts[_LEVELS.index(level)]].budget
        return Slice(granted, budget, left - granted, level)

    def return_lease(self, lease_id: str, owed: int, expire_time: float) -> None:
        """See Store.return_lease."""
        lease = self.leases.get(lease_id)
        if lease is None:
            return
        # Costs that the replica knows of and whose settlements are still on their way must not be spent a second time.
        kept = min(max(0, owed - lease.posted), lease.outstanding)
        self._free(lease.payer, lease.outstanding - kept)
        self.changed_leases.add(lease_id)
        if kept:
            lease.outstanding, lease.expire_time = kept, expire_time
        else:
            del self.leases[lease_id]

    def end_reservations(self, survivor: Replica, expire_time: float) -> int:
        """See Store.end_reservations."""
        ended = 0
        for lease_id, lease in self.leases.items():
            if lease.holder.slot == survivor.slot and lease.holder != survivor:
                ended += 1
                if lease.expire_time > expire_time:
                    lease.expire_time = expire_time
                    self.changed_leases.add(lease_id)
        for hold in list(self.holds.values()):
            if hold.state is HoldState.OPEN and hold.holder.slot == survivor.slot and hold.holder != survivor:
                ended += 1
                self._end_hold_at(hold, expire_time)
        return ended

    def post(self, settlements: Sequence[Settlement]) -> list[PostState]:
        """See Store.post. Raises StoreUnavailable when a sum would pass what can be counted."""
        states: list[PostState] = []
        fresh: list[Settlement] = []
        spent: dict[str, int] = {}
        known = self._posted
        ids: set[str] = set()
        owners = {key: owner for s in settlements if (key := s.request_key) and (owner := self._owners.get(key)) is not None}
        claimed: list[tuple[bytes, str, float]] = []
        for settlement in settlements:
            entry = settlement.entry
            if entry.attempt_id in known or entry.attempt_id in ids:
                states.append(PostState.DUPLICATE)
                continue
            ids.add(entry.attempt_id)
            states.append(PostState.POSTED)
            key = settlement.request_key
            if key:
                entry = charged_once(settlement, owners.get(key))
                if key not in owners and claims(settlement):
                    owners[key] = entry.operation_id
                    claimed.append((key, entry.operation_id, entry.post_micros / 1e6 + REQUEST_SECONDS))
                settlement = settlement._replace(entry=entry)
            fresh.append(settlement)
            if entry.amount and entry.debit != PLATFORM:
                for name in Payer(entry.tenant_id, entry.project_id, entry.key_id).accounts:
                    spent[name] = spent.get(name, 0) + entry.amount
        for name, amount in spent.items():
            account = self.accounts.get(name)
            if amount + (account.spent if account is not None else 0) > _MOST:
                raise StoreUnavailable
        known |= ids
        self._owners |= owners
        self.claims += claimed
        for name, amount in spent.items():
            self.accounts.setdefault(name, Account()).spent += amount
            self.changed_accounts.add(name)
        for settlement in fresh:
            self._append(settlement)
        return states

    def expire(self, now: float) -> int:
        """See Store.expire; of what was read."""
        holds = [hold for hold in self.holds.values() if hold.state is HoldState.OPEN and hold.expire_time <= now]
        for hold in holds:
            self._end_hold(hold, HoldState.EXPIRED)
        leases = [name for name, lease in self.leases.items() if lease.expire_time <= now]
        for name in leases:
            lease = self.leases.pop(name)
            self._free(lease.payer, lease.outstanding)
            self.changed_leases.add(name)
        return len(holds) + len(leases)

    def _append(self, settlement: Settlement) -> None:
        entry = settlement.entry
        self.head = Head(self.head.sequence + 1, chained(self.head.hash, entry))
        self.entries.append((entry, self.head.hash))
        # A lease that is gone has expired: its money went back, and the late settlement is posted all the same.
        lease = self.leases.get(settlement.lease_id) if settlement.lease_id else None
        if lease is not None and entry.debit != PLATFORM and entry.amount:
            used = min(entry.amount, lease.outstanding)
            lease.outstanding -= used
            lease.posted += entry.amount
            self._free(lease.payer, used)
            self.changed_leases.add(settlement.lease_id)
        hold = self.holds.get(settlement.hold_id) if settlement.hold_id and settlement.is_final else None
        if hold is not None and hold.state is HoldState.OPEN:
            self._end_hold(hold, HoldState.POSTED)

    def _tightest(self, payer: Payer) -> tuple[int | None, str]:
        """What is left of the tightest budget and its level; None: no budget is set."""
        best: int | None = None
        level = ""
        for name, its_level in zip(payer.accounts, _LEVELS, strict=True):
            account = self.accounts.get(name)
            if account is not None and account.budget is not None:
                left = account.budget - account.spent - account.held
                if best is None or left < best:
                    best, level = left, its_level
        return best, level

    def _reserve(self, payer: Payer, amount: int) -> bool:
        """Holds `amount` at all three accounts, or at none and False."""
        found = [self.accounts.get(name) for name in payer.accounts]
        for account in found:
            if account is None or account.held + amount > _MOST:
                return False
            if account.budget is not None and account.budget - account.spent - account.held < amount:
                return False
        for account in found:
            if account is not None:
                account.held += amount
        self.changed_accounts.update(payer.accounts)
        return True

    def _free(self, payer: Payer, amount: int) -> None:
        if amount:
            for name in payer.accounts:
                self.accounts[name].held -= amount
            self.changed_accounts.update(payer.accounts)

    def _end_hold(self, hold: Hold, state: HoldState) -> None:
        self._free(hold.payer, hold.amount)
        self._set_hold(replace(hold, state=state))

    def _end_hold_at(self, hold: Hold, expire_time: float) -> None:
        if expire_time < hold.expire_time:
            self._set_hold(replace(hold, expire_time=expire_time))

    def _set_hold(self, hold: Hold) -> None:
        self.holds[hold.id] = hold
        self.changed_holds.add(hold.id)


class Operation(ABC):
    """A change of the books."""

    __slots__ = ()

    @abstractmethod
    def wants(self, wanted: Wanted) -> None:
        """Adds what must be read first."""

    @abstractmethod
    def apply(self, books: Books) -> Any:
        """Makes the change and returns what its caller gets, or raises MeteringError and changes nothing."""


@dataclass(frozen=True, slots=True)
class TakeHold(Operation):
    """Store.hold."""

    operation_id: str
    payer: Payer
    amount: int
    least: int
    expire_time: float
    holder: Replica

    def wants(self, wanted: Wanted) -> None:
        """See Operation."""
        wanted.operation_ids.add(self.operation_id)
        wanted.payers.add(self.payer)

    def apply(self, books: Books) -> Hold:
        """See Operation."""
        return books.hold(self.operation_id, self.payer, self.amount, self.least, self.expire_time, self.holder)


@dataclass(frozen=True, slots=True)
class VoidHold(Operation):
    """Store.void_hold."""

    hold_id: str
    expire_time: float | None

    def wants(self, wanted: Wanted) -> None:
        """See Operation."""
        wanted.hold_ids.add(self.hold_id)

    def apply(self, books: Books) -> HoldState:
        """See Operation."""
        return books.void_hold(self.hold_id, self.expire_time)


@dataclass(frozen=True, slots=True)
class GrantSlice(Operation):
    """Store.grant_slice."""

    lease_id: str
    payer: Payer
    wanted: int
    reserve: int
    expire_time: float
    holder: Replica

    def wants(self, wanted: Wanted) -> None:
        """See Operation."""
        wanted.lease_ids.add(self.lease_id)
        wanted.payers.add(self.payer)

    def apply(self, books: Books) -> Slice:
        """See Operation."""
        return books.grant_slice(self.lease_id, self.payer, self.wanted, self.reserve, self.expire_time, self.holder)


@dataclass(frozen=True, slots=True)
class ReturnLease(Operation):
    """Store.return_lease."""

    lease_id: str
    owed: int
    expire_time: float

    def wants(self, wanted: Wanted) -> None:
        """See Operation."""
        wanted.lease_ids.add(self.lease_id)

    def apply(self, books: Books) -> None:
        """See Operation."""
        books.return_lease(self.lease_id, self.owed, self.expire_time)


@dataclass(frozen=True, slots=True)
class EndReservations(Operation):
    """Store.end_reservations."""

    survivor: Replica
    expire_time: float

    def wants(self, wanted: Wanted) -> None:
        """See Operation."""
        wanted.slots.add(self.survivor.slot)

    def apply(self, books: Books) -> int:
        """See Operation."""
        return books.end_reservations(self.survivor, self.expire_time)


@dataclass(frozen=True, slots=True)
class Post(Operation):
    """Store.post."""

    settlements: Sequence[Settlement]

    def wants(self, wanted: Wanted) -> None:
        """See Operation."""
        for entry, lease_id, hold_id, is_final, request_key in self.settlements:
            wanted.attempt_ids.add(entry.attempt_id)
            if request_key:
                wanted.request_keys.add(request_key)
            if entry.amount and entry.debit != PLATFORM:
                wanted.payers.add(Payer(entry.tenant_id, entry.project_id, entry.key_id))
                if lease_id:
                    wanted.lease_ids.add(lease_id)
            if hold_id and is_final:
                wanted.hold_ids.add(hold_id)

    def apply(self, books: Books) -> list[PostState]:
        """See Operation."""
        return books.post(self.settlements)


@dataclass(frozen=True, slots=True)
class Expire(Operation):
    """Store.expire."""

    now: float

    def wants(self, wanted: Wanted) -> None:
        """See Operation."""
        wanted.due = self.now if wanted.due is None else max(self.now, wanted.due)

    def apply(self, books: Books) -> int:
        """See Operation."""
        return books.expire(self.now)
