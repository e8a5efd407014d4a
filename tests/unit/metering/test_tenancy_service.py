from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp

from services.metering.accounts import Key
from services.metering.ports import Store
from services.metering.tenancy import Tenancy
from services.metering.tenancy_service import TenancyServicer
from services.runtime.call import ADMIN, Call
from services.runtime.errors import Code, Reason
from sluice.metering.v1 import tenancy_service_pb2 as pb2
from tests.unit.metering.examples import UNTIL_2100, refused, refused_field

CALL = Call("/sluice.metering.v1.TenancyService/CreateTenant", deadline=1e12, caller=ADMIN)


@pytest.fixture
def tenancy(store: Store) -> TenancyServicer:
    async def announce(key: Key) -> None:
        pass

    return TenancyServicer(Tenancy(store, announce), store)


async def create_tenant(tenancy: TenancyServicer, tenant_id: str = "acme", request_id: str = "") -> pb2.Tenant:
    wanted = pb2.Tenant(id=tenant_id, display_name="Acme", limits=pb2.Limits(budget_nano_usd=100, concurrency=-1))
    response = await tenancy.CreateTenant(pb2.CreateTenantRequest(request_id=request_id, tenant=wanted), CALL)
    return response.tenant


async def all_pages(call: Callable[[Any, Call], Awaitable[Any]], request: Any, field: str) -> list[list[str]]:
    """Ids of every page."""
    pages = []
    while True:
        page = await call(request, CALL)
        pages.append([one.id for one in getattr(page, field)])
        if not page.next_page_token:
            return pages
        request.page_token = page.next_page_token


async def test_a_tenant_is_made_shown_and_changed(tenancy: TenancyServicer) -> None:
    made = await create_tenant(tenancy)
    assert (made.id, made.display_name, made.limits.budget_nano_usd, made.limits.concurrency) == ("acme", "Acme", 100, -1)
    assert not made.limits.HasField("requests_per_minute")
    assert made.create_time.seconds > 1_700_000_000
    assert (await tenancy.GetTenant(pb2.GetTenantRequest(tenant_id="acme"), CALL)).tenant == made
    request = pb2.UpdateTenantRequest(
        tenant=pb2.Tenant(id="acme", display_name="ignored", limits=pb2.Limits(requests_per_minute=5)),
        update_mask=FieldMask(paths=["limits.requests_per_minute", "limits.budget_nano_usd"]),
    )
    changed = (await tenancy.UpdateTenant(request, CALL)).tenant
    assert (changed.display_name, changed.limits) == ("Acme", pb2.Limits(requests_per_minute=5, concurrency=-1))


async def test_the_same_request_makes_a_tenant_once_and_another_is_told_that_it_exists(tenancy: TenancyServicer) -> None:
    made = await create_tenant(tenancy, request_id="r-1")
    assert await create_tenant(tenancy, request_id="r-1") == made
    for request_id in ("", "r-2"):
        with refused(Reason.RESOURCE_EXISTS, Code.ALREADY_EXISTS, resource="tenants/acme"):
            await create_tenant(tenancy, request_id=request_id)


async def test_a_project_is_made_once_and_changed(tenancy: TenancyServicer) -> None:
    await create_tenant(tenancy)
    wanted = pb2.Project(id="site", tenant_id="acme", display_name="Site", limits=pb2.Limits(tokens_per_minute=7))
    request = pb2.CreateProjectRequest(request_id="r-1", project=wanted)
    made = (await tenancy.CreateProject(request, CALL)).project
    assert (made.id, made.tenant_id, made.display_name, made.limits) == ("site", "acme", "Site", wanted.limits)
    assert (await tenancy.CreateProject(request, CALL)).project == made
    with refused(Reason.RESOURCE_EXISTS, Code.ALREADY_EXISTS, resource="tenants/acme/projects/site"):
        await tenancy.CreateProject(pb2.CreateProjectRequest(project=wanted), CALL)
    changing = pb2.UpdateProjectRequest(project=wanted, update_mask=FieldMask(paths=["display_name", "limits"]))
    changing.project.display_name = "New"
    changing.project.ClearField("limits")
    changed = (await tenancy.UpdateProject(changing, CALL)).project
    assert (changed.display_name, changed.limits) == ("New", pb2.Limits())


