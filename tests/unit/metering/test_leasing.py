from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import replace

import pytest

from services.metering.accounts import Balance, Level, Limits, ModelLimits
from services.metering.errors import KeyUnknown
from services.metering.leasing import Defaults, Leasing, Wish
from services.metering.ports import Store
from services.runtime.errors import Code, Reason
from tests.conformance.ledger import examples
from tests.conformance.ledger.examples import ACME, PAYER
from tests.unit.metering.examples import Clock, accounts, refused

UNLIMITED = Defaults(requests_per_minute=-1, concurrency=-1)


def leasing(store: Store, clock: Clock, defaults: Defaults = UNLIMITED, *, recall_factor: int = 1) -> Leasing:
    return Leasing(store, defaults, lease_seconds=30.0, grace_seconds=120.0, recall_factor=recall_factor, clock=clock)


def wish(
    sequence: int = 1,
    *,
    replica: str = "r-1",
    lease: str = "",
    requests: int = 0,
    tokens: int = 0,
    concurrency: int = 1,
    nano_usd: int = 0,
    key_id: str = PAYER.key_id,
    model: str = "",
) -> Wish:
    return Wish(replica, sequence, key_id, lease, requests, tokens, concurrency, nano_usd, model)


async def held(store: Store) -> int:
    tenant = await store.tenant(ACME)
    assert tenant is not None
    return tenant.balance.held_nano_usd


async def test_a_lease_is_granted_extended_and_returned(store: Store, clock: Clock) -> None:
    await accounts(store, budget=10_000, limits=Limits(requests_per_minute=60, tokens_per_minute=600, concurrency=4))
    leases = leasing(store, clock)
    first = await leases.acquire(wish(requests=10, tokens=100, concurrency=3, nano_usd=1000))
    assert (first.requests, first.tokens, first.concurrency, first.nano_usd) == (10, 100, 3, 1000)
    assert first.expire_time == clock.time + 30
    assert first.retry_delay == 0.0
    clock.time += 20
    second = await leases.acquire(wish(2, lease=first.lease_id, requests=10, concurrency=4, nano_usd=500))
    assert second.lease_id == first.lease_id
    assert second.expire_time == clock.time + 30
    assert (second.requests, second.concurrency, second.nano_usd) == (10, 4, 500)
    assert await held(store) == 1500
    await leases.give_back(first.lease_id, 200)
    assert await held(store) == 200
    await leases.give_back(first.lease_id, 200)
    assert await held(store) == 200
    # What is settled still has a moment from the return on.
    assert await store.expire(clock.time + 14) == 0
    assert await store.expire(clock.time + 15) == 1
    assert await held(store) == 0


async def test_the_money_of_a_replica_that_was_started_again_is_free_once_what_it_had_is_settled(
    store: Store, clock: Clock
) -> None:
    await accounts(store, budget=10_000)
    leases = leasing(store, clock)
    lost = await leases.acquire(replace(wish(nano_usd=1000), replica_id="gateway-2.before"))
    other = await leases.acquire(replace(wish(nano_usd=300), replica_id="gateway-3.first"))
    assert await held(store) == 1300
    await leases.acquire(replace(wish(nano_usd=500), replica_id="gateway-2.after"))
    assert await held(store) == 1800
    assert await store.expire(clock.time + 14) == 0
    # A settlement of what was cut off there comes in time.
    await store.post([examples.settlement("op-1/1", amount=400, lease_id=lost.lease_id)])
    assert await store.expire(clock.time + 15) == 1
    assert await held(store) == 800
    assert other.lease_id != lost.lease_id


async def test_a_metering_process_that_was_started_again_knows_whose_leases_are_over(store: Store, clock: Clock) -> None:
    await accounts(store, budget=10_000)
    before = leasing(store, clock)
    await before.acquire(wish(nano_usd=1000, replica="gateway-2.before"))
    await before.acquire(wish(nano_usd=300, replica="gateway-3.first"))
    after = leasing(store, clock)
    assert await after.begin("gateway-2.after") == 1
    assert await after.begin("gateway-3.first") == 0
    assert await after.begin("gateway-nameless") == 0
    assert await store.expire(clock.time + 14) == 0
    assert await store.expire(clock.time + 15) == 1
    assert await held(store) == 300


