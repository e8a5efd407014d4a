"""Translations between `sluice.metering.v1` and the ledger."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import MappingProxyType
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from services.metering.accounts import Balance, Key, Limits, ModelLimits, Project, Tenant, key_account
from services.metering.cost import Price, cost_of
from services.metering.leasing import Grant
from services.metering.ledger import GENESIS, PLATFORM, Entry, Head, HoldState, Settlement, Verdict
from services.metering.ports import Chain, Posted, UsageRow
from services.metering.pricebook import PriceBook
from services.runtime.errors import invalid
from sluice.inference.v1 import answer_pb2, receipt_pb2
from sluice.metering.v1 import metering_service_pb2, price_pb2, tenancy_service_pb2, usage_service_pb2

HOLD_STATES: Final = MappingProxyType(
    {
        HoldState.OPEN: metering_service_pb2.HOLD_STATE_OPEN,
        HoldState.POSTED: metering_service_pb2.HOLD_STATE_POSTED,
        HoldState.VOIDED: metering_service_pb2.HOLD_STATE_VOIDED,
        HoldState.EXPIRED: metering_service_pb2.HOLD_STATE_EXPIRED,
    }
)
_KINDS: Final = MappingProxyType(
    {
        "requests": metering_service_pb2.LIMIT_KIND_REQUESTS_PER_MINUTE,
        "tokens": metering_service_pb2.LIMIT_KIND_TOKENS_PER_MINUTE,
        "concurrency": metering_service_pb2.LIMIT_KIND_CONCURRENCY,
        "budget": metering_service_pb2.LIMIT_KIND_BUDGET,
    }
)
_MAX_AMOUNT: Final = 1 << 60
_MAX_MODELS: Final = 64
_MAX_MODEL: Final = 256
_MAX_COUNT: Final = 1 << 40
"""Of tokens and pictures of one attempt. Far above any, and low enough that sums over all of them fit an int64."""
_REQUEST_KEY_BYTES: Final = 16
_MAX_ID: Final = 256
_MIN_SECONDS: Final = -62_135_596_800
_MAX_SECONDS: Final = 253_402_300_799
"""Bounds of google.protobuf.Timestamp: the years 1 to 9999."""
_MAX_DURATION: Final = 315_576_000_000
"""Bound of google.protobuf.Duration, s."""
_NANOS: Final = 1_000_000_000
_IDS: Final = ("attempt_id", "operation_id", "tenant_id", "project_id", "key_id")
# In the order in which `cost_of` takes them.
_COUNTS: Final = (
    "input_token_count",
    "cached_input_token_count",
    "cache_write_token_count",
    "output_token_count",
    "reasoning_token_count",
    "image_count",
)


def timestamp(seconds: float | None) -> Timestamp | None:
    """Unix seconds as a message; None stays None."""
    if seconds is None:
        return None
    message = Timestamp()
    message.FromMicroseconds(round(seconds * 1e6))
    return message


def duration(seconds: float) -> Duration:
    """Seconds as a message."""
    message = Duration()
    message.FromMicroseconds(round(seconds * 1e6))
    return message


def micros_of(message: Timestamp, field: str) -> int:
    """Microseconds since the epoch; raises Failure (REQUEST_INVALID) outside of the years 1 to 9999."""
    if not _MIN_SECONDS <= message.seconds <= _MAX_SECONDS or not 0 <= message.nanos < _NANOS:
        raise invalid(field, "must be a moment in the years 1 to 9999")
    return message.seconds * 1_000_000 + message.nanos // 1000


def required(value: str, field: str) -> str:
    """An id; raises Failure (REQUEST_INVALID) when it is missing or too long."""
    if not value or len(value) > _MAX_ID:
        raise invalid(field, f"must have 1 to {_MAX_ID} characters")
    return value


def settlement_from_proto(message: metering_service_pb2.Settlement, book: PriceBook, now_micros: int) -> Settlement:
    """A settlement; raises Failure (REQUEST_INVALID) for one that can never be posted.

    Its cost is checked against the price that it names. What a provider charged for is owed whatever we think of the sum, so
    a mismatch is posted as sent and flagged, and `usage` and `verify` show it.
    """
    # Each field is read once: a text is made anew at every read, and every settlement of the mesh passes here.
    attempt_id, operation_id = message.attempt_id, message.operation_id
    tenant_id, project_id, key_id = message.tenant_id, message.project_id, message.key_id
    if not (
        0 < len(attempt_id) <= _MAX_ID
        and 0 < len(operation_id) <= _MAX_ID
        and 0 < len(tenant_id) <= _MAX_ID
        and 0 < len(project_id) <= _MAX_ID
        and 0 < len(key_id) <= _MAX_ID
    ):
        for field, value in zip(_IDS, (attempt_id, operation_id, tenant_id, project_id, key_id), strict=True):
            required(value, field)
    if not attempt_id.startswith(f"{operation_id}/"):
        # By this the ledger finds the attempts of an operation.
        raise invalid("attempt_id", "must begin with the id of its operation and a slash")
    amount, saved = message.cost_nano_usd, message.saved_nano_usd
    if not 0 <= amount <= _MAX_AMOUNT:
        raise invalid("cost_nano_usd", f"must be 0 to {_MAX_AMOUNT}, got {amount}")
    if not 0 <= saved <= _MAX_AMOUNT:
        raise invalid("saved_nano_usd", f"must be 0 to {_MAX_AMOUNT}, got {saved}")
    usage = message.usage
    counts = (
        usage.input_token_count,
        usage.cached_input_token_count,
        usage.cache_write_token_count,
        usage.output_token_count,
        usage.reasoning_token_count,
        usage.image_count,
    )
    if min(counts) < 0 or max(counts) > _MAX_COUNT:
        for field, count in zip(_COUNTS, counts, strict=True):
            if not 0 <= count <= _MAX_COUNT:
                raise invalid(f"usage.{field}", f"must be 0 to {_MAX_COUNT}, got {count}")
    took = message.duration
    seconds, nanos = took.seconds, took.nanos
    if not 0 <= seconds <= _MAX_DURATION or not 0 <= nanos < _NANOS:
        raise invalid("duration", f"must be 0 to {_MAX_DURATION} seconds")
    flags = ""
    price_version = message.price_version
    if price_version:
        price = book.by_version(price_version)
        if price is None:
            # A price of another version of the file: known to whoever charged, not to us any more.
            flags = "price_unknown"
        elif amount != cost_of(price, *counts):
            flags = "cost_mismatch"
    elif amount:
        flags = "price_unknown"
    platform = message.payer == metering_service_pb2.PAYER_PLATFORM
    provider = message.provider
    entry = Entry(
        attempt_id,
        operation_id,
        PLATFORM if platform else key_account(key_id),
        f"provider/{provider}",
        amount,
        tenant_id,
        project_id,
        key_id,
        message.model,
        provider,
        *counts,
        usage.source,
        price_version,
        micros_of(message.start_time, "start_time") or now_micros,
        seconds * 1_000_000 + nanos // 1000,
        message.outcome,
        message.error_reason,
        message.task_type,
        saved,
        message.cache_status,
        message.attempt_number,
        flags,
        now_micros,
        *_observed(message),
    )
    request_key = message.request_key
    if request_key and len(request_key) != _REQUEST_KEY_BYTES:
        raise invalid("request_key", f"must be empty or have {_REQUEST_KEY_BYTES} bytes, got {len(request_key)}")
    return Settlement(entry, message.lease_id, message.hold_id, message.is_final, request_key)


def _observed(message: metering_service_pb2.Settlement) -> tuple[int | None, int | None]:
    """Our own counts of a settlement. Raises Failure (REQUEST_INVALID)."""
    if not message.HasField("observed_usage"):
        return None, None
    usage = message.observed_usage
    prompt, answer = usage.input_token_count, usage.output_token_count
    if not 0 <= prompt <= _MAX_COUNT or not 0 <= answer <= _MAX_COUNT:
        raise invalid("observed_usage", f"counts must be 0 to {_MAX_COUNT}, got {prompt} and {answer}")
    return prompt, answer


def grant_to_proto(grant: Grant) -> metering_service_pb2.AcquireLeaseResponse:
    """A grant."""
    return metering_service_pb2.AcquireLeaseResponse(
        lease_id=grant.lease_id,
        expire_time=timestamp(grant.expire_time),
        granted_request_count=grant.requests,
        granted_token_count=grant.tokens,
        granted_concurrency=grant.concurrency,
        granted_nano_usd=grant.nano_usd,
        limits=[
            metering_service_pb2.LimitStatus(
                level=one.level.value, kind=_KINDS[one.kind], limit=one.limit, remaining=one.remaining
            )
            for one in grant.standings
        ],
        retry_delay=duration(grant.retry_delay) if grant.retry_delay else None,
    )


def price_to_proto(price: Price) -> price_pb2.Price:
    """A row of the price book."""
    return price_pb2.Price(
        price_version=price.version,
        model=price.model,
        input_nano_usd_per_million=price.input,
        cached_input_nano_usd_per_million=price.cached_input,
        output_nano_usd_per_million=price.output,
        reasoning_nano_usd_per_million=price.reasoning,
        cache_write_nano_usd_per_million=price.cache_write,
        image_nano_usd=price.image,
        request_nano_usd=price.request,
        effective_from_time=timestamp(price.effective_from),
        effective_to_time=timestamp(price.effective_to),
        source=price.source,
    )


def limits_from_proto(message: tenancy_service_pb2.Limits) -> Limits:
    """Limits; raises Failure (REQUEST_INVALID) for one below -1, or a negative budget."""

    def optional(field: str, least: int) -> int | None:
        if not message.HasField(field):  # type: ignore[arg-type]  # one of the stub's literals
            return None
        value: int = getattr(message, field)
        if not least <= value <= _MAX_AMOUNT:
            raise invalid(f"limits.{field}", f"must be at least {least}, got {value}")
        return value

    return Limits(
        optional("budget_nano_usd", 0),
        optional("requests_per_minute", -1),
        optional("tokens_per_minute", -1),
        optional("concurrency", -1),
        _models_from_proto(message.models),
    )


def _models_from_proto(messages: Sequence[tenancy_service_pb2.ModelLimits]) -> tuple[ModelLimits, ...]:
    if len(messages) > _MAX_MODELS:
        raise invalid("limits.models", f"must have at most {_MAX_MODELS} entries, got {len(messages)}")
    found: dict[str, ModelLimits] = {}
    for number, message in enumerate(messages):
        where = f"limits.models[{number}]"
        model = message.model
        if not 0 < len(model) <= _MAX_MODEL:
            raise invalid(f"{where}.model", f"must have 1 to {_MAX_MODEL} characters")
        if model in found:
            raise invalid(f"{where}.model", f"{model!r} is there twice")
        values: list[int | None] = []
        for field in ("requests_per_minute", "tokens_per_minute", "concurrency"):
            value = getattr(message, field) if message.HasField(field) else None
            if value is not None and not -1 <= value <= _MAX_AMOUNT:
                raise invalid(f"{where}.{field}", f"must be at least -1, got {value}")
            values.append(value)
        if values == [None, None, None]:
            raise invalid(where, "must have a limit: requests_per_minute, tokens_per_minute or concurrency")
        found[model] = ModelLimits(model, *values)
    return tuple(found[model] for model in sorted(found))


def limits_to_proto(limits: Limits) -> tenancy_service_pb2.Limits:
    """Limits."""
    return tenancy_service_pb2.Limits(
        budget_nano_usd=limits.budget_nano_usd,
        requests_per_minute=limits.requests_per_minute,
        tokens_per_minute=limits.tokens_per_minute,
        concurrency=limits.concurrency,
        models=[
            tenancy_service_pb2.ModelLimits(
                model=one.model,
                requests_per_minute=one.requests_per_minute,
                tokens_per_minute=one.tokens_per_minute,
                concurrency=one.concurrency,
            )
            for one in limits.models
        ],
    )


def _balance(balance: Balance) -> tenancy_service_pb2.Balance:
    return tenancy_service_pb2.Balance(spent_nano_usd=balance.spent_nano_usd, held_nano_usd=balance.held_nano_usd)


def tenant_to_proto(tenant: Tenant) -> tenancy_service_pb2.Tenant:
    """A tenant."""
    return tenancy_service_pb2.Tenant(
        id=tenant.id,
        display_name=tenant.display_name,
        limits=limits_to_proto(tenant.limits),
        balance=_balance(tenant.balance),
        create_time=timestamp(tenant.create_time),
    )


def project_to_proto(project: Project) -> tenancy_service_pb2.Project:
    """A project."""
    return tenancy_service_pb2.Project(
        id=project.id,
        tenant_id=project.tenant_id,
        display_name=project.display_name,
        limits=limits_to_proto(project.limits),
        balance=_balance(project.balance),
        create_time=timestamp(project.create_time),
    )


def key_to_proto(key: Key) -> tenancy_service_pb2.Key:
    """A key, without anything of its secret but the last four characters."""
    return tenancy_service_pb2.Key(
        id=key.id,
        tenant_id=key.tenant_id,
        project_id=key.project_id,
        display_name=key.display_name,
        secret_hint=key.secret_hint,
        scopes=key.scopes,
        allowed_models=key.allowed_models,
        limits=limits_to_proto(key.limits),
        balance=_balance(key.balance),
        create_time=timestamp(key.create_time),
        expire_time=timestamp(key.expire_time),
        revoke_time=timestamp(key.revoke_time),
        cache_namespace=key.cache_namespace,
    )


def identity_of(chain: Chain) -> metering_service_pb2.Identity:
    """What a key stands for."""
    key = chain.key
    return metering_service_pb2.Identity(
        tenant_id=key.tenant_id,
        project_id=key.project_id,
        key_id=key.id,
        scopes=sorted(key.scopes),
        allowed_models=key.allowed_models,
        expire_time=timestamp(key.expire_time),
        cache_namespace=key.cache_namespace,
        limited_models=sorted({one.model for part in (chain.tenant, chain.project, key) for one in part.limits.models}),
    )


def task_type_name(number: str) -> str:
    """What people call the task type that the journal has by its number: `reasoning`. One that this Sluice doesn't know stays a number."""
    if int(number) not in receipt_pb2.TaskType.values():
        return number
    return receipt_pb2.TaskType.Name(receipt_pb2.TaskType.ValueType(int(number))).removeprefix("TASK_TYPE_").lower()