async def test_a_key_gives_its_secret_once_and_never_again(tenancy: TenancyServicer, store: Store) -> None:
    await create_tenant(tenancy)
    wanted = pb2.Key(
        id="chosen-by-the-caller",
        tenant_id="acme",
        display_name="Site",
        scopes=["usage"],
        allowed_models=["a/x"],
        limits=pb2.Limits(budget_nano_usd=0),
        expire_time=Timestamp(seconds=UNTIL_2100),
        cache_namespace="shop",
    )
    response = await tenancy.CreateKey(pb2.CreateKeyRequest(key=wanted), CALL)
    key = response.key
    assert key.id != wanted.id
    assert (key.tenant_id, key.project_id, key.display_name, key.cache_namespace) == ("acme", "default", "Site", "shop")
    assert (list(key.scopes), list(key.allowed_models), key.limits) == (["usage"], ["a/x"], wanted.limits)
    assert (key.expire_time, key.secret_hint) == (wanted.expire_time, response.secret[-4:])
    assert not key.HasField("revoke_time")
    assert await store.chain_by_digest(hashlib.sha256(response.secret.encode()).digest()) is not None
    listed = await tenancy.ListKeys(pb2.ListKeysRequest(tenant_id="acme"), CALL)
    assert list(listed.keys) == [key]
    for shown in (key, listed):
        assert response.secret[len("sk-sluice-") :].encode() not in shown.SerializeToString()
    plain = (await tenancy.CreateKey(pb2.CreateKeyRequest(key=pb2.Key(tenant_id="acme")), CALL)).key
    assert (list(plain.scopes), plain.HasField("expire_time")) == (["inference", "jobs", "usage"], False)


async def test_a_revoked_key_is_shown_as_such_ever_after(tenancy: TenancyServicer) -> None:
    await create_tenant(tenancy)
    made = (await tenancy.CreateKey(pb2.CreateKeyRequest(key=pb2.Key(tenant_id="acme")), CALL)).key
    revoked = (await tenancy.RevokeKey(pb2.RevokeKeyRequest(key_id=made.id), CALL)).key
    assert revoked.HasField("revoke_time")
    assert (await tenancy.RevokeKey(pb2.RevokeKeyRequest(key_id=made.id), CALL)).key == revoked
    assert list((await tenancy.ListKeys(pb2.ListKeysRequest(tenant_id="acme"), CALL)).keys) == [revoked]


async def test_lists_come_in_pages_that_miss_and_repeat_nothing(tenancy: TenancyServicer) -> None:
    for number in range(5):
        await create_tenant(tenancy, f"t-{number}")
    request = pb2.ListTenantsRequest(page_size=2)
    assert await all_pages(tenancy.ListTenants, request, "tenants") == [["t-0", "t-1"], ["t-2", "t-3"], ["t-4"]]
    # A page that is full and the last has no next one.
    assert await all_pages(tenancy.ListTenants, pb2.ListTenantsRequest(page_size=5), "tenants") == [
        [f"t-{n}" for n in range(5)]
    ]
    for name in ("a", "b"):
        await tenancy.CreateProject(pb2.CreateProjectRequest(project=pb2.Project(id=name, tenant_id="t-1")), CALL)
    projects = pb2.ListProjectsRequest(tenant_id="t-1", page_size=2)
    assert await all_pages(tenancy.ListProjects, projects, "projects") == [["a", "b"], ["default"]]
    made = []
    for project in ("a", "default", "a"):
        key = pb2.Key(tenant_id="t-1", project_id=project)
        made.append((await tenancy.CreateKey(pb2.CreateKeyRequest(key=key), CALL)).key.id)
    pages = await all_pages(tenancy.ListKeys, pb2.ListKeysRequest(tenant_id="t-1", page_size=2), "keys")
    assert [len(page) for page in pages] == [2, 1]
    assert sum(pages, []) == sorted(made)  # noqa: RUF017 - three
    (page,) = await all_pages(tenancy.ListKeys, pb2.ListKeysRequest(tenant_id="t-1", project_id="a"), "keys")
    assert page == sorted([made[0], made[2]])


