"""The servicer of `sluice.metering.v1.MeteringService`: what the mesh calls on the way of a request."""

from __future__ import annotations

import time
from typing import Final

from services.metering.accounts import Payer
from services.metering.errors import KeyUnknown
from services.metering.leasing import Leasing, Wish
from services.metering.ledger import PostState, Settlement
from services.metering.ports import Store
from services.metering.pricebook import PriceBook
from services.metering.proto import (
    HOLD_STATES,
    duration,
    grant_to_proto,
    identity_of,
    micros_now,
    micros_of,
    required,
    settlement_from_proto,
)
from services.runtime.call import Call
from services.runtime.errors import Failure, invalid
from services.runtime.metrics import Registry
from services.runtime.status import status_from_failure
from sluice.metering.v1 import metering_service_pb2 as pb2

MAX_SETTLEMENTS: Final = 1000
_DIGEST_BYTES: Final = 32
_STATES: Final = {
    PostState.POSTED: pb2.SETTLEMENT_STATE_POSTED,
    PostState.DUPLICATE: pb2.SETTLEMENT_STATE_DUPLICATE,
}


class Prices:
    """The price book in force; replaced when the catalogue changes."""

    def __init__(self, book: PriceBook) -> None:
        self.book = book


class MeteringServicer:
    """Translates, makes one call, translates."""

    def __init__(self, store: Store, leasing: Leasing, prices: Prices, metrics: Registry, *, identity_reuse: float) -> None:
        self._store = store
        self._leasing = leasing
        self._prices = prices
        self._identity_reuse = identity_reuse
        self._posted = metrics.counter("sluice_settlements_total", "Settlements by what became of them", ["state"])
        self._flagged = metrics.counter(
            "sluice_settlements_flagged_total", "Posted settlements whose cost we would have put otherwise"
        )

    async def Authenticate(self, request: pb2.AuthenticateRequest, call: Call) -> pb2.AuthenticateResponse:
        """See the proto."""
        if len(request.key_sha256) != _DIGEST_BYTES:
            raise invalid("key_sha256", f"must have {_DIGEST_BYTES} bytes")
        chain = await self._store.chain_by_digest(request.key_sha256)
        now = time.time()
        if chain is None or not chain.key.is_active(now):
            raise KeyUnknown
        reuse = self._identity_reuse
        if chain.key.expire_time is not None:
            reuse = max(0.0, min(reuse, chain.key.expire_time - now))
        return pb2.AuthenticateResponse(identity=identity_of(chain), reuse_duration=duration(reuse))

    async def AcquireLease(self, request: pb2.AcquireLeaseRequest, call: Call) -> pb2.AcquireLeaseResponse:
        """See the proto."""
        required(request.replica_id, "replica_id")
        required(request.key_id, "key_id")
        if request.lease_id:
            required(request.lease_id, "lease_id")
        if request.model:
            required(request.model, "model")
        wish = Wish(
            request.replica_id,
            request.sequence,
            request.key_id,
            request.lease_id,
            request.wanted_request_count,
            request.wanted_token_count,
            request.wanted_concurrency,
            request.wanted_nano_usd,
            request.model,
        )
        return grant_to_proto(await self._leasing.acquire(wish))

    async def EndReservations(self, request: pb2.EndReservationsRequest, call: Call) -> pb2.EndReservationsResponse:
        """See the proto."""
        required(request.replica_id, "replica_id")
        return pb2.EndReservationsResponse(reservation_count=await self._leasing.begin(request.replica_id))

    async def ReturnLease(self, request: pb2.ReturnLeaseRequest, call: Call) -> pb2.ReturnLeaseResponse:
        """See the proto."""
        required(request.lease_id, "lease_id")
        await self._leasing.give_back(request.lease_id, request.owed_nano_usd)
        return pb2.ReturnLeaseResponse()

    async def Hold(self, request: pb2.HoldRequest, call: Call) -> pb2.HoldResponse:
        """See the proto."""
        required(request.operation_id, "operation_id")
        required(request.key_id, "key_id")
        if request.amount_nano_usd <= 0:
            raise invalid("amount_nano_usd", f"must be positive, got {request.amount_nano_usd}")
        if not 0 <= request.min_amount_nano_usd <= request.amount_nano_usd:
            raise invalid("min_amount_nano_usd", f"must be 0 to amount_nano_usd, got {request.min_amount_nano_usd}")
        if not request.HasField("expire_time"):
            raise invalid("expire_time", "must be set: the store frees the hold then by itself")
        expires = micros_of(request.expire_time, "expire_time") / 1e6
        chain = await self._store.chain_by_key(request.key_id)
        if chain is None or not chain.key.is_active(time.time()):
            raise KeyUnknown
        hold = await self._leasing.hold(
            request.replica_id,
            request.operation_id,
            Payer(chain.tenant.id, chain.project.id, chain.key.id),
            request.amount_nano_usd,
            request.min_amount_nano_usd,
            expires,
        )
        return pb2.HoldResponse(
            hold_id=hold.id,
            amount_nano_usd=hold.amount,
            budget_before_nano_usd=hold.budget_before,
            budget_level=hold.budget_level,
        )

    async def VoidHold(self, request: pb2.VoidHoldRequest, call: Call) -> pb2.VoidHoldResponse:
        """See the proto."""
        required(request.hold_id, "hold_id")
        state = await self._leasing.void_hold(request.hold_id, may_have_run=request.may_have_run)
        return pb2.VoidHoldResponse(state=HOLD_STATES[state])

    async def PostSettlements(self, request: pb2.PostSettlementsRequest, call: Call) -> pb2.PostSettlementsResponse:
        """See the proto."""
        if not 1 <= len(request.settlements) <= MAX_SETTLEMENTS:
            raise invalid("settlements", f"must have 1 to {MAX_SETTLEMENTS} entries, got {len(request.settlements)}")
        now = micros_now()
        book = self._prices.book
        response = pb2.PostSettlementsResponse()
        add = response.results.add
        good: list[Settlement] = []
        places: list[pb2.SettlementResult] = []
        for message in request.settlements:
            result = add()
            try:
                settlement = settlement_from_proto(message, book, now)
            except Failure as failure:
                result.attempt_id = message.attempt_id
                result.state = pb2.SETTLEMENT_STATE_REFUSED
                result.status.CopyFrom(status_from_failure(failure))
            else:
                result.attempt_id = settlement.entry.attempt_id
                good.append(settlement)
                places.append(result)
        if len(good) < len(request.settlements):
            self._posted.labels("refused").inc(len(request.settlements) - len(good))
        if good:
            states = await self._store.post(good)
            for result, state, settlement in zip(places, states, good, strict=True):
                result.state = _STATES[state]
                if settlement.entry.flags and state is PostState.POSTED:
                    self._flagged.inc()
            for state in PostState:
                if count := states.count(state):
                    self._posted.labels(state.value).inc(count)
        return response