async def test_the_holds_of_a_replica_that_was_started_again_end_once_what_it_had_is_settled(
    store: Store, clock: Clock
) -> None:
    await accounts(store, budget=10_000)
    leases = leasing(store, clock)
    await leases.begin("gateway-2.before")
    for number, replica in enumerate(("gateway-2.before", "gateway-3.first", "")):
        await leases.hold(replica, f"op-{number}", examples.PAYER, 1000 + number, 0, clock.time + 90)
    assert await leases.begin("gateway-2.after") == 1
    # One that was on its way when its process ended.
    await leases.hold("gateway-2.before", "op-3", examples.PAYER, 500, 0, clock.time + 90)
    assert await held(store) == 3503
    assert await store.expire(clock.time + 14) == 0
    assert await store.expire(clock.time + 15) == 2
    assert await held(store) == 2003


async def test_a_late_wish_of_a_process_that_was_followed_ends_nothing(store: Store, clock: Clock) -> None:
    await accounts(store, budget=10_000, limits=Limits(concurrency=10))
    leases = leasing(store, clock)
    await leases.acquire(wish(1, nano_usd=1000, replica="gateway-2.before"))
    granted = await leases.acquire(wish(1, nano_usd=300, replica="gateway-2.after", concurrency=10))
    assert (await leases.acquire(wish(2, nano_usd=200, replica="gateway-2.before"))).nano_usd == 0
    assert await store.expire(clock.time + 15) == 1
    assert await held(store) == 300
    # Nor does it take more of its concurrency than any other would.
    assert (await leases.acquire(wish(2, lease=granted.lease_id, replica="gateway-2.after", concurrency=10))).concurrency == 5


async def test_the_money_of_a_lease_that_nobody_extends_stays_for_the_grace(store: Store, clock: Clock) -> None:
    await accounts(store, budget=10_000)
    grant = await leasing(store, clock).acquire(wish(nano_usd=1000))
    await store.post([examples.settlement("op-1/1", amount=400, lease_id=grant.lease_id)])
    assert await held(store) == 600
    assert await store.expire(grant.expire_time + 119.9) == 0
    assert await store.expire(grant.expire_time + 120) == 1
    tenant = await store.tenant(ACME)
    assert tenant is not None
    assert tenant.balance == Balance(400, 0)


async def test_a_model_has_limits_of_its_own_at_every_level_and_no_money(store: Store, clock: Clock) -> None:
    of_key = Limits(requests_per_minute=100, models=(ModelLimits("a/x", 10, 500), ModelLimits("a/y", concurrency=3)))
    await accounts(store, budget=10_000, limits=of_key)
    await store.update_tenant(
        ACME, None, lambda limits: replace(limits, requests_per_minute=-1, models=(ModelLimits("a/x", 6, -1, 2),))
    )
    leases = leasing(store, clock)
    granted = await leases.acquire(wish(requests=20, tokens=600, concurrency=5, nano_usd=1000, model="a/x"))
    assert (granted.requests, granted.tokens, granted.concurrency, granted.nano_usd) == (6, 500, 2, -1)
    assert {(one.level, one.kind, one.limit, one.remaining) for one in granted.standings} == {
        (Level.MODEL, "requests", 10, 4),
        (Level.MODEL, "tokens", 500, 0),
        (Level.MODEL, "requests", 6, 0),
        (Level.MODEL, "concurrency", 2, 0),
    }
    assert await held(store) == 0
    # The same sequence for another model, or for none, is another wish.
    other = await leases.acquire(wish(requests=20, tokens=600, concurrency=5, model="a/y"))
    assert (other.requests, other.tokens, other.concurrency) == (-1, -1, 3)
    unlimited = await leases.acquire(wish(requests=20, concurrency=5, model="a/z"))
    assert (unlimited.requests, unlimited.concurrency, unlimited.standings) == (-1, -1, ())
    whole = await leases.acquire(wish(requests=20, nano_usd=1000))
    assert (whole.requests, whole.nano_usd) == (20, 1000)
    assert len({granted.lease_id, other.lease_id, unlimited.lease_id, whole.lease_id}) == 4
    refused = await leases.acquire(wish(2, lease=granted.lease_id, requests=1, model="a/x"))
    assert (refused.requests, refused.retry_delay) == (0, 10.0)
    await leases.give_back(granted.lease_id, 0)
    assert (await leases.acquire(wish(1, replica="r-2", concurrency=2, model="a/x"))).concurrency == 2


async def test_a_repeated_wish_gets_its_grant_again_and_takes_nothing_more(store: Store, clock: Clock) -> None:
    await accounts(store, budget=10_000, limits=Limits(requests_per_minute=60))
    leases = leasing(store, clock)
    first = await leases.acquire(wish(requests=40, nano_usd=1000))
    clock.time += 1
    assert await leases.acquire(wish(requests=40, nano_usd=1000)) == first
    assert await held(store) == 1000
    # Another replica with the same number is another wish.
    other = await leases.acquire(wish(requests=40, nano_usd=1000, replica="r-2"))
    assert other.lease_id != first.lease_id
    assert other.requests == 21
    assert await held(store) == 2000


