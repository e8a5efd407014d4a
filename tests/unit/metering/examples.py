"""Clocks, calls and messages for tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from services.metering.accounts import Key, Limits, Tenant
from services.metering.cost import Price
from services.metering.ports import Store
from services.metering.pricebook import PriceBook, versioned
from services.runtime.call import ADMIN, Call, Caller, CallerKind
from services.runtime.errors import Code, Failure, Reason
from sluice.inference.v1 import answer_pb2
from sluice.metering.v1 import metering_service_pb2 as pb2
from tests.conformance.ledger.examples import ACME, NOW, PAYER, key

CALL = Call("/sluice.metering.v1.MeteringService/Hold", deadline=1e12, caller=Caller(CallerKind.SERVICE, "gateway"))
AS_ADMIN = Call("/sluice.metering.v1.UsageService/QueryUsage", deadline=1e12, caller=ADMIN)
UNTIL_2100 = 4_102_444_800
"""Unix seconds: the servicers look at the real clock."""


class Clock:
    """Unix time that a test sets."""

    def __init__(self) -> None:
        self.time = NOW

    def __call__(self) -> float:
        return self.time


def with_key(secret: str) -> Call:
    """A call of nobody the transport knows, with a bearer token."""
    return Call("/sluice.metering.v1.UsageService/QueryUsage", deadline=1e12, metadata={"authorization": f"Bearer {secret}"})


@contextlib.contextmanager
def refused(reason: Reason, code: Code, **metadata: str) -> Iterator[None]:
    """The block fails so, with these values among its metadata."""
    with pytest.raises(Failure) as caught:
        yield
    assert (caught.value.reason, caught.value.code) == (reason, code)
    assert metadata.items() <= dict(caught.value.metadata).items(), caught.value


@contextlib.contextmanager
def refused_field(field: str) -> Iterator[None]:
    """The block fails for `field` of the request."""
    with refused(Reason.REQUEST_INVALID, Code.INVALID_ARGUMENT, field=field):
        yield


async def accounts(
    store: Store, *, budget: int | None = None, limits: Limits | None = None, expire_time: float | None = None
) -> Key:
    """Tenant `acme` with its project `default` and the key of PAYER; the budget is the tenant's, `limits` are the key's."""
    await store.create_tenant(Tenant(ACME, "Acme", Limits(budget_nano_usd=budget), NOW), "")
    made = key(PAYER.key_id, limits=limits, expire_time=expire_time)
    return await store.create_key(made)


def book() -> PriceBook:
    """Model `a/x` at 2 and 10 dollars per million tokens until 2023-11-15, then at half of it."""
    rows = [
        Price("", "", 2_000_000_000, 10_000_000_000, source="test"),
        Price("", "", 1_000_000_000, 5_000_000_000, effective_from=1_700_006_400.0, source="test"),
    ]
    return PriceBook({"a/x": versioned("a/x", rows)})


def settlement(
    attempt_id: str, cost: int, *, price_version: str = "", input_tokens: int = 0, output_tokens: int = 0
) -> pb2.Settlement:
    """A settlement of `attempt_id`, `<operation>/<n>`, charged to PAYER."""
    return pb2.Settlement(
        attempt_id=attempt_id,
        operation_id=attempt_id.partition("/")[0],
        tenant_id=PAYER.tenant_id,
        project_id=PAYER.project_id,
        key_id=PAYER.key_id,
        model="a/x",
        provider="a",
        usage=answer_pb2.Usage(
            input_token_count=input_tokens, output_token_count=output_tokens, source=answer_pb2.USAGE_SOURCE_REPORTED
        ),
        cost_nano_usd=cost,
        price_version=price_version,
        is_final=True,
        attempt_number=1,
    )
