"""The check of a whole ledger, whatever the store: it is fed what the store has and says what is wrong with it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Final

from services.metering.accounts import Payer
from services.metering.ledger import GENESIS, PLATFORM, Entry, Head, Verdict, chained

MOST_PROBLEMS: Final = 100
"""That are told; a ledger that is wrong at its beginning is wrong at every entry after it."""


class Audit:
    """A check under way: entries in order, then reservations, then accounts."""

    def __init__(self, expected: Head | None = None) -> None:
        self._expected = expected
        self._problems: list[str] = []
        self._head = Head(0, GENESIS)
        self._entries = 0
        self._moved = 0
        self._spent: dict[str, int] = defaultdict(int)
        self._held: dict[str, int] = defaultdict(int)

    def verdict(self) -> Verdict:
        """What was found so far."""
        # A row is both sides of a transfer, so neither can be without the other.
        return Verdict(self._head, self._entries, self._moved, self._moved, tuple(self._problems))

    def problem(self, text: str) -> None:
        """Notes something that the store itself found."""
        if len(self._problems) < MOST_PROBLEMS:
            self._problems.append(text)

    def entry(self, sequence: int, stored: object, entry: Entry) -> None:
        """The next row of the journal with the hash that is `stored` beside it. Damaged values may have any type."""
        before, expected = self._head, self._expected
        if sequence != before.sequence + 1:
            self.problem(f"entries {before.sequence + 1} to {sequence - 1} are missing")
        if chained(before.hash, entry) != stored:
            self.problem(f"entry {sequence} ({entry.attempt_id!r}) does not follow from those before it")
        if expected is not None and sequence == expected.sequence and stored != expected.hash:
            self.problem(f"entry {sequence} is not the one whose hash was kept: it or one before it was changed")
        self._head = Head(sequence, stored if isinstance(stored, bytes) else GENESIS)
        self._entries += 1
        amount = entry.amount
        if not isinstance(amount, int):
            # Only damage makes it something else, and that was told above.
            return
        self._moved += amount
        if entry.debit != PLATFORM:
            for account in Payer(entry.tenant_id, entry.project_id, entry.key_id).accounts:
                self._spent[account] += amount

    def entries_end(self) -> None:
        """There are no further entries."""
        expected, last = self._expected, self._head.sequence
        if expected is not None and expected.sequence > last:
            self.problem(f"entries {last + 1} to {expected.sequence} are missing: they were there when the head was kept")

    def reserved(self, payer: Payer, amount: int) -> None:
        """An open hold, or what a lease has left."""
        for account in payer.accounts:
            self._held[account] += amount

    def accounts(self, rows: Iterable[tuple[str, int, int]]) -> None:
        """Every account: name, spent, held."""
        for name, spent, held in rows:
            journaled, reserved = self._spent.pop(name, 0), self._held.pop(name, 0)
            if spent != journaled:
                self.problem(f"{name} says {spent} spent, the journal {journaled}")
            if held != reserved:
                self.problem(f"{name} says {held} held, its reservations {reserved}")
            if held < 0:
                self.problem(f"{name} holds {held}, less than nothing")
        for name in sorted({account for found in (self._spent, self._held) for account, amount in found.items() if amount}):
            self.problem(f"{name} has entries or reservations and no account")
