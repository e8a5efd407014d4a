"""What a service is given and what it gives back: the seam between a service's `app.py` and the process that runs it."""

from __future__ import annotations

import asyncio
import types
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog
from nats.aio.client import Client as NatsClient

from services.runtime.call import Caller, CallerKind
from services.runtime.dispatch import Binding, Table
from services.runtime.errors import unavailable
from services.runtime.inproc import InprocChannel
from services.runtime.metrics import Registry
from services.runtime.settings import MeshSettings

_NO_ADDRESSES: Final[Mapping[str, str]] = types.MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Service:
    """A service that is open: what `open_service` yields."""

    name: str
    """`routing`."""
    bindings: tuple[Binding, ...]
    """What it serves."""
    pings: Mapping[str, Callable[[], Awaitable[None]]]
    """Readiness: each returns when a needed dependency is there and raises when it isn't. Called every few seconds, bounded."""
    workers: tuple[Callable[[], Coroutine[Any, Any, None]], ...] = ()
    """Run from the start to the stop of the process, then cancelled. One that raises ends the process."""
    drain: Callable[[], Awaitable[None]] | None = None
    """Called at SIGTERM when clients have turned away and before transports stop: finish what runs, flush what is held."""
    addresses: Mapping[str, str] = _NO_ADDRESSES
    """Further addresses to report, say the gateway's `{"http": "http://127.0.0.1:8080"}`."""
