"""What every ledger store keeps to. An adapter's test derives from `LedgerSuite` and gives the fixture `database`."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest

from services.metering.accounts import Balance, Key, Limits, ModelLimits, Payer, Project, Tenant
from services.metering.errors import BudgetExhausted, Exists, NotFound
from services.metering.ledger import GENESIS, PLATFORM, Entry, Head, HoldState, PostState, Replica
from services.metering.ports import Posted, Store, UsageFilter
from tests.conformance.ledger.examples import ACME, HOLDER, HOUR, NOW, PAYER, key, settlement

ROOT = Path(__file__).resolve().parents[3]
ENOUGH = 1_000_000
_KILLS = 10
"""A store made to confirm before its commit was caught in 5 of 6 runs of ten kills, in 3 of 5 runs of three."""


class Database(Protocol):
    """Where the stores of one test keep their rows."""

    writer: Sequence[str]
    """Arguments that make `tests.conformance.ledger.writer` open a store on it in another process."""

    def open(self) -> AbstractAsyncContextManager[Store]:
        """A store on it; one after the other see the same rows."""

    async def refuses(self, statement: str) -> bool:
        """Whether the database itself, asked past the store, refuses this SQL."""

    async def tamper(self, statement: str) -> None:
        """Runs SQL past the store and its guards."""

    async def stored(self) -> bytes:
        """All that is stored, as bytes."""


async def prepare(store: Store, *, tenant: int | None = None, project: int | None = None, of_key: int | None = None) -> None:
    """Makes the accounts of PAYER with these budgets."""
    await store.create_tenant(Tenant(ACME, "Acme", Limits(budget_nano_usd=tenant), NOW), "")
    await store.update_project(ACME, "default", None, lambda _: Limits(budget_nano_usd=project))
    await store.create_key(key(limits=Limits(budget_nano_usd=of_key)))


async def balances(store: Store) -> tuple[Balance, Balance, Balance]:
    """Balances of PAYER's key, project and tenant."""
    chain = await store.chain_by_key(PAYER.key_id)
    assert chain is not None
    return chain.key.balance, chain.project.balance, chain.tenant.balance


async def assert_balances(store: Store, *, spent: int, held: int) -> None:
    """All three accounts of PAYER say so, and the books agree."""
    assert await balances(store) == (Balance(spent, held),) * 3
    assert (await store.verify()).problems == ()


