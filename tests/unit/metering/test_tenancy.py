from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest

from services.metering.accounts import SCOPES, Key, Limits
from services.metering.adapters.sqlite import open_store
from services.metering.errors import Exists, NotFound
from services.metering.ports import Store
from services.metering.tenancy import SECRET_PREFIX, Tenancy
from tests.conformance.ledger.examples import settlement
from tests.unit.metering.examples import Clock, refused_field


class Announced:
    """Keys whose end was announced."""

    def __init__(self) -> None:
        self.keys: list[Key] = []

    async def __call__(self, key: Key) -> None:
        self.keys.append(key)


@pytest.fixture
def announced() -> Announced:
    return Announced()


@pytest.fixture
def tenancy(store: Store, announced: Announced, clock: Clock) -> Tenancy:
    return Tenancy(store, announced, clock)


async def test_a_tenant_is_made_with_the_time_and_found(tenancy: Tenancy, clock: Clock) -> None:
    made = await tenancy.create_tenant("acme", "Acme", Limits(concurrency=3), "")
    assert (made.id, made.display_name, made.limits, made.create_time) == ("acme", "Acme", Limits(concurrency=3), clock.time)
    assert await tenancy.tenant("acme") == made
    with pytest.raises(NotFound):
        await tenancy.tenant("nobody")


@pytest.mark.parametrize("tenant_id", ["", "Acme", "a/b", "x" * 64])
async def test_ids_are_checked(tenancy: Tenancy, tenant_id: str) -> None:
    with refused_field("tenant.id"):
        await tenancy.create_tenant(tenant_id, "", Limits(), "")
    await tenancy.create_tenant("acme", "", Limits(), "")
    with refused_field("project.id"):
        await tenancy.create_project("acme", tenant_id, "", Limits(), "")


async def test_names_are_bounded_in_bytes(tenancy: Tenancy) -> None:
    await tenancy.create_tenant("acme", "ä" * 128, Limits(), "")
    for name in ("ä" * 129, "x" * 257):
        with refused_field("display_name"):
            await tenancy.create_tenant("other", name, Limits(), "")
        with refused_field("display_name"):
            await tenancy.create_project("acme", "site", name, Limits(), "")
        with refused_field("display_name"):
            await tenancy.create_key("acme", "default", display_name=name)
        with refused_field("display_name"):
            await tenancy.update_tenant("acme", name, Limits(), ["display_name"])


async def test_an_update_changes_what_the_mask_names_and_nothing_else(tenancy: Tenancy) -> None:
    await tenancy.create_tenant("acme", "Acme", Limits(1, 2, 3, 4), "")
    given = Limits(budget_nano_usd=10, concurrency=40)
    changed = await tenancy.update_tenant("acme", "New", given, ["limits.budget_nano_usd"])
    assert (changed.display_name, changed.limits) == ("Acme", Limits(10, 2, 3, 4))
    # Named and absent: removed.
    changed = await tenancy.update_tenant("acme", "New", given, ["limits.requests_per_minute", "display_name"])
    assert (changed.display_name, changed.limits) == ("New", Limits(10, None, 3, 4))
    for mask in (["limits"], ["limits", "limits.concurrency"], ["limits.concurrency", "limits"]):
        changed = await tenancy.update_tenant("acme", "Other", given, mask)
        assert (changed.display_name, changed.limits) == ("New", given)
    project = await tenancy.update_project("acme", "default", "Main", given, ["limits.concurrency", "display_name"])
    assert (project.display_name, project.limits) == ("Main", Limits(concurrency=40))


@pytest.mark.parametrize("mask", [[], ["id"], ["limits.speed"], ["limits."], ["display_name", "balance"], ["limits.__class__"]])
async def test_a_mask_that_names_nothing_known_is_refused(tenancy: Tenancy, mask: list[str]) -> None:
    made = await tenancy.create_tenant("acme", "Acme", Limits(1), "")
    with refused_field("update_mask"):
        await tenancy.update_tenant("acme", "New", Limits(2), mask)
    with refused_field("update_mask"):
        await tenancy.update_project("acme", "default", "New", Limits(2), mask)
    assert await tenancy.tenant("acme") == made


