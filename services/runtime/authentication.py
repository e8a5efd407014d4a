"""Who calls, and whether they may: deny by default, by service.

Identities are proved by metadata: `authorization: Bearer <token>` with the mesh's service token (and `x-sluice-service:
<name>`) for a service, with the admin key for the administrator. Callers in this process are services. Another bearer token
is a tenant's key: the transport can't judge it, the servicers that take tenant keys do.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from services.runtime.call import ADMIN, ANONYMOUS, Caller, CallerKind
from services.runtime.errors import Failure, Reason

_BEARER: Final = "Bearer "
_MAX_NAME: Final = 64


class Access(enum.Enum):
    """Whom a service lets in."""

    ANYONE = "anyone"
    """The servicer itself judges the key that the call carries."""
    MESH = "mesh"
    """Services and the administrator."""


ACCESS: Final[Mapping[str, Access]] = MappingProxyType(
    {
        "sluice.inference.v1.InferenceService": Access.ANYONE,
        "sluice.jobs.v1.JobService": Access.ANYONE,
        "sluice.metering.v1.UsageService": Access.ANYONE,
        "sluice.metering.v1.MeteringService": Access.MESH,
        "sluice.metering.v1.TenancyService": Access.MESH,
        "sluice.routing.v1.RoutingService": Access.MESH,
        "sluice.caching.v1.CachingService": Access.MESH,
        "sluice.execution.v1.ExecutionService": Access.MESH,
        "sluice.tokenization.v1.TokenizationService": Access.MESH,
        "sluice.link.v1.LinkService": Access.MESH,
    }
)
"""Access by full name of the service. One that isn't listed lets nobody in."""


class Authenticator:
    """Tells callers by their metadata. An empty token or digest proves nothing to anybody."""

    def __init__(self, service_token: str, admin_key_sha256: str) -> None:
        self._service_token = service_token.encode()
        self._admin_digest = admin_key_sha256.encode()

    def caller(self, metadata: Mapping[str, str]) -> Caller:
        """The caller behind `metadata` with lower-case keys."""
        value = metadata.get("authorization")
        if value is None or not value.startswith(_BEARER):
            return ANONYMOUS
        token = value[len(_BEARER) :].encode()
        if self._service_token and hmac.compare_digest(token, self._service_token):
            return Caller(CallerKind.SERVICE, metadata.get("x-sluice-service", "")[:_MAX_NAME])
        if self._admin_digest:
            digest = hashlib.sha256(token).hexdigest().encode()
            if hmac.compare_digest(digest, self._admin_digest):
                return ADMIN
        return ANONYMOUS


def check(service: str, caller: Caller) -> None:
    """Lets `caller` in to `service` (a full name), or raises Failure SERVICE_IDENTITY."""
    access = ACCESS.get(service)
    if access is Access.ANYONE or (access is Access.MESH and caller.kind is not CallerKind.ANONYMOUS):
        return
    raise Failure(
        Reason.SERVICE_IDENTITY,
        f"{service!r} serves the services of the mesh and its administrator; "
        "present the service token or the admin key as `authorization: Bearer …`",
    )
