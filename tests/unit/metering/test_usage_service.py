from __future__ import annotations

import asyncio
import base64
import hashlib
import time
from collections.abc import Callable

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from services.metering.accounts import Limits, Payer, Tenant
from services.metering.cost import Price
from services.metering.ports import Store
from services.metering.pricebook import PriceBook, versioned
from services.metering.service import Prices
from services.metering.usage_service import UsageServicer, _query_digest
from services.runtime.call import Call, Caller, CallerKind
from services.runtime.errors import Code, Reason
from sluice.metering.v1 import usage_service_pb2 as pb2
from tests.conformance.ledger.examples import ACME, HOUR, NOW, key, settlement
from tests.unit.metering.examples import AS_ADMIN, book, refused, refused_field, with_key

FROM_THE_START = Timestamp(seconds=1)
BRITE = Payer("brite", "default", "key-brite")


@pytest.fixture
def usage(store: Store) -> UsageServicer:
    return UsageServicer(store, Prices(book()))


async def tenants(store: Store, *, scopes: tuple[str, ...] = ("inference", "usage")) -> Call:
    """Tenants `acme` and `brite`; returns a call with a key of `acme`."""
    for tenant_id in (ACME, BRITE.tenant_id):
        await store.create_tenant(Tenant(tenant_id, "", Limits(), NOW), "")
    made = key(sha256=hashlib.sha256(b"secret-of-acme").digest(), expire_time=None, scopes=scopes)
    await store.create_key(made)
    return with_key("secret-of-acme")


async def test_sums_are_those_of_the_settled_costs(store: Store, usage: UsageServicer) -> None:
    await tenants(store)
    settled = [
        settlement(
            f"op-{number}/1", amount=number**3, model=f"a/{number % 3}", tokens=number, start_micros=int(NOW * 1e6) + number
        )
        for number in range(50)
    ]
    await store.post([*settled, settlement("op-x/1", amount=5, payer=BRITE)])
    request = pb2.QueryUsageRequest(tenant_id=ACME, start_time=FROM_THE_START)
    (whole,) = (await usage.QueryUsage(request, AS_ADMIN)).rows
    assert whole.cost_nano_usd == sum(one.entry.amount for one in settled)
    assert whole.usage.input_token_count == sum(range(50))
    assert (whole.request_count, whole.attempt_count, list(whole.group_values)) == (50, 50, [])
    request.group_by.extend([pb2.USAGE_DIMENSION_DAY, pb2.USAGE_DIMENSION_MODEL])
    rows = (await usage.QueryUsage(request, AS_ADMIN)).rows
    assert [tuple(row.group_values) for row in rows] == [("2023-11-14", f"a/{number}") for number in range(3)]
    assert [row.cost_nano_usd for row in rows] == [
        sum(number**3 for number in range(50) if number % 3 == rest) for rest in range(3)
    ]


@pytest.mark.parametrize(
    ("dimension", "value"),
    [
        (pb2.USAGE_DIMENSION_TENANT, "acme"),
        (pb2.USAGE_DIMENSION_PROJECT, "default"),
        (pb2.USAGE_DIMENSION_KEY, "key-1"),
        (pb2.USAGE_DIMENSION_MODEL, "a/x"),
        (pb2.USAGE_DIMENSION_PROVIDER, "a"),
        (pb2.USAGE_DIMENSION_TASK_TYPE, "reasoning"),
        (pb2.USAGE_DIMENSION_HOUR, "2023-11-14T22:00:00Z"),
        (pb2.USAGE_DIMENSION_DAY, "2023-11-14"),
    ],
)
async def test_every_dimension_groups(
    store: Store, usage: UsageServicer, dimension: pb2.UsageDimension.ValueType, value: str
) -> None:
    await store.post([settlement("op-1/1", amount=5)])
    request = pb2.QueryUsageRequest(start_time=FROM_THE_START, group_by=[dimension])
    (row,) = (await usage.QueryUsage(request, AS_ADMIN)).rows
    assert (list(row.group_values), row.cost_nano_usd) == ([value], 5)


async def test_without_times_it_is_the_last_24_hours(store: Store, usage: UsageServicer) -> None:
    now = time.time()
    for amount, ago in ((1, 25 * HOUR), (10, 23 * HOUR), (100, 60.0), (1000, -HOUR)):
        await store.post([settlement(f"op-{amount}/1", amount=amount, start_micros=int((now - ago) * 1e6))])
    (row,) = (await usage.QueryUsage(pb2.QueryUsageRequest(), AS_ADMIN)).rows
    assert row.cost_nano_usd == 110
    request = pb2.QueryUsageRequest(start_time=FROM_THE_START, end_time=Timestamp(seconds=int(now - 24 * HOUR)))
    (row,) = (await usage.QueryUsage(request, AS_ADMIN)).rows
    assert row.cost_nano_usd == 1


