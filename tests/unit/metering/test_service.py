from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2

from services.metering.accounts import Balance, Limits
from services.metering.adapters.sqlite import open_store
from services.metering.leasing import Defaults, Leasing
from services.metering.ports import Store
from services.metering.service import MeteringServicer, Prices
from services.runtime.errors import Code, Reason
from services.runtime.metrics import Registry
from sluice.metering.v1 import metering_service_pb2 as pb2
from tests.conformance.ledger.examples import ACME, PAYER, key
from tests.unit.metering.examples import CALL, UNTIL_2100, accounts, book, refused, refused_field, settlement

UNTIL = Timestamp(seconds=UNTIL_2100)
DIGEST = key(PAYER.key_id).sha256


def servicer(store: Store, metrics: Registry | None = None) -> MeteringServicer:
    leasing = Leasing(store, Defaults(-1, -1), lease_seconds=30.0, grace_seconds=120.0, recall_factor=1)
    return MeteringServicer(store, leasing, Prices(book()), metrics or Registry(), identity_reuse=30.0)


@pytest.fixture
def metering(store: Store) -> MeteringServicer:
    return servicer(store)


async def balance(store: Store) -> Balance:
    tenant = await store.tenant(ACME)
    assert tenant is not None
    return tenant.balance


def holding(operation_id: str, amount: int, *, least: int = 0) -> pb2.HoldRequest:
    return pb2.HoldRequest(
        operation_id=operation_id,
        key_id=PAYER.key_id,
        amount_nano_usd=amount,
        min_amount_nano_usd=least,
        expire_time=UNTIL,
    )


async def post(metering: MeteringServicer, settlements: Sequence[pb2.Settlement]) -> list[pb2.SettlementState.ValueType]:
    response = await metering.PostSettlements(pb2.PostSettlementsRequest(settlements=settlements), CALL)
    assert [result.attempt_id for result in response.results] == [one.attempt_id for one in settlements]
    return [result.state for result in response.results]


async def test_a_key_is_its_identity(store: Store, metering: MeteringServicer) -> None:
    await accounts(store, expire_time=UNTIL_2100)
    response = await metering.Authenticate(pb2.AuthenticateRequest(key_sha256=DIGEST), CALL)
    identity = response.identity
    assert (identity.tenant_id, identity.project_id, identity.key_id) == (ACME, "default", PAYER.key_id)
    assert (list(identity.scopes), list(identity.allowed_models)) == (["inference", "usage"], ["a/x", "policy/cheap"])
    assert (identity.expire_time.seconds, identity.cache_namespace) == (UNTIL_2100, "shop")
    assert response.reuse_duration.ToMilliseconds() == 30_000


async def test_an_identity_is_not_reused_beyond_the_end_of_its_key(store: Store, metering: MeteringServicer) -> None:
    await accounts(store, expire_time=time.time() + 10)
    response = await metering.Authenticate(pb2.AuthenticateRequest(key_sha256=DIGEST), CALL)
    assert 0 < response.reuse_duration.ToMilliseconds() <= 10_000


async def test_unknown_expired_and_revoked_keys_are_refused_alike(store: Store, metering: MeteringServicer) -> None:
    with refused(Reason.KEY_INVALID, Code.UNAUTHENTICATED):
        await metering.Authenticate(pb2.AuthenticateRequest(key_sha256=DIGEST), CALL)
    await accounts(store, expire_time=time.time() - 1)
    with refused(Reason.KEY_INVALID, Code.UNAUTHENTICATED):
        await metering.Authenticate(pb2.AuthenticateRequest(key_sha256=DIGEST), CALL)
    other = key("key-2", expire_time=None)
    await store.create_key(other)
    await metering.Authenticate(pb2.AuthenticateRequest(key_sha256=other.sha256), CALL)
    await store.revoke_key("key-2", time.time())
    with refused(Reason.KEY_INVALID, Code.UNAUTHENTICATED):
        await metering.Authenticate(pb2.AuthenticateRequest(key_sha256=other.sha256), CALL)


@pytest.mark.parametrize("digest", [b"", bytes(31), bytes(33)])
async def test_what_is_no_digest_is_malformed(metering: MeteringServicer, digest: bytes) -> None:
    with refused_field("key_sha256"):
        await metering.Authenticate(pb2.AuthenticateRequest(key_sha256=digest), CALL)


