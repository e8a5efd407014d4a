"""One call as a servicer sees it, whichever transport brought it."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

DEFAULT_TIMEOUT_SECONDS: Final = 60.0
"""Deadline of a call that came without one."""

Metadata = tuple[tuple[str, str], ...]

FORWARDED: Final = frozenset({"x-request-id", "traceparent", "tracestate"})
"""Metadata that travels with a request through the mesh."""

_EMPTY: Final[Mapping[str, str]] = MappingProxyType({})


class CallerKind(enum.Enum):
    """Who calls, as far as the transport proved it."""

    ANONYMOUS = "anonymous"
    """Nothing was presented, or a bearer token that only the service itself can check (a tenant's key)."""
    SERVICE = "service"
    """A service of the mesh: presented the mesh's service token, or lives in this process."""
    ADMIN = "admin"
    """Presented the admin key."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The calling side."""

    kind: CallerKind
    name: str = ""
    """Name of the service; empty for others."""


ANONYMOUS: Final = Caller(CallerKind.ANONYMOUS)
ADMIN: Final = Caller(CallerKind.ADMIN, "admin")


@dataclass(slots=True)
class Call:
    """What is known of a call beside its request.

    `deadline` is a moment of the running loop's clock (`loop.time()`), in seconds. `metadata` has keys in lower case.
    """

    method: str
    """Full method name, `/sluice.routing.v1.RoutingService/Plan`."""
    deadline: float
    metadata: Mapping[str, str] = field(default_factory=lambda: _EMPTY)
    caller: Caller = ANONYMOUS
    forward: Metadata = field(default=())
    """Metadata to pass on with calls made on behalf of this one: `x-request-id`, `traceparent`."""
    is_lost: bool = False
    """Set when the call is cancelled because the connection to its caller broke: a process of ours ended, nobody took anything back."""
    span: object | None = None
    """The trace's span of this call, when traces are on; the telemetry module knows its type."""

    def time_left(self) -> float:
        """Seconds until the deadline; negative when it has passed."""
        return self.deadline - asyncio.get_running_loop().time()