def usage_row_to_proto(row: UsageRow, group_by: Sequence[str]) -> usage_service_pb2.UsageRow:
    """Sums of one group of the dimensions `group_by`."""
    return usage_service_pb2.UsageRow(
        group_values=[
            task_type_name(value) if name == "task_type" else value for name, value in zip(group_by, row.group, strict=True)
        ],
        request_count=row.requests,
        cache_hit_count=row.cache_hits,
        attempt_count=row.attempts,
        fallback_count=row.fallbacks,
        usage=answer_pb2.Usage(
            input_token_count=row.input_tokens,
            cached_input_token_count=row.cached_tokens,
            output_token_count=row.output_tokens,
            reasoning_token_count=row.reasoning_tokens,
            cache_write_token_count=row.cache_write_tokens,
            image_count=row.images,
            source=row.usage_source,  # type: ignore[arg-type]  # stored as it came
        ),
        cost_nano_usd=row.cost,
        saved_nano_usd=row.saved,
        succeeded_count=row.succeeded,
        cost_per_task_nano_usd=row.cost // row.succeeded if row.succeeded else None,
        fallback_share=row.fallbacks / row.attempts if row.attempts else 0.0,
    )


def entry_to_proto(posted: Posted) -> usage_service_pb2.LedgerEntry:
    """A row of the journal."""
    entry = posted.entry
    return usage_service_pb2.LedgerEntry(
        sequence=posted.sequence,
        attempt_id=entry.attempt_id,
        operation_id=entry.operation_id,
        debit_account=entry.debit,
        credit_account=entry.credit,
        amount_nano_usd=entry.amount,
        key_id=entry.key_id,
        model=entry.model,
        usage=answer_pb2.Usage(
            input_token_count=entry.input_tokens,
            cached_input_token_count=entry.cached_tokens,
            output_token_count=entry.output_tokens,
            reasoning_token_count=entry.reasoning_tokens,
            source=entry.usage_source,  # type: ignore[arg-type]  # stored as it came
            cache_write_token_count=entry.cache_write_tokens,
            image_count=entry.images,
        ),
        observed_usage=None
        if entry.observed_output is None
        else answer_pb2.Usage(
            input_token_count=entry.observed_input or 0,
            output_token_count=entry.observed_output,
            source=answer_pb2.USAGE_SOURCE_ESTIMATED,
        ),
        price_version=entry.price_version,
        start_time=timestamp(entry.start_micros / 1e6),
        post_time=timestamp(entry.post_micros / 1e6),
        outcome=entry.outcome,  # type: ignore[arg-type]  # stored as it came
        tenant_id=entry.tenant_id,
        project_id=entry.project_id,
        provider=entry.provider,
        task_type=entry.task_type,  # type: ignore[arg-type]  # stored as it came
        saved_nano_usd=entry.saved,
        cache_status=entry.cache_status,  # type: ignore[arg-type]  # stored as it came
        attempt_number=entry.attempt_number,
        flags=[flag for flag in entry.flags.split(",") if flag],
    )


