"""The servicer of `sluice.metering.v1.TenancyService`."""

from __future__ import annotations

from services.metering.ports import Store
from services.metering.proto import (
    key_to_proto,
    limits_from_proto,
    micros_of,
    page_size,
    project_to_proto,
    required,
    tenant_to_proto,
)
from services.metering.tenancy import Tenancy
from services.runtime.call import Call
from sluice.metering.v1 import tenancy_service_pb2 as pb2


class TenancyServicer:
    """Translates, makes one call, translates. The transport lets in only administrators and services."""

    def __init__(self, tenancy: Tenancy, store: Store) -> None:
        self._tenancy = tenancy
        self._store = store

    async def CreateTenant(self, request: pb2.CreateTenantRequest, call: Call) -> pb2.CreateTenantResponse:
        """See the proto."""
        given = request.tenant
        made = await self._tenancy.create_tenant(
            given.id, given.display_name, limits_from_proto(given.limits), request.request_id
        )
        return pb2.CreateTenantResponse(tenant=tenant_to_proto(made))

    async def GetTenant(self, request: pb2.GetTenantRequest, call: Call) -> pb2.GetTenantResponse:
        """See the proto."""
        return pb2.GetTenantResponse(
            tenant=tenant_to_proto(await self._tenancy.tenant(required(request.tenant_id, "tenant_id")))
        )

    async def ListTenants(self, request: pb2.ListTenantsRequest, call: Call) -> pb2.ListTenantsResponse:
        """See the proto."""
        size = page_size(request.page_size)
        found = await self._store.tenants(request.page_token, size + 1)
        return pb2.ListTenantsResponse(
            tenants=[tenant_to_proto(tenant) for tenant in found[:size]],
            next_page_token=found[size - 1].id if len(found) > size else "",
        )

    async def UpdateTenant(self, request: pb2.UpdateTenantRequest, call: Call) -> pb2.UpdateTenantResponse:
        """See the proto."""
        given = request.tenant
        changed = await self._tenancy.update_tenant(
            required(given.id, "tenant.id"),
            given.display_name,
            limits_from_proto(given.limits),
            list(request.update_mask.paths),
        )
        return pb2.UpdateTenantResponse(tenant=tenant_to_proto(changed))

    async def CreateProject(self, request: pb2.CreateProjectRequest, call: Call) -> pb2.CreateProjectResponse:
        """See the proto."""
        given = request.project
        made = await self._tenancy.create_project(
            required(given.tenant_id, "project.tenant_id"),
            given.id,
            given.display_name,
            limits_from_proto(given.limits),
            request.request_id,
        )
        return pb2.CreateProjectResponse(project=project_to_proto(made))

    async def ListProjects(self, request: pb2.ListProjectsRequest, call: Call) -> pb2.ListProjectsResponse:
        """See the proto."""
        size = page_size(request.page_size)
        found = await self._store.projects(required(request.tenant_id, "tenant_id"), request.page_token, size + 1)
        return pb2.ListProjectsResponse(
            projects=[project_to_proto(project) for project in found[:size]],
            next_page_token=found[size - 1].id if len(found) > size else "",
        )

    async def UpdateProject(self, request: pb2.UpdateProjectRequest, call: Call) -> pb2.UpdateProjectResponse:
        """See the proto."""
        given = request.project
        changed = await self._tenancy.update_project(
            required(given.tenant_id, "project.tenant_id"),
            required(given.id, "project.id"),
            given.display_name,
            limits_from_proto(given.limits),
            list(request.update_mask.paths),
        )
        return pb2.UpdateProjectResponse(project=project_to_proto(changed))

    async def CreateKey(self, request: pb2.CreateKeyRequest, call: Call) -> pb2.CreateKeyResponse:
        """See the proto."""
        given = request.key
        key, secret = await self._tenancy.create_key(
            required(given.tenant_id, "key.tenant_id"),
            given.project_id or "default",
            display_name=given.display_name,
            scopes=list(given.scopes),
            allowed_models=list(given.allowed_models),
            limits=limits_from_proto(given.limits),
            expire_time=micros_of(given.expire_time, "key.expire_time") / 1e6 if given.HasField("expire_time") else None,
            cache_namespace=given.cache_namespace,
        )
        return pb2.CreateKeyResponse(key=key_to_proto(key), secret=secret)

    async def ListKeys(self, request: pb2.ListKeysRequest, call: Call) -> pb2.ListKeysResponse:
        """See the proto."""
        size = page_size(request.page_size)
        tenant_id = required(request.tenant_id, "tenant_id")
        found = await self._store.keys(tenant_id, request.project_id, request.page_token, size + 1)
        return pb2.ListKeysResponse(
            keys=[key_to_proto(key) for key in found[:size]],
            next_page_token=found[size - 1].id if len(found) > size else "",
        )

    async def RevokeKey(self, request: pb2.RevokeKeyRequest, call: Call) -> pb2.RevokeKeyResponse:
        """See the proto."""
        return pb2.RevokeKeyResponse(key=key_to_proto(await self._tenancy.revoke_key(required(request.key_id, "key_id"))))
