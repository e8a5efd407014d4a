"""Keys: cached, checked again, revoked."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from services.gateway.principals import Principal
from services.runtime.errors import Failure, Reason
from tests.unit.gateway.fakes import SECRET, World, down

DIGEST = hashlib.sha256(SECRET.encode()).digest()


async def reason_of(world: World, secret: str | None) -> Reason:
    """Why a key is refused."""
    with pytest.raises(Failure) as caught:
        await world.identities.authenticate(secret, 1.0)
    assert secret is None or not secret or secret not in caught.value.message
    return caught.value.reason


async def test_a_key_is_asked_for_once_and_only_its_hash_leaves() -> None:
    world = World()
    assert world.identities.known(SECRET) is None
    principal = await world.identities.authenticate(SECRET, 1.0)
    assert (principal.tenant_id, principal.key_id) == ("acme", "key-1")
    assert world.identities.known(SECRET) is principal
    assert await world.identities.authenticate(SECRET, 1.0) is principal
    (request,) = world.metering.asked("Authenticate")
    assert request.key_sha256 == DIGEST


async def test_many_at_once_ask_once() -> None:
    world = World()
    world.metering.delays["Authenticate"] = 0.02
    await asyncio.gather(*(world.identities.authenticate(SECRET, 1.0) for _ in range(20)))
    assert len(world.metering.asked("Authenticate")) == 1


async def test_while_metering_does_not_answer_keys_that_are_not_known_cannot_be_checked() -> None:
    world = World()
    world.metering.delays["Authenticate"] = 30.0
    # The first asks, the others wait for its answer.
    asked = await asyncio.gather(*(world.identities.authenticate(SECRET, 0.1) for _ in range(3)), return_exceptions=True)
    assert [one.reason for one in asked if isinstance(one, Failure)] == [Reason.DEPENDENCY_UNAVAILABLE] * 3


@pytest.mark.parametrize("secret", [None, ""])
async def test_no_key(secret: str | None) -> None:
    assert await reason_of(World(), secret) is Reason.KEY_MISSING


async def test_a_wrong_key_is_refused_and_not_asked_for_at_once_again() -> None:
    world = World()
    world.metering.valid = False
    assert await reason_of(world, "sk-sluice-wrong") is Reason.KEY_INVALID
    assert await reason_of(world, "sk-sluice-wrong") is Reason.KEY_INVALID
    assert len(world.metering.asked("Authenticate")) == 1


async def test_an_absurd_key_is_refused_without_asking() -> None:
    world = World()
    assert await reason_of(world, "x" * 10_000) is Reason.KEY_INVALID
    assert not world.metering.calls


async def test_a_key_of_odd_characters_is_refused_by_metering_not_by_a_crash() -> None:
    world = World()
    world.metering.valid = False
    assert await reason_of(world, "\udcff\x00é") is Reason.KEY_INVALID


async def test_metering_down_is_unavailable_for_a_new_key() -> None:
    world = World()
    world.metering.failures["Authenticate"] = down("metering")
    assert await reason_of(world, SECRET) is Reason.DEPENDENCY_UNAVAILABLE


async def test_a_revocation_ends_it_at_once() -> None:
    world = World()
    await world.identities.authenticate(SECRET, 1.0)
    await world.generate()
    world.identities.revoke(DIGEST, None)
    assert world.identities.known(SECRET) is None
    assert not world.leases.is_alive("key-1")
    world.metering.valid = False
    assert await reason_of(world, SECRET) is Reason.KEY_INVALID


async def test_a_change_replaces_it() -> None:
    world = World()
    await world.identities.authenticate(SECRET, 1.0)
    changed = Principal("acme", "default", "key-1", ("usage",), (), "", None)
    world.identities.revoke(DIGEST, changed)
    assert world.identities.known(SECRET) is changed


async def test_an_expired_identity_lives_on_with_its_lease_while_metering_is_down() -> None:
    world = World()
    world.metering.identity.expire_time.GetCurrentTime()
    world.metering.identity.expire_time.seconds += 1000
    await world.identities.authenticate(SECRET, 1.0)
    await world.generate()
    world.identities._entries[DIGEST].valid_until = 0.0
    world.metering.failures["Authenticate"] = down("metering")
    assert (await world.identities.authenticate(SECRET, 1.0)).key_id == "key-1"


async def test_an_expired_identity_without_a_lease_does_not() -> None:
    world = World()
    await world.identities.authenticate(SECRET, 1.0)
    world.identities._entries[DIGEST].valid_until = 0.0
    world.metering.failures["Authenticate"] = down("metering")
    assert await reason_of(world, SECRET) is Reason.DEPENDENCY_UNAVAILABLE


async def test_the_keys_own_end_bounds_its_reuse() -> None:
    world = World()
    world.metering.identity.expire_time.GetCurrentTime()
    await world.identities.authenticate(SECRET, 1.0)
    assert world.identities.known(SECRET) is None


async def test_identities_in_use_are_checked_again_in_the_background() -> None:
    world = World()
    await world.identities.authenticate(SECRET, 1.0)
    assert world.identities.known(SECRET) is not None
    world.identities._entries[DIGEST].checks = 0.0
    world.metering.valid = False
    task = asyncio.create_task(world.identities.recheck_forever())
    await asyncio.sleep(1.1)
    task.cancel()
    assert world.identities.known(SECRET) is None