async def test_updates_at_once_of_different_fields_both_count(tenancy: Tenancy, store: Store) -> None:
    await tenancy.create_tenant("acme", "Acme", Limits(1, 2, 3, 4), "")
    await asyncio.gather(
        tenancy.update_tenant("acme", "", Limits(budget_nano_usd=10), ["limits.budget_nano_usd"]),
        tenancy.update_tenant("acme", "", Limits(concurrency=40), ["limits.concurrency"]),
        tenancy.update_tenant("acme", "New", Limits(), ["display_name"]),
        tenancy.update_project("acme", "default", "", Limits(budget_nano_usd=5), ["limits.budget_nano_usd"]),
        tenancy.update_project("acme", "default", "", Limits(tokens_per_minute=6), ["limits.tokens_per_minute"]),
    )
    tenant = await tenancy.tenant("acme")
    assert (tenant.display_name, tenant.limits) == ("New", Limits(10, 2, 3, 40))
    project = await store.project("acme", "default")
    assert project is not None
    assert project.limits == Limits(budget_nano_usd=5, tokens_per_minute=6)


async def test_the_last_of_many_projects_can_be_changed(tenancy: Tenancy, store: Store) -> None:
    await tenancy.create_tenant("acme", "", Limits(), "")
    made = (tenancy.create_project("acme", f"p-{number:04}", "", Limits(), "") for number in range(1001))
    await asyncio.gather(*made)
    changed = await tenancy.update_project("acme", "p-1000", "Last", Limits(), ["display_name"])
    assert changed.display_name == "Last"


async def test_what_is_not_there_cannot_be_changed(tenancy: Tenancy) -> None:
    with pytest.raises(NotFound):
        await tenancy.update_tenant("nobody", "x", Limits(), ["display_name"])
    with pytest.raises(NotFound):
        await tenancy.update_project("nobody", "default", "x", Limits(), ["display_name"])
    with pytest.raises(NotFound):
        await tenancy.create_project("nobody", "site", "", Limits(), "")
    with pytest.raises(NotFound):
        await tenancy.create_key("nobody", "default")


async def test_a_key_is_found_by_the_hash_of_its_secret(tenancy: Tenancy, store: Store, clock: Clock) -> None:
    await tenancy.create_tenant("acme", "", Limits(), "")
    made, secret = await tenancy.create_key(
        "acme",
        "default",
        display_name="Site",
        scopes=["usage", "inference", "usage"],
        allowed_models=["b/y", "a/x"],
        limits=Limits(budget_nano_usd=9),
        expire_time=clock.time + 5,
        cache_namespace="shop",
    )
    assert secret.startswith(SECRET_PREFIX)
    assert len(secret) >= len(SECRET_PREFIX) + 43
    assert made.secret_hint == secret[-4:]
    assert (made.scopes, made.allowed_models) == (("inference", "usage"), ("a/x", "b/y"))
    assert (made.limits, made.expire_time, made.cache_namespace) == (Limits(budget_nano_usd=9), clock.time + 5, "shop")
    chain = await store.chain_by_digest(hashlib.sha256(secret.encode()).digest())
    assert chain is not None
    assert chain.key == made


async def test_no_two_keys_are_alike_and_a_key_without_scopes_has_all(tenancy: Tenancy) -> None:
    await tenancy.create_tenant("acme", "", Limits(), "")
    made = [await tenancy.create_key("acme", "default", scopes=[]) for _ in range(20)]
    assert len({secret for _, secret in made}) == len({key.id for key, _ in made}) == 20
    assert {key.scopes for key, _ in made} == {SCOPES}


