"""Leases: what one replica may spend for one key without asking. Grants of rates and concurrency, and slices of budgets."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from services.metering.accounts import Level, Limits, ModelLimits, Payer
from services.metering.errors import KeyUnknown
from services.metering.ledger import Hold, HoldState, Replica, Slice
from services.metering.limits import UNLIMITED, Concurrency, Rates
from services.metering.ports import Chain, Store

_MOST_ANSWERS: Final = 100_000
_MOST_FOLLOWED: Final = 10_000
_KINDS: Final = ("requests", "tokens", "concurrency")
_FREE: Final = Slice(UNLIMITED, None, None, "")
"""What the lease of a model has of money: that is the key's."""
_SETTLE_SECONDS: Final = 15.0
"""After the replica of a lease or hold has let go of it, or was lost: by then what ran there is settled. Execution posts within
milliseconds, and within seconds of its own restart. What comes later is posted all the same."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """Limits of tenants that set none. -1: unlimited."""

    requests_per_minute: int
    concurrency: int


@dataclass(frozen=True, slots=True)
class Wish:
    """What a replica asks for."""

    replica_id: str
    sequence: int
    key_id: str
    lease_id: str
    requests: int
    tokens: int
    concurrency: int
    nano_usd: int
    model: str = ""
    """Whose limits alone are asked for; empty: those that hold whatever the model."""


@dataclass(frozen=True, slots=True)
class Standing:
    """One limit that applies, and what is left of it."""

    level: Level
    kind: str
    """`requests`, `tokens`, `concurrency`, `budget`."""
    limit: int
    remaining: int


@dataclass(frozen=True, slots=True)
class Grant:
    """What a replica gets. -1: unlimited."""

    lease_id: str
    expire_time: float
    requests: int
    tokens: int
    concurrency: int
    nano_usd: int
    standings: tuple[Standing, ...]
    retry_delay: float
    """Seconds; 0: something was granted."""


class Leasing:
    """Grants leases. One per ledger: rates and shares are counted here."""

    def __init__(
        self,
        store: Store,
        defaults: Defaults,
        *,
        lease_seconds: float,
        grace_seconds: float,
        recall_factor: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._defaults = defaults
        self._seconds = lease_seconds
        self._grace = grace_seconds
        self._recall_factor = recall_factor
        self._clock = clock
        self._rates = Rates()
        self._concurrency = Concurrency()
        self._answers: OrderedDict[tuple[str, str, str], tuple[int, Grant]] = OrderedDict()
        self._asking: dict[tuple[str, str, str], tuple[asyncio.Lock, int]] = {}
        """Locks by who asks, with how many hold or await them."""
        self._replicas: dict[str, float] = {}
        self._incarnations: dict[str, str] = {}
        """Replica by the part of its id that is the same after a restart."""
        self._followed: OrderedDict[str, None] = OrderedDict()
        """Replicas in whose slots there were others later."""
        self._leases_of: dict[str, set[str]] = {}
        """Leases that are out, by replica."""

    async def acquire(self, wish: Wish) -> Grant:
        """Grants what can be had. A repeated wish (same replica, key, model and sequence) gets the grant it got. Raises KeyUnknown."""
        asked = (wish.replica_id, wish.key_id, wish.model)
        # A repetition may come while the first is still being granted: it waits, so that money is deducted once.
        lock, count = self._asking.get(asked) or (asyncio.Lock(), 0)
        self._asking[asked] = (lock, count + 1)
        try:
            async with lock:
                known = self._answers.get(asked)
                if known is not None and known[0] == wish.sequence:
                    return known[1]
                grant = await self._grant(wish)
                self._answers[asked] = (wish.sequence, grant)
                self._answers.move_to_end(asked)
                if len(self._answers) > _MOST_ANSWERS:
                    self._answers.popitem(last=False)
                return grant
        finally:
            lock, count = self._asking.pop(asked)
            if count > 1:
                self._asking[asked] = (lock, count - 1)

    async def _grant(self, wish: Wish) -> Grant:
        now = self._clock()
        chain = await self._store.chain_by_key(wish.key_id)
        if chain is None or not chain.key.is_active(now):
            raise KeyUnknown
        for replica in [name for name, until in self._replicas.items() if until < now]:
            self._forget(replica)
        if wish.replica_id not in self._replicas:
            await self.begin(wish.replica_id)
        self._replicas[wish.replica_id] = now + 2 * self._seconds
        payer = Payer(chain.tenant.id, chain.project.id, chain.key.id)
        lease_id = wish.lease_id or _lease_id(wish)
        self._leases_of.setdefault(wish.replica_id, set()).add(lease_id)
        expires = now + self._seconds
        money = _FREE if wish.model else await self._money(payer, wish, lease_id, expires)
        limits = {kind: self._limits(chain, kind, wish.model) for kind in _KINDS}
        requests, wait = self._rates.take(limits["requests"], max(0, wish.requests), now)
        tokens, token_wait = self._rates.take(limits["tokens"], max(0, wish.tokens), now)
        share = self._concurrency.share(lease_id, limits["concurrency"], max(1, wish.concurrency), expires, now)
        return Grant(
            lease_id,
            expires,
            requests,
            tokens,
            share,
            money.granted,
            tuple(self._standings(chain, wish.model, money, now)),
            max(wait, token_wait),
        )

    async def begin(self, replica_id: str) -> int:
        """A replica that is new here: what ran in the one before it, in its slot, has ended with that one, and nobody may wait for the
        leases and holds of then to end by themselves. Returns how many there are whose money isn't free yet; it is once what was cut off is
        settled.
        """
        replica = Replica.of(replica_id)
        if not replica.slot:
            return 0
        if replica_id in self._followed:
            # A wish of the process that was there before came late.
            return 0
        before = self._incarnations.get(replica.slot)
        self._incarnations[replica.slot] = replica_id
        if before is not None and before != replica_id:
            self._forget(before)
            self._followed[before] = None
            if len(self._followed) > _MOST_FOLLOWED:
                self._followed.popitem(last=False)
        return await self._store.end_reservations(replica, self._settled())

    def _forget(self, replica_id: str) -> None:
        self._replicas.pop(replica_id, None)
        for lease in self._leases_of.pop(replica_id, ()):
            self._concurrency.release(lease)
        slot = Replica.of(replica_id).slot
        if self._incarnations.get(slot) == replica_id:
            del self._incarnations[slot]

    async def _money(self, payer: Payer, wish: Wish, lease_id: str, expires: float) -> Slice:
        # A slice is a few holds; when the budget nears what the replicas' slices could hide, every hold asks for itself.
        reserve = self._recall_factor * max(1, len(self._replicas)) * max(1, wish.nano_usd // 8)
        # A process that was followed is dead, or a second one under its name, whose holds can ask for themselves.
        wanted = max(0, wish.nano_usd) if wish.replica_id not in self._followed else 0
        ends = expires + self._grace
        return await self._store.grant_slice(lease_id, payer, wanted, reserve, ends, Replica.of(wish.replica_id))

    async def give_back(self, lease_id: str, owed: int) -> None:
        """Ends a lease; what of `owed` (spent since it was granted, or held by what still runs) isn't posted yet stays reserved."""
        self._concurrency.release(lease_id)
        for leases in self._leases_of.values():
            leases.discard(lease_id)
        await self._store.return_lease(lease_id, owed, self._settled())

    async def hold(self, replica_id: str, operation_id: str, payer: Payer, amount: int, least: int, expire_time: float) -> Hold:
        """Reserves money for one operation of a replica. Raises BudgetExhausted."""
        if replica_id in self._followed:
            # The process that asked has ended since.
            expire_time = min(expire_time, self._settled())
        return await self._store.hold(operation_id, payer, amount, least, expire_time, Replica.of(replica_id))

    async def void_hold(self, hold_id: str, *, may_have_run: bool) -> HoldState:
        """Frees a hold: at once, or when what may have run for it is settled. Raises NotFound."""
        return await self._store.void_hold(hold_id, self._settled() if may_have_run else None)

    def _settled(self) -> float:
        return self._clock() + min(self._grace, _SETTLE_SECONDS)

    def _limits(self, chain: Chain, kind: str, model: str) -> dict[str, int]:
        """Limits by kind and name, unlimited ones left out."""
        found = {}
        for level, name, limits in _levels(chain, model):
            value = _value(limits, kind)
            if value is None and level is Level.TENANT:
                value = {"requests": self._defaults.requests_per_minute, "concurrency": self._defaults.concurrency}.get(kind)
            if value is not None and value != UNLIMITED:
                found[f"{kind}:{name}"] = value
        return found

    def _standings(self, chain: Chain, model: str, money: Slice, now: float) -> list[Standing]:
        standings = []
        for level, name, _ in _levels(chain, model):
            for kind in _KINDS:
                key = f"{kind}:{name}"
                limit = self._limits(chain, kind, model).get(key)
                if limit is not None:
                    left = limit - self._concurrency.used(key) if kind == "concurrency" else self._rates.left(key, limit, now)
                    standings.append(Standing(level, kind, limit, max(0, left)))
        if money.budget is not None and money.left is not None:
            standings.append(Standing(Level(money.level), "budget", money.budget, max(0, money.left)))
        return standings


def _levels(chain: Chain, model: str) -> list[tuple[Level, str, Limits | ModelLimits]]:
    tenant, project, key = chain.tenant, chain.project, chain.key
    levels: list[tuple[Level, str, Limits]] = [
        (Level.KEY, f"key/{key.id}", key.limits),
        (Level.PROJECT, f"project/{tenant.id}/{project.id}", project.limits),
        (Level.TENANT, f"tenant/{tenant.id}", tenant.limits),
    ]
    if not model:
        return [*levels]
    return [
        (Level.MODEL, f"{name}/{model}", of_model)
        for _, name, limits in levels
        if (of_model := limits.of_model(model)) is not None
    ]


def _value(limits: Limits | ModelLimits, kind: str) -> int | None:
    match kind:
        case "requests":
            return limits.requests_per_minute
        case "tokens":
            return limits.tokens_per_minute
        case _:
            return limits.concurrency


def _lease_id(wish: Wish) -> str:
    digest = hashlib.blake2b(f"{wish.replica_id}|{wish.key_id}|{wish.sequence}|{wish.model}".encode(), digest_size=12)
    return f"lease-{digest.hexdigest()}"
