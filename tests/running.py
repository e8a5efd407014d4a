"""A running Sluice for tests, proofs and benches: the real `sluice up` as a child process, told apart from a person's only by
its free ports and temporary state directory."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import yaml

from services.cli.client import Client, connect
from services.cli.demonstration import demo_catalogue
from services.cli.state import Ready

ROOT: Final = Path(__file__).resolve().parents[1]
START_SECONDS: Final = 90.0
BROKEN_MODELS: Final = ("broken/500", "broken/429", "broken/stream", "broken/stream2")
STOP_SECONDS: Final = 15.0
"""What `up` promises for its own end."""


@dataclass(slots=True)
class Running:
    """A started `sluice up`."""

    process: subprocess.Popen[bytes]
    directory: Path
    topology: str
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def ready(self) -> Ready:
        """The ready file as it is now: process ids change when a service is started again."""
        return Ready.read(self.directory / "ready.json")

    def logs(self) -> str:
        """The ends of all logs, for the message of a failed test."""
        logs = sorted((self.directory / "logs").glob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)

    @contextlib.contextmanager
    def client(self, *, key: str | None = None) -> Iterator[Client]:
        """Blocking stubs of every service."""
        with connect(self.ready, key=key) as client:
            yield client

    @contextlib.contextmanager
    def channel(self, service: str) -> Iterator[grpc.Channel]:
        """A blocking channel to one service."""
        with grpc.insecure_channel(self.ready.grpc[service]) as channel:
            yield channel


def write_config(directory: Path, sections: Mapping[str, Any], catalogue: Mapping[str, Any] | None = None) -> Path:
    """A config file with `sections`, and a catalogue beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "sluice.yaml"
    merged = {name: dict(values) for name, values in sections.items()}
    if catalogue is not None:
        (directory / "catalogue.yaml").write_text(yaml.safe_dump(dict(catalogue), sort_keys=False))
        merged.setdefault("mesh", {})["catalogue"] = str(directory / "catalogue.yaml")
    path.write_text(yaml.safe_dump(merged, sort_keys=False))
    return path


def default_catalogue() -> dict[str, Any]:
    """The demo's catalogue: the shipped one, plus a provider that is down, and models of a fake that may be made to fail.

    A failure has consequences (a breaker opens, Retry-After is kept), so tests that script one use a model of its own.
    """
    catalogue = demo_catalogue(ROOT / "deploy" / "catalogue.yaml")
    catalogue["providers"]["broken"] = {"kind": "echo"}
    for name in BROKEN_MODELS:
        catalogue["models"][name] = {**catalogue["models"]["echo/echo"], "provider": "broken"}
    return catalogue


@contextlib.contextmanager
def running(
    topology: str,
    *,
    sections: Mapping[str, Any] | None = None,
    catalogue: Mapping[str, Any] | None = None,
    replicas: Mapping[str, int] | None = None,
    environment: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[Running]:
    """Starts `sluice up` in a temporary directory and stops it at the end. `prefix` goes before the command, say `taskset`."""
    directory = Path(tempfile.mkdtemp(prefix=f"sluice-{topology}-"))
    process: subprocess.Popen[bytes] | None = None
    try:
        config = write_config(directory / "config", sections or {}, catalogue if catalogue is not None else default_catalogue())
        ready = directory / "ready.json"
        command = [
            *prefix,
            sys.executable,
            "-m",
            "services.cli",
            "up",
            "--port",
            "0",
            "--grpc-port",
            "0",
            "--config",
            str(config),
        ]
        command += ["--state-dir", str(directory), "--ready-file", str(ready)]
        command += ["--mesh"] * (topology == "mesh")
        for service, count in (replicas or {}).items():
            command += ["--replicas", f"{service}={count}"]
        output = (directory / "up.log").open("wb")
        with output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})},
                start_new_session=True,
            )
        started = Running(process, directory, topology)
        _wait(started, ready)
        yield started
    finally:
        if process is not None:
            stop(process)
        shutil.rmtree(directory, ignore_errors=True)


def _wait(started: Running, ready: Path) -> None:
    ends = time.monotonic() + START_SECONDS
    while not ready.exists():
        said = (started.directory / "up.log").read_text(errors="replace")
        if started.process.poll() is not None:
            raise AssertionError(f"`sluice up` ended with {started.process.returncode}:\n{said}\n{started.logs()}")
        if time.monotonic() > ends:
            raise AssertionError(f"`sluice up` was not ready in {START_SECONDS:g} s:\n{said}\n{started.logs()}")
        time.sleep(0.05)


def stop(process: subprocess.Popen[bytes]) -> float:
    """SIGTERM, and the seconds until the end. Kills what is left after twice the promised time."""
    began = time.monotonic()
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(2 * STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return time.monotonic() - began