async def test_a_hold_is_made_settled_and_charged_once(store: Store, metering: MeteringServicer) -> None:
    await accounts(store, budget=1000)
    hold = await metering.Hold(holding("op-1", 400), CALL)
    assert (hold.amount_nano_usd, hold.budget_before_nano_usd, hold.budget_level) == (400, 1000, "tenant")
    assert await metering.Hold(holding("op-1", 400), CALL) == hold
    assert await balance(store) == Balance(0, 400)
    settled = settlement("op-1/1", 250)
    settled.hold_id = hold.hold_id
    assert await post(metering, [settled]) == [pb2.SETTLEMENT_STATE_POSTED]
    assert await post(metering, [settled, settled]) == [pb2.SETTLEMENT_STATE_DUPLICATE] * 2
    assert await balance(store) == Balance(250, 0)
    voided = await metering.VoidHold(pb2.VoidHoldRequest(hold_id=hold.hold_id), CALL)
    assert voided.state == pb2.HOLD_STATE_POSTED
    assert await balance(store) == Balance(250, 0)


async def test_a_hold_whose_operation_may_have_run_stays_until_that_is_settled(
    store: Store, metering: MeteringServicer
) -> None:
    await accounts(store, budget=1000)
    hold = await metering.Hold(holding("op-1", 400), CALL)
    for _ in range(2):
        voided = await metering.VoidHold(pb2.VoidHoldRequest(hold_id=hold.hold_id, may_have_run=True), CALL)
        assert voided.state == pb2.HOLD_STATE_OPEN
    assert await balance(store) == Balance(0, 400)
    assert await store.expire(time.time() + 13) == 0
    assert await store.expire(time.time() + 16) == 1
    assert await balance(store) == Balance(0, 0)


async def test_a_cancelled_operation_gives_its_hold_back(store: Store, metering: MeteringServicer) -> None:
    await accounts(store, budget=1000)
    hold = await metering.Hold(holding("op-1", 1000), CALL)
    for _ in range(2):
        voided = await metering.VoidHold(pb2.VoidHoldRequest(hold_id=hold.hold_id), CALL)
        assert voided.state == pb2.HOLD_STATE_VOIDED
    assert await balance(store) == Balance(0, 0)
    assert (await metering.Hold(holding("op-2", 1000), CALL)).amount_nano_usd == 1000


async def test_a_caller_that_goes_away_during_its_hold_finds_it_made(store: Store, metering: MeteringServicer) -> None:
    await accounts(store, budget=1000)
    asked = asyncio.create_task(metering.Hold(holding("op-1", 600), CALL))
    await asyncio.sleep(0)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    # Whether it was made or not: asking again makes it once.
    assert (await metering.Hold(holding("op-1", 600), CALL)).amount_nano_usd == 600
    assert await balance(store) == Balance(0, 600)


async def test_a_hold_above_the_budget_is_refused_or_clamped(store: Store, metering: MeteringServicer) -> None:
    await accounts(store, budget=1000)
    with refused(
        Reason.BUDGET_EXHAUSTED,
        Code.RESOURCE_EXHAUSTED,
        level="tenant",
        wanted_nano_usd="1001",
        left_nano_usd="1000",
    ):
        await metering.Hold(holding("op-1", 1001), CALL)
    assert (await metering.Hold(holding("op-1", 1001, least=500), CALL)).amount_nano_usd == 1000


async def test_without_a_budget_a_hold_says_so_by_leaving_it_out(store: Store, metering: MeteringServicer) -> None:
    await accounts(store)
    hold = await metering.Hold(holding("op-1", 5), CALL)
    assert not hold.HasField("budget_before_nano_usd")
    assert hold.budget_level == ""
    await store.update_tenant(ACME, None, lambda _: Limits(budget_nano_usd=5))
    with refused(Reason.BUDGET_EXHAUSTED, Code.RESOURCE_EXHAUSTED):
        await metering.Hold(holding("op-2", 1), CALL)