async def test_a_malformed_key_is_refused(tenancy: Tenancy, clock: Clock) -> None:
    await tenancy.create_tenant("acme", "", Limits(), "")
    with refused_field("key.scopes"):
        await tenancy.create_key("acme", "default", scopes=["inference", "everything"])
    with refused_field("key.allowed_models"):
        await tenancy.create_key("acme", "default", allowed_models=[f"a/{number}" for number in range(257)])
    with refused_field("key.allowed_models"):
        await tenancy.create_key("acme", "default", allowed_models=["x" * 257])
    with refused_field("key.cache_namespace"):
        await tenancy.create_key("acme", "default", cache_namespace="x" * 257)
    with refused_field("key.expire_time"):
        await tenancy.create_key("acme", "default", expire_time=clock.time)


async def test_a_revocation_is_announced_and_repeated_changes_nothing(
    tenancy: Tenancy, announced: Announced, clock: Clock
) -> None:
    await tenancy.create_tenant("acme", "", Limits(), "")
    made, _ = await tenancy.create_key("acme", "default")
    revoked = await tenancy.revoke_key(made.id)
    assert revoked.revoke_time == clock.time
    clock.time += 5
    assert await tenancy.revoke_key(made.id) == revoked
    # Announced again all the same: the first may not have been heard.
    assert announced.keys == [revoked, revoked]
    with pytest.raises(NotFound):
        await tenancy.revoke_key("nobody")
    assert len(announced.keys) == 2


async def test_secrets_are_nowhere_in_the_files(tmp_path: Path, announced: Announced) -> None:
    directory = tmp_path / "ledger"
    secrets = ["sk-sluice-the-one-of-the-configuration"]
    async with open_store(directory) as store:
        tenancy = Tenancy(store, announced)
        await tenancy.bootstrap(secrets[0], Limits())
        made = [await tenancy.create_key("default", "default", display_name="Site") for _ in range(3)]
        secrets += [secret for _, secret in made]
        await store.post([settlement("op-1/1", amount=1)])
        await tenancy.revoke_key(made[0][0].id)
        while_open = b"".join(path.read_bytes() for path in sorted(directory.iterdir()))
    closed = b"".join(path.read_bytes() for path in sorted(directory.iterdir()))
    for stored in (while_open, closed):
        # The files are really those that have the keys.
        assert hashlib.sha256(secrets[1].encode()).digest() in stored
        for secret in secrets:
            for part in (secret, secret.removeprefix(SECRET_PREFIX), secret[:-4], secret[-8:]):
                assert part.encode() not in stored


async def test_the_bootstrap_is_done_once(tenancy: Tenancy, store: Store) -> None:
    secret = "a-secret-of-the-configuration"
    await tenancy.bootstrap(secret, Limits(concurrency=7))
    chain = await store.chain_by_digest(hashlib.sha256(secret.encode()).digest())
    assert chain is not None
    assert (chain.tenant.id, chain.tenant.limits, chain.key.scopes) == ("default", Limits(concurrency=7), SCOPES)
    # A later start with other limits leaves those that were set meanwhile.
    await tenancy.bootstrap(secret, Limits(concurrency=9))
    assert (await tenancy.tenant("default")).limits == Limits(concurrency=7)
    assert len(await store.keys("default", "", "", 10)) == 1
    # Another secret is another key; a revoked one is not made again.
    await tenancy.bootstrap("another", Limits())
    assert len(await store.keys("default", "", "", 10)) == 2
    await tenancy.revoke_key(chain.key.id)
    await tenancy.bootstrap(secret, Limits())
    again = await store.chain_by_key(chain.key.id)
    assert again is not None
    assert again.key.revoke_time is not None
    assert len(await store.keys("default", "", "", 10)) == 2


async def test_a_secret_that_is_taken_is_refused(tenancy: Tenancy) -> None:
    await tenancy.create_tenant("acme", "", Limits(), "")
    await tenancy.create_key("acme", "default", secret="the-same")
    with pytest.raises(Exists):
        await tenancy.create_key("acme", "default", secret="the-same")
