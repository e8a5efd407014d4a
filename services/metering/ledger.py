"""What is posted: entries, holds, leases. The rules of money that hold whatever the store."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, NamedTuple

from services.metering.accounts import Payer

PLATFORM: Final = "platform"
SUCCEEDED: Final = 1
"""Outcome of an attempt that answered, as entries have it."""
GENESIS: Final = bytes(16)
"""What the first entry's hash follows."""


class Entry(NamedTuple):
    """One row of the journal: a transfer of `amount` from `debit` to `credit`. A tuple, since it goes into the store as it is."""

    attempt_id: str
    operation_id: str
    debit: str
    credit: str
    amount: int
    tenant_id: str
    project_id: str
    key_id: str
    model: str
    provider: str
    input_tokens: int
    cached_tokens: int
    cache_write_tokens: int
    output_tokens: int
    reasoning_tokens: int
    images: int
    usage_source: int
    price_version: str
    start_micros: int
    duration_micros: int
    outcome: int
    error_reason: int
    task_type: int
    saved: int
    cache_status: int
    attempt_number: int
    flags: str
    """Comma-separated: `cost_mismatch`, `price_unknown`, `repeated`."""
    post_micros: int
    observed_input: int | None = None
    """Tokens by our own count, beside those that the provider reported and was paid for; None: not counted, or what was counted was billed."""
    observed_output: int | None = None
    """Likewise, of what passed through us."""


_HASHED: Final = "\x1f".join(["%s"] * len(Entry._fields))
_HASHED_UNOBSERVED: Final = "\x1f".join(["%s"] * (len(Entry._fields) - 2))
_UNOBSERVED: Final = (None, None)


class Settlement(NamedTuple):
    """An entry and the reservation that it ends."""

    entry: Entry
    lease_id: str
    hold_id: str
    is_final: bool
    request_key: bytes
    """What the caller's request id stands for; empty: it gave none."""


REQUEST_SECONDS: Final = 24 * 3600.0
"""For so long a request key stands for one request, as long as its answer is kept for; after that it is a new one."""


def charged_once(settlement: Settlement, owner: str | None) -> Entry:
    """The entry to post when the operation `owner` is the one that is charged for the settlement's request; None: none yet.

    A request that was answered and charged is run again only where a crash of ours lost the answer before it was kept. Its caller asked
    for one.
    """
    entry = settlement.entry
    if owner is None or owner == entry.operation_id or entry.debit == PLATFORM:
        return entry
    return entry._replace(debit=PLATFORM, flags=f"{entry.flags},repeated" if entry.flags else "repeated")


def claims(settlement: Settlement) -> bool:
    """Whether the settlement makes its operation the one that is charged for its request, where none is yet."""
    entry = settlement.entry
    return bool(settlement.request_key) and entry.outcome == SUCCEEDED and entry.debit != PLATFORM


def chained(previous: bytes, entry: Entry) -> bytes:
    """Hash of an entry and of all before it: a changed, missing or inserted row breaks every later one.

    Without counts of ours it is the hash that entries had before there were any.
    """
    text = _HASHED_UNOBSERVED % entry[:-2] if entry[-2:] == _UNOBSERVED else _HASHED % entry
    return blake2b(previous + text.encode(), digest_size=16).digest()


class PostState(enum.Enum):
    """What became of a settlement."""

    # Members are alike only to themselves; the inherited hash of their name runs Python, once for every settlement.
    __hash__ = object.__hash__

    POSTED = "posted"
    DUPLICATE = "duplicate"


class HoldState(enum.Enum):
    """What became of a hold."""

    OPEN = "open"
    POSTED = "posted"
    VOIDED = "voided"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class Replica:
    """A process that has leases and holds."""

    slot: str
    """Its name, which the process that is started in its place has, too. Empty: nobody is."""
    incarnation: str

    @classmethod
    def of(cls, replica_id: str) -> Replica:
        """From an id: `<slot>.<incarnation>`, or without a dot for one that has no name."""
        slot, _, incarnation = replica_id.rpartition(".")
        return cls(slot, incarnation)


@dataclass(frozen=True, slots=True)
class Hold:
    """Money reserved for one operation."""

    id: str
    operation_id: str
    payer: Payer
    amount: int
    state: HoldState
    expire_time: float
    budget_before: int | None
    """Left of the tightest budget before the hold; None: no budget is set."""
    budget_level: str
    holder: Replica


@dataclass(frozen=True, slots=True)
class Slice:
    """Money deducted for a lease."""

    granted: int
    """-1: no budget is set at any level."""
    budget: int | None
    """The tightest budget; None: none is set."""
    left: int | None
    """What is left of it after the grant."""
    level: str


@dataclass(frozen=True, slots=True)
class Head:
    """A journal up to an entry."""

    sequence: int
    """Place of the entry; 0: before the first."""
    hash: bytes
    """Its hash; GENESIS before the first."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check of the whole ledger found."""

    head: Head

    entries: int
    debits: int
    credits: int
    problems: tuple[str, ...]
