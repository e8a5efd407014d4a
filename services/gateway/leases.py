"""Slices of a key's limits that this replica may spend without asking.

A lease holds slices of requests, tokens, concurrency and money. The hot path takes from them with a few additions; a worker refills
them before they are empty, and only a caller that finds them empty waits. Rates may overshoot by replicas times slice. Money can't:
a slice was deducted from the budget when it was granted, and what is held but not known to be spent stays taken until the lease is
exchanged for a new one (`strand`).

While metering is down, calls go on inside what the lease has until it expires; after that they are refused, never unmetered.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from services.gateway.flights import Flights
from services.gateway.ports import OUTAGES, Grant, LeaseWish, LimitState, Metering
from services.gateway.releases import Releases
from services.runtime.errors import Failure, Reason, unavailable

_MOST_REFILLS: Final = 4
_PLENTY: Final = 1 << 60
"""Stands for unlimited: large enough never to be used up, so that the hot path needs no second comparison."""
_ENDLESS: Final = 1 << 59
_RENEWALS_AT_ONCE: Final = 16
_REFUSAL_SECONDS: Final = 0.25
_FAST_SECONDS: Final = 1.0
"""A slice that was used up faster is followed by a larger one."""
_SLOW_SECONDS: Final = 10.0
"""And one that lasted longer by a smaller one."""
_STILL_SECONDS: Final = 0.1
"""A call that ends later than this after its time: the process stood still, and the answer may lie there unread."""
_MAX_FACTOR: Final = 64


@dataclass(frozen=True, slots=True)
class SliceSizes:
    """What is asked for at a time."""

    request_count: int
    token_count: int
    concurrency: int
    nano_usd: int


@dataclass(frozen=True, slots=True)
class Standing:
    """The tightest limit of a kind, and what is left of it as far as this replica knows."""

    kind: str
    """`requests`, `tokens`, `concurrency`."""
    limit: int
    remaining: int
    reset: float | None
    """Seconds until all of it is there again; None: that doesn't depend on time."""


def lease_name(key_id: str, model: str = "") -> str:
    """What a lease is known by: that of a key, or that of one model for the key."""
    return f"{key_id}/{model}" if model else key_id


class Lease:
    """The slices of one key at this replica, or those of one model for the key. Fields are read by the hot path; only `Leases` changes
    them.
    """

    __slots__ = (
        "budget", "concurrency", "concurrency_limit", "expires", "factor", "failed_until", "generation", "granted", "held", "in_flight",
        "is_all_concurrency", "key_id", "largest_hold", "lease_id", "low_money", "low_requests", "low_tokens", "model", "money", "name", "no_concurrency_until",
        "no_money_until", "no_rate_until", "pending", "renews", "request_limit", "requests", "slice_money", "spent", "stranded",
        "tenant_id", "token_limit", "tokens", "used", "waiting", "wanted",
    )  # fmt: skip

    def __init__(self, tenant_id: str, key_id: str, model: str = "") -> None:
        self.tenant_id = tenant_id
        self.key_id = key_id
        self.model = model
        self.name = lease_name(key_id, model)
        self.lease_id = ""
        self.generation = 0
        """Rises when the money slice is replaced; a hold gives back only to the slice it was taken from."""
        self.expires = 0.0
        self.renews = 0.0
        self.requests = 0
        self.tokens = 0
        self.granted = 0.0
        """When the last grant came."""
        self.factor = 1
        """By how much the next slices of rates are larger than the least."""
        self.concurrency = 0
        self.is_all_concurrency = False
        """The last grant was for less than was asked: no more is to be had."""
        self.in_flight = 0
        self.waiting = 0
        """Requests that wait to be admitted."""
        self.money = 0
        self.held = 0
        self.spent = 0
        """Costs settled since the slice was granted; their settlements may not be posted yet."""
        self.stranded = 0
        """Held for operations that ended without telling what they cost."""
        self.slice_money = 0
        self.largest_hold = 0
        self.low_requests = 0
        self.low_tokens = 0
        self.low_money = 0
        self.used = False
        """Since the last grant."""
        self.wanted = False
        """The worker knows that a refill is due."""
        self.pending: LeaseWish | None = None
        """Sent and not answered: sent again as it was, so that its grant isn't made twice."""
        self.failed_until = 0.0
        self.no_rate_until = 0.0
        self.no_concurrency_until = 0.0
        self.no_money_until = 0.0
        self.request_limit: LimitState | None = None
        self.token_limit: LimitState | None = None
        self.concurrency_limit: LimitState | None = None
        self.budget: LimitState | None = None

    def is_unlimited_money(self) -> bool:
        """Whether no budget is set at any level."""
        return self.money >= _ENDLESS

    def owed(self) -> int:
        """What must not be given to others when the lease ends: spent, or held by what is or was under way."""
        return self.spent + self.held + self.stranded

    def budget_left(self) -> int | None:
        """What is left of the tightest budget, as far as this replica knows: nano-dollars; None: no budget is set."""
        if self.budget is None or self.money >= _ENDLESS:
            return None
        return self.budget.remaining + self.money


