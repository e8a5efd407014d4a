"""Children of `sluice up`: started, watched, started again, stopped in order.

A child that ends while it should run is started again after a short, growing pause. Children die with the supervisor even when
it is killed (`PR_SET_PDEATHSIG`), so that no stray process keeps a port or a ledger.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_PR_SET_PDEATHSIG: Final = 1
_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 5.0
_STEADY_SECONDS: Final = 10.0
"""A child that ran this long has proved itself: its next pause is the first again."""
_LOG_LIMIT_BYTES: Final = 64 * 1024 * 1024
"""A child's log is moved to `<name>.log.1` at a start when it has grown past this."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What to run."""

    name: str
    """Unique among the children, say `gateway-2`."""
    command: tuple[str, ...]
    environment: Mapping[str, str]
    """Added to the supervisor's own environment."""
    log: Path
    """Where its output goes."""
    stop_seconds: float = 10.0
    """Time between SIGTERM and SIGKILL."""
    stop_order: int = 0
    """Lower ones are stopped first."""


def _die_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Child:
    """One supervised process. `reports` has what it said of itself through its report pipe: the latest line per service."""

    def __init__(self, spec: Spec, on_change: Callable[[Child], None]) -> None:
        self.spec = spec
        self.reports: dict[str, dict[str, Any]] = {}
        self.start_count = 0
        self.log_start = 0
        """Size of the log when the first run began: what stands before it is of earlier times."""
        self._on_change = on_change
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    @property
    def returncode(self) -> int | None:
        """How its last run ended; None while it runs or before it ran."""
        return self._process.returncode if self._process is not None else None

    async def run(self) -> None:
        """Keeps the child running until `stop`."""
        pause = _FIRST_PAUSE
        loop = asyncio.get_running_loop()
        while not self._stopping.is_set():
            began = loop.time()
            await self._once()
            if self._stopping.is_set():
                return
            pause = _FIRST_PAUSE if loop.time() - began > _STEADY_SECONDS else min(pause * 2, _LONGEST_PAUSE)
            self._on_change(self)
            try:
                async with asyncio.timeout(pause):
                    await self._stopping.wait()
            except TimeoutError:
                continue

    async def _once(self) -> None:
        reader, writer = os.pipe()
        log = self.spec.log
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists() and log.stat().st_size > _LOG_LIMIT_BYTES:
            log.replace(log.with_suffix(".log.1"))
        if not self.start_count:
            self.log_start = log.stat().st_size if log.exists() else 0
        try:
            with log.open("ab") as output:
                self._process = await asyncio.create_subprocess_exec(
                    *self.spec.command,
                    env={**os.environ, **self.spec.environment, "SLUICE_REPORT_FD": str(writer)},
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(writer,),
                    preexec_fn=_die_with_parent if sys.platform == "linux" else None,
                    # A Ctrl-C in the terminal reaches the supervisor alone, which stops the children in order.
                    start_new_session=True,
                )
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        self.start_count += 1
        self.reports = {}
        self._on_change(self)
        reports = asyncio.create_task(self._read_reports(reader), name=f"reports of {self.spec.name}")
        try:
            await self._process.wait()
        finally:
            reports.cancel()
            await asyncio.gather(reports, return_exceptions=True)

    async def _read_reports(self, descriptor: int) -> None:
        stream = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        pipe = os.fdopen(descriptor, "rb", buffering=0)
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stream), pipe)
        try:
            while line := await stream.readline():
                report = json.loads(line)
                self.reports[report["service"]] = report
                self._on_change(self)
        finally:
            transport.close()

    async def stop(self) -> None:
        """Ends the child: SIGTERM, then SIGKILL when its time is over. Returns when it is gone."""
        self._stopping.set()
        process = self._process
        if process is None or process.returncode is not None:
            return
        try:
            process.terminate()
        except ProcessLookupError:
            return
        try:
            async with asyncio.timeout(self.spec.stop_seconds):
                await process.wait()
        except TimeoutError:
            try:
                process.kill()
            except ProcessLookupError:
                return
            await process.wait()


class Supervisor:
    """Children as a group. Use `run` in a task of its own; `stop` ends them in their order."""

    def __init__(self, specs: list[Spec], on_change: Callable[[Child], None]) -> None:
        self.children = [Child(spec, on_change) for spec in specs]

    async def run(self) -> None:
        """Runs all children until `stop`."""
        async with asyncio.TaskGroup() as group:
            for child in self.children:
                group.create_task(child.run(), name=f"child {child.spec.name}")

    async def stop(self) -> None:
        """Stops all children; those of one order together."""
        for order in sorted({child.spec.stop_order for child in self.children}):
            await asyncio.gather(*(child.stop() for child in self.children if child.spec.stop_order == order))
