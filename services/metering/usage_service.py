"""The servicer of `sluice.metering.v1.UsageService`. Administrators and services see everything, a tenant's key its own tenant."""

from __future__ import annotations

import hashlib
import time
from typing import Final

from services.metering.errors import KeyUnknown
from services.metering.ports import Store, UsageFilter
from services.metering.proto import (
    entry_to_proto,
    head_from_proto,
    head_to_proto,
    micros_of,
    page_size,
    price_to_proto,
    usage_row_to_proto,
    verdict_to_proto,
)
from services.metering.service import Prices
from services.runtime.call import Call, CallerKind
from services.runtime.errors import Failure, Reason, invalid
from sluice.metering.v1 import usage_service_pb2 as pb2

_SCOPE: Final = "usage"
_BEARER: Final = "Bearer "
_MOST_GROUPS: Final = 6
_DAY: Final = 24 * 3600.0
_GROUPS: Final = {
    pb2.USAGE_DIMENSION_TENANT: "tenant",
    pb2.USAGE_DIMENSION_PROJECT: "project",
    pb2.USAGE_DIMENSION_KEY: "key",
    pb2.USAGE_DIMENSION_MODEL: "model",
    pb2.USAGE_DIMENSION_TASK_TYPE: "task_type",
    pb2.USAGE_DIMENSION_HOUR: "hour",
    pb2.USAGE_DIMENSION_DAY: "day",
}


class UsageServicer:
    """Translates, makes one call, translates."""

    def __init__(self, store: Store, prices: Prices) -> None:
        self._store = store
        self._prices = prices

    async def _tenant(self, call: Call, wanted: str) -> str:
        """The tenant that may be shown; empty: all. Raises Failure KEY_MISSING, KEY_INVALID, PERMISSION_DENIED."""
        if call.caller.kind is not CallerKind.ANONYMOUS:
            return wanted
        authorization = call.metadata.get("authorization", "")
        if not authorization.startswith(_BEARER):
            raise Failure(Reason.KEY_MISSING, "no key; send metadata `authorization: Bearer sk-sluice-…`")
        chain = await self._store.chain_by_digest(hashlib.sha256(authorization[len(_BEARER) :].encode()).digest())
        if chain is None or not chain.key.is_active(time.time()):
            raise KeyUnknown
        if _SCOPE not in chain.key.scopes:
            raise Failure(Reason.PERMISSION_DENIED, f"the key lacks the scope {_SCOPE!r}", metadata={"scope": _SCOPE})
        if wanted not in ("", chain.tenant.id):
            raise Failure(Reason.PERMISSION_DENIED, "the key sees its own tenant only", metadata={"scope": _SCOPE})
        return chain.tenant.id

    async def QueryUsage(self, request: pb2.QueryUsageRequest, call: Call) -> pb2.QueryUsageResponse:
        """See the proto."""
        size, after = page_size(request.page_size), _offset(request.page_token)
        if len(request.group_by) > _MOST_GROUPS:
            raise invalid("group_by", f"must have at most {_MOST_GROUPS} entries, got {len(request.group_by)}")
        now = time.time()
        wanted = UsageFilter(
            await self._tenant(call, request.tenant_id),
            request.project_id,
            request.key_id,
            request.model,
            micros_of(request.start_time, "start_time") / 1e6 if request.HasField("start_time") else now - _DAY,
            micros_of(request.end_time, "end_time") / 1e6 if request.HasField("end_time") else now,
        )
        groups = []
        for dimension in request.group_by:
            if dimension not in _GROUPS:
                raise invalid("group_by", f"{dimension} is no dimension")
            groups.append(_GROUPS[dimension])
        rows = await self._store.usage(wanted, groups, after, size + 1)
        return pb2.QueryUsageResponse(
            rows=[usage_row_to_proto(row) for row in rows[:size]],
            next_page_token=str(after + size) if len(rows) > size else "",
        )

    async def ListEntries(self, request: pb2.ListEntriesRequest, call: Call) -> pb2.ListEntriesResponse:
        """See the proto."""
        size, before = page_size(request.page_size), _offset(request.page_token)
        tenant = await self._tenant(call, request.tenant_id)
        found = await self._store.entries(tenant, request.operation_id, before or None, size + 1)
        return pb2.ListEntriesResponse(
            entries=[entry_to_proto(posted) for posted in found[:size]],
            next_page_token=str(found[size - 1].sequence) if len(found) > size else "",
        )

    async def ListPrices(self, request: pb2.ListPricesRequest, call: Call) -> pb2.ListPricesResponse:
        """See the proto."""
        await self._tenant(call, "")
        size, after = page_size(request.page_size, 1000, 10_000), _offset(request.page_token)
        moment = micros_of(request.time, "time") / 1e6 if request.HasField("time") else time.time()
        book = self._prices.book
        wanted = set(request.models)
        found = [price for price in book.all_at(moment) if not wanted or price.model in wanted][after : after + size + 1]
        return pb2.ListPricesResponse(
            prices=[price_to_proto(price) for price in found[:size]],
            next_page_token=str(after + size) if len(found) > size else "",
            book_version=book.version,
        )

    async def VerifyLedger(self, request: pb2.VerifyLedgerRequest, call: Call) -> pb2.VerifyLedgerResponse:
        """See the proto."""
        _require_admin(call)
        expected = head_from_proto(request.expected_head, "expected_head") if request.HasField("expected_head") else None
        return verdict_to_proto(await self._store.verify(expected))

    async def GetLedgerHead(self, request: pb2.GetLedgerHeadRequest, call: Call) -> pb2.GetLedgerHeadResponse:
        """See the proto."""
        _require_admin(call)
        return pb2.GetLedgerHeadResponse(head=head_to_proto(await self._store.head()))


def _require_admin(call: Call) -> None:
    if call.caller.kind is CallerKind.ANONYMOUS:
        raise Failure(
            Reason.PERMISSION_DENIED, "the whole ledger is the administrator's to verify", metadata={"scope": "admin"}
        )


def _offset(page_token: str) -> int:
    if not page_token:
        return 0
    if not page_token.isascii() or not page_token.isdigit() or len(page_token) > 18:
        raise invalid("page_token", "is not one that a previous page gave")
    return int(page_token)
