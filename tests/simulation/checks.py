"""What must hold: at every commit, once it is quiet, and in the end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from services.metering.adapters.sqlite import verify_connection
from services.metering.ledger import PLATFORM, Entry
from sluice.inference.v1 import receipt_pb2
from tests.simulation.nodes import Execution, Gateway

if TYPE_CHECKING:
    from tests.simulation.world import World

_LOST = receipt_pb2.ATTEMPT_OUTCOME_LOST
_NOT_SENT = receipt_pb2.ATTEMPT_OUTCOME_NOT_SENT
_SUCCEEDED = receipt_pb2.ATTEMPT_OUTCOME_SUCCEEDED
_CACHE = "cache"
_GROUP_SECONDS = 0.1
"""Most that a settlement waits for its fsync: the group's five milliseconds, and what the disk takes here for the one before and its own."""
_ENTRIES = f"SELECT {', '.join(Entry._fields)} FROM journal ORDER BY sequence"


def _entries(world: World) -> list[Entry]:
    return [Entry(*row) for row in world.connection.execute(_ENTRIES)]


def at_commit(world: World) -> None:
    """No budget is passed by what was admitted: only by what a provider charged beyond an operation's hold."""
    over = world.connection.execute(
        "SELECT name, budget, spent, held FROM accounts WHERE budget IS NOT NULL AND spent + held > budget"
    ).fetchall()
    for name, budget, spent, held in over:
        beyond = _beyond_holds(world, name)
        if spent + held > budget + beyond:
            world.wrong(f"{name} has a budget of {budget}, {spent} spent, {held} held, and {beyond} beyond holds")
    for process in world.processes.values():
        if isinstance(process, Gateway):
            _free_money(world, process)


def _beyond_holds(world: World, account: str) -> int:
    """What providers charged to an account beyond what was held for the operations."""
    charged: dict[str, int] = defaultdict(int)
    for entry in _entries(world):
        if entry.debit != PLATFORM and account in (f"key/{entry.key_id}", f"tenant/{entry.tenant_id}"):
            charged[entry.operation_id] += entry.amount
    # A hold of an operation's own stays whole until its last attempt: the next one may cost as much.
    rows = world.connection.execute("SELECT operation_id, amount FROM holds WHERE state = 'open'").fetchall()
    still = {operation: amount for operation, amount in rows if operation in charged}
    holds = world.records.holds
    return sum(max(0, amount + still.get(operation, 0) - holds.get(operation, 0)) for operation, amount in charged.items())


def at_a_confirmation(world: World, attempts: Sequence[str]) -> None:
    """Whoever is told that settlements are posted: they are in the journal."""
    for attempt in attempts:
        if world.connection.execute("SELECT 1 FROM journal WHERE attempt_id = ?", (attempt,)).fetchone() is None:
            world.wrong(f"the settlement of {attempt} was confirmed before it was committed")


def at_an_answer(world: World, operation: str) -> None:
    """Whoever has the last byte: what it cost is on disk."""
    records = world.records
    for attempt, record in records.starts.items():
        if record.operation_id == operation and attempt not in records.settles and attempt not in world.disk.unwritten:
            world.wrong(f"{operation} was answered before the settlement of {attempt} was on disk")


def when_quiet(world: World) -> None:
    """Everybody has ended, nothing has expired yet: what is still held has its reason."""
    for process in world.processes.values():
        if isinstance(process, Execution):
            if process.spool.backlog:
                world.wrong(f"{process.node.name} has {process.spool.backlog} settlements that are not posted")
        elif isinstance(process, Gateway):
            _leases(world, process)
            _free_money(world, process)
    posted = {entry.attempt_id for entry in _entries(world)}
    for attempt in world.records.starts:
        if attempt not in posted and attempt not in world.disk.lost:
            world.wrong(f"attempt {attempt} began and was not settled")
    for attempt, age in world.disk.lost.items():
        if age > _GROUP_SECONDS:
            world.wrong(f"the power took a settlement of {attempt} that had been written {age:.3f} s before")


def _leases(world: World, gateway: Gateway) -> None:
    for lease in gateway.leases._leases.values():
        for what in ("held", "in_flight", "waiting"):
            if getattr(lease, what):
                world.wrong(
                    f"{gateway.node.name}: the lease of {lease.key_id} has {what} {getattr(lease, what)} and nothing runs"
                )


def _free_money(world: World, gateway: Gateway) -> None:
    """No gateway may spend what the ledger doesn't hold for it: the ledger learns later than a gateway what was spent or returned, and
    earlier what is granted."""
    for lease in gateway.leases._leases.values():
        if not lease.lease_id or lease.is_unlimited_money() or world.universe.now >= lease.expires:
            continue
        row = world.connection.execute("SELECT outstanding FROM leases WHERE id = ?", (lease.lease_id,)).fetchone()
        reserved = row[0] if row is not None else 0
        if lease.money > reserved and lease.money > reserved + _beyond_holds(world, f"key/{lease.key_id}"):
            world.wrong(f"{gateway.node.name} may spend {lease.money} of {lease.key_id}, of which the ledger holds {reserved}")