async def test_what_is_not_there_is_not_found(tenancy: TenancyServicer) -> None:
    named = FieldMask(paths=["display_name"])
    cases: list[tuple[Any, Any, str]] = [
        (tenancy.GetTenant, pb2.GetTenantRequest(tenant_id="x"), "tenants/x"),
        (tenancy.UpdateTenant, pb2.UpdateTenantRequest(tenant=pb2.Tenant(id="x"), update_mask=named), "tenants/x"),
        (tenancy.CreateProject, pb2.CreateProjectRequest(project=pb2.Project(id="p", tenant_id="x")), "tenants/x"),
        (
            tenancy.UpdateProject,
            pb2.UpdateProjectRequest(project=pb2.Project(id="p", tenant_id="x"), update_mask=named),
            "tenants/x/projects/p",
        ),
        (tenancy.CreateKey, pb2.CreateKeyRequest(key=pb2.Key(tenant_id="x")), "tenants/x/projects/default"),
        (tenancy.RevokeKey, pb2.RevokeKeyRequest(key_id="x"), "keys/x"),
    ]
    for call, request, resource in cases:
        with refused(Reason.RESOURCE_NOT_FOUND, Code.NOT_FOUND, resource=resource):
            await call(request, CALL)


async def test_malformed_requests_are_refused_by_their_field(tenancy: TenancyServicer) -> None:
    await create_tenant(tenancy)
    acme = pb2.Tenant(id="acme")
    negative = pb2.Limits(budget_nano_usd=-1)
    endless = Timestamp(seconds=1 << 60)
    cases: list[tuple[Any, Any, str]] = [
        (tenancy.CreateTenant, pb2.CreateTenantRequest(), "tenant.id"),
        (tenancy.CreateTenant, pb2.CreateTenantRequest(tenant=pb2.Tenant(id="B")), "tenant.id"),
        (
            tenancy.CreateTenant,
            pb2.CreateTenantRequest(tenant=pb2.Tenant(id="b", limits=negative)),
            "limits.budget_nano_usd",
        ),
        (tenancy.CreateTenant, pb2.CreateTenantRequest(request_id="x" * 257, tenant=pb2.Tenant(id="b")), "request_id"),
        (tenancy.GetTenant, pb2.GetTenantRequest(), "tenant_id"),
        (tenancy.UpdateTenant, pb2.UpdateTenantRequest(), "tenant.id"),
        (tenancy.UpdateTenant, pb2.UpdateTenantRequest(tenant=acme), "update_mask"),
        (tenancy.ListTenants, pb2.ListTenantsRequest(page_size=1001), "page_size"),
        (tenancy.CreateProject, pb2.CreateProjectRequest(project=pb2.Project(id="p")), "project.tenant_id"),
        (tenancy.CreateProject, pb2.CreateProjectRequest(project=pb2.Project(tenant_id="acme")), "project.id"),
        (
            tenancy.CreateProject,
            pb2.CreateProjectRequest(request_id="x" * 257, project=pb2.Project(id="p", tenant_id="acme")),
            "request_id",
        ),
        (tenancy.ListProjects, pb2.ListProjectsRequest(), "tenant_id"),
        (tenancy.ListProjects, pb2.ListProjectsRequest(tenant_id="acme", page_size=-1), "page_size"),
        (tenancy.UpdateProject, pb2.UpdateProjectRequest(project=pb2.Project(id="p")), "project.tenant_id"),
        (tenancy.UpdateProject, pb2.UpdateProjectRequest(project=pb2.Project(tenant_id="acme")), "project.id"),
        (tenancy.CreateKey, pb2.CreateKeyRequest(), "key.tenant_id"),
        (tenancy.CreateKey, pb2.CreateKeyRequest(key=pb2.Key(tenant_id="acme", scopes=["root"])), "key.scopes"),
        (tenancy.CreateKey, pb2.CreateKeyRequest(key=pb2.Key(tenant_id="acme", expire_time=endless)), "key.expire_time"),
        (
            tenancy.CreateKey,
            pb2.CreateKeyRequest(key=pb2.Key(tenant_id="acme", expire_time=Timestamp(seconds=1))),
            "key.expire_time",
        ),
        (tenancy.ListKeys, pb2.ListKeysRequest(), "tenant_id"),
        (tenancy.ListKeys, pb2.ListKeysRequest(tenant_id="acme", page_size=1001), "page_size"),
        (tenancy.RevokeKey, pb2.RevokeKeyRequest(), "key_id"),
    ]
    for call, request, field in cases:
        with refused_field(field):
            await call(request, CALL)
    assert await all_pages(tenancy.ListProjects, pb2.ListProjectsRequest(tenant_id="acme"), "projects") == [["default"]]