class Leases:
    """The leases of this replica. `clock` is the loop's."""

    def __init__(
        self,
        metering: Metering,
        releases: Releases,
        clock: Callable[[], float],
        sizes: SliceSizes,
        *,
        call_seconds: float = 2.0,
        max_count: int = 10_000,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._metering = metering
        self._releases = releases
        self._clock = clock
        self._wall_clock = wall_clock
        self._sizes = sizes
        self._call_seconds = call_seconds
        self._max_count = max_count
        self._leases: dict[str, Lease] = {}
        self._refills: Flights[str, None] = Flights("a lease from metering")
        self._due: dict[str, Lease] = {}
        self._work = asyncio.Event()
        self._sequence = 0
        self.renewal_failure_count = 0

    def admit(self, name: str, tokens: int) -> Lease | None:
        """Takes one request and `tokens` tokens from the lease of a key (`lease_name`); None: `admit_waiting` must be asked. Hot path."""
        lease = self._leases.get(name)
        if lease is None:
            return None
        now = self._clock()
        if now >= lease.expires or lease.requests <= 0 or lease.tokens <= 0 or lease.in_flight >= lease.concurrency:
            return None
        lease.requests -= 1
        lease.tokens -= tokens
        lease.in_flight += 1
        lease.used = True
        if not lease.wanted and (lease.requests < lease.low_requests or lease.tokens < lease.low_tokens or now >= lease.renews):
            self._want(lease)
        return lease

    def standings(self, key_id: str) -> list[Standing]:
        """What applies to a key; none without a lease."""
        lease = self._leases.get(key_id)
        if lease is None:
            return []
        found = []
        passed = max(0.0, self._clock() - lease.granted)
        for kind, rate, slice_left in (
            ("requests", lease.request_limit, lease.requests),
            ("tokens", lease.token_limit, lease.tokens),
        ):
            if rate is None or rate.limit <= 0:
                continue
            # What was left over all replicas at the last grant, what came since, and what this one was granted and hasn't used.
            left = min(rate.limit, int(rate.remaining + passed * rate.limit / 60) + max(0, slice_left))
            found.append(Standing(kind, rate.limit, left, (rate.limit - left) * 60 / rate.limit))
        limit = lease.concurrency_limit
        if limit is not None:
            left = min(limit.limit, limit.remaining + lease.concurrency) - lease.in_flight
            found.append(Standing("concurrency", limit.limit, max(0, left), None))
        return found

    async def admit_waiting(self, tenant_id: str, key_id: str, tokens: int, timeout: float, model: str = "") -> Lease:
        """As `admit`, asking metering first. Failure RATE_LIMITED or CONCURRENCY_LIMITED with a retry delay, DEPENDENCY_UNAVAILABLE
        when metering can't be asked and the lease has nothing left.
        """
        name = lease_name(key_id, model)
        lease = self._leases.get(name)
        if lease is None:
            lease = self._open(tenant_id, key_id, model)
        admitted = self.admit(name, tokens)
        if admitted is not None:
            return admitted
        self._refuse_early(lease)
        lease.waiting += 1
        try:
            # Who asks first asks for those that wait by then, and the worker for those that run; more may have come meanwhile, for whom
            # there is to be asked again.
            for _ in range(_MOST_REFILLS):
                # Else the sweep could take the lease for idle, and let it go, while it is being renewed.
                lease.used = True
                await self._refill(lease, 0, timeout)
                admitted = self.admit(name, tokens)
                if admitted is not None:
                    return admitted
                if self._clock() < lease.no_rate_until or (lease.in_flight >= lease.concurrency and lease.is_all_concurrency):
                    # There is no more to be had.
                    break
        finally:
            lease.waiting -= 1
        self._refuse(lease)
        raise AssertionError("unreachable: _refuse raises")

    def leave(self, lease: Lease, token_correction: int) -> None:
        """The request is over; it used `token_correction` tokens more than was taken at admission (negative: fewer)."""
        lease.in_flight -= 1
        lease.tokens -= token_correction

    def is_used_up(self, key_id: str, model: str) -> bool:
        """Whether a rate of a model is known to have nothing left at the moment."""
        lease = self._leases.get(lease_name(key_id, model))
        if lease is None:
            return False
        now = self._clock()
        return now < lease.expires and now < lease.no_rate_until and (lease.requests <= 0 or lease.tokens <= 0)

    def charge(self, tenant_id: str, key_id: str, model: str, tokens: int) -> None:
        """A model has answered in another's place, and wasn't asked for before: one request and `tokens` tokens of it were used."""
        name = lease_name(key_id, model)
        lease = self._leases.get(name)
        if lease is None:
            try:
                lease = self._open(tenant_id, key_id, model)
            except Failure:
                # So many are in use that this one isn't kept.
                return
        lease.requests -= 1
        lease.tokens -= tokens
        lease.used = True
        if not lease.wanted and (lease.requests < lease.low_requests or lease.tokens < lease.low_tokens):
            self._want(lease)

    def take(self, lease: Lease, amount: int) -> bool:
        """Holds `amount` from the money slice; False: it has too little."""
        if amount > lease.largest_hold:
            lease.largest_hold = amount
        if lease.money < amount:
            return False
        lease.money -= amount
        lease.held += amount
        if lease.money < lease.low_money and not lease.wanted:
            self._want(lease)
        return True

    async def take_waiting(self, lease: Lease, amount: int, timeout: float) -> bool:
        """As `take`, asking metering for more first when it has too little. False: a hold of its own is needed."""
        if self.take(lease, amount):
            return True
        now = self._clock()
        if now < lease.no_money_until or now < lease.failed_until:
            return False
        try:
            await self._refill(lease, amount, timeout)
        except Failure as failure:
            if failure.reason not in OUTAGES:
                raise
            return False
        if self.take(lease, amount):
            return True
        lease.no_money_until = self._clock() + 1.0
        return False

    def settle(self, lease: Lease, generation: int, amount: int, cost: int) -> None:
        """The operation cost `cost` of the `amount` it held: the rest returns to the slice."""
        if generation == lease.generation:
            lease.held -= amount
            lease.money += amount - cost
            lease.spent += cost

    def strand(self, lease: Lease, generation: int, amount: int) -> None:
        """The operation ended and nobody here knows what it cost: its hold stays taken until the lease is exchanged."""
        if amount and generation == lease.generation:
            lease.held -= amount
            if lease.money >= _ENDLESS:
                # Nothing was deducted for it.
                return
            lease.stranded += amount
            if lease.stranded * 2 > lease.slice_money and not lease.wanted:
                self._want(lease)

    def is_alive(self, key_id: str) -> bool:
        """Whether there is a lease that hasn't expired."""
        lease = self._leases.get(key_id)
        return lease is not None and self._clock() < lease.expires

    async def refill_forever(self) -> None:
        """The worker: refills what runs low, exchanges what is stranded, returns what is idle. First of all it says that this replica has
        started: without traffic it would say nothing else, and the money of the one before it would stay reserved.
        """
        is_known = False
        while True:
            if not is_known:
                is_known = await self._say_started()
            try:
                async with asyncio.timeout(1.0):
                    await self._work.wait()
            except TimeoutError:
                self._sweep()
            self._work.clear()
            due, self._due = self._due, {}
            leases = list(due.values())
            for start in range(0, len(leases), _RENEWALS_AT_ONCE):
                async with asyncio.TaskGroup() as group:
                    for lease in leases[start : start + _RENEWALS_AT_ONCE]:
                        group.create_task(self._renew(lease))

    async def _say_started(self) -> bool:
        try:
            await self._metering.end_reservations(timeout=self._call_seconds)
        except Failure:
            # Said again when there is something to do, within a second.
            return False
        return True

    async def give_back_all(self, timeout: float) -> None:
        """Returns every lease; for the end of the process. What can't be returned expires by itself."""
        leases = [lease for lease in self._leases.values() if lease.lease_id]
        self._leases.clear()
        deadline = self._clock() + timeout
        for start in range(0, len(leases), _RENEWALS_AT_ONCE):
            async with asyncio.TaskGroup() as group:
                for lease in leases[start : start + _RENEWALS_AT_ONCE]:
                    group.create_task(self._give_back(lease, max(0.05, deadline - self._clock())))

    def forget(self, key_id: str) -> None:
        """The key was revoked: its lease is returned."""
        for lease in [lease for lease in self._leases.values() if lease.key_id == key_id]:
            lease.expires = 0.0
            lease.used = False
            self._want(lease)

    def _open(self, tenant_id: str, key_id: str, model: str) -> Lease:
        if len(self._leases) >= self._max_count:
            idle = next((lease for lease in self._leases.values() if lease.in_flight == 0), None)
            if idle is None:
                raise Failure(Reason.OVERLOADED, "too many keys are in use at once; retry later", retry_delay=1.0)
            del self._leases[idle.name]
            if idle.lease_id:
                self._releases.give_back(idle.tenant_id, idle.lease_id, idle.owed())
        lease = Lease(tenant_id, key_id, model)
        self._leases[lease.name] = lease
        return lease

    def _want(self, lease: Lease) -> None:
        lease.wanted = True
        self._due[lease.name] = lease
        self._work.set()

    def _refuse_early(self, lease: Lease) -> None:
        """Refuses without asking when metering said lately that there is no more, or couldn't be asked."""
        now = self._clock()
        if now < lease.failed_until:
            if now < lease.expires and lease.requests > 0 and lease.tokens > 0:
                self._refuse(lease)
            raise unavailable("metering", "limits can't be checked at the moment and the lease is used up; retry later")
        if now >= lease.expires:
            return
        if (lease.requests <= 0 or lease.tokens <= 0) and now < lease.no_rate_until:
            self._refuse(lease)
        if lease.in_flight >= lease.concurrency and now < lease.no_concurrency_until:
            self._refuse(lease)

    def _refuse(self, lease: Lease) -> None:
        now = self._clock()
        if lease.requests <= 0 or lease.tokens <= 0:
            what, limit = ("requests", lease.request_limit) if lease.requests <= 0 else ("tokens", lease.token_limit)
            if now >= lease.no_rate_until:
                lease.no_rate_until = now + 1.0
            level = limit.level if limit is not None else "key"
            size = str(limit.limit) if limit is not None else "0"
            raise Failure(
                Reason.RATE_LIMITED,
                f"the limit of {size} {what} per minute of {_whose(lease, level)} is used up; retry later or ask for a higher limit",
                metadata=_about(lease, size, level),
                retry_delay=round(lease.no_rate_until - now, 3),
            )
        if lease.in_flight >= lease.concurrency:
            if lease.is_all_concurrency and now >= lease.no_concurrency_until:
                lease.no_concurrency_until = now + _REFUSAL_SECONDS
            limit = lease.concurrency_limit
            level = limit.level if limit is not None else "key"
            size = str(limit.limit) if limit is not None else str(lease.concurrency)
            raise Failure(
                Reason.CONCURRENCY_LIMITED,
                f"the {size} requests that {_whose(lease, level)} may run at once are running, or set aside for other keys and gateways; "
                "retry when one has ended",
                metadata=_about(lease, size, level),
                retry_delay=1.0,
            )
        raise unavailable("metering", "the lease ran out while it was renewed; retry")

    async def _refill(self, lease: Lease, needed_money: int, timeout: float) -> None:
        try:
            await self._refills.run(
                lease.name, lambda: self._ask(lease, needed_money, min(timeout, self._call_seconds)), timeout
            )
        except Failure as failure:
            if failure.reason is Reason.DEADLINE_EXCEEDED:
                # Of who waits for another's call, too, it is metering's time that passed.
                raise unavailable("metering", "metering didn't answer in time; retry later") from failure
            raise

    async def _ask(self, lease: Lease, needed_money: int, timeout: float) -> None:
        now = self._clock()
        if now >= lease.expires:
            self._end_slices(lease)
        wish = lease.pending
        if wish is None or wish.lease_id != lease.lease_id:
            wish = lease.pending = self._wish(lease, needed_money)
        try:
            grant = await self._acquire(wish, timeout)
        except Failure as failure:
            if failure.reason in OUTAGES:
                now = self._clock()
                lease.failed_until = now + 1.0
                self.renewal_failure_count += 1
                # Inside a lease that is still good the worker tries again, and callers go on with what is left.
                lease.renews = max(lease.renews, now + 1.0)
                if failure.reason is Reason.DEADLINE_EXCEEDED:
                    raise unavailable("metering", "metering didn't answer in time; retry later") from failure
            else:
                lease.pending = None
            raise
        lease.pending = None
        lease.failed_until = 0.0
        self._apply(lease, wish, grant)

    async def _acquire(self, wish: LeaseWish, timeout: float) -> Grant:
        start = self._clock()
        try:
            return await self._metering.acquire(wish, timeout=timeout)
        except Failure as failure:
            if failure.reason is not Reason.DEADLINE_EXCEEDED or self._clock() < start + timeout + _STILL_SECONDS:
                raise
        # That says nothing about metering. For it, a wish sent again is the same wish.
        return await self._metering.acquire(wish, timeout=timeout)

    def _wish(self, lease: Lease, needed_money: int) -> LeaseWish:
        sizes = self._sizes
        self._sequence += 1
        left_requests = max(0, lease.requests) if lease.requests < _ENDLESS else 0
        left_tokens = max(0, lease.tokens) if lease.tokens < _ENDLESS else 0
        money = 0
        if lease.money < _ENDLESS and not lease.model:
            # Room for several of the largest holds seen, so that long answers don't ask every time.
            slice_size = max(sizes.nano_usd, 8 * lease.largest_hold)
            money = max(slice_size - lease.money, needed_money - lease.money, 0)
        # No more than is likely to be used: other keys and other replicas want a part of the tenant's limit, too.
        concurrency = max(sizes.concurrency, 2 * (lease.in_flight + lease.waiting))
        request_count = _slice(sizes.request_count, lease.factor, lease.request_limit)
        token_count = _slice(sizes.token_count, lease.factor, lease.token_limit)
        return LeaseWish(
            sequence=self._sequence,
            key_id=lease.key_id,
            lease_id=lease.lease_id,
            request_count=max(0, max(request_count, lease.waiting) - lease.requests) if lease.requests < _ENDLESS else 0,
            token_count=max(0, token_count - lease.tokens) if lease.tokens < _ENDLESS else 0,
            concurrency=concurrency,
            nano_usd=money,
            left_request_count=left_requests,
            left_token_count=left_tokens,
            tenant_id=lease.tenant_id,
            model=lease.model,
        )

    def _apply(self, lease: Lease, wish: LeaseWish, grant: Grant) -> None:
        now = self._clock()
        if now - lease.granted < _FAST_SECONDS:
            lease.factor = min(_MAX_FACTOR, lease.factor * 2)
        elif now - lease.granted > _SLOW_SECONDS and lease.factor > 1:
            lease.factor //= 2
        lease.granted = now
        if grant.lease_id != lease.lease_id:
            lease.generation += 1
            lease.money = lease.held = lease.stranded = lease.spent = 0
            lease.lease_id = grant.lease_id
        lease.requests = _on_top(lease.requests, grant.request_count)
        lease.tokens = _on_top(lease.tokens, grant.token_count)
        lease.concurrency = _PLENTY if grant.concurrency < 0 else grant.concurrency
        lease.is_all_concurrency = lease.concurrency < wish.concurrency
        lease.money = _on_top(lease.money, grant.nano_usd)
        lease.slice_money = lease.money + lease.held
        lease.low_requests = _low(lease.requests)
        lease.low_tokens = _low(lease.tokens)
        lease.low_money = _low(lease.money)
        seconds = max(0.0, grant.expire_time - self._wall_clock())
        lease.expires = now + seconds
        lease.renews = now + seconds / 2
        lease.used = False
        lease.largest_hold //= 2
        lease.request_limit = grant.request_limit
        lease.token_limit = grant.token_limit
        lease.concurrency_limit = grant.concurrency_limit
        lease.budget = grant.budget
        lease.no_rate_until = 0.0
        if lease.requests <= 0 or lease.tokens <= 0:
            delay = 1.0 if grant.retry_delay is None else max(0.01, grant.retry_delay)
            lease.no_rate_until = now + delay
            lease.low_requests = lease.low_tokens = -_PLENTY
        elif (wish.request_count and grant.request_count == 0) or (wish.token_count and grant.token_count == 0):
            # Nothing more to be had for now: asking at every request from here to empty would help nobody.
            lease.low_requests = lease.low_tokens = -_PLENTY
        if wish.nano_usd and grant.nano_usd == 0:
            lease.low_money = -_PLENTY

    def _end_slices(self, lease: Lease) -> None:
        """The lease has expired: the store has taken its slices back."""
        lease.lease_id = ""
        lease.generation += 1
        # What was used beyond the slices is owed to the next ones.
        lease.requests = min(0, lease.requests)
        lease.tokens = min(0, lease.tokens)
        lease.money = lease.held = lease.stranded = lease.spent = lease.slice_money = 0

    async def _renew(self, lease: Lease) -> None:
        lease.wanted = False
        now = self._clock()
        if now < lease.failed_until:
            return
        try:
            if lease.expires == 0.0 and not lease.used:
                self._leases.pop(lease.name, None)
                await self._give_back(lease, self._call_seconds)
                return
            if lease.stranded * 2 > lease.slice_money:
                await self._exchange(lease)
            await self._refill(lease, 0, self._call_seconds)
        except Failure:
            # Counted in `_ask`; who needs more gets the failure itself.
            return

    async def _exchange(self, lease: Lease) -> None:
        """Returns the money slice with what is under way marked, so that the store knows what was really spent."""
        lease_id, owed = lease.lease_id, lease.owed()
        lease.lease_id = ""
        lease.generation += 1
        lease.money = lease.held = lease.stranded = lease.spent = 0
        lease.pending = None
        if lease_id:
            await self._return(lease.tenant_id, lease_id, owed, self._call_seconds)

    async def _give_back(self, lease: Lease, timeout: float) -> None:
        if lease.lease_id:
            with contextlib.suppress(Failure):
                await self._return(lease.tenant_id, lease.lease_id, lease.owed(), timeout)

    async def _return(self, tenant_id: str, lease_id: str, owed: int, timeout: float) -> None:
        try:
            await self._metering.give_back(tenant_id, lease_id, owed, timeout=timeout)
        except Failure:
            self.renewal_failure_count += 1
            self._releases.give_back(tenant_id, lease_id, owed)
            raise

    def _sweep(self) -> None:
        """Renews what is used and lets go what isn't."""
        now = self._clock()
        for lease in list(self._leases.values()):
            if lease.wanted or now < lease.renews or now < lease.failed_until:
                continue
            if lease.used or lease.in_flight:
                if lease.expires > 0.0:
                    self._want(lease)
            else:
                # Unused since the last grant: its money is for others.
                lease.expires = 0.0
                self._want(lease)


def _whose(lease: Lease, level: str) -> str:
    return f"the model {lease.model}" if lease.model else f"this {level}"


def _about(lease: Lease, size: str, level: str) -> dict[str, str]:
    about = {"limit": size, "level": level}
    if lease.model:
        about["model"] = lease.model
    return about


def _on_top(left: int, granted: int) -> int:
    if granted < 0:
        return _PLENTY
    return granted if left >= _ENDLESS else left + granted


def _low(amount: int) -> int:
    return -_PLENTY if amount >= _ENDLESS else amount // 4


def _slice(least: int, factor: int, limit: LimitState | None) -> int:
    """What to ask for of a rate: more while it is used up quickly, and never more than an eighth of the limit beyond the least."""
    if factor == 1 or limit is None:
        return least * factor
    return max(least, min(least * factor, limit.limit // 8))