async def test_usage_comes_in_pages_that_miss_and_repeat_nothing(store: Store, usage: UsageServicer) -> None:
    await store.post([settlement(f"op-{number}/1", amount=1, model=f"a/{number:02}") for number in range(7)])
    request = pb2.QueryUsageRequest(start_time=FROM_THE_START, group_by=[pb2.USAGE_DIMENSION_MODEL], page_size=3)
    pages = []
    while True:
        page = await usage.QueryUsage(request, AS_ADMIN)
        pages.append([row.group_values[0] for row in page.rows])
        request.page_token = page.next_page_token
        if not page.next_page_token:
            break
    assert pages == [["a/00", "a/01", "a/02"], ["a/03", "a/04", "a/05"], ["a/06"]]


async def test_a_later_page_is_of_the_time_of_the_first(store: Store, usage: UsageServicer) -> None:
    now = time.time()
    await store.post(
        [settlement(f"op-{name}/1", amount=1, model=name, start_micros=int((now - 60) * 1e6)) for name in ("a", "c", "e")]
    )
    request = pb2.QueryUsageRequest(group_by=[pb2.USAGE_DIMENSION_MODEL], page_size=1)
    first = await usage.QueryUsage(request, AS_ADMIN)
    # They began after the first page was asked for.
    later = int((time.time() + 1e-3) * 1e6)
    await store.post([settlement(f"op-{name}2/1", amount=1, model=name, start_micros=later) for name in ("a", "b", "c", "d")])
    await asyncio.sleep(0.01)
    request.page_token, request.page_size = first.next_page_token, 1000
    second = await usage.QueryUsage(request, AS_ADMIN)
    assert [(row.group_values[0], row.request_count) for row in (*first.rows, *second.rows)] == [("a", 1), ("c", 1), ("e", 1)]


@pytest.mark.parametrize(
    "change",
    [
        lambda request: setattr(request, "model", "a/00"),
        lambda request: setattr(request, "provider", "a"),
        lambda request: setattr(request, "tenant_id", ACME),
        lambda request: setattr(request, "task_type", 2),
        lambda request: setattr(request.start_time, "seconds", 2),
        lambda request: setattr(request.end_time, "seconds", 2),
        lambda request: request.group_by.append(pb2.USAGE_DIMENSION_DAY),
        lambda request: request.ClearField("group_by"),
        lambda request: setattr(request, "page_token", request.page_token[:-4]),
        lambda request: setattr(request, "page_token", request.page_token + "!"),
        lambda request: setattr(request, "page_token", "W10="),
        lambda request: setattr(request, "page_token", "A" * 40_000),
    ],
)
async def test_a_token_of_another_query_is_refused(
    store: Store, usage: UsageServicer, change: Callable[[pb2.QueryUsageRequest], None]
) -> None:
    await store.post([settlement(f"op-{number}/1", amount=1, model=f"a/{number:02}") for number in range(7)])
    request = pb2.QueryUsageRequest(start_time=FROM_THE_START, group_by=[pb2.USAGE_DIMENSION_MODEL], page_size=3)
    request.page_token = (await usage.QueryUsage(request, AS_ADMIN)).next_page_token
    request.page_size = 4
    assert len((await usage.QueryUsage(request, AS_ADMIN)).rows) == 4
    change(request)
    with refused_field("page_token"):
        await usage.QueryUsage(request, AS_ADMIN)


async def test_a_token_of_another_tenant_is_refused(store: Store, usage: UsageServicer) -> None:
    as_acme = await tenants(store)
    await store.post([settlement(f"op-{number}/1", amount=1, model=f"a/{number:02}") for number in range(7)])
    request = pb2.QueryUsageRequest(start_time=FROM_THE_START, group_by=[pb2.USAGE_DIMENSION_MODEL], page_size=3)
    request.page_token = (await usage.QueryUsage(request, AS_ADMIN)).next_page_token
    with refused_field("page_token"):
        await usage.QueryUsage(request, as_acme)


async def test_halves_of_a_character_in_a_token_are_refused(usage: UsageServicer) -> None:
    request = pb2.QueryUsageRequest(start_time=FROM_THE_START, group_by=[pb2.USAGE_DIMENSION_MODEL])
    query = _query_digest(request, "")
    for group in ("\\ud800", "a\\u0000"):
        text = f'["{query}", 0, 1, ["{group}"]]'
        request.page_token = base64.urlsafe_b64encode(text.encode()).decode()
        with refused_field("page_token"):
            await usage.QueryUsage(request, AS_ADMIN)


