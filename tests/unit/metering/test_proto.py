from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor

from services.metering import proto
from services.metering.accounts import Balance, Limits, ModelLimits, Project, Tenant
from services.metering.cost import Price
from services.metering.ledger import Entry, HoldState
from services.metering.ports import Chain, Posted, UsageRow
from services.runtime.errors import Failure
from sluice.errors.v1 import error_reason_pb2
from sluice.inference.v1 import answer_pb2, receipt_pb2
from sluice.metering.v1 import metering_service_pb2, tenancy_service_pb2
from tests.conformance.ledger.examples import ACME, NOW, key
from tests.unit.metering.examples import book, refused_field, settlement

BOOK = book()
NOW_MICROS = int(NOW * 1e6)


def entry_of(message: metering_service_pb2.Settlement) -> Entry:
    return proto.settlement_from_proto(message, BOOK, NOW_MICROS).entry


def full() -> metering_service_pb2.Settlement:
    """A settlement whose fields differ all from each other and from nothing."""
    message = settlement("op-1/3", 77)
    message.MergeFrom(
        metering_service_pb2.Settlement(
            lease_id="lease-1",
            hold_id="hold-1",
            model="a/y",
            provider="prov",
            usage=answer_pb2.Usage(
                input_token_count=11,
                cached_input_token_count=2,
                cache_write_token_count=3,
                output_token_count=14,
                reasoning_token_count=5,
                image_count=6,
                source=answer_pb2.USAGE_SOURCE_COUNTED,
            ),
            observed_usage=answer_pb2.Usage(
                input_token_count=12, output_token_count=13, source=answer_pb2.USAGE_SOURCE_ESTIMATED
            ),
            price_version="unheard-of",
            outcome=4,  # type: ignore[arg-type]  # any
            error_reason=error_reason_pb2.ERROR_REASON_PROVIDER_TIMEOUT,
            task_type=2,  # type: ignore[arg-type]  # any
            saved_nano_usd=8,
            cache_status=receipt_pb2.CACHE_STATUS_HIT_EXACT,
            attempt_number=3,
        )
    )
    message.start_time.FromMicroseconds(1_700_000_000_123_456)
    message.duration.FromMicroseconds(2_500_001)
    return message


def test_a_settlement_becomes_an_entry_field_by_field() -> None:
    translated = proto.settlement_from_proto(full(), BOOK, NOW_MICROS)
    assert (translated.lease_id, translated.hold_id, translated.is_final) == ("lease-1", "hold-1", True)
    assert translated.entry == Entry(
        attempt_id="op-1/3",
        operation_id="op-1",
        debit="key/key-1",
        credit="provider/prov",
        amount=77,
        tenant_id="acme",
        project_id="default",
        key_id="key-1",
        model="a/y",
        provider="prov",
        input_tokens=11,
        cached_tokens=2,
        cache_write_tokens=3,
        output_tokens=14,
        reasoning_tokens=5,
        images=6,
        usage_source=answer_pb2.USAGE_SOURCE_COUNTED,
        price_version="unheard-of",
        start_micros=1_700_000_000_123_456,
        duration_micros=2_500_001,
        outcome=4,
        error_reason=error_reason_pb2.ERROR_REASON_PROVIDER_TIMEOUT,
        task_type=2,
        saved=8,
        cache_status=receipt_pb2.CACHE_STATUS_HIT_EXACT,
        attempt_number=3,
        flags="price_unknown",
        post_micros=NOW_MICROS,
        observed_input=12,
        observed_output=13,
    )


def test_an_entry_is_shown_as_it_was_settled() -> None:
    message = full()
    shown = proto.entry_to_proto(Posted(9, entry_of(message)))
    assert shown.sequence == 9
    assert (shown.attempt_id, shown.operation_id, shown.key_id, shown.model) == ("op-1/3", "op-1", "key-1", "a/y")
    assert (shown.debit_account, shown.credit_account, shown.amount_nano_usd) == ("key/key-1", "provider/prov", 77)
    assert (shown.usage, shown.observed_usage) == (message.usage, message.observed_usage)
    assert (shown.start_time, shown.outcome, shown.price_version) == (message.start_time, 4, "unheard-of")
    assert shown.post_time.ToMicroseconds() == NOW_MICROS
    assert list(shown.flags) == ["price_unknown"]


