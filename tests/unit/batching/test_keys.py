from __future__ import annotations

import hashlib

import pytest

from services.batching.keys import Identity, Keys
from services.batching.submission import Owner
from services.runtime.errors import Code, Failure, Reason
from tests.unit.batching.examples import Clock, refused

OWNER = Owner("acme", "default", "key_1")
SECRET = "sk-sluice-one"
DIGEST = hashlib.sha256(SECRET.encode()).digest()


class Metering:
    """Knows one key."""

    def __init__(self, *scopes: str) -> None:
        self.asked: list[bytes] = []
        self.scopes = frozenset(scopes or ("jobs",))

    async def authenticate(self, digest: bytes) -> Identity:
        self.asked.append(digest)
        if digest != DIGEST:
            raise Failure(Reason.KEY_INVALID, "no such key")
        return Identity(OWNER, self.scopes, 30.0)


@pytest.mark.parametrize("given", [None, "", "Basic x", f"bearer {SECRET}", SECRET])
async def test_without_a_bearer_key_nobody_is_asked(given: str | None) -> None:
    metering = Metering()
    with refused(Reason.KEY_MISSING, Code.UNAUTHENTICATED):
        await Keys(metering.authenticate).owner(given)
    assert metering.asked == []


async def test_a_key_is_remembered_for_as_long_as_metering_says() -> None:
    metering, clock = Metering(), Clock()
    keys = Keys(metering.authenticate, clock)
    assert await keys.owner(f"Bearer {SECRET}") == OWNER
    clock.time += 29.9
    await keys.owner(f"Bearer {SECRET}")
    assert metering.asked == [DIGEST]
    clock.time += 0.1
    await keys.owner(f"Bearer {SECRET}")
    assert metering.asked == [DIGEST, DIGEST]


async def test_a_wrong_key_is_never_remembered() -> None:
    metering = Metering()
    keys = Keys(metering.authenticate)
    for _ in range(2):
        with refused(Reason.KEY_INVALID, Code.UNAUTHENTICATED):
            await keys.owner("Bearer sk-sluice-two")
    assert len(metering.asked) == 2


async def test_a_key_without_the_scope_may_not() -> None:
    with refused(Reason.PERMISSION_DENIED, Code.PERMISSION_DENIED, scope="jobs"):
        await Keys(Metering("inference", "usage").authenticate).owner(f"Bearer {SECRET}")


async def test_a_revoked_key_is_asked_for_again() -> None:
    metering = Metering()
    keys = Keys(metering.authenticate, Clock())
    await keys.owner(f"Bearer {SECRET}")
    keys.forget(b"another")
    keys.forget(DIGEST)
    await keys.owner(f"Bearer {SECRET}")
    assert len(metering.asked) == 2