async def test_cost_per_task_carries_what_failed_attempts_cost(store: Store, usage: UsageServicer) -> None:
    await store.post(
        [
            settlement("op-1/1", amount=7, outcome=2),
            settlement("op-1/2", amount=10, attempt_number=2),
            settlement("op-2/1", amount=4, model="b/y"),
            settlement("op-3/1", amount=5, model="c/z", outcome=2),
            settlement("op-4/cache", amount=0, saved=9, model="d/w", cache_status=1),
        ]
    )
    request = pb2.QueryUsageRequest(start_time=FROM_THE_START, group_by=[pb2.USAGE_DIMENSION_MODEL])
    rows = {row.group_values[0]: row for row in (await usage.QueryUsage(request, AS_ADMIN)).rows}
    assert [row.cost_per_task_nano_usd for row in rows.values()] == [17, 4, 0, 0]
    assert [row.HasField("cost_per_task_nano_usd") for row in rows.values()] == [True, True, False, True]
    assert [row.fallback_share for row in rows.values()] == [0.5, 0.0, 0.0, 0.0]
    request.ClearField("group_by")
    (whole,) = (await usage.QueryUsage(request, AS_ADMIN)).rows
    assert (whole.succeeded_count, whole.cost_nano_usd, whole.cost_per_task_nano_usd) == (3, 26, 8)


async def test_a_task_type_without_a_name_is_its_number(store: Store, usage: UsageServicer) -> None:
    await store.post([settlement("op-1/1", amount=5, task_type=0), settlement("op-2/1", amount=5, task_type=7)])
    request = pb2.QueryUsageRequest(start_time=FROM_THE_START, group_by=[pb2.USAGE_DIMENSION_TASK_TYPE])
    rows = (await usage.QueryUsage(request, AS_ADMIN)).rows
    assert [row.group_values[0] for row in rows] == ["unspecified", "7"]


async def test_entries_come_newest_first_in_pages(store: Store, usage: UsageServicer) -> None:
    await store.post([settlement(f"op-{number}/1", amount=number) for number in range(1, 8)])
    request = pb2.ListEntriesRequest(page_size=3)
    pages = []
    while True:
        page = await usage.ListEntries(request, AS_ADMIN)
        pages.append([entry.sequence for entry in page.entries])
        request.page_token = page.next_page_token
        if not page.next_page_token:
            break
        # What is written in between doesn't shift the pages.
        await store.post([settlement(f"op-{len(pages)}00/1", amount=1)])
    assert pages == [[7, 6, 5], [4, 3, 2], [1]]
    (entry,) = (await usage.ListEntries(pb2.ListEntriesRequest(operation_id="op-4"), AS_ADMIN)).entries
    assert (entry.attempt_id, entry.amount_nano_usd, entry.debit_account) == ("op-4/1", 4, "key/key-1")


async def test_entries_of_a_time_come_oldest_first_in_pages(store: Store, usage: UsageServicer) -> None:
    as_acme = await tenants(store)
    second = 1_000_000
    await store.post([settlement(f"op-{number}/1", amount=number, start_micros=number * second) for number in range(1, 8)])
    await store.post([settlement("op-x/1", amount=99, payer=BRITE, start_micros=3 * second)])
    request = pb2.ListEntriesRequest(
        page_size=2, oldest_first=True, start_time=Timestamp(seconds=2), end_time=Timestamp(seconds=7)
    )
    pages = []
    while True:
        page = await usage.ListEntries(request, as_acme)
        pages.append([entry.amount_nano_usd for entry in page.entries])
        request.page_token = page.next_page_token
        if not page.next_page_token:
            break
        await store.post([settlement(f"op-{len(pages)}00/1", amount=len(pages) * 100, start_micros=5 * second)])
    assert pages == [[2, 3], [4, 5], [6, 100], [200, 300]]
    first = (await usage.ListEntries(pb2.ListEntriesRequest(oldest_first=True, page_size=1), AS_ADMIN)).entries[0]
    assert (first.tenant_id, first.project_id, first.provider, first.attempt_number) == (ACME, "default", "a", 1)
    for field, wrong in (
        ("operation_id", pb2.ListEntriesRequest(oldest_first=True, operation_id="op-1")),
        ("start_time", pb2.ListEntriesRequest(start_time=Timestamp(seconds=2))),
        ("end_time", pb2.ListEntriesRequest(end_time=Timestamp(seconds=2))),
        ("end_time", pb2.ListEntriesRequest(oldest_first=True, end_time=Timestamp(nanos=-1))),
    ):
        with refused_field(field):
            await usage.ListEntries(wrong, AS_ADMIN)