def test_without_our_own_count_none_is_shown() -> None:
    entry = entry_of(settlement("op-1/1", 5))
    assert (entry.observed_input, entry.observed_output) == (None, None)
    assert not proto.entry_to_proto(Posted(1, entry)).HasField("observed_usage")


@pytest.mark.parametrize(("prompt", "answer"), [(-1, 1), (1, 1 << 62)])
def test_counts_of_ours_that_can_not_be_are_refused(prompt: int, answer: int) -> None:
    message = settlement("op-1/1", 5)
    message.observed_usage.MergeFrom(answer_pb2.Usage(input_token_count=prompt, output_token_count=answer))
    with refused_field("observed_usage"):
        entry_of(message)


def test_what_the_platform_pays_is_its_debit() -> None:
    message = settlement("op-1/1", 5)
    message.payer = metering_service_pb2.PAYER_PLATFORM
    assert entry_of(message).debit == "platform"
    message.payer = metering_service_pb2.PAYER_TENANT
    assert entry_of(message).debit == "key/key-1"


def test_a_settlement_without_a_time_is_of_now() -> None:
    assert entry_of(settlement("op-1/1", 5)).start_micros == NOW_MICROS


def test_a_charge_is_checked_against_the_price_it_names_and_posted_whatever_it_is() -> None:
    price = BOOK.at("a/x", 0.0)
    later = BOOK.at("a/x", 1_700_006_400.0)
    assert price is not None
    assert later is not None

    def flags(cost: int, version: str) -> str:
        return entry_of(settlement("op-1/1", cost, price_version=version, input_tokens=1000, output_tokens=10)).flags

    assert flags(2_000_000 + 100_000, price.version) == ""
    assert flags(1_000_000 + 50_000, later.version) == ""
    assert flags(2_000_000 + 100_000, later.version) == "cost_mismatch"
    assert flags(5, "gone") == "price_unknown"
    assert flags(5, "") == "price_unknown"
    assert flags(0, "") == ""
    assert entry_of(settlement("op-1/1", 12, price_version=price.version)).amount == 12


@pytest.mark.parametrize("field", ["attempt_id", "operation_id", "tenant_id", "project_id", "key_id"])
def test_ids_are_required_and_bounded(field: str) -> None:
    for value in ("", "x" * 257):
        message = settlement("op-1/1", 5)
        setattr(message, field, value)
        with refused_field(field):
            entry_of(message)
    longest = "x" * 256
    match field:
        case "attempt_id":
            longest = f"op-1/{'1' * 251}"
        case "operation_id":
            longest = "x" * 254
            message.attempt_id = f"{longest}/1"
    setattr(message, field, longest)
    assert getattr(entry_of(message), field) == longest


@pytest.mark.parametrize("attempt_id", ["op-1", "op-11/1", "op-/1", "other/1", "1", "/op-1/1"])
def test_the_id_of_an_attempt_begins_with_its_operation(attempt_id: str) -> None:
    message = settlement("op-1/1", 5)
    message.attempt_id = attempt_id
    with refused_field("attempt_id"):
        entry_of(message)


def _set(path: str, value: int) -> Callable[[metering_service_pb2.Settlement], None]:
    def change(message: metering_service_pb2.Settlement) -> None:
        *parents, last = path.split(".")
        target = message
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, last, value)

    return change


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("cost_nano_usd", -1, "cost_nano_usd"),
        ("cost_nano_usd", (1 << 60) + 1, "cost_nano_usd"),
        ("saved_nano_usd", -1, "saved_nano_usd"),
        ("saved_nano_usd", 1 << 62, "saved_nano_usd"),
        ("usage.input_token_count", -1, "usage.input_token_count"),
        ("usage.output_token_count", 1 << 62, "usage.output_token_count"),
        ("usage.reasoning_token_count", -5, "usage.reasoning_token_count"),
        ("usage.image_count", -1, "usage.image_count"),
        # Each of these would not fit the store, or be no moment that can be shown.
        ("start_time.seconds", 1 << 62, "start_time"),
        ("start_time.seconds", -(1 << 62), "start_time"),
        ("start_time.nanos", -1, "start_time"),
        ("start_time.nanos", 1_000_000_000, "start_time"),
        ("duration.seconds", 1 << 62, "duration"),
        ("duration.seconds", -1, "duration"),
        ("duration.nanos", -1, "duration"),
    ],
)
def test_values_out_of_bounds_are_refused(path: str, value: int, field: str) -> None:
    message = settlement("op-1/1", 5)
    _set(path, value)(message)
    with refused_field(field):
        entry_of(message)