async def test_a_repetition_that_overtakes_the_first_answer_takes_nothing_more(store: Store, clock: Clock) -> None:
    await accounts(store, budget=10_000, limits=Limits(requests_per_minute=60))
    leases = leasing(store, clock)
    grants = await asyncio.gather(*(leases.acquire(wish(requests=10, nano_usd=1000)) for _ in range(5)))
    assert set(grants) == {grants[0]}
    assert await held(store) == 1000
    assert (await leases.acquire(wish(2, requests=60, nano_usd=0))).requests == 50


async def test_a_caller_that_goes_away_does_not_block_the_next(store: Store, clock: Clock) -> None:
    await accounts(store, budget=10_000)
    leases = leasing(store, clock)
    first = asyncio.create_task(leases.acquire(wish(nano_usd=1000)))
    second = asyncio.create_task(leases.acquire(wish(nano_usd=1000)))
    await asyncio.sleep(0)
    first.cancel()
    grant = await second
    with pytest.raises(asyncio.CancelledError):
        await first
    assert grant.nano_usd == 1000
    await leases.give_back(grant.lease_id, 0)
    assert await held(store) == 0


async def test_a_key_that_ended_gets_no_lease(store: Store, clock: Clock) -> None:
    await accounts(store, expire_time=clock.time + 10)
    leases = leasing(store, clock)
    await leases.acquire(wish(1))
    with pytest.raises(KeyUnknown):
        await leases.acquire(wish(2, key_id="key-of-nobody"))
    clock.time += 10
    with pytest.raises(KeyUnknown):
        await leases.acquire(wish(3))


async def test_a_revoked_key_gets_no_lease_not_even_the_one_it_had(store: Store, clock: Clock) -> None:
    await accounts(store)
    leases = leasing(store, clock)
    granted = await leases.acquire(wish(1))
    await store.revoke_key(PAYER.key_id, clock.time)
    with refused(Reason.KEY_INVALID, Code.UNAUTHENTICATED):
        await leases.acquire(wish(2, lease=granted.lease_id))


async def test_a_tenant_without_limits_has_the_defaults_and_minus_one_lifts_them(store: Store, clock: Clock) -> None:
    await accounts(store)
    leases = leasing(store, clock, Defaults(requests_per_minute=12, concurrency=3))
    grant = await leases.acquire(wish(1, requests=50, tokens=5000, concurrency=9))
    assert (grant.requests, grant.tokens, grant.concurrency) == (12, -1, 3)
    assert {(one.level, one.kind, one.limit, one.remaining) for one in grant.standings} == {
        (Level.TENANT, "requests", 12, 0),
        (Level.TENANT, "concurrency", 3, 0),
    }
    await store.update_tenant(ACME, None, lambda _: Limits(requests_per_minute=-1, concurrency=-1))
    grant = await leases.acquire(wish(2, requests=50, concurrency=9))
    assert (grant.requests, grant.concurrency, grant.standings) == (-1, -1, ())


async def test_a_rate_that_is_used_up_says_when_there_is_more(store: Store, clock: Clock) -> None:
    await accounts(store, limits=Limits(requests_per_minute=60, tokens_per_minute=6000))
    leases = leasing(store, clock)
    await leases.acquire(wish(1, requests=60, tokens=6000))
    grant = await leases.acquire(wish(2, requests=1, tokens=1))
    assert (grant.requests, grant.tokens) == (0, 0)
    assert grant.retry_delay == pytest.approx(1.0)
    clock.time += 1.0
    assert (await leases.acquire(wish(3, requests=5, tokens=500))).requests == 1


async def test_rates_of_a_tenant_are_shared_by_its_keys(store: Store, clock: Clock) -> None:
    await accounts(store)
    await store.create_key(examples.key("key-2"))
    await store.update_tenant(ACME, None, lambda _: Limits(requests_per_minute=100, concurrency=10))
    leases = leasing(store, clock)
    first = await leases.acquire(wish(1, requests=70, concurrency=8))
    second = await leases.acquire(wish(1, requests=70, concurrency=8, key_id="key-2"))
    assert (first.requests, second.requests) == (70, 30)
    assert (first.concurrency, second.concurrency) == (8, 2)


async def test_a_returned_lease_frees_its_concurrency_at_once(store: Store, clock: Clock) -> None:
    await accounts(store, limits=Limits(concurrency=5))
    leases = leasing(store, clock)
    first = await leases.acquire(wish(concurrency=5))
    other = await leases.acquire(wish(concurrency=5, replica="r-2"))
    assert other.concurrency == 0
    await leases.give_back(first.lease_id, 0)
    assert (await leases.acquire(wish(2, lease=other.lease_id, concurrency=5, replica="r-2"))).concurrency == 5


