"""A PostgreSQL server for tests, proofs and benches: Debian's, on a free port of loopback, with a directory of its own."""

from __future__ import annotations

import contextlib
import functools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import asyncpg

_START_SECONDS: Final = 60.0
_USER: Final = "sluice"
# As a production server commits; only what costs memory and nothing else is small.
_SETTINGS: Final = (
    "fsync=on",
    "synchronous_commit=on",
    "shared_buffers=64MB",
    "max_connections=60",
    "listen_addresses=127.0.0.1",
)


@contextlib.asynccontextmanager
async def connected(url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection of one's own."""
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


@dataclass(slots=True)
class Server:
    """A server in a directory of its own."""

    port: int
    directory: Path
    _command: Sequence[str]
    _runs_as: Mapping[str, Any]
    _process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """What it says."""
        return self.directory / "server.log"

    def start(self) -> None:
        """Starts it, again after a stop; returns when it can be used."""
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                self._command, stdout=output, stderr=subprocess.STDOUT, cwd=self.directory, **self._runs_as
            )
        ends = time.monotonic() + _START_SECONDS
        while True:
            said = self.log.read_text(errors="replace")
            if "database system is ready to accept connections" in said:
                return
            if self._process.poll() is not None or time.monotonic() > ends:
                raise RuntimeError(f"PostgreSQL did not start:\n{said[-3000:]}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Ends it at once, as a crash would: what was committed is found in its log at the next start."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(30)

    def url(self, database: str) -> str:
        """URL of a database, as settings take it."""
        return f"postgresql://{_USER}@127.0.0.1:{self.port}/{database}"

    def cpu_seconds(self) -> float:
        """CPU time of the server and of those of its processes that run or have ended."""
        assert self._process is not None
        pids = [self._process.pid, *_children(self._process.pid)]
        ticks = 0
        for pid in pids:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                # utime and stime; of the parent also those of its ended children.
                ticks += sum(map(int, fields[11:15] if pid == self._process.pid else fields[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")

    async def new_database(self, like: str = "") -> str:
        """URL of a database of its own: empty, or a copy of the one with the URL `like`, which nobody may use meanwhile."""
        name = f"t{uuid.uuid4().hex}"
        template = f' TEMPLATE "{like.rpartition("/")[2]}"' if like else ""
        async with connected(self.url("postgres")) as connection:
            # Through the log: no checkpoint, which a copy of files would need.
            await connection.execute(f'CREATE DATABASE "{name}"{template} STRATEGY wal_log')
        return self.url(name)


def _children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


@functools.cache
def _program(name: str) -> str:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which(name)
    if not found and on_path is None:
        raise RuntimeError(f"{name} is missing: `make tools` installs PostgreSQL, or apt-get install postgresql")
    return str(found[-1]) if found else str(on_path)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def server(*settings: str) -> Iterator[Server]:
    """Makes a cluster, starts it, and removes both at the end. `settings` as `name=value`, over those of every test."""
    # PostgreSQL refuses to be run by root.
    runs_as: dict[str, Any] = {}
    directory = Path(tempfile.mkdtemp(prefix="sluice-postgres-"))
    if os.geteuid() == 0:
        user = pwd.getpwnam("postgres")
        runs_as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        os.chown(directory, user.pw_uid, user.pw_gid)
    data = directory / "data"
    started: Server | None = None
    try:
        command = [
            _program("initdb"),
            "-D",
            str(data),
            "-U",
            _USER,
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--locale=C.UTF-8",
            "--no-sync",
        ]
        _run(command, runs_as)
        port = _free_port()
        command = [_program("postgres"), "-D", str(data), "-p", str(port), "-k", str(directory)]
        for setting in (*_SETTINGS, *settings):
            command += ["-c", setting]
        started = Server(port, directory, command, runs_as)
        started.start()
        yield started
    finally:
        if started is not None:
            started.stop()
        shutil.rmtree(directory, ignore_errors=True)


def _run(command: Sequence[str], runs_as: dict[str, Any]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False, **runs_as)
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-1500:]}")