@pytest.mark.parametrize("size", [1, 15, 17, 64])
def test_a_request_key_of_another_size_is_refused(size: int) -> None:
    message = settlement("op-1/1", 5)
    message.request_key = b"k" * size
    with refused_field("request_key"):
        entry_of(message)


def test_limits_round_trip_absent_zero_and_unlimited() -> None:
    for limits in (Limits(), Limits(0, 0, 0, 0), Limits(5, -1, -1, -1), Limits(1 << 60, 1, 2, 3)):
        assert proto.limits_from_proto(proto.limits_to_proto(limits)) == limits


@pytest.mark.parametrize(
    ("field", "value"),
    [("budget_nano_usd", -1), ("requests_per_minute", -2), ("tokens_per_minute", -2), ("concurrency", -2), ("concurrency", 1 << 61)],
)  # fmt: skip
def test_limits_below_their_least_are_refused(field: str, value: int) -> None:
    with refused_field(f"limits.{field}"):
        message = tenancy_service_pb2.Limits()
        setattr(message, field, value)
        proto.limits_from_proto(message)


@pytest.mark.parametrize(
    ("models", "field"),
    [
        ([{"model": "", "concurrency": 1}], "limits.models[0].model"),
        ([{"model": "m" * 257, "concurrency": 1}], "limits.models[0].model"),
        ([{"model": "a/x", "concurrency": 1}, {"model": "a/x", "concurrency": 2}], "limits.models[1].model"),
        ([{"model": "a/x"}], "limits.models[0]"),
        ([{"model": "a/x", "tokens_per_minute": -2}], "limits.models[0].tokens_per_minute"),
        ([{"model": f"a/{number}", "concurrency": 1} for number in range(65)], "limits.models"),
    ],
)
def test_limits_of_models_that_say_nothing_clear_are_refused(models: list[Any], field: str) -> None:
    messages = [tenancy_service_pb2.ModelLimits(**one) for one in models]
    with refused_field(field):
        proto.limits_from_proto(tenancy_service_pb2.Limits(models=messages))


def test_limits_of_models_are_kept_by_model() -> None:
    limits = Limits(5, models=(ModelLimits("a/x", 1, None, -1), ModelLimits("b/y", tokens_per_minute=0)))
    shown = proto.limits_to_proto(limits)
    assert [one.model for one in shown.models] == ["a/x", "b/y"]
    assert not shown.models[0].HasField("tokens_per_minute")
    assert proto.limits_from_proto(tenancy_service_pb2.Limits(budget_nano_usd=5, models=reversed(shown.models))) == limits


def test_a_price_keeps_what_is_absent_absent() -> None:
    plain = proto.price_to_proto(Price("v", "m", 1, 2, effective_from=5.0, source="s"))
    assert not plain.HasField("cached_input_nano_usd_per_million")
    assert not plain.HasField("effective_to_time")
    assert (plain.price_version, plain.model, plain.source, plain.effective_from_time.seconds) == ("v", "m", "s", 5)
    priced = proto.price_to_proto(Price("v", "m", 1, 2, 0, 4, 5, 6, 7, 8.0, 9.0, "s"))
    assert priced.HasField("cached_input_nano_usd_per_million")
    shown = {field.name: value for field, value in priced.ListFields() if field.type == FieldDescriptor.TYPE_INT64}
    assert shown == {
        "input_nano_usd_per_million": 1,
        "output_nano_usd_per_million": 2,
        "cached_input_nano_usd_per_million": 0,
        "reasoning_nano_usd_per_million": 4,
        "cache_write_nano_usd_per_million": 5,
        "image_nano_usd": 6,
        "request_nano_usd": 7,
    }
    assert priced.effective_to_time.seconds == 9