class LedgerSuite:
    """The contract."""

    @pytest.fixture
    async def store(self, database: Database) -> AsyncIterator[Store]:
        async with database.open() as store:
            yield store

    # Holds.

    async def test_a_hold_is_taken_at_all_three_accounts_and_only_once_per_operation(self, store: Store) -> None:
        await prepare(store, tenant=1000, project=500, of_key=300)
        first = await store.hold("op-1", PAYER, 100, 0, NOW + HOUR, HOLDER)
        assert (first.amount, first.state, first.budget_before, first.budget_level) == (100, HoldState.OPEN, 300, "key")
        assert (first.operation_id, first.payer, first.expire_time) == ("op-1", PAYER, NOW + HOUR)
        assert await store.hold("op-1", PAYER, 100, 0, NOW + HOUR, HOLDER) == first
        await assert_balances(store, spent=0, held=100)

    async def test_the_same_hold_asked_for_at_once_is_taken_once(self, store: Store) -> None:
        await prepare(store, tenant=1000)
        taken = await asyncio.gather(*(store.hold("op-1", PAYER, 100, 0, NOW + HOUR, HOLDER) for _ in range(20)))
        assert len({hold.id for hold in taken}) == 1
        await assert_balances(store, spent=0, held=100)

    @pytest.mark.parametrize("level", ["key", "project", "tenant"])
    async def test_the_tightest_budget_refuses_and_then_nothing_is_held_anywhere(self, store: Store, level: str) -> None:
        budgets = {"key": ENOUGH, "project": ENOUGH, "tenant": ENOUGH} | {level: 99}
        await prepare(store, tenant=budgets["tenant"], project=budgets["project"], of_key=budgets["key"])
        with pytest.raises(BudgetExhausted) as refused:
            await store.hold("op-1", PAYER, 100, 0, NOW + HOUR, HOLDER)
        assert refused.value.metadata == {"level": level, "wanted_nano_usd": "100", "left_nano_usd": "99"}
        await assert_balances(store, spent=0, held=0)
        # The refusal isn't remembered: the operation may ask for less.
        assert (await store.hold("op-1", PAYER, 99, 0, NOW + HOUR, HOLDER)).amount == 99

    async def test_a_hold_takes_what_is_left_down_to_its_least(self, store: Store) -> None:
        await prepare(store, tenant=100)
        with pytest.raises(BudgetExhausted):
            await store.hold("op-1", PAYER, 150, 101, NOW + HOUR, HOLDER)
        clamped = await store.hold("op-1", PAYER, 150, 100, NOW + HOUR, HOLDER)
        assert (clamped.amount, clamped.budget_before) == (100, 100)
        with pytest.raises(BudgetExhausted):
            await store.hold("op-2", PAYER, 150, 1, NOW + HOUR, HOLDER)
        await assert_balances(store, spent=0, held=100)

    async def test_without_a_budget_holds_are_counted_and_never_refused(self, store: Store) -> None:
        await prepare(store)
        hold = await store.hold("op-1", PAYER, 1 << 50, 0, NOW + HOUR, HOLDER)
        assert (hold.budget_before, hold.budget_level) == (None, "")
        await assert_balances(store, spent=0, held=1 << 50)

    async def test_two_hundred_at_once_get_exactly_what_the_budget_covers(self, store: Store) -> None:
        await prepare(store, tenant=1000, project=730, of_key=5000)
        asked = (store.hold(f"op-{number}", PAYER, 10, 0, NOW + HOUR, HOLDER) for number in range(200))
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        assert all(isinstance(error, BudgetExhausted) for error in refused)
        assert len(refused) == 200 - 73
        await assert_balances(store, spent=0, held=730)

    async def test_a_refusal_among_many_undoes_itself_alone(self, store: Store) -> None:
        await prepare(store, tenant=100)
        amounts = [60, 1000, 40]
        asked = (store.hold(f"op-{amount}", PAYER, amount, 0, NOW + HOUR, HOLDER) for amount in amounts)
        first, second, third = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(second, BudgetExhausted)
        assert not isinstance(first, BaseException)
        assert not isinstance(third, BaseException)
        await assert_balances(store, spent=0, held=100)

    async def test_a_voided_hold_is_free_again_and_voiding_twice_frees_once(self, store: Store) -> None:
        await prepare(store, tenant=100)
        hold = await store.hold("op-1", PAYER, 60, 0, NOW + HOUR, HOLDER)
        other = await store.hold("op-2", PAYER, 40, 0, NOW + HOUR, HOLDER)
        states = await asyncio.gather(*(store.void_hold(hold.id) for _ in range(2)))
        assert states == [HoldState.VOIDED] * 2
        await assert_balances(store, spent=0, held=40)
        assert (await store.hold("op-3", PAYER, 60, 0, NOW + HOUR, HOLDER)).amount == 60
        assert other.state is HoldState.OPEN

    async def test_what_has_no_hold_cannot_be_voided(self, store: Store) -> None:
        with pytest.raises(NotFound):
            await store.void_hold("hold-of-nobody")

    async def test_a_hold_ends_by_itself_at_its_time_and_a_late_settlement_still_posts_once(self, store: Store) -> None:
        await prepare(store, tenant=100)
        hold = await store.hold("op-1", PAYER, 100, 0, NOW + 10, HOLDER)
        assert await store.expire(NOW + 9.9) == 0
        await assert_balances(store, spent=0, held=100)
        assert await store.expire(NOW + 10) == 1
        assert await store.expire(NOW + 10) == 0
        await assert_balances(store, spent=0, held=0)
        assert await store.void_hold(hold.id) is HoldState.EXPIRED
        late = settlement("op-1/1", amount=70, hold_id=hold.id, final=True)
        assert await store.post([late]) == [PostState.POSTED]
        assert await store.post([late]) == [PostState.DUPLICATE]
        assert await store.void_hold(hold.id) is HoldState.EXPIRED
        await assert_balances(store, spent=70, held=0)

    # Settlements.

    async def test_a_final_settlement_charges_its_cost_and_frees_the_hold(self, store: Store) -> None:
        await prepare(store, tenant=100)
        hold = await store.hold("op-1", PAYER, 100, 0, NOW + HOUR, HOLDER)
        first = settlement("op-1/1", amount=20, hold_id=hold.id, final=False)
        assert await store.post([first]) == [PostState.POSTED]
        await assert_balances(store, spent=20, held=100)
        second = settlement("op-1/2", amount=30, hold_id=hold.id, final=True)
        assert await store.post([second]) == [PostState.POSTED]
        assert await store.void_hold(hold.id) is HoldState.POSTED
        assert await store.expire(NOW + 2 * HOUR) == 0
        await assert_balances(store, spent=50, held=0)

    async def test_a_settlement_above_its_hold_is_charged_in_full_and_the_next_hold_refused(self, store: Store) -> None:
        await prepare(store, tenant=100)
        hold = await store.hold("op-1", PAYER, 100, 0, NOW + HOUR, HOLDER)
        await store.post([settlement("op-1/1", amount=130, hold_id=hold.id, final=True)])
        await assert_balances(store, spent=130, held=0)
        with pytest.raises(BudgetExhausted) as refused:
            await store.hold("op-2", PAYER, 1, 1, NOW + HOUR, HOLDER)
        assert refused.value.metadata["left_nano_usd"] == "0"

    async def test_an_attempt_is_posted_once_however_often_it_is_sent(self, store: Store, database: Database) -> None:
        await prepare(store)
        wanted = settlement("op-1/1", amount=7)
        assert await store.post([wanted, wanted, settlement("op-1/2", amount=3)]) == [
            PostState.POSTED,
            PostState.DUPLICATE,
            PostState.POSTED,
        ]
        # A repetition that says otherwise changes nothing.
        assert await store.post([settlement("op-1/1", amount=900)]) == [PostState.DUPLICATE]
        await assert_balances(store, spent=10, held=0)
        assert [posted.entry.amount for posted in await store.entries("", "op-1", None, 10)] == [3, 7]

    async def test_the_attempts_of_an_operation_are_those_of_no_other(self, store: Store) -> None:
        await prepare(store)
        names = ["op/1", "op/2", "op/cache", "op-1/1", "op0/1", "op./1", "op1/1", "o/1", "op/1/1", "OP/1", "op\x7f/1"]
        posted = [settlement(name, amount=1) for name in names]
        # An operation whose id has a slash in it.
        posted = [
            one._replace(entry=one.entry._replace(operation_id="op/1")) if one.entry.attempt_id == "op/1/1" else one
            for one in posted
        ]
        await store.post(posted)
        for tenant in ("", PAYER.tenant_id):
            found = await store.entries(tenant, "op", None, 100)
            assert [posted.entry.attempt_id for posted in found] == ["op/cache", "op/2", "op/1"]
            assert [posted.sequence for posted in await store.entries(tenant, "op", 3, 1)] == [2]
        assert await store.entries("another", "op", None, 100) == []

    async def test_new_attempts_between_posted_ones_are_posted(self, store: Store) -> None:
        await prepare(store)
        await store.post([settlement(f"op-{number}/1", amount=1) for number in range(0, 100, 3)])
        states = await store.post([settlement(f"op-{number}/1", amount=1) for number in range(100)])
        assert [state is PostState.DUPLICATE for state in states] == [number % 3 == 0 for number in range(100)]
        await assert_balances(store, spent=100, held=0)
        assert (await store.verify()).problems == ()

    async def test_an_attempt_sent_from_many_sides_at_once_is_posted_once(self, store: Store) -> None:
        await prepare(store)
        batches = [[settlement(f"op-{number}/1", amount=number) for number in range(30)] for _ in range(20)]
        for number, batch in enumerate(batches):
            random.Random(number).shuffle(batch)
        states = await asyncio.gather(*(store.post(batch) for batch in batches))
        flat = [state for batch in states for state in batch]
        assert flat.count(PostState.POSTED) == 30
        assert flat.count(PostState.DUPLICATE) == 30 * 19
        await assert_balances(store, spent=sum(range(30)), held=0)

    async def test_more_settlements_than_a_statement_has_variables_are_told_apart(self, store: Store) -> None:
        await prepare(store)
        many = [settlement(f"op-{number}/1", amount=1) for number in range(1000)]
        await store.post(many[500:600])
        states = await store.post(many)
        assert [index for index, state in enumerate(states) if state is PostState.DUPLICATE] == list(range(500, 600))
        await assert_balances(store, spent=1000, held=0)

    async def test_what_the_platform_pays_is_journaled_and_charged_to_nobody(self, store: Store) -> None:
        await prepare(store, tenant=100)
        lease = await store.grant_slice("lease-1", PAYER, 50, 0, NOW + HOUR, HOLDER)
        assert lease.granted == 50
        twice = settlement("op-1/1", amount=40, debit="platform", lease_id="lease-1")
        assert await store.post([twice]) == [PostState.POSTED]
        await assert_balances(store, spent=0, held=50)
        verdict = await store.verify()
        assert (verdict.entries, verdict.debits, verdict.credits) == (1, 40, 40)

    async def test_one_operation_of_a_request_is_charged_and_the_others_are_the_platforms(self, store: Store) -> None:
        await prepare(store, tenant=1000)
        mine, another = b"a" * 16, b"b" * 16
        # Both in one call and in several: whichever answered first is charged, with all of its attempts.
        await store.post(
            [
                settlement("op-1/1", amount=1, request_key=mine, outcome=2),
                settlement("op-1/2", amount=20, request_key=mine),
                settlement("op-2/1", amount=21, request_key=mine),
            ]
        )
        held = await store.hold("op-3", PAYER, 100, 0, NOW + 60, HOLDER)
        sent = [settlement("op-3/1", amount=22, request_key=mine, hold_id=held.id)]
        assert await store.post(sent) == [PostState.POSTED]
        assert await store.post(sent) == [PostState.DUPLICATE]
        await store.post([settlement("op-4/1", amount=300, request_key=another), settlement("op-5/1", amount=400)])
        await assert_balances(store, spent=721, held=0)
        entries = {one.entry.attempt_id: one.entry for one in await store.entries("", "", None, 100)}
        repeated = {name for name, entry in entries.items() if entry.flags == "repeated"}
        assert repeated == {name for name, entry in entries.items() if entry.debit == "platform"} == {"op-2/1", "op-3/1"}

    async def test_what_did_not_answer_leaves_the_charge_to_what_does(self, store: Store) -> None:
        """Who leaves on purpose and asks again gets two pieces of work and pays for both."""
        await prepare(store, tenant=1000)
        request = b"a" * 16
        await store.post([settlement("op-1/1", amount=5, request_key=request, outcome=3)])
        await store.post([settlement("op-2/1", amount=6, request_key=request, debit="platform")])
        await store.post([settlement("op-3/1", amount=7, request_key=request)])
        await store.post([settlement("op-4/1", amount=8, request_key=request, outcome=3)])
        await assert_balances(store, spent=12, held=0)

    async def test_a_request_key_stands_for_its_request_for_a_day(self, store: Store) -> None:
        await prepare(store, tenant=1000)
        request, day = b"a" * 16, 24 * HOUR
        await store.post([settlement("op-1/1", amount=1, request_key=request)])
        await store.expire(NOW + day - 1)
        await store.post([settlement("op-2/1", amount=2, request_key=request)])
        await store.expire(NOW + day + 1)
        await store.post([settlement("op-3/1", amount=4, request_key=request)])
        await assert_balances(store, spent=5, held=0)

    async def test_a_settlement_of_an_account_that_nobody_made_is_kept_for_it(self, store: Store) -> None:
        await store.post([settlement("op-1/1", amount=9)])
        await prepare(store, tenant=10)
        await assert_balances(store, spent=9, held=0)
        with pytest.raises(BudgetExhausted):
            await store.hold("op-2", PAYER, 2, 0, NOW + HOUR, HOLDER)

    # Leases.

    async def test_a_slice_is_deducted_when_granted_and_its_cost_is_moved_from_held_to_spent(self, store: Store) -> None:
        await prepare(store, tenant=1000)
        granted = await store.grant_slice("lease-1", PAYER, 300, 0, NOW + HOUR, HOLDER)
        assert (granted.granted, granted.budget, granted.left, granted.level) == (300, 1000, 700, "tenant")
        await assert_balances(store, spent=0, held=300)
        await store.post([settlement("op-1/1", amount=120, lease_id="lease-1")])
        await assert_balances(store, spent=120, held=180)
        more = await store.grant_slice("lease-1", PAYER, 200, 0, NOW + 2 * HOUR, HOLDER)
        assert (more.granted, more.left) == (200, 500)
        await assert_balances(store, spent=120, held=380)
        # Extended: the first end frees nothing.
        assert await store.expire(NOW + HOUR) == 0
        assert await store.expire(NOW + 2 * HOUR) == 1
        await assert_balances(store, spent=120, held=0)

    async def test_a_lease_that_costs_more_than_it_has_left_frees_no_more_than_that(self, store: Store) -> None:
        await prepare(store, tenant=1000)
        await store.grant_slice("lease-1", PAYER, 100, 0, NOW + HOUR, HOLDER)
        await store.post(
            [settlement("op-1/1", amount=80, lease_id="lease-1"), settlement("op-2/1", amount=50, lease_id="lease-1")]
        )
        await assert_balances(store, spent=130, held=0)

    async def test_no_slice_is_granted_that_would_leave_less_than_the_reserve(self, store: Store) -> None:
        await prepare(store, tenant=1000, of_key=400)
        assert (await store.grant_slice("lease-1", PAYER, 101, 300, NOW + HOUR, HOLDER)).granted == 0
        await assert_balances(store, spent=0, held=0)
        full = await store.grant_slice("lease-1", PAYER, 100, 300, NOW + HOUR, HOLDER)
        assert (full.granted, full.budget, full.left, full.level) == (100, 400, 300, "key")
        await assert_balances(store, spent=0, held=100)

    async def test_without_a_budget_a_slice_is_unlimited(self, store: Store) -> None:
        await prepare(store)
        granted = await store.grant_slice("lease-1", PAYER, 100, 0, NOW + HOUR, HOLDER)
        assert (granted.granted, granted.budget, granted.left) == (-1, None, None)
        # A budget set afterwards finds nothing held by the lease.
        await store.update_tenant(ACME, None, lambda _: Limits(budget_nano_usd=100))
        await store.post([settlement("op-1/1", amount=60, lease_id="lease-1")])
        await assert_balances(store, spent=60, held=0)

    async def test_slices_and_holds_together_never_pass_the_budget(self, store: Store) -> None:
        await prepare(store, tenant=1000)

        async def slice_of(number: int) -> int:
            return (await store.grant_slice(f"lease-{number}", PAYER, 70, 0, NOW + HOUR, HOLDER)).granted

        async def hold_of(number: int) -> int:
            try:
                return (await store.hold(f"op-{number}", PAYER, 30, 0, NOW + HOUR, HOLDER)).amount
            except BudgetExhausted:
                return 0

        taken = await asyncio.gather(*(one(number) for number in range(100) for one in (slice_of, hold_of)))
        assert 970 < sum(taken) <= 1000
        await assert_balances(store, spent=0, held=sum(taken))

    async def test_a_returned_lease_frees_all_but_what_is_still_held(self, store: Store) -> None:
        await prepare(store, tenant=1000)
        await store.grant_slice("lease-1", PAYER, 300, 0, NOW + HOUR, HOLDER)
        await store.return_lease("lease-1", 80, NOW + 60)
        await assert_balances(store, spent=0, held=80)
        await store.return_lease("lease-1", 80, NOW + 60)
        await assert_balances(store, spent=0, held=80)
        await store.post([settlement("op-1/1", amount=50, lease_id="lease-1")])
        await assert_balances(store, spent=50, held=30)
        assert await store.expire(NOW + 59) == 0
        assert await store.expire(NOW + 60) == 1
        await assert_balances(store, spent=50, held=0)

    async def test_a_cost_that_is_known_but_not_posted_stays_reserved_when_the_lease_is_returned(self, store: Store) -> None:
        await prepare(store, tenant=1000)
        await store.grant_slice("lease-1", PAYER, 900, 0, NOW + HOUR, HOLDER)
        await store.post([settlement("op-1/1", amount=100, lease_id="lease-1")])
        # The replica settled 500 in all; the settlements of 400 are still on their way.
        await store.return_lease("lease-1", 500, NOW + HOUR)
        await assert_balances(store, spent=100, held=400)
        with pytest.raises(BudgetExhausted):
            await store.hold("op-2", PAYER, 501, 0, NOW + HOUR, HOLDER)
        await store.post([settlement("op-3/1", amount=400, lease_id="lease-1")])
        await assert_balances(store, spent=500, held=0)
        await store.return_lease("lease-1", 500, NOW + HOUR)
        await assert_balances(store, spent=500, held=0)

    async def test_a_lease_cannot_keep_more_than_it_has_and_an_unknown_one_is_ignored(self, store: Store) -> None:
        await prepare(store, tenant=1000)
        await store.grant_slice("lease-1", PAYER, 100, 0, NOW + HOUR, HOLDER)
        await store.return_lease("lease-1", 5000, NOW + HOUR)
        await assert_balances(store, spent=0, held=100)
        await store.return_lease("lease-1", 0, NOW + HOUR)
        await store.return_lease("lease-1", 0, NOW + HOUR)
        await store.return_lease("lease-of-nobody", 10, NOW + HOUR)
        await assert_balances(store, spent=0, held=0)

    async def test_a_replica_that_was_started_again_ends_what_the_one_before_held_and_nothing_else(
        self, database: Database
    ) -> None:
        before, after = HOLDER, Replica(HOLDER.slot, "second")
        async with database.open() as store:
            await prepare(store, tenant=1000)
            await store.grant_slice("lease-1", PAYER, 100, 0, NOW + HOUR, before)
            await store.grant_slice("lease-2", PAYER, 90, 0, NOW + 5, before)
            await store.grant_slice("lease-3", PAYER, 80, 0, NOW + HOUR, after)
            await store.grant_slice("lease-4", PAYER, 70, 0, NOW + HOUR, Replica("gateway-2", "first"))
            await store.grant_slice("lease-5", PAYER, 60, 0, NOW + HOUR, Replica("", "gateway-abc"))
            for operation, lasts, holder in (
                ("op-2", HOUR, before),
                ("op-3", 5, before),
                ("op-4", HOUR, after),
                ("op-5", HOUR, Replica("", "gateway-abc")),
                ("op-6", HOUR, before),
            ):
                await store.hold(operation, PAYER, 1, 0, NOW + lasts, holder)
            await store.void_hold("hold-op-6")
        # Known of by the store itself: the metering process that granted them may be gone, too.
        async with database.open() as store:
            assert await store.end_reservations(after, NOW + 15) == 4
            assert await store.end_reservations(after, NOW + HOUR) == 4
            assert await store.end_reservations(Replica("", "gateway-def"), NOW + 1) == 0
            assert await store.expire(NOW + 5) == 2
            await store.post([settlement("op-1/1", amount=30, lease_id="lease-1")])
            await assert_balances(store, spent=30, held=70 + 80 + 70 + 60 + 3)
            assert await store.expire(NOW + 14) == 0
            assert await store.expire(NOW + 15) == 2
            await assert_balances(store, spent=30, held=80 + 70 + 60 + 2)
            assert await store.end_reservations(after, NOW) == 0

    async def test_a_late_settlement_of_a_lease_that_is_over_posts_once(self, store: Store) -> None:
        await prepare(store, tenant=1000)
        await store.grant_slice("lease-1", PAYER, 100, 0, NOW + HOUR, HOLDER)
        assert await store.expire(NOW + HOUR) == 1
        late = settlement("op-1/1", amount=40, lease_id="lease-1")
        assert await store.post([late]) == [PostState.POSTED]
        assert await store.post([late]) == [PostState.DUPLICATE]
        await assert_balances(store, spent=40, held=0)

    async def test_a_lease_of_another_payer_is_not_extended(self, store: Store) -> None:
        await prepare(store, tenant=1000)
        await store.create_key(key("key-2"))
        await store.grant_slice("lease-1", PAYER, 100, 0, NOW + HOUR, HOLDER)
        with pytest.raises(NotFound):
            await store.grant_slice("lease-1", Payer(ACME, "default", "key-2"), 100, 0, NOW + HOUR, HOLDER)
        await assert_balances(store, spent=0, held=100)

    # Durability and the journal.

    async def test_reopening_keeps_everything(self, database: Database) -> None:
        async with database.open() as store:
            await prepare(store, tenant=1000, of_key=900)
            hold = await store.hold("op-1", PAYER, 100, 0, NOW + HOUR, HOLDER)
            await store.grant_slice("lease-1", PAYER, 200, 0, NOW + HOUR, HOLDER)
            await store.post([settlement("op-0/1", amount=30, lease_id="lease-1")])
            await store.create_project(Project("site", ACME, "Site", Limits(concurrency=3), NOW), "r")
            before = (
                await store.chain_by_key(PAYER.key_id),
                await store.projects(ACME, "", 10),
                await store.entries("", "", None, 10),
                await store.usage(UsageFilter(), ["key"], (), 10),
            )
        async with database.open() as store:
            after = (
                await store.chain_by_key(PAYER.key_id),
                await store.projects(ACME, "", 10),
                await store.entries("", "", None, 10),
                await store.usage(UsageFilter(), ["key"], (), 10),
            )
            assert after == before
            await assert_balances(store, spent=30, held=270)
            # And goes on: what was posted stays posted, what was held stays held, the chain of hashes continues.
            assert await store.post([settlement("op-0/1", amount=30)]) == [PostState.DUPLICATE]
            assert await store.hold("op-1", PAYER, 100, 0, NOW + HOUR, HOLDER) == hold
            await store.post([settlement("op-1/1", amount=40, hold_id=hold.id, final=True)])
            await assert_balances(store, spent=70, held=170)
            assert [posted.sequence for posted in await store.entries("", "", None, 10)] == [2, 1]

    async def test_what_was_confirmed_before_a_kill_is_there_after_it(self, database: Database) -> None:
        async with database.open() as store:
            await prepare(store)
        confirmed: list[str] = []
        for round_number in range(_KILLS):
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.conformance.ledger.writer", str(round_number), *database.writer,
                cwd=ROOT, env={"PYTHONPATH": f"{ROOT / 'gen'}:{ROOT}"}, stdout=asyncio.subprocess.PIPE,
            )  # fmt: skip
            assert child.stdout is not None
            try:
                # Killed in the middle of its work: it would go on for ever.
                lines = [await child.stdout.readline() for _ in range(60 + 30 * round_number)]
            finally:
                child.send_signal(signal.SIGKILL)
            lines += (await child.stdout.read()).splitlines(keepends=True)
            assert await child.wait() == -signal.SIGKILL
            confirmed += [line.decode().strip() for line in lines if line.endswith(b"\n")]
        assert len(confirmed) == len(set(confirmed)) >= 60 * _KILLS
        async with database.open() as store:
            posted = {one.entry.attempt_id: one.entry for one in await store.entries("", "", None, 1_000_000)}
            assert set(confirmed) <= set(posted)
            assert (await store.verify()).problems == ()
            assert {balance.spent_nano_usd for balance in await balances(store)} == {len(posted)}
            # A client that doesn't know what became of its last calls sends all again.
            again = [settlement(attempt, amount=1) for attempt in posted]
            for start in range(0, len(again), 1000):
                batch = again[start : start + 1000]
                assert await store.post(batch) == [PostState.DUPLICATE] * len(batch)
            assert {balance.spent_nano_usd for balance in await balances(store)} == {len(posted)}

    async def test_the_database_refuses_to_change_or_delete_an_entry(self, store: Store, database: Database) -> None:
        await prepare(store)
        await store.post([settlement("op-1/1", amount=5), settlement("op-1/2", amount=6)])
        assert await database.refuses("UPDATE journal SET amount = 1")
        assert await database.refuses("DELETE FROM journal WHERE sequence = 2")
        assert await database.refuses("DELETE FROM journal")
        assert [one.entry.amount for one in await store.entries("", "", None, 10)] == [6, 5]

    @pytest.mark.parametrize(
        ("statement", "told"),
        [
            ("UPDATE journal SET amount = amount + 1 WHERE sequence = 2", "entry 2 "),
            ("UPDATE journal SET model = 'other' WHERE sequence = 2", "entry 2 "),
            ("UPDATE journal SET post_micros = post_micros - 1 WHERE sequence = 2", "entry 2 "),
            ("DELETE FROM journal WHERE sequence = 2", "entries 2 to 2 are missing"),
            ("DELETE FROM journal WHERE sequence = 3", "key/key-1 says 6 spent, the journal 3"),
            ("UPDATE journal SET hash = (SELECT hash FROM journal WHERE sequence = 1) WHERE sequence = 3", "entry 3 "),
            ("UPDATE accounts SET spent = spent + 1 WHERE name = 'key/key-1'", "key/key-1 says 7 spent, the journal 6"),
            ("UPDATE accounts SET held = held + 1 WHERE name = 'tenant/acme'", "tenant/acme says 1 held, its reservations 0"),
        ],
    )  # fmt: skip
    async def test_a_row_changed_past_the_store_is_found(self, database: Database, statement: str, told: str) -> None:
        async with database.open() as store:
            await prepare(store)
            await store.post([settlement(f"op-{number}/1", amount=number) for number in (1, 2, 3)])
            assert (await store.verify()).problems == ()
        await database.tamper(statement)
        async with database.open() as store:
            problems = (await store.verify()).problems
            assert any(told in problem for problem in problems), problems

    async def test_the_head_is_the_last_entrys_and_moves_with_each(self, store: Store) -> None:
        heads = [await store.head()]
        assert heads == [Head(0, GENESIS)]
        for number in (1, 2, 3):
            await store.post([settlement(f"op-{number}/1", amount=number)])
            heads.append(await store.head())
        assert [head.sequence for head in heads] == [0, 1, 2, 3]
        assert len({head.hash for head in heads}) == 4
        for head in heads:
            verdict = await store.verify(head)
            assert (verdict.problems, verdict.head) == ((), heads[-1])

    @pytest.mark.parametrize(
        ("statement", "told"),
        [
            ("DELETE FROM journal WHERE sequence = 3", "entries 3 to 3 are missing: they were there when the head was kept"),
            # Found by nothing else: each balance is what the journal says, and nobody knows how long it was.
            ("DELETE FROM journal WHERE sequence = 4", "entries 4 to 4 are missing: they were there when the head was kept"),
        ],
    )
    async def test_a_tail_that_was_cut_is_found_by_a_head_that_was_kept(
        self, database: Database, statement: str, told: str
    ) -> None:
        async with database.open() as store:
            await store.post([settlement(f"op-{number}/1", amount=number) for number in (1, 2, 3)])
            if "4" in statement:
                await store.post([settlement("op-4/1", amount=5, debit=PLATFORM)])
            kept = await store.head()
        await database.tamper(statement)
        async with database.open() as store:
            assert any(told in problem for problem in (await store.verify(kept)).problems)
            if "4" in statement:
                assert (await store.verify()).problems == ()

    async def test_a_ledger_written_anew_is_found_by_a_head_that_was_kept(self, store: Store) -> None:
        await store.post([settlement("op-1/1", amount=1), settlement("op-2/1", amount=1)])
        real = await store.head()
        other = Head(1, bytes(15) + b"1")
        assert (await store.verify(real)).problems == ()
        (problem,) = (await store.verify(other)).problems
        assert problem.startswith("entry 1 is not the one whose hash was kept")

    @pytest.mark.parametrize("column", Entry._fields)
    async def test_a_change_of_any_column_is_found(self, database: Database, column: str) -> None:
        async with database.open() as store:
            await store.post([settlement("op-1/1", amount=1), settlement("op-2/1", amount=1)])
            (_, first) = await store.entries("", "", None, 2)
        value = getattr(first.entry, column)
        await database.tamper(
            f"UPDATE journal SET {column} = {value + 1 if isinstance(value, int) else repr(value + 'x')} WHERE sequence = 1"
        )
        async with database.open() as store:
            assert any(problem.startswith("entry 1 ") for problem in (await store.verify()).problems)

    async def test_an_operation_of_another_payer_gets_no_hold_of_this_one(self, store: Store) -> None:
        await prepare(store, tenant=1000)
        await store.create_key(key("key-2"))
        await store.hold("op-1", PAYER, 100, 0, NOW + HOUR, HOLDER)
        with pytest.raises(Exists):
            await store.hold("op-1", Payer(ACME, "default", "key-2"), 100, 0, NOW + HOUR, HOLDER)
        await assert_balances(store, spent=0, held=100)

    async def test_an_amount_that_cannot_be_added_is_refused_and_the_ledger_goes_on(self, store: Store) -> None:
        await prepare(store)
        await store.post([settlement("op-1/1", amount=(1 << 63) - 1)])
        # The sum would pass what the store can count; others who wait beside it are served.
        bad, good = await asyncio.gather(
            store.post([settlement("op-2/1", amount=1)]),
            store.hold("op-3", PAYER, 5, 0, NOW + HOUR, HOLDER),
            return_exceptions=True,
        )
        assert isinstance(bad, Exception)
        assert not isinstance(good, BaseException)
        assert good.amount == 5
        with contextlib.suppress(Exception):
            await store.post([settlement("op-4/1", amount=1, start_micros=1 << 70)])
        await store.ping()
        await assert_balances(store, spent=(1 << 63) - 1, held=5)

    # Usage and entries.

    async def test_sums_of_usage_are_the_sums_of_what_was_settled(self, store: Store) -> None:
        await prepare(store)
        drawn = random.Random(7)
        settled = [
            settlement(
                f"op-{number // 2}/{number % 2 + 1}",
                amount=drawn.randrange(10**12),
                model=drawn.choice(["a/x", "b/y", "c/z"]),
                tokens=drawn.randrange(10_000),
                attempt_number=number % 2 + 1,
                start_micros=int((NOW + drawn.randrange(50) * HOUR) * 1e6),
            )
            for number in range(200)
        ]
        await store.post(settled)
        for groups in ([], ["model"], ["day", "model"], ["hour"], ["tenant", "project", "key", "model", "task_type", "day"]):
            rows = await store.usage(UsageFilter(), groups, (), 1000)
            assert sum(row.cost for row in rows) == sum(one.entry.amount for one in settled)
            assert sum(row.input_tokens for row in rows) == sum(one.entry.input_tokens for one in settled)
            assert sum(row.attempts for row in rows) == 200
            assert sum(row.fallbacks for row in rows) == 100
            assert [row.group for row in rows] == sorted({row.group for row in rows})
        (whole,) = await store.usage(UsageFilter(), [], (), 10)
        assert (whole.requests, whole.cache_hits, whole.group) == (100, 0, ())
        by_model = {row.group[0]: row for row in await store.usage(UsageFilter(), ["model"], (), 10)}
        for model, row in by_model.items():
            assert row.cost == sum(one.entry.amount for one in settled if one.entry.model == model)
        assert {balance.spent_nano_usd for balance in await balances(store)} == {whole.cost}

    async def test_usage_counts_hits_savings_and_only_what_is_asked_for(self, store: Store) -> None:
        await prepare(store)
        await store.create_key(key("key-2"))
        other = Payer(ACME, "default", "key-2")
        second = int(1e6)
        at = int(NOW * 1e6)
        await store.post(
            [
                settlement("op-1/1", amount=10, start_micros=at),
                settlement("op-2/cache", amount=0, saved=10, cache_status=2, start_micros=at + second),
                settlement("op-3/1", amount=5, payer=other, start_micros=at + 2 * second),
                settlement("op-4/1", amount=99, debit="platform", start_micros=at + 3 * second),
            ]
        )
        (row,) = await store.usage(UsageFilter(), [], (), 10)
        assert (row.requests, row.cache_hits, row.attempts, row.cost, row.saved) == (4, 1, 3, 15, 10)
        (row,) = await store.usage(UsageFilter(key_id="key-2"), [], (), 10)
        assert (row.requests, row.cost) == (1, 5)
        # From the first moment on, and up to but without the last.
        (row,) = await store.usage(UsageFilter(start=NOW + 1, end=NOW + 2), [], (), 10)
        assert (row.requests, row.saved) == (1, 10)
        for wanted in (UsageFilter(tenant_id="x"), UsageFilter(project_id="x"), UsageFilter(model="x"), UsageFilter(end=NOW)):
            assert await store.usage(wanted, [], (), 10) == []

    async def test_usage_says_whether_all_tokens_were_reported(self, store: Store) -> None:
        await prepare(store)
        await store.post(
            [
                settlement("op-1/1", amount=1, model="a/x", usage_source=1),
                settlement("op-2/1", amount=1, model="a/x", usage_source=1),
                settlement("op-3/1", amount=1, model="b/y", usage_source=1),
                settlement("op-4/1", amount=1, model="b/y", usage_source=2),
            ]
        )
        rows = await store.usage(UsageFilter(), ["model"], (), 10)
        assert [(row.group, row.usage_source) for row in rows] == [(("a/x",), 1), (("b/y",), 2)]

    async def test_usage_comes_in_pages(self, store: Store) -> None:
        await store.post([settlement(f"op-{number}/1", amount=number, model=f"m/{number}") for number in range(5)])
        afters: tuple[tuple[str, ...], ...] = ((), ("m/1",), ("m/3",), ("m/4",))
        pages = [await store.usage(UsageFilter(), ["model"], after, 2) for after in afters]
        assert [[row.group[0] for row in page] for page in pages] == [["m/0", "m/1"], ["m/2", "m/3"], ["m/4"], []]

    @pytest.mark.parametrize(
        "groups",
        [
            ["tenant", "project", "key", "model", "provider", "day"],
            ["hour", "task_type"],
            ["model", "hour"],
            ["task_type", "provider"],
        ],
    )
    async def test_pages_behind_a_group_are_what_one_page_has(self, store: Store, groups: list[str]) -> None:
        drawn = random.Random(11)
        made = [
            settlement(
                f"op-{number}/1",
                amount=number,
                # Order is that of the bytes, whatever the database's language.
                model=drawn.choice(["a/x", "A/x", "a-x", "ä/x", "Z", "'"]),
                provider=drawn.choice(["b", "B", "_"]),
                task_type=drawn.randrange(5),
                start_micros=int((NOW + drawn.randrange(60) * HOUR) * 1e6),
            )
            for number in range(120)
        ]
        await store.post(made)
        whole = await store.usage(UsageFilter(), groups, (), 1000)
        assert len(whole) > 10
        assert [row.group for row in whole] == sorted(
            {row.group for row in whole}, key=lambda group: [one.encode() for one in group]
        )
        found = []
        after: tuple[str, ...] = ()
        while page := await store.usage(UsageFilter(), groups, after, 3):
            found += page
            after = page[-1].group
        assert found == whole
        assert sum(row.cost for row in found) == sum(one.entry.amount for one in made)

    async def test_the_journal_is_read_on_from_a_sequence(self, store: Store) -> None:
        other = Payer("brite", "default", "key-9")
        await store.post(
            [
                settlement(
                    f"op-{number}/1", amount=number, payer=other if number % 3 == 0 else PAYER, start_micros=number * 10**6
                )
                for number in range(1, 21)
            ]
        )
        found: list[Posted] = []
        while page := await store.journal(UsageFilter(), found[-1].sequence if found else 0, 6):
            found += page
        assert found == list(reversed(await store.entries("", "", None, 100)))
        assert [one.entry.amount for one in await store.journal(UsageFilter("brite", start=6.0, end=15.0), 0, 10)] == [6, 9, 12]
        assert [one.entry.amount for one in await store.journal(UsageFilter("brite"), 9, 2)] == [12, 15]

    async def test_what_is_posted_between_pages_neither_repeats_nor_hides_a_group(self, store: Store) -> None:
        await store.post([settlement(f"op-{number}/1", amount=1, model=f"m/{number}") for number in (2, 4, 6, 8)])
        first = await store.usage(UsageFilter(), ["model"], (), 2)
        await store.post([settlement(f"op-{number}/1", amount=1, model=f"m/{number}") for number in (1, 3, 5)])
        second = await store.usage(UsageFilter(), ["model"], first[-1].group, 10)
        assert [row.group[0] for row in (*first, *second)] == ["m/2", "m/4", "m/5", "m/6", "m/8"]

    async def test_usage_is_filtered_by_provider_and_task_type(self, store: Store) -> None:
        await store.post(
            [
                settlement("op-1/1", amount=1, provider="a", task_type=1),
                settlement("op-2/1", amount=10, provider="a", task_type=3),
                settlement("op-3/1", amount=100, provider="b", task_type=3),
            ]
        )
        for wanted, cost in (
            (UsageFilter(provider="a"), 11),
            (UsageFilter(task_type=3), 110),
            (UsageFilter(provider="a", task_type=3), 10),
            (UsageFilter(tenant_id=ACME, start=NOW, end=NOW + 1, provider="b", task_type=3), 100),
        ):
            assert [row.cost for row in await store.usage(wanted, [], (), 10)] == [cost]
            assert sum(row.cost for row in await store.usage(wanted, ["model"], ("a/w",), 10)) == cost
        assert await store.usage(UsageFilter(provider="b", task_type=1), [], (), 10) == []

    async def test_what_succeeded_is_counted_once_and_not_for_the_platform(self, store: Store) -> None:
        await store.post(
            [
                settlement("op-1/1", amount=7, outcome=2),
                settlement("op-1/2", amount=10, outcome=1, attempt_number=2),
                settlement("op-2/1", amount=3, outcome=4),
                settlement("op-3/cache", amount=0, saved=10, cache_status=1),
                settlement("op-4/1", amount=99, debit="platform"),
            ]
        )
        (row,) = await store.usage(UsageFilter(), [], (), 10)
        assert (row.requests, row.succeeded, row.attempts, row.fallbacks, row.cost) == (4, 2, 4, 1, 20)

    async def test_our_own_counts_may_be_absent_and_are_part_of_the_chain(self, database: Database) -> None:
        known: tuple[tuple[int | None, int | None], ...] = ((None, None), (None, 8), (90, 8), (90, 8))
        async with database.open() as store:
            await store.post([settlement(f"op-{number}/1", amount=1, observed=one) for number, one in enumerate(known)])
            entries = await store.entries("", "", None, 10)
            assert [(one.entry.observed_input, one.entry.observed_output) for one in reversed(entries)] == list(known)
            assert (await store.verify()).problems == ()
        await database.tamper("UPDATE journal SET observed_input = NULL, observed_output = NULL WHERE sequence = 3")
        async with database.open() as store:
            (problem,) = (await store.verify()).problems
        assert problem.startswith("entry 3 ")

    async def test_entries_come_newest_first_whole_and_in_pages(self, store: Store) -> None:
        sent = [settlement(f"op-{number}/1", amount=number) for number in range(5)]
        await store.post(sent)
        await store.post([settlement("op-9/1", amount=9, payer=Payer("other", "default", "key-9"))])
        first = await store.entries(ACME, "", None, 2)
        assert [(one.sequence, one.entry) for one in first] == [(5, sent[4].entry), (4, sent[3].entry)]
        rest = await store.entries(ACME, "", 4, 10)
        assert [one.sequence for one in rest] == [3, 2, 1]
        assert [one.entry.attempt_id for one in await store.entries("", "op-9", None, 10)] == ["op-9/1"]
        assert await store.entries("other", "op-1", None, 10) == []

    # Tenants, projects, keys.

    async def test_a_tenant_comes_with_its_default_project_and_its_id_is_taken_then(self, store: Store) -> None:
        limits = Limits(5, 6, 7, 8)
        made = await store.create_tenant(Tenant(ACME, "Acme", limits, NOW), "request-1")
        assert made == Tenant(ACME, "Acme", limits, NOW)
        assert await store.tenant(ACME) == made
        assert [project.id for project in await store.projects(ACME, "", 10)] == ["default"]
        # The same call again gets what it made; any other is refused.
        assert await store.create_tenant(Tenant(ACME, "Acme", limits, NOW + 1), "request-1") == made
        for request_id in ("", "request-2"):
            with pytest.raises(Exists):
                await store.create_tenant(Tenant(ACME, "Acme", limits, NOW), request_id)

    async def test_a_tenant_made_without_a_request_id_is_not_repeated(self, store: Store) -> None:
        await store.create_tenant(Tenant(ACME, "Acme", Limits(), NOW), "")
        with pytest.raises(Exists):
            await store.create_tenant(Tenant(ACME, "Acme", Limits(), NOW), "")

    async def test_a_project_needs_its_tenant_and_an_id_of_its_own(self, store: Store) -> None:
        await prepare(store)
        made = await store.create_project(Project("site", ACME, "Site", Limits(budget_nano_usd=4), NOW), "r")
        assert made == Project("site", ACME, "Site", Limits(budget_nano_usd=4), NOW)
        assert await store.create_project(Project("site", ACME, "Site", Limits(), NOW), "r") == made
        assert await store.project(ACME, "site") == made
        assert await store.project(ACME, "nowhere") is None
        with pytest.raises(Exists):
            await store.create_project(Project("site", ACME, "Site", Limits(), NOW), "other")
        with pytest.raises(NotFound):
            await store.create_project(Project("site", "nobody", "", Limits(), NOW), "")

    async def test_limits_of_models_are_kept_at_every_level(self, store: Store) -> None:
        models = (ModelLimits("a/x", 1, None, -1), ModelLimits("b/y", tokens_per_minute=0))
        await store.create_tenant(Tenant(ACME, "Acme", Limits(5, models=models), NOW), "")
        await store.create_project(Project("main", ACME, "", Limits(models=models[:1]), NOW), "")
        await store.create_key(key(project_id="main", limits=Limits(models=models[1:])))
        chain = await store.chain_by_key("key-1")
        assert chain is not None
        assert (chain.tenant.limits, chain.project.limits) == (Limits(5, models=models), Limits(models=models[:1]))
        assert chain.key.limits == Limits(models=models[1:])
        for update in (
            lambda change: store.update_tenant(ACME, None, change),
            lambda change: store.update_project(ACME, "main", None, change),
        ):
            assert (await update(lambda limits: replace(limits, models=()))).limits.models == ()
        project = await store.project(ACME, "default")
        assert project is not None
        assert project.limits == Limits()

    async def test_limits_change_and_names_stay_unless_given(self, store: Store) -> None:
        await prepare(store, tenant=10)
        changed = await store.update_tenant(ACME, None, lambda _: Limits(20, 1, 2, 3))
        assert (changed.display_name, changed.limits) == ("Acme", Limits(20, 1, 2, 3))
        assert (await store.update_tenant(ACME, "New", lambda _: Limits())).display_name == "New"
        project = await store.update_project(ACME, "default", "Main", lambda _: Limits(budget_nano_usd=3))
        assert (project.display_name, project.limits) == ("Main", Limits(budget_nano_usd=3))
        with pytest.raises(BudgetExhausted):
            await store.hold("op-1", PAYER, 4, 0, NOW + HOUR, HOLDER)
        with pytest.raises(NotFound):
            await store.update_tenant("nobody", None, lambda limits: limits)
        with pytest.raises(NotFound):
            await store.update_project(ACME, "nowhere", None, lambda limits: limits)

    async def test_a_change_is_made_of_what_is_there_then(self, store: Store) -> None:
        await prepare(store, tenant=0)

        def one_more(limits: Limits) -> Limits:
            return Limits(budget_nano_usd=(limits.budget_nano_usd or 0) + 1)

        await asyncio.gather(*(store.update_tenant(ACME, None, one_more) for _ in range(20)))
        await asyncio.gather(*(store.update_project(ACME, "default", None, one_more) for _ in range(20)))
        tenant, project = await store.tenant(ACME), await store.project(ACME, "default")
        assert tenant is not None
        assert project is not None
        assert (tenant.limits.budget_nano_usd, project.limits.budget_nano_usd) == (20, 20)

    async def test_a_budget_lowered_below_what_is_spent_refuses_and_breaks_nothing(self, store: Store) -> None:
        await prepare(store, tenant=100)
        await store.hold("op-1", PAYER, 60, 0, NOW + HOUR, HOLDER)
        await store.update_tenant(ACME, None, lambda _: Limits(budget_nano_usd=50))
        with pytest.raises(BudgetExhausted):
            await store.hold("op-2", PAYER, 1, 0, NOW + HOUR, HOLDER)
        assert (await store.grant_slice("lease-1", PAYER, 1, 0, NOW + HOUR, HOLDER)).granted == 0
        await assert_balances(store, spent=0, held=60)

    async def test_a_key_is_found_by_its_digest_with_all_above_it(self, store: Store) -> None:
        await prepare(store, tenant=3, project=2, of_key=1)
        wanted = key(limits=Limits(budget_nano_usd=1))
        chain = await store.chain_by_digest(wanted.sha256)
        assert chain is not None
        assert chain.key == wanted
        assert (chain.project.limits, chain.tenant.limits) == (Limits(budget_nano_usd=2), Limits(budget_nano_usd=3))
        assert await store.chain_by_key(wanted.id) == chain
        assert await store.chain_by_digest(bytes(32)) is None
        assert await store.chain_by_key("nobody") is None

    async def test_a_key_needs_its_project_and_an_id_and_a_digest_of_its_own(self, store: Store) -> None:
        await prepare(store)
        with pytest.raises(Exists):
            await store.create_key(key())
        with pytest.raises(Exists):
            await store.create_key(key("key-2", sha256=key().sha256))
        with pytest.raises(NotFound):
            await store.create_key(key("key-2", project_id="nowhere"))
        assert [one.id for one in await store.keys(ACME, "", "", 10)] == ["key-1"]

    async def test_a_revoked_key_stays_revoked_at_its_first_time(self, store: Store) -> None:
        await prepare(store)
        assert (await store.revoke_key("key-1", NOW + 5)).revoke_time == NOW + 5
        revoked = await store.revoke_key("key-1", NOW + 9)
        assert revoked.revoke_time == NOW + 5
        assert not revoked.is_active(NOW + 5)
        with pytest.raises(NotFound):
            await store.revoke_key("nobody", NOW)

    async def test_lists_come_by_id_in_pages(self, store: Store) -> None:
        for number in (2, 0, 1):
            await store.create_tenant(Tenant(f"t{number}", "", Limits(), NOW), "")
        assert [tenant.id for tenant in await store.tenants("", 2)] == ["t0", "t1"]
        assert [tenant.id for tenant in await store.tenants("t1", 2)] == ["t2"]
        await store.create_project(Project("a", "t0", "", Limits(), NOW), "")
        assert [project.id for project in await store.projects("t0", "", 1)] == ["a"]
        assert [project.id for project in await store.projects("t0", "a", 5)] == ["default"]
        made: list[Key] = [
            key(f"key-{number}", tenant_id="t0", project_id="a" if number % 2 else "default") for number in range(4)
        ]
        for one in made:
            await store.create_key(one)
        assert await store.keys("t0", "", "", 3) == made[:3]
        assert await store.keys("t0", "", "key-2", 3) == made[3:]
        assert [one.id for one in await store.keys("t0", "a", "", 9)] == ["key-1", "key-3"]
        assert await store.keys("t1", "", "", 9) == []
