"""Whom a key stands for, remembered for a short while.

Keys are kept as SHA-256 only. An identity that is in use is asked for again in the background before it is too old, so that callers
don't wait; a revocation that arrives ends it at once. While metering is down an identity stays good as long as its lease.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Final

from services.gateway.flights import Flights
from services.gateway.leases import Leases
from services.gateway.ports import OUTAGES, Authentication, Metering
from services.gateway.principals import Principal
from services.runtime.errors import Failure, Reason, unavailable

_MAX_SECRET: Final = 512
_CHECKS_AT_ONCE: Final = 16
_KEEP_SECONDS: Final = 300.0


class _Entry:
    __slots__ = ("checks", "principal", "used", "valid_until")

    def __init__(self, principal: Principal) -> None:
        self.principal = principal
        self.valid_until = 0.0
        self.checks = 0.0
        self.used = True


class Identities:
    """Principals by key. `clock` is the loop's, `wall_clock` says Unix seconds."""

    def __init__(
        self,
        metering: Metering,
        leases: Leases,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        *,
        recheck_seconds: float,
        call_seconds: float,
        max_count: int,
    ) -> None:
        self._metering = metering
        self._leases = leases
        self._clock = clock
        self._wall_clock = wall_clock
        self._recheck_seconds = recheck_seconds
        self._call_seconds = call_seconds
        self._max_count = max_count
        self._entries: dict[bytes, _Entry] = {}
        self._refused: dict[bytes, float] = {}
        self._flights: Flights[bytes, Principal] = Flights("the identity of the key")

    def known(self, secret: str) -> Principal | None:
        """The principal of a key that was checked lately; None: ask `authenticate`."""
        return self.known_digest(digest_of(secret))

    def known_digest(self, digest: bytes) -> Principal | None:
        """As `known`, for who has the key's digest already."""
        entry = self._entries.get(digest)
        if entry is None or self._clock() >= entry.valid_until:
            return None
        entry.used = True
        return entry.principal

    async def authenticate(self, secret: str | None, timeout: float) -> Principal:
        """The principal of a key. Failure KEY_MISSING, KEY_INVALID, DEPENDENCY_UNAVAILABLE."""
        if not secret:
            raise Failure(
                Reason.KEY_MISSING, "no API key was sent; send it as `Authorization: Bearer sk-sluice-…` or as `x-api-key`"
            )
        if len(secret) > _MAX_SECRET:
            raise _invalid_key()
        principal = self.known(secret)
        if principal is not None:
            return principal
        digest = digest_of(secret)
        refused_until = self._refused.get(digest)
        if refused_until is not None and self._clock() < refused_until:
            raise _invalid_key()
        try:
            return await self._flights.run(digest, lambda: self._ask(digest, min(timeout, self._call_seconds)), timeout)
        except Failure as failure:
            if failure.reason is Reason.DEADLINE_EXCEEDED:
                # It is metering's time that passed, not the caller's.
                raise unavailable(
                    "metering", "the key can't be checked, metering didn't answer in time; retry later"
                ) from failure
            raise

    def revoke(self, digest: bytes, principal: Principal | None) -> None:
        """The key was revoked, or with `principal` changed. Holds for calls from now on."""
        entry = self._entries.get(digest)
        if entry is None:
            return
        if principal is None:
            del self._entries[digest]
            self._leases.forget(entry.principal.key_id)
        else:
            entry.principal = principal

    async def recheck_forever(self) -> None:
        """The worker: asks again for identities in use, forgets the rest."""
        while True:
            await asyncio.sleep(1.0)
            now = self._clock()
            self._refused = {digest: until for digest, until in self._refused.items() if now < until}
            due = []
            for digest, entry in list(self._entries.items()):
                if now < entry.checks:
                    continue
                if entry.used:
                    due.append(digest)
                elif now > entry.valid_until + _KEEP_SECONDS:
                    del self._entries[digest]
            for start in range(0, len(due), _CHECKS_AT_ONCE):
                async with asyncio.TaskGroup() as group:
                    for digest in due[start : start + _CHECKS_AT_ONCE]:
                        group.create_task(self._recheck(digest))

    async def _recheck(self, digest: bytes) -> None:
        entry = self._entries.get(digest)
        if entry is None or self._flights.is_running(digest):
            return
        entry.checks = self._clock() + 1.0
        try:
            await self._flights.run(digest, lambda: self._ask(digest, self._call_seconds), self._call_seconds)
        except Failure:
            # KEY_INVALID has removed the entry; an outage leaves it to `valid_until` and the lease.
            return

    async def _ask(self, digest: bytes, timeout: float) -> Principal:
        try:
            authentication = await self._metering.authenticate(digest, timeout=timeout)
        except Failure as failure:
            now = self._clock()
            entry = self._entries.get(digest)
            if failure.reason is Reason.KEY_INVALID:
                if entry is not None:
                    del self._entries[digest]
                    self._leases.forget(entry.principal.key_id)
                if len(self._refused) < self._max_count:
                    self._refused[digest] = now + 1.0
                raise _invalid_key() from failure
            if failure.reason in OUTAGES and entry is not None and self._may_go_on(entry.principal):
                entry.valid_until = max(entry.valid_until, now + 1.0)
                return entry.principal
            raise
        return self._keep(digest, authentication)

    def _may_go_on(self, principal: Principal) -> bool:
        """Without metering: as long as the lease lasts and the key itself hasn't ended."""
        ends = principal.expire_time
        return (ends is None or self._wall_clock() < ends) and self._leases.is_alive(principal.key_id)

    def _keep(self, digest: bytes, authentication: Authentication) -> Principal:
        now = self._clock()
        principal = authentication.principal
        seconds = min(authentication.reuse_seconds, self._recheck_seconds)
        if principal.expire_time is not None:
            seconds = min(seconds, principal.expire_time - self._wall_clock())
        entry = self._entries.get(digest)
        if entry is None:
            if len(self._entries) >= self._max_count:
                # The one that was learned first; if it is in use it is asked for again.
                del self._entries[next(iter(self._entries))]
            entry = self._entries[digest] = _Entry(principal)
        entry.principal = principal
        entry.valid_until = now + seconds
        entry.checks = now + seconds * 0.6
        entry.used = False
        return principal


def digest_of(secret: str) -> bytes:
    """What a key is known by."""
    return hashlib.sha256(secret.encode("utf-8", "replace")).digest()


def _invalid_key() -> Failure:
    return Failure(Reason.KEY_INVALID, "the API key is not valid; check it, or make a new one with `sluice keys create`")