def test_accounts_are_shown_with_limits_and_balances() -> None:
    limits, balance = Limits(5, 6, 7, 8), Balance(3, 4)
    tenant = proto.tenant_to_proto(Tenant("t", "T", limits, NOW, balance))
    project = proto.project_to_proto(Project("p", "t", "P", limits, NOW, balance))
    for shown in (tenant, project):
        assert proto.limits_from_proto(shown.limits) == limits
        assert (shown.balance.spent_nano_usd, shown.balance.held_nano_usd) == (3, 4)
        assert shown.create_time.seconds == int(NOW)
    assert (tenant.id, tenant.display_name) == ("t", "T")
    assert (project.id, project.tenant_id, project.display_name) == ("p", "t", "P")


def test_a_key_is_shown_without_its_digest() -> None:
    one = dataclasses.replace(key(), revoke_time=NOW + 1, balance=Balance(1, 2))
    shown = proto.key_to_proto(one)
    assert (shown.id, shown.tenant_id, shown.project_id, shown.secret_hint) == ("key-1", ACME, "default", "ey-1")
    assert (list(shown.scopes), list(shown.allowed_models)) == (["inference", "usage"], ["a/x", "policy/cheap"])
    assert (shown.expire_time.seconds, shown.revoke_time.seconds) == (int(NOW) + 3600, int(NOW) + 1)
    assert shown.cache_namespace == "shop"
    assert one.sha256 not in shown.SerializeToString()
    one = dataclasses.replace(one, limits=Limits(models=(ModelLimits("b/y", 1),)))
    tenant = Tenant(ACME, "", Limits(models=(ModelLimits("a/x", 1), ModelLimits("b/y", 2))), NOW)
    identity = proto.identity_of(Chain(one, Project("default", ACME, "", Limits(), NOW), tenant))
    assert list(identity.limited_models) == ["a/x", "b/y"]
    assert (identity.tenant_id, identity.project_id, identity.key_id) == (ACME, "default", "key-1")
    assert (list(identity.scopes), identity.cache_namespace) == (["inference", "usage"], "shop")
    assert one.sha256 not in identity.SerializeToString()


def test_sums_are_shown_each_in_its_place() -> None:
    shown = proto.usage_row_to_proto(UsageRow(("a", "3"), 1, 5, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 1), ["model", "task_type"])
    assert list(shown.group_values) == ["a", "code"]
    assert (shown.succeeded_count, shown.cost_per_task_nano_usd, shown.fallback_share) == (5, 2, 4 / 3)
    assert (shown.request_count, shown.cache_hit_count, shown.attempt_count, shown.fallback_count) == (1, 2, 3, 4)
    assert shown.usage == answer_pb2.Usage(
        input_token_count=5,
        cached_input_token_count=6,
        cache_write_token_count=7,
        output_token_count=8,
        reasoning_token_count=9,
        image_count=10,
        source=answer_pb2.USAGE_SOURCE_REPORTED,
    )
    assert (shown.cost_nano_usd, shown.saved_nano_usd) == (11, 12)


def test_every_state_of_a_hold_has_its_own_value() -> None:
    assert set(proto.HOLD_STATES) == set(HoldState)
    assert sorted(proto.HOLD_STATES.values()) == [1, 2, 3, 4]


def test_a_page_size_of_nothing_is_the_default() -> None:
    assert (proto.page_size(0), proto.page_size(1), proto.page_size(1000)) == (100, 1, 1000)
    assert (proto.page_size(0, 1000, 10_000), proto.page_size(10_000, 1000, 10_000)) == (1000, 10_000)
    for value in (-1, 1001):
        with refused_field("page_size"):
            proto.page_size(value)


def test_absent_moments_stay_absent() -> None:
    assert proto.timestamp(None) is None
    moment = proto.timestamp(1.5)
    assert moment is not None
    assert (moment.seconds, moment.nanos) == (1, 500_000_000)
    assert proto.micros_of(moment, "time") == 1_500_000
    with pytest.raises(Failure):
        moment.seconds = 253_402_300_800
        proto.micros_of(moment, "time")
