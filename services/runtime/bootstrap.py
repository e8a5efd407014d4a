"""Starts, runs and stops a process: `main` for one service, `run_services` for several in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from services.runtime.process import Process, Service

OpenService = Callable[[Any, Process], AbstractAsyncContextManager[Service]]


@dataclass(frozen=True, slots=True)
class Unit:
    """A service that can be opened: its name, the class of its configuration and what opens it."""

    name: str
    config: type[Any]
    open: OpenService
