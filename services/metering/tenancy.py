"""Making tenants, projects and keys: ids, secrets, and telling the mesh of a revocation."""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Final

from services.metering.accounts import SCOPES, Key, Limits, Project, Tenant, is_id
from services.metering.errors import Exists, NotFound
from services.metering.ports import Change, Store
from services.runtime.errors import invalid

_MAX_NAME: Final = 256
_MAX_MODELS: Final = 256
_MAX_MODEL: Final = 256
SECRET_PREFIX: Final = "sk-sluice-"

Announce = Callable[[Key], Awaitable[None]]
"""Tells gateways that a key ended. Best effort: they ask again within 30 s anyway."""


class Tenancy:
    """Administers tenants."""

    def __init__(self, store: Store, announce: Announce, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._announce = announce
        self._clock = clock

    async def create_tenant(self, tenant_id: str, display_name: str, limits: Limits, request_id: str) -> Tenant:
        """A new tenant with a project `default`. Raises Failure REQUEST_INVALID, Exists."""
        _check_id("tenant.id", tenant_id)
        _check_name(display_name)
        _check_request_id(request_id)
        return await self._store.create_tenant(Tenant(tenant_id, display_name, limits, self._clock()), request_id)

    async def tenant(self, tenant_id: str) -> Tenant:
        """Raises NotFound."""
        found = await self._store.tenant(tenant_id)
        if found is None:
            raise NotFound(f"tenants/{tenant_id}")
        return found

    async def update_tenant(self, tenant_id: str, display_name: str, limits: Limits, mask: Collection[str]) -> Tenant:
        """Changes the fields that `mask` names. Raises NotFound, Failure REQUEST_INVALID."""
        name, change = _changes(display_name, limits, mask)
        return await self._store.update_tenant(tenant_id, name, change)

    async def create_project(
        self, tenant_id: str, project_id: str, display_name: str, limits: Limits, request_id: str
    ) -> Project:
        """A new project. Raises NotFound, Exists, Failure REQUEST_INVALID."""
        _check_id("project.id", project_id)
        _check_name(display_name)
        _check_request_id(request_id)
        project = Project(project_id, tenant_id, display_name, limits, self._clock())
        return await self._store.create_project(project, request_id)

    async def update_project(
        self, tenant_id: str, project_id: str, display_name: str, limits: Limits, mask: Collection[str]
    ) -> Project:
        """As update_tenant."""
        name, change = _changes(display_name, limits, mask)
        return await self._store.update_project(tenant_id, project_id, name, change)

    async def create_key(
        self,
        tenant_id: str,
        project_id: str,
        *,
        display_name: str = "",
        scopes: Collection[str] = SCOPES,
        allowed_models: Collection[str] = (),
        limits: Limits | None = None,
        expire_time: float | None = None,
        cache_namespace: str = "",
        secret: str = "",
    ) -> tuple[Key, str]:
        """A new key and its secret, which is kept nowhere. Raises NotFound, Failure REQUEST_INVALID."""
        _check_name(display_name)
        unknown = sorted(set(scopes) - set(SCOPES))
        if unknown:
            raise invalid("key.scopes", f"{unknown[0]!r} is not one of {', '.join(SCOPES)}")
        if len(allowed_models) > _MAX_MODELS:
            raise invalid("key.allowed_models", f"must have at most {_MAX_MODELS} entries")
        if any(not 0 < len(model) <= _MAX_MODEL for model in allowed_models):
            raise invalid("key.allowed_models", f"each must have 1 to {_MAX_MODEL} characters")
        if len(cache_namespace) > _MAX_NAME:
            raise invalid("key.cache_namespace", f"must have at most {_MAX_NAME} characters")
        now = self._clock()
        if expire_time is not None and expire_time <= now:
            raise invalid("key.expire_time", "has passed")
        secret = secret or SECRET_PREFIX + secrets.token_urlsafe(32)
        key = Key(
            id=f"key-{secrets.token_hex(8)}",
            sha256=hashlib.sha256(secret.encode()).digest(),
            tenant_id=tenant_id,
            project_id=project_id,
            display_name=display_name,
            secret_hint=secret[-4:],
            scopes=tuple(sorted(set(scopes) or set(SCOPES))),
            allowed_models=tuple(sorted(set(allowed_models))),
            limits=limits or Limits(),
            create_time=now,
            expire_time=expire_time,
            cache_namespace=cache_namespace,
        )
        return await self._store.create_key(key), secret

    async def revoke_key(self, key_id: str) -> Key:
        """Ends a key. Raises NotFound."""
        key = await self._store.revoke_key(key_id, self._clock())
        await self._announce(key)
        return key

    async def bootstrap(self, secret: str, limits: Limits) -> None:
        """Makes the tenant `default` and a key with `secret`, unless they are there."""
        if await self._store.tenant("default") is None:
            await self._store.create_tenant(Tenant("default", "Default", limits, self._clock()), "bootstrap")
        digest = hashlib.sha256(secret.encode()).digest()
        if await self._store.chain_by_digest(digest) is None:
            try:
                await self.create_key("default", "default", display_name="bootstrap", secret=secret)
            except Exists:
                # Another start made it in the meantime.
                return


def _check_id(field: str, value: str) -> None:
    if not is_id(value):
        raise invalid(field, f"{value[:80]!r} must match [a-z0-9][a-z0-9-]{{0,62}}")


def _check_name(value: str) -> None:
    if len(value.encode()) > _MAX_NAME:
        raise invalid("display_name", f"must have at most {_MAX_NAME} bytes")


def _check_request_id(value: str) -> None:
    if len(value) > _MAX_NAME:
        raise invalid("request_id", f"must have at most {_MAX_NAME} characters")


def _changes(display_name: str, given: Limits, mask: Collection[str]) -> tuple[str | None, Change]:
    """The new name, None when it stays, and what becomes of limits. A whole `limits` in the mask outdoes its fields."""
    if not mask:
        raise invalid("update_mask", "must name the fields to change: display_name, limits, or limits.<field>")
    known = {field.name for field in dataclasses.fields(Limits)}
    named: set[str] = set()
    for path in mask:
        if path == "limits":
            named |= known
        elif path.startswith("limits.") and (field := path.removeprefix("limits.")) in known:
            named.add(field)
        elif path != "display_name":
            raise invalid("update_mask", f"{path[:80]!r} is not display_name, limits or limits.<field>")
    name: str | None = None
    if "display_name" in mask:
        _check_name(display_name)
        name = display_name
    return name, lambda present: dataclasses.replace(present, **{field: getattr(given, field) for field in named})