async def test_near_the_end_of_a_budget_no_slices_are_granted(store: Store, clock: Clock) -> None:
    await accounts(store, budget=10_000)
    leases = leasing(store, clock, recall_factor=20)
    # 20 times the share of 800 that one hold is, 100, must be left after the grant for each replica.
    full = await leases.acquire(wish(1, nano_usd=800))
    assert full.nano_usd == 800
    assert [(one.kind, one.limit, one.remaining) for one in full.standings] == [("budget", 10_000, 9200)]
    await store.post([examples.settlement("op-1/1", amount=6900)])
    # 2,300 are left: of a slice of 400, 1,900 would stay. One replica must leave 1,000, two 2,000.
    assert (await leases.acquire(wish(1, nano_usd=400, replica="r-2"))).nano_usd == 0
    # A replica that asks no more is forgotten after two leases' time.
    clock.time += 61
    assert (await leases.acquire(wish(2, nano_usd=400, replica="r-2"))).nano_usd == 400


async def test_many_replicas_that_ask_at_once_never_get_more_than_the_budget(store: Store, clock: Clock) -> None:
    await accounts(store, budget=10_000)
    leases = leasing(store, clock)
    grants = await asyncio.gather(*(leases.acquire(wish(nano_usd=300, replica=f"r-{number}")) for number in range(100)))
    total = sum(grant.nano_usd for grant in grants)
    assert 0 < total <= 10_000
    assert await held(store) == total


async def test_negative_wishes_are_wishes_for_nothing(store: Store, clock: Clock) -> None:
    await accounts(store, budget=10_000, limits=Limits(requests_per_minute=60, tokens_per_minute=60, concurrency=5))
    grant = await leasing(store, clock).acquire(wish(requests=-5, tokens=-5, concurrency=-5, nano_usd=-5))
    assert (grant.requests, grant.tokens, grant.concurrency, grant.nano_usd) == (0, 0, 1, 0)
    assert await held(store) == 0


async def test_a_lease_id_is_the_wishs_own_so_that_a_restart_gives_the_same(store: Store, clock: Clock) -> None:
    await accounts(store)
    first = await leasing(store, clock).acquire(wish())
    again = await leasing(store, clock).acquire(wish())
    assert again.lease_id == first.lease_id
    for other in (wish(2), wish(replica="r-2")):
        assert (await leasing(store, clock).acquire(other)).lease_id != first.lease_id


async def test_standings_name_every_limit_that_applies(store: Store, clock: Clock) -> None:
    await accounts(store, budget=500, limits=Limits(requests_per_minute=10, tokens_per_minute=20, concurrency=3))
    await store.update_project(ACME, "default", None, lambda limits: dataclasses.replace(limits, budget_nano_usd=400))
    grant = await leasing(store, clock).acquire(wish(requests=4, tokens=5, concurrency=2, nano_usd=100))
    assert [(one.level, one.kind, one.limit, one.remaining) for one in grant.standings] == [
        (Level.KEY, "requests", 10, 6),
        (Level.KEY, "tokens", 20, 15),
        (Level.KEY, "concurrency", 3, 1),
        (Level.PROJECT, "budget", 400, 300),
    ]


async def test_a_replica_that_was_started_again_does_not_wait_for_its_own_old_lease(store: Store, clock: Clock) -> None:
    await accounts(store, limits=Limits(concurrency=10))
    leases = leasing(store, clock)
    assert (await leases.acquire(wish(1, replica="gateway.aaa", concurrency=10))).concurrency == 10
    other = await leases.acquire(wish(1, replica="gateway-2.ccc", concurrency=4))
    assert other.concurrency == 0
    # The process was killed and is back under its name: what ran in it has ended.
    assert (await leases.acquire(wish(1, replica="gateway.bbb", concurrency=6))).concurrency == 5
    assert (await leases.acquire(wish(2, replica="gateway-2.ccc", lease=other.lease_id, concurrency=4))).concurrency == 4


async def test_replicas_without_a_name_keep_their_leases_apart(store: Store, clock: Clock) -> None:
    await accounts(store, limits=Limits(concurrency=10))
    leases = leasing(store, clock)
    assert (await leases.acquire(wish(1, replica="gateway-aaa", concurrency=10))).concurrency == 10
    assert (await leases.acquire(wish(1, replica="gateway-bbb", concurrency=6))).concurrency == 0
