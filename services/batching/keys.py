"""Who submits jobs: bearer keys, checked with metering and remembered for as long as it says."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from services.batching.submission import Owner
from services.runtime.errors import Failure, Reason

_SCOPE: Final = "jobs"
_CAPACITY: Final = 10_000
_BEARER: Final = "Bearer "


@dataclass(frozen=True, slots=True)
class Identity:
    """What a key stands for."""

    owner: Owner
    scopes: frozenset[str]
    valid_seconds: float
    """How long it may be reused without asking again."""


Authenticate = Callable[[bytes], Awaitable[Identity]]
"""Asks metering by the SHA-256 of a key; raises Failure KEY_INVALID."""


class Keys:
    """Identities by key digest."""

    def __init__(self, authenticate: Authenticate, clock: Callable[[], float] = time.monotonic) -> None:
        self._authenticate = authenticate
        self._clock = clock
        self._known: OrderedDict[bytes, tuple[float, Identity]] = OrderedDict()

    async def owner(self, authorization: str | None) -> Owner:
        """The owner behind an `authorization` value. Raises Failure KEY_MISSING, KEY_INVALID, PERMISSION_DENIED."""
        if not authorization or not authorization.startswith(_BEARER):
            raise Failure(Reason.KEY_MISSING, "no key; send metadata `authorization: Bearer sk-sluice-…`")
        digest = hashlib.sha256(authorization[len(_BEARER) :].encode()).digest()
        known = self._known.get(digest)
        if known is None or known[0] <= self._clock():
            identity = await self._authenticate(digest)
            self._known[digest] = known = (self._clock() + identity.valid_seconds, identity)
            self._known.move_to_end(digest)
            if len(self._known) > _CAPACITY:
                self._known.popitem(last=False)
        identity = known[1]
        if _SCOPE not in identity.scopes:
            raise Failure(Reason.PERMISSION_DENIED, f"the key lacks the scope {_SCOPE!r}", metadata={"scope": _SCOPE})
        return identity.owner

    def forget(self, digest: bytes) -> None:
        """A key was revoked."""
        self._known.pop(digest, None)