async def test_a_key_sees_its_own_tenant_only(store: Store, usage: UsageServicer) -> None:
    as_acme = await tenants(store)
    await store.post([settlement("op-1/1", amount=5), settlement("op-2/1", amount=7, payer=BRITE)])
    for tenant_id in ("", ACME):
        (row,) = (await usage.QueryUsage(pb2.QueryUsageRequest(tenant_id=tenant_id, start_time=FROM_THE_START), as_acme)).rows
        assert row.cost_nano_usd == 5
        listed = (await usage.ListEntries(pb2.ListEntriesRequest(tenant_id=tenant_id), as_acme)).entries
        assert [entry.operation_id for entry in listed] == ["op-1"]
    assert not (await usage.ListEntries(pb2.ListEntriesRequest(operation_id="op-2"), as_acme)).entries
    assert not (await usage.QueryUsage(pb2.QueryUsageRequest(key_id="key-brite", start_time=FROM_THE_START), as_acme)).rows
    with refused(Reason.PERMISSION_DENIED, Code.PERMISSION_DENIED):
        await usage.QueryUsage(pb2.QueryUsageRequest(tenant_id="brite"), as_acme)
    with refused(Reason.PERMISSION_DENIED, Code.PERMISSION_DENIED):
        await usage.ListEntries(pb2.ListEntriesRequest(tenant_id="brite"), as_acme)


async def test_nobody_sees_anything_without_a_key_that_may(store: Store, usage: UsageServicer) -> None:
    as_acme = await tenants(store, scopes=("inference",))
    nobody = Call("/sluice.metering.v1.UsageService/QueryUsage", deadline=1e12)
    basic = Call(nobody.method, deadline=1e12, metadata={"authorization": "Basic x"})
    for call, reason, code in (
        (nobody, Reason.KEY_MISSING, Code.UNAUTHENTICATED),
        (basic, Reason.KEY_MISSING, Code.UNAUTHENTICATED),
        (with_key("guess"), Reason.KEY_INVALID, Code.UNAUTHENTICATED),
        (as_acme, Reason.PERMISSION_DENIED, Code.PERMISSION_DENIED),
    ):
        with refused(reason, code):
            await usage.QueryUsage(pb2.QueryUsageRequest(), call)
        with refused(reason, code):
            await usage.ListEntries(pb2.ListEntriesRequest(), call)
        with refused(reason, code):
            await usage.ListPrices(pb2.ListPricesRequest(), call)
        with refused(Reason.PERMISSION_DENIED, Code.PERMISSION_DENIED):
            await usage.VerifyLedger(pb2.VerifyLedgerRequest(), call)
        with refused(Reason.PERMISSION_DENIED, Code.PERMISSION_DENIED):
            await usage.GetLedgerHead(pb2.GetLedgerHeadRequest(), call)


async def test_a_revoked_key_sees_nothing_more(store: Store, usage: UsageServicer) -> None:
    as_acme = await tenants(store)
    await usage.QueryUsage(pb2.QueryUsageRequest(), as_acme)
    await store.revoke_key("key-1", time.time())
    with refused(Reason.KEY_INVALID, Code.UNAUTHENTICATED):
        await usage.QueryUsage(pb2.QueryUsageRequest(), as_acme)


async def test_prices_are_those_of_the_moment(usage: UsageServicer) -> None:
    before = await usage.ListPrices(pb2.ListPricesRequest(time=Timestamp(seconds=1_700_006_399)), AS_ADMIN)
    after = await usage.ListPrices(pb2.ListPricesRequest(time=Timestamp(seconds=1_700_006_400)), AS_ADMIN)
    now = await usage.ListPrices(pb2.ListPricesRequest(), AS_ADMIN)
    assert [price.input_nano_usd_per_million for price in before.prices] == [2_000_000_000]
    assert [price.input_nano_usd_per_million for price in after.prices] == [1_000_000_000]
    assert now.prices == after.prices
    assert before.prices[0].price_version != after.prices[0].price_version
    assert before.book_version == after.book_version == book().version
    other = pb2.ListPricesRequest(models=["b/y"])
    assert not (await usage.ListPrices(other, AS_ADMIN)).prices