async def test_two_hundred_holds_at_once_never_pass_the_budget(store: Store, metering: MeteringServicer) -> None:
    await accounts(store, budget=1234)
    asked = (metering.Hold(holding(f"op-{number}", 10), CALL) for number in range(200))
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    taken = [outcome for outcome in outcomes if isinstance(outcome, pb2.HoldResponse)]
    assert len(taken) == 123
    assert await balance(store) == Balance(0, 1230)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("operation_id", lambda request: request.ClearField("operation_id")),
        ("operation_id", lambda request: setattr(request, "operation_id", "x" * 257)),
        ("key_id", lambda request: request.ClearField("key_id")),
        ("amount_nano_usd", lambda request: request.ClearField("amount_nano_usd")),
        ("amount_nano_usd", lambda request: setattr(request, "amount_nano_usd", -5)),
        ("min_amount_nano_usd", lambda request: setattr(request, "min_amount_nano_usd", -1)),
        ("min_amount_nano_usd", lambda request: setattr(request, "min_amount_nano_usd", 11)),
        ("expire_time", lambda request: request.ClearField("expire_time")),
        ("expire_time", lambda request: setattr(request.expire_time, "seconds", 1 << 62)),
    ],
)
async def test_a_malformed_hold_is_refused_by_its_field(
    store: Store, metering: MeteringServicer, field: str, change: Callable[[pb2.HoldRequest], None]
) -> None:
    await accounts(store)
    request = holding("op-1", 10)
    change(request)
    with refused_field(field):
        await metering.Hold(request, CALL)
    assert await balance(store) == Balance(0, 0)


async def test_a_key_that_ended_holds_nothing_but_what_it_held_is_settled(store: Store, metering: MeteringServicer) -> None:
    await accounts(store, budget=1000)
    hold = await metering.Hold(holding("op-1", 400), CALL)
    await store.revoke_key(PAYER.key_id, time.time())
    with refused(Reason.KEY_INVALID, Code.UNAUTHENTICATED):
        await metering.Hold(holding("op-2", 1), CALL)
    settled = settlement("op-1/1", 300)
    settled.hold_id = hold.hold_id
    assert await post(metering, [settled]) == [pb2.SETTLEMENT_STATE_POSTED]
    assert await balance(store) == Balance(300, 0)


async def test_a_hold_that_nobody_made_is_not_found(metering: MeteringServicer) -> None:
    with refused(Reason.RESOURCE_NOT_FOUND, Code.NOT_FOUND, resource="holds/hold-x"):
        await metering.VoidHold(pb2.VoidHoldRequest(hold_id="hold-x"), CALL)
    with refused_field("hold_id"):
        await metering.VoidHold(pb2.VoidHoldRequest(), CALL)


async def test_a_lease_is_granted_spent_and_returned(store: Store, metering: MeteringServicer) -> None:
    await accounts(store, budget=10_000, limits=Limits(requests_per_minute=60, concurrency=4))
    request = pb2.AcquireLeaseRequest(
        replica_id="r-1",
        sequence=1,
        key_id=PAYER.key_id,
        wanted_request_count=50,
        wanted_token_count=10,
        wanted_concurrency=9,
        wanted_nano_usd=800,
    )
    lease = await metering.AcquireLease(request, CALL)
    assert lease.lease_id
    assert (lease.granted_request_count, lease.granted_token_count, lease.granted_concurrency) == (50, -1, 4)
    assert lease.granted_nano_usd == 800
    assert not lease.HasField("retry_delay")
    assert {(one.level, one.kind, one.limit, one.remaining) for one in lease.limits} == {
        ("key", pb2.LIMIT_KIND_REQUESTS_PER_MINUTE, 60, 10),
        ("key", pb2.LIMIT_KIND_CONCURRENCY, 4, 0),
        ("tenant", pb2.LIMIT_KIND_BUDGET, 10_000, 9200),
    }
    assert await metering.AcquireLease(request, CALL) == lease
    assert await balance(store) == Balance(0, 800)
    settled = settlement("op-1/1", 300)
    settled.lease_id = lease.lease_id
    assert await post(metering, [settled]) == [pb2.SETTLEMENT_STATE_POSTED]
    assert await balance(store) == Balance(300, 500)
    for _ in range(2):
        await metering.ReturnLease(pb2.ReturnLeaseRequest(lease_id=lease.lease_id, owed_nano_usd=400), CALL)
    assert await balance(store) == Balance(300, 100)


async def test_a_lease_without_rates_left_says_when_to_come_back(store: Store, metering: MeteringServicer) -> None:
    await accounts(store, limits=Limits(tokens_per_minute=60))
    asked = pb2.AcquireLeaseRequest(replica_id="r-1", sequence=1, key_id=PAYER.key_id, wanted_token_count=60)
    assert (await metering.AcquireLease(asked, CALL)).granted_token_count == 60
    asked.sequence = 2
    refusal = await metering.AcquireLease(asked, CALL)
    assert refusal.granted_token_count == 0
    assert 0 < refusal.retry_delay.ToMilliseconds() <= 1000