def head_from_proto(message: usage_service_pb2.LedgerHead, field: str) -> Head:
    """A kept head. Raises Failure (REQUEST_INVALID)."""
    if message.sequence < 0:
        raise invalid(f"{field}.sequence", f"must not be negative, got {message.sequence}")
    if len(message.hash) != len(GENESIS):
        raise invalid(f"{field}.hash", f"must have {len(GENESIS)} bytes, got {len(message.hash)}")
    return Head(message.sequence, message.hash)


def head_to_proto(head: Head) -> usage_service_pb2.LedgerHead:
    """A head."""
    return usage_service_pb2.LedgerHead(sequence=head.sequence, hash=head.hash)


def verdict_to_proto(verdict: Verdict) -> usage_service_pb2.VerifyLedgerResponse:
    """What a check found."""
    return usage_service_pb2.VerifyLedgerResponse(
        head=head_to_proto(verdict.head),
        ok=not verdict.problems and verdict.debits == verdict.credits,
        entry_count=verdict.entries,
        debit_nano_usd=verdict.debits,
        credit_nano_usd=verdict.credits,
        problems=verdict.problems,
    )


def page_size(value: int, default: int = 100, most: int = 1000) -> int:
    """A page size; raises Failure (REQUEST_INVALID) when it is out of bounds."""
    if not 0 <= value <= most:
        raise invalid("page_size", f"must be 0 to {most}, got {value}")
    return value or default


def micros_now() -> int:
    """Microseconds since the epoch."""
    return time.time_ns() // 1000