async def test_prices_come_by_model_up_to_ten_thousand_a_page(store: Store) -> None:
    models = [f"a/{number:04}" for number in range(2500)]
    prices = PriceBook({model: versioned(model, [Price("", "", 1, 1)]) for model in reversed(models)})
    usage = UsageServicer(store, Prices(prices))
    first = await usage.ListPrices(pb2.ListPricesRequest(), AS_ADMIN)
    assert [price.model for price in first.prices] == models[:1000]
    rest = await usage.ListPrices(pb2.ListPricesRequest(page_size=10_000, page_token=first.next_page_token), AS_ADMIN)
    assert [price.model for price in rest.prices] == models[1000:]
    assert rest.next_page_token == ""
    with refused_field("page_size"):
        await usage.ListPrices(pb2.ListPricesRequest(page_size=10_001), AS_ADMIN)


async def test_the_verdict_is_of_the_whole_ledger_whoever_of_us_asks(store: Store, usage: UsageServicer) -> None:
    await tenants(store)
    await store.post([settlement("op-1/1", amount=5), settlement("op-2/1", amount=6, debit="platform")])
    as_service = Call("/sluice.metering.v1.UsageService/VerifyLedger", deadline=1e12, caller=Caller(CallerKind.SERVICE, "cli"))
    for call in (AS_ADMIN, as_service):
        verdict = await usage.VerifyLedger(pb2.VerifyLedgerRequest(), call)
        assert verdict.ok
        assert (verdict.entry_count, verdict.debit_nano_usd, verdict.credit_nano_usd) == (2, 11, 11)
        assert not verdict.problems
        assert verdict.head == (await usage.GetLedgerHead(pb2.GetLedgerHeadRequest(), call)).head
        assert (verdict.head.sequence, len(verdict.head.hash)) == (2, 16)
        assert (await usage.VerifyLedger(pb2.VerifyLedgerRequest(expected_head=verdict.head), call)).ok
        longer = pb2.LedgerHead(sequence=3, hash=bytes(16))
        verdict = await usage.VerifyLedger(pb2.VerifyLedgerRequest(expected_head=longer), call)
        assert not verdict.ok
        assert "entries 3 to 3 are missing" in verdict.problems[0]


@pytest.mark.parametrize(
    ("field", "head"),
    [
        ("expected_head.sequence", pb2.LedgerHead(sequence=-1, hash=bytes(16))),
        ("expected_head.hash", pb2.LedgerHead(sequence=1, hash=b"short")),
        ("expected_head.hash", pb2.LedgerHead(sequence=1)),
    ],
)
async def test_a_head_that_is_none_is_refused(usage: UsageServicer, field: str, head: pb2.LedgerHead) -> None:
    with refused_field(field):
        await usage.VerifyLedger(pb2.VerifyLedgerRequest(expected_head=head), AS_ADMIN)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("page_size", lambda request: setattr(request, "page_size", -1)),
        ("page_size", lambda request: setattr(request, "page_size", 1001)),
        ("page_token", lambda request: setattr(request, "page_token", "next")),
        ("page_token", lambda request: setattr(request, "page_token", "-5")),
        ("page_token", lambda request: setattr(request, "page_token", "٣")),
        ("page_token", lambda request: setattr(request, "page_token", "9" * 19)),
        ("model", lambda request: setattr(request, "model", "a" * 513)),
        ("provider", lambda request: setattr(request, "provider", "a\0")),
        ("task_type", lambda request: setattr(request, "task_type", 99)),
        ("group_by", lambda request: request.group_by.append(0)),
        ("group_by", lambda request: request.group_by.append(99)),
        ("group_by", lambda request: request.group_by.extend([1, 2, 3, 4, 5, 6, 7])),
        ("start_time", lambda request: setattr(request.start_time, "seconds", 1 << 62)),
        ("end_time", lambda request: setattr(request.end_time, "nanos", -1)),
    ],
)
async def test_a_malformed_query_is_refused_by_its_field(
    usage: UsageServicer, field: str, change: Callable[[pb2.QueryUsageRequest], None]
) -> None:
    request = pb2.QueryUsageRequest()
    change(request)
    with refused_field(field):
        await usage.QueryUsage(request, AS_ADMIN)


async def test_other_malformed_requests_are_refused_by_their_field(usage: UsageServicer) -> None:
    with refused_field("page_size"):
        await usage.ListEntries(pb2.ListEntriesRequest(page_size=1001), AS_ADMIN)
    with refused_field("page_token"):
        await usage.ListEntries(pb2.ListEntriesRequest(page_token="x"), AS_ADMIN)
    with refused_field("time"):
        await usage.ListPrices(pb2.ListPricesRequest(time=Timestamp(seconds=1 << 60)), AS_ADMIN)