async def test_malformed_lease_requests_are_refused_by_their_field(store: Store, metering: MeteringServicer) -> None:
    await accounts(store)
    with refused_field("replica_id"):
        await metering.AcquireLease(pb2.AcquireLeaseRequest(key_id=PAYER.key_id), CALL)
    with refused_field("key_id"):
        await metering.AcquireLease(pb2.AcquireLeaseRequest(replica_id="r-1"), CALL)
    with refused_field("lease_id"):
        await metering.AcquireLease(pb2.AcquireLeaseRequest(replica_id="r-1", key_id=PAYER.key_id, lease_id="x" * 257), CALL)
    with refused(Reason.KEY_INVALID, Code.UNAUTHENTICATED):
        await metering.AcquireLease(pb2.AcquireLeaseRequest(replica_id="r-1", key_id="nobody"), CALL)
    with refused_field("lease_id"):
        await metering.ReturnLease(pb2.ReturnLeaseRequest(), CALL)


async def test_a_settlement_that_can_never_be_posted_leaves_the_others_alone(store: Store) -> None:
    metrics = Registry()
    metering = servicer(store, metrics)
    await accounts(store)
    bad = settlement("op-2/1", -1)
    nameless = settlement("op-3/1", 5)
    nameless.tenant_id = ""
    sent = [settlement("op-1/1", 10), bad, settlement("op-1/1", 10), nameless, settlement("op-4/1", 0)]
    response = await metering.PostSettlements(pb2.PostSettlementsRequest(settlements=sent), CALL)
    assert [result.state for result in response.results] == [
        pb2.SETTLEMENT_STATE_POSTED,
        pb2.SETTLEMENT_STATE_REFUSED,
        pb2.SETTLEMENT_STATE_DUPLICATE,
        pb2.SETTLEMENT_STATE_REFUSED,
        pb2.SETTLEMENT_STATE_POSTED,
    ]
    for place, field in ((1, "cost_nano_usd"), (3, "tenant_id")):
        status = response.results[place].status
        assert status.code == Code.INVALID_ARGUMENT
        (detail,) = status.details
        info = error_details_pb2.ErrorInfo()
        assert detail.Unpack(info)
        assert (info.reason, info.domain, info.metadata["field"]) == ("REQUEST_INVALID", "sluice", field)
    assert not response.results[0].HasField("status")
    assert await balance(store) == Balance(10, 0)
    exposed = metrics.exposition().decode()
    for line in (
        'sluice_settlements_total{state="posted"} 2.0',
        'sluice_settlements_total{state="duplicate"} 1.0',
        'sluice_settlements_total{state="refused"} 2.0',
        # The charge of 10 names no price.
        "sluice_settlements_flagged_total 1.0",
    ):
        assert line in exposed, line


async def test_a_batch_of_refused_settlements_is_answered_without_the_store(metering: MeteringServicer) -> None:
    assert await post(metering, [settlement("op-1/1", -1)]) == [pb2.SETTLEMENT_STATE_REFUSED]


@pytest.mark.parametrize("count", [0, 1001])
async def test_a_batch_has_1_to_1000_settlements(metering: MeteringServicer, count: int) -> None:
    with refused_field("settlements"):
        await post(metering, [settlement(f"op-{number}/1", 1) for number in range(count)])


async def test_settlements_sent_again_after_a_restart_are_duplicates(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        await accounts(store)
        assert await post(servicer(store), [settlement("op-1/1", 10)]) == [pb2.SETTLEMENT_STATE_POSTED]
    async with open_store(tmp_path) as store:
        states = await post(servicer(store), [settlement("op-1/1", 10), settlement("op-1/2", 5)])
        assert states == [pb2.SETTLEMENT_STATE_DUPLICATE, pb2.SETTLEMENT_STATE_POSTED]
        assert await balance(store) == Balance(15, 0)
        chain = await store.chain_by_digest(hashlib.sha256(PAYER.key_id.encode()).digest())
        assert chain is not None
        assert chain.key.balance == Balance(15, 0)


async def test_a_store_that_is_gone_is_unavailable_and_says_when_to_retry(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        await accounts(store)
        metering = servicer(store)
        # Another writer that doesn't let go: what a full or broken disk does, too.
        store._write.execute("PRAGMA busy_timeout=20")
        store._read.execute("BEGIN IMMEDIATE")
        with refused(Reason.DEPENDENCY_UNAVAILABLE, Code.UNAVAILABLE, dependency="ledger"):
            await post(metering, [settlement("op-1/1", 10)])
        store._read.execute("ROLLBACK")
        # Nothing was lost or half done.
        assert await post(metering, [settlement("op-1/1", 10)]) == [pb2.SETTLEMENT_STATE_POSTED]
        assert (await store.verify()).problems == ()