def when_settled(world: World) -> None:
    """Whoever was killed meanwhile, no hold is left. One that arrived twice ends by its time."""
    rows = world.connection.execute("SELECT operation_id, amount FROM holds WHERE state = 'open'").fetchall()
    for operation, amount in rows:
        if operation not in world.records.asked_again:
            world.wrong(f"the hold of {operation} over {amount} is left open")


def at_the_end(world: World, *, expired: bool = True) -> None:
    """The books: every attempt once, what was answered as the provider bills it, and nothing held."""
    verdict = verify_connection(world.connection, world.head)
    for problem in verdict.problems:
        world.wrong(f"verify: {problem}")
    if verdict.debits != verdict.credits:
        world.wrong(f"{verdict.debits} debited, {verdict.credits} credited")
    entries = {entry.attempt_id: entry for entry in _entries(world)}
    attempts = {attempt: entry for attempt, entry in entries.items() if entry.provider != _CACHE}
    starts, bill = world.records.starts, world.vendor.bill
    for attempt in sorted(starts.keys() - attempts.keys() - world.disk.lost.keys()):
        world.wrong(f"attempt {attempt} began and was not settled")
    for attempt in sorted(attempts.keys() - starts.keys()):
        if attempts[attempt].outcome == _NOT_SENT and not attempts[attempt].amount and attempt not in bill:
            # It only ends the hold, or the disk was full.
            continue
        world.wrong(f"attempt {attempt} was settled and its start not recorded")
    for attempt in sorted(bill.keys() - starts.keys()):
        world.wrong(f"the provider bills {attempt}, whose start was not recorded")
    for attempt, entry in attempts.items():
        is_repeated = entry.flags == "repeated"
        if (entry.outcome == _LOST or is_repeated) != (entry.debit == PLATFORM):
            world.wrong(f"attempt {attempt} has outcome {entry.outcome} and is charged to {entry.debit}")
        if entry.flags and not is_repeated:
            world.wrong(f"attempt {attempt} is flagged {entry.flags}")
        if entry.outcome == _SUCCEEDED and entry.amount != bill.get(attempt, 0) and attempt not in world.vendor.crossed:
            world.wrong(f"attempt {attempt} succeeded, costs {entry.amount}, and the provider bills {bill.get(attempt, 0)}")
    _requests(world, attempts)
    _answers(world, attempts)
    if expired:
        for name, held in world.connection.execute("SELECT name, held FROM accounts WHERE held != 0").fetchall():
            world.wrong(f"{name} still holds {held}")
    at_commit(world)


def _requests(world: World, attempts: dict[str, Entry]) -> None:
    """Of a request that was run more than once, one run that answered is charged."""
    charged: dict[bytes, set[str]] = defaultdict(set)
    for attempt, record in world.records.starts.items():
        entry = attempts.get(attempt)
        if record.request_key and entry is not None and entry.outcome == _SUCCEEDED:
            runs = charged[record.request_key]
            if entry.debit != PLATFORM:
                runs.add(entry.operation_id)
    for runs in charged.values():
        if len(runs) != 1:
            world.wrong(f"of the runs of one request {sorted(runs)} are charged")


def _answers(world: World, attempts: dict[str, Entry]) -> None:
    by_operation: dict[str, list[Entry]] = defaultdict(list)
    for entry in attempts.values():
        by_operation[entry.operation_id].append(entry)
    operations: dict[tuple[str, str], set[str]] = defaultdict(set)
    for answered in world.records.answered:
        operation = answered.operation_id
        mine = by_operation[operation]
        if any(entry.attempt_id in world.disk.unwritten for entry in mine):
            # Its settlement was in memory alone: a full disk and a crash in one.
            continue
        if any(attempt.startswith(f"{operation}/") for attempt in world.disk.lost):
            # What the power may take is looked at by itself.
            continue
        # A repetition of what had been charged and whose answer a crash had lost says what it cost, and the platform pays.
        charged = sum(entry.amount for entry in mine if entry.debit != PLATFORM or entry.flags == "repeated")
        if charged != answered.cost:
            world.wrong(f"{answered.caller} was told that {operation} costs {answered.cost}, it is charged {charged}")
        for entry in mine:
            billed = world.vendor.bill.get(entry.attempt_id, 0)
            if entry.debit == PLATFORM and entry.flags != "repeated":
                world.wrong(f"{answered.caller} has its answer, and attempt {entry.attempt_id} is booked to the platform")
            elif entry.amount != billed and entry.attempt_id not in world.vendor.crossed:
                world.wrong(f"{operation} was answered, {entry.attempt_id} costs {entry.amount}, the provider bills {billed}")
        if answered.request_id:
            # Ten characters of an id are those of the gateway's process.
            operations[answered.request_id, operation[10:20]].add(operation)
    for (request_id, _), found in operations.items():
        if len(found) > 1:
            world.wrong(f"request id {request_id} was run more than once: {sorted(found)}")
