"""Any sequence of calls leaves a ledger that agrees with a plain model of it, and whose books agree with themselves.

An adapter's test derives from `LedgerMachine` and gives `new_database`.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from services.metering.accounts import Balance, Limits, Payer, Tenant
from services.metering.errors import BudgetExhausted, Exists, NotFound
from services.metering.ledger import PLATFORM, HoldState, PostState, Replica
from services.metering.ports import Store, UsageFilter
from tests.conformance.ledger.examples import ACME, NOW, key, settlement
from tests.conformance.ledger.suite import Database

PAYERS = (Payer(ACME, "default", "key-1"), Payer(ACME, "default", "key-2"))
BUDGETS = {"key/key-1": 600, "tenant/acme": 1000}

payers = st.sampled_from(PAYERS)
operations = st.integers(0, 5).map("op-{}".format)
lease_ids = st.integers(0, 2).map("lease-{}".format)
holders = st.sampled_from((Replica("g", "1"), Replica("g", "2"), Replica("h", "1"), Replica("", "i")))
amounts = st.integers(1, 400)
seconds = st.integers(1, 20)


@dataclass(frozen=True, slots=True)
class _Hold:
    payer: Payer
    amount: int
    state: HoldState
    ends: float
    holder: Replica


@dataclass(frozen=True, slots=True)
class _Lease:
    payer: Payer
    outstanding: int
    ends: float
    posted: int
    holder: Replica


@dataclass(frozen=True, slots=True)
class _Wish:
    """A settlement to be posted, by what it names."""

    attempt: str
    payer: Payer
    amount: int
    lease: str
    hold: str
    final: bool
    platform: bool
    request: bytes
    outcome: int


wishes = st.builds(
    _Wish,
    attempt=st.builds("{}/{}".format, operations, st.integers(1, 3)),
    payer=payers,
    amount=st.integers(0, 400),
    lease=st.one_of(st.just(""), lease_ids),
    hold=st.one_of(st.just(""), operations),
    final=st.booleans(),
    platform=st.booleans(),
    request=st.sampled_from((b"", b"a" * 16, b"b" * 16)),
    outcome=st.sampled_from((1, 1, 2)),
)


class LedgerMachine(RuleBasedStateMachine):
    """The model: balances by account, reservations, and what was journaled."""

    def __init__(self) -> None:
        super().__init__()
        self._runner = asyncio.Runner()
        self._resources = contextlib.ExitStack()
        self._database = self.new_database(self._resources)
        self._opened = contextlib.AsyncExitStack()
        self._store: Store
        self._now = NOW
        self._spent = dict.fromkeys([name for payer in PAYERS for name in payer.accounts], 0)
        self._held = dict(self._spent)
        self._holds: dict[str, _Hold] = {}
        self._leases: dict[str, _Lease] = {}
        self._journal: dict[str, int] = {}
        self._charged = 0
        self._owners: dict[bytes, str] = {}

    def new_database(self, resources: contextlib.ExitStack) -> Database:
        """An empty database that `resources` removes."""
        raise NotImplementedError

    async def _open(self) -> None:
        await self._opened.aclose()
        self._store = await self._opened.enter_async_context(self._database.open())

    def _left(self, payer: Payer) -> int | None:
        left = [BUDGETS[name] - self._spent[name] - self._held[name] for name in payer.accounts if name in BUDGETS]
        return min(left, default=None)

    def _hold_more(self, payer: Payer, amount: int) -> None:
        for name in payer.accounts:
            self._held[name] += amount

    @initialize()
    def accounts(self) -> None:
        async def make() -> None:
            await self._open()
            await self._store.create_tenant(Tenant(ACME, "", Limits(budget_nano_usd=BUDGETS["tenant/acme"]), NOW), "")
            for payer in PAYERS:
                limits = Limits(budget_nano_usd=BUDGETS.get(f"key/{payer.key_id}"))
                await self._store.create_key(key(payer.key_id, limits=limits))

        self._runner.run(make())

    @rule(operation=operations, payer=payers, amount=amounts, least=st.integers(0, 200), lasts=seconds, holder=holders)
    def hold(self, operation: str, payer: Payer, amount: int, least: int, lasts: int, holder: Replica) -> None:
        asked = self._store.hold(operation, payer, amount, least, self._now + lasts, holder)
        known, left = self._holds.get(operation), self._left(payer)
        if known is not None and known.payer != payer:
            with pytest.raises(Exists):
                self._runner.run(asked)
        elif known is not None:
            got = self._runner.run(asked)
            assert (got.amount, got.state, got.expire_time) == (known.amount, known.state, known.ends)
        elif left is not None and left < amount and not 0 < least <= left:
            with pytest.raises(BudgetExhausted):
                self._runner.run(asked)
        else:
            taken = amount if left is None else min(amount, left)
            assert self._runner.run(asked).amount == taken
            self._holds[operation] = _Hold(payer, taken, HoldState.OPEN, self._now + lasts, holder)
            self._hold_more(payer, taken)

    def _end(self, operation: str, state: HoldState) -> None:
        ended = self._holds[operation]
        if ended.state is HoldState.OPEN:
            self._holds[operation] = replace(ended, state=state)
            self._hold_more(ended.payer, -ended.amount)

    @rule(operation=operations)
    def void(self, operation: str) -> None:
        asked = self._store.void_hold(f"hold-{operation}")
        if operation not in self._holds:
            with pytest.raises(NotFound):
                self._runner.run(asked)
            return
        self._end(operation, HoldState.VOIDED)
        assert self._runner.run(asked) is self._holds[operation].state

    @rule(operation=operations, lasts=seconds)
    def void_later(self, operation: str, lasts: int) -> None:
        asked = self._store.void_hold(f"hold-{operation}", self._now + lasts)
        if operation not in self._holds:
            with pytest.raises(NotFound):
                self._runner.run(asked)
            return
        known = self._holds[operation]
        if known.state is HoldState.OPEN:
            self._holds[operation] = replace(known, ends=min(known.ends, self._now + lasts))
        assert self._runner.run(asked) is known.state

    @rule(lease=lease_ids, payer=payers, wanted=st.integers(0, 400), reserve=st.integers(0, 300), lasts=seconds, holder=holders)
    def grant(self, lease: str, payer: Payer, wanted: int, reserve: int, lasts: int, holder: Replica) -> None:
        asked = self._store.grant_slice(lease, payer, wanted, reserve, self._now + lasts, holder)
        known, left = self._leases.get(lease), self._left(payer)
        if known is not None and known.payer != payer:
            with pytest.raises(NotFound):
                self._runner.run(asked)
            return
        assert left is not None
        granted = wanted if left - wanted >= reserve else 0
        got = self._runner.run(asked)
        assert (got.granted, got.left) == (granted, left - granted)
        before = known.outstanding if known is not None else 0
        posted = known.posted if known is not None else 0
        self._leases[lease] = _Lease(
            payer, before + granted, self._now + lasts, posted, known.holder if known is not None else holder
        )
        self._hold_more(payer, granted)

    @rule(survivor=holders, lasts=seconds)
    def end_reservations(self, survivor: Replica, lasts: int) -> None:
        def is_ended(holder: Replica) -> bool:
            return bool(survivor.slot) and holder.slot == survivor.slot and holder.incarnation != survivor.incarnation

        leases = [name for name, lease in self._leases.items() if is_ended(lease.holder)]
        holds = [name for name, hold in self._holds.items() if hold.state is HoldState.OPEN and is_ended(hold.holder)]
        ends = self._now + lasts
        assert self._runner.run(self._store.end_reservations(survivor, ends)) == len(leases) + len(holds)
        for name in leases:
            self._leases[name] = replace(self._leases[name], ends=min(self._leases[name].ends, ends))
        for name in holds:
            self._holds[name] = replace(self._holds[name], ends=min(self._holds[name].ends, ends))

    @rule(lease=lease_ids, owed=st.integers(0, 500), lasts=seconds)
    def give_back(self, lease: str, owed: int, lasts: int) -> None:
        self._runner.run(self._store.return_lease(lease, owed, self._now + lasts))
        known = self._leases.pop(lease, None)
        if known is not None:
            kept = min(max(0, owed - known.posted), known.outstanding)
            self._hold_more(known.payer, kept - known.outstanding)
            if kept:
                self._leases[lease] = replace(known, outstanding=kept, ends=self._now + lasts)

    @rule(batch=st.lists(wishes, min_size=1, max_size=5))
    def post(self, batch: list[_Wish]) -> None:
        expected = []
        for wish in batch:
            if wish.attempt in self._journal:
                expected.append(PostState.DUPLICATE)
                continue
            expected.append(PostState.POSTED)
            self._journal[wish.attempt] = wish.amount
            operation = wish.attempt.partition("/")[0]
            is_charged = not wish.platform and self._owners.get(wish.request, operation) == operation
            if is_charged and wish.request and wish.outcome == 1:
                self._owners[wish.request] = operation
            if is_charged:
                self._charged += wish.amount
                for name in wish.payer.accounts:
                    self._spent[name] += wish.amount
                if (lease := self._leases.get(wish.lease)) is not None:
                    used = min(wish.amount, lease.outstanding)
                    self._leases[wish.lease] = replace(
                        lease, outstanding=lease.outstanding - used, posted=lease.posted + wish.amount
                    )
                    self._hold_more(lease.payer, -used)
            if wish.final and wish.hold in self._holds:
                self._end(wish.hold, HoldState.POSTED)
        sent = [
            settlement(
                wish.attempt,
                amount=wish.amount,
                payer=wish.payer,
                debit=PLATFORM if wish.platform else "",
                lease_id=wish.lease,
                hold_id=wish.hold and f"hold-{wish.hold}",
                final=wish.final,
                request_key=wish.request,
                outcome=wish.outcome,
            )
            for wish in batch
        ]
        assert self._runner.run(self._store.post(sent)) == expected

    @rule(passed=seconds)
    def time_passes(self, passed: int) -> None:
        self._now += passed
        over = [name for name, hold in self._holds.items() if hold.state is HoldState.OPEN and hold.ends <= self._now]
        for name in over:
            self._end(name, HoldState.EXPIRED)
        ended = [name for name, lease in self._leases.items() if lease.ends <= self._now]
        for name in ended:
            lease = self._leases.pop(name)
            self._hold_more(lease.payer, -lease.outstanding)
        assert self._runner.run(self._store.expire(self._now)) == len(over) + len(ended)

    @rule()
    def reopen(self) -> None:
        self._runner.run(self._open())

    @invariant()
    def the_books_agree(self) -> None:
        self._runner.run(self._check())

    async def _check(self) -> None:
        if not hasattr(self, "_store"):
            return
        verdict = await self._store.verify()
        assert verdict.problems == ()
        assert verdict.debits == verdict.credits == sum(self._journal.values())
        for payer in PAYERS:
            chain = await self._store.chain_by_key(payer.key_id)
            assert chain is not None
            found = [chain.key.balance, chain.project.balance, chain.tenant.balance]
            assert found == [Balance(self._spent[name], self._held[name]) for name in payer.accounts]
        entries = await self._store.entries("", "", None, 1000)
        assert {one.entry.attempt_id: one.entry.amount for one in entries} == self._journal
        assert [one.sequence for one in entries] == list(range(len(self._journal), 0, -1))
        assert sum(row.cost for row in await self._store.usage(UsageFilter(), ["key"], (), 10)) == self._charged

    def teardown(self) -> None:
        self._runner.run(self._opened.aclose())
        self._runner.close()
        self._resources.close()
