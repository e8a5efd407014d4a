"""The scripted service as a process of its own: `python -m tests.unit.runtime.scripted`. Tells its life on standard output."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from services.runtime.bootstrap import main
from services.runtime.config import ConfigError, setting
from services.runtime.process import Process, Service
from tests.unit.runtime.fakes import Script, bindings


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What the script plays."""

    gate: Path | None = setting(None, "Ready only while this file exists")
    worker_fails: bool = setting(False, "Whether the worker fails")
    catalogue_fails: bool = setting(False, "Whether a file named by the configuration is wrong")
    open_fails: bool = setting(False, "Whether opening fails")


def say(text: str) -> None:
    """A line for the test."""
    print(text, flush=True)


@contextlib.asynccontextmanager
async def open_service(config: Config, process: Process) -> AsyncIterator[Service]:
    """Opens the script."""
    if config.catalogue_fails:
        raise ConfigError(["catalogue.yaml: models is missing"])
    if config.open_fails:
        raise OSError("the ledger can't be opened: /secret-free/path")

    async def gate() -> None:
        if config.gate is not None and not config.gate.exists():
            raise FileNotFoundError("gate")

    async def work() -> None:
        if config.worker_fails:
            await asyncio.sleep(0.2)
            raise RuntimeError("the worker broke")
        try:
            await asyncio.Event().wait()
        finally:
            say("worker ended")

    async def drain() -> None:
        say("drained")

    say("opened")
    try:
        yield Service(
            "tokenization",
            bindings(Script()),
            pings={"gate": gate},
            workers=(work,),
            drain=drain,
            addresses={"http": "http://127.0.0.1:1"},
        )
    finally:
        say("closed")


if __name__ == "__main__":
    main("tokenization", Config, open_service)
