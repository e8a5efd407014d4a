"""The servicer of `sluice.metering.v1.UsageService`. Administrators and services see everything, a tenant's key its own tenant."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Sequence
from typing import Final

from services.metering.errors import KeyUnknown
from services.metering.ports import Store, UsageFilter
from services.metering.proto import (
    entry_to_proto,
    head_from_proto,
    head_to_proto,
    micros_now,
    micros_of,
    page_size,
    price_to_proto,
    usage_row_to_proto,
    verdict_to_proto,
)
from services.metering.service import Prices
from services.runtime.call import Call, CallerKind
from services.runtime.errors import Failure, Reason, invalid
from sluice.inference.v1 import receipt_pb2
from sluice.metering.v1 import usage_service_pb2 as pb2

_SCOPE: Final = "usage"
_BEARER: Final = "Bearer "
_MOST_GROUPS: Final = 6
_DAY_MICROS: Final = 24 * 3600 * 1_000_000
_MOST_CHARACTERS: Final = 512
_MOST_TOKEN: Final = 32_768
"""Characters of a page token: six groups, whose characters take up to twelve bytes each in it, don't fill it."""
_MOST_MICROS: Final = 253_402_300_800_000_000
"""The year 10000."""
_GROUPS: Final = {
    pb2.USAGE_DIMENSION_TENANT: "tenant",
    pb2.USAGE_DIMENSION_PROJECT: "project",
    pb2.USAGE_DIMENSION_KEY: "key",
    pb2.USAGE_DIMENSION_MODEL: "model",
    pb2.USAGE_DIMENSION_PROVIDER: "provider",
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
        size = page_size(request.page_size)
        groups = _groups(request.group_by)
        for field in ("tenant_id", "project_id", "key_id", "model", "provider"):
            _check_text(getattr(request, field), field)
        if request.task_type not in receipt_pb2.TaskType.values():
            raise invalid("task_type", f"{request.task_type} is no task type")
        now = micros_now()
        start = micros_of(request.start_time, "start_time") if request.HasField("start_time") else now - _DAY_MICROS
        end = micros_of(request.end_time, "end_time") if request.HasField("end_time") else now
        tenant_id = await self._tenant(call, request.tenant_id)
        query = _query_digest(request, tenant_id)
        after: Sequence[str] = ()
        if request.page_token:
            start, end, after = _from_token(request.page_token, query, len(groups))
        wanted = UsageFilter(
            tenant_id,
            request.project_id,
            request.key_id,
            request.model,
            start / 1e6,
            end / 1e6,
            request.provider,
            request.task_type,
        )
        rows = await self._store.usage(wanted, groups, after, size + 1)
        return pb2.QueryUsageResponse(
            rows=[usage_row_to_proto(row, groups) for row in rows[:size]],
            next_page_token=_token(query, start, end, rows[size - 1].group) if len(rows) > size else "",
        )

    async def ListEntries(self, request: pb2.ListEntriesRequest, call: Call) -> pb2.ListEntriesResponse:
        """See the proto."""
        size, before = page_size(request.page_size), _offset(request.page_token)
        tenant = await self._tenant(call, request.tenant_id)
        if request.oldest_first:
            return await self._oldest_first(request, tenant, size, before)
        for field in ("start_time", "end_time"):
            if request.HasField(field):
                raise invalid(field, "goes with oldest_first only")
        found = await self._store.entries(tenant, request.operation_id, before or None, size + 1)
        return pb2.ListEntriesResponse(
            entries=[entry_to_proto(posted) for posted in found[:size]],
            next_page_token=str(found[size - 1].sequence) if len(found) > size else "",
        )

    async def _oldest_first(
        self, request: pb2.ListEntriesRequest, tenant_id: str, size: int, after: int
    ) -> pb2.ListEntriesResponse:
        if request.operation_id:
            raise invalid("operation_id", "must be empty with oldest_first")
        _check_text(tenant_id, "tenant_id")
        wanted = UsageFilter(
            tenant_id,
            start=micros_of(request.start_time, "start_time") / 1e6 if request.HasField("start_time") else None,
            end=micros_of(request.end_time, "end_time") / 1e6 if request.HasField("end_time") else None,
        )
        found = await self._store.journal(wanted, after, size + 1)
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


def _groups(dimensions: Sequence[pb2.UsageDimension.ValueType]) -> list[str]:
    if len(dimensions) > _MOST_GROUPS:
        raise invalid("group_by", f"must have at most {_MOST_GROUPS} entries, got {len(dimensions)}")
    groups = []
    for dimension in dimensions:
        if dimension not in _GROUPS:
            raise invalid("group_by", f"{dimension} is no dimension")
        groups.append(_GROUPS[dimension])
    return groups


def _check_text(value: str, field: str) -> None:
    # Neither is in any row; a text of PostgreSQL can't have a NUL.
    if len(value) > _MOST_CHARACTERS or "\0" in value:
        raise invalid(field, f"must have at most {_MOST_CHARACTERS} characters and no NUL")


def _is_storable(value: str) -> bool:
    """Whether a database takes it as a text: JSON may name halves of a character."""
    return "\0" not in value and value.encode(errors="replace").decode() == value


def _query_digest(request: pb2.QueryUsageRequest, tenant_id: str) -> str:
    """Stands for what is asked for, whichever page of it."""
    query = pb2.QueryUsageRequest()
    query.CopyFrom(request)
    query.tenant_id = tenant_id
    query.ClearField("page_size")
    query.ClearField("page_token")
    return hashlib.blake2b(query.SerializeToString(deterministic=True), digest_size=16).hexdigest()


def _token(query: str, start: int, end: int, group: Sequence[str]) -> str:
    return base64.urlsafe_b64encode(json.dumps([query, start, end, list(group)]).encode()).decode()


def _from_token(page_token: str, query: str, count: int) -> tuple[int, int, tuple[str, ...]]:
    """First and last microsecond and the last group. Raises Failure (REQUEST_INVALID) unless a page of the same query gave the token."""
    foreign = invalid("page_token", "is not one that a previous page of the same query gave")
    if len(page_token) > _MOST_TOKEN:
        raise foreign
    try:
        match json.loads(base64.b64decode(page_token, altchars=b"-_", validate=True)):
            case [str(digest), int(start), int(end), [*group]] if digest == query and len(group) == count > 0:
                pass
            case _:
                raise foreign
    except (ValueError, RecursionError):
        raise foreign from None
    if not all(isinstance(value, str) and _is_storable(value) for value in group):
        raise foreign
    if not all(-_MOST_MICROS < moment < _MOST_MICROS for moment in (start, end)):
        raise foreign
    return start, end, tuple(group)


def _offset(page_token: str) -> int:
    if not page_token:
        return 0
    if not page_token.isascii() or not page_token.isdigit() or len(page_token) > 18:
        raise invalid("page_token", "is not one that a previous page gave")
    return int(page_token)
