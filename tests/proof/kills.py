"""Kills processes of a running mesh under load and watches what callers see."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.cli.state import Ready
from services.runtime.errors import Failure
from sluice.inference.v1 import conversation_pb2, inference_service_pb2
from sluice.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.running import ROOT, Running

RECOVERY_SECONDS: Final = 5.0
DEADLINE_SECONDS: Final = 2.0
"""Of each request of the load."""
SLACK_SECONDS: Final = 0.5
"""What a busy machine may add to a deadline before its answer is read."""
MODEL: Final = "echo/echo"
NATS: Final = "nats"
_CLEAN_SECONDS: Final = 1.0
"""So long without a failure, a kill is over."""
_WATCH_SECONDS: Final = 30.0
_PAUSE_SECONDS: Final = 0.02
_HTTP_CALLERS: Final = 2
_GRPC_CALLERS: Final = 2
_UNSHARED: Final = (("grpc.use_local_subchannel_pool", 1),)
"""Channels of one process share connections and their backoff; one that is to tell the truth at once must not."""
_RECONNECT: Final = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500))


def ask(ready: Ready) -> None:
    """One proper request over HTTP. AssertionError with the answer when it isn't answered."""
    said = _over_http(ready, "Is anybody there?", 30.0)
    assert not said, said


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request of the load went. Times are of the monotonic clock."""

    began: float
    ended: float
    error: str
    """Empty: answered."""

    @property
    def is_late(self) -> bool:
        """Whether its caller waited past the deadline."""
        return self.ended - self.began > DEADLINE_SECONDS + SLACK_SECONDS


@dataclass(frozen=True, slots=True)
class Kill:
    """One killed process."""

    name: str
    recovery_seconds: float
    """From the kill to the end of the last request that failed; 0 when none did."""
    serving_seconds: float
    """From the kill to its health being SERVING again."""
    flipped: bool
    """Whether its health went down and came back, in another process."""
    errors: Counter[str]
    recovery_by_caller: Mapping[str, float]
    """As `recovery_seconds`, for callers over HTTP and over gRPC: when only one of them waits, its connections are what to look at."""
    health_seconds: float
    """From the kill to the last moment at which its health, asked over a new connection, was not SERVING."""
    logs: Path | None
    """A copy of every process's log after a slow recovery: the running Sluice takes its own with it."""


@dataclass(slots=True)
class Seen:
    """What callers saw."""

    kills: list[Kill] = field(default_factory=list)
    requests: int = 0
    late: int = 0

    def details(self) -> list[str]:
        """One line per kill, the slowest recovery first."""
        return [
            f"{one.name}: last failure after {one.recovery_seconds:.1f} s ("
            + ", ".join(f"{caller} {seconds:.1f}" for caller, seconds in one.recovery_by_caller.items())
            + f"), serving after {one.serving_seconds:.1f} s, last not serving after {one.health_seconds:.1f} s, "
            f"health {'flipped' if one.flipped else 'did not flip'}, failed {sum(one.errors.values())}"
            + "".join(f"; {count} x {error}" for error, count in one.errors.most_common(2))
            + (f"; logs in {one.logs}" if one.logs is not None else "")
            for one in sorted(self.kills, key=lambda one: one.recovery_seconds, reverse=True)
        ]


class _Load:
    """Callers that go on asking until they are told to stop."""

    def __init__(self, ready: Ready) -> None:
        # As callers do: they were told the addresses once, and those stay.
        self._ready = ready
        self._outcomes: list[Outcome] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._numbers = itertools.count()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Asks while the context is open."""
        callers = [threading.Thread(target=self._http, name=f"http-{index}") for index in range(_HTTP_CALLERS)]
        callers += [threading.Thread(target=self._grpc, name=f"grpc-{index}") for index in range(_GRPC_CALLERS)]
        for caller in callers:
            caller.start()
        try:
            yield
        finally:
            self._stop.set()
            for caller in callers:
                caller.join()

    def outcomes(self) -> list[Outcome]:
        """Every outcome so far."""
        with self._lock:
            return list(self._outcomes)

    def failures_since(self, time_: float) -> list[Outcome]:
        """Requests that failed after `time_`."""
        return [one for one in self.outcomes() if one.error and one.ended >= time_]

    def _repeat(self, call: Callable[[str], str]) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            # Each is another question: an answer from the cache would not need the service that was killed.
            error = call(f"Say {next(self._numbers)}.")
            outcome = Outcome(began, time.monotonic(), error)
            with self._lock:
                self._outcomes.append(outcome)
            self._stop.wait(_PAUSE_SECONDS)

    def _http(self) -> None:
        self._repeat(lambda text: _over_http(self._ready, text, DEADLINE_SECONDS))

    def _grpc(self) -> None:
        ready = self._ready
        with grpc.insecure_channel(ready.grpc["gateway"], options=_RECONNECT) as channel:
            stub = InferenceServiceStub(channel)
            metadata = (("authorization", f"Bearer {ready.key}"),)

            def call(text: str) -> str:
                request = inference_service_pb2.GenerateRequest(
                    conversation=conversation_pb2.Conversation(
                        messages=[
                            conversation_pb2.Message(role=conversation_pb2.ROLE_USER, parts=[conversation_pb2.Part(text=text)])
                        ]
                    ),
                    routing=inference_service_pb2.RoutingWishes(model=MODEL),
                )
                try:
                    stub.Generate(request, timeout=DEADLINE_SECONDS, metadata=metadata)
                except grpc.RpcError as error:
                    return f"gRPC {error.code().name}: {(error.details() or '')[:120]}"
                return ""

            self._repeat(call)


def _over_http(ready: Ready, text: str, seconds: float) -> str:
    """One request; what went wrong, empty when nothing did."""
    parts = urlsplit(ready.http)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=seconds + 10 * SLACK_SECONDS)
    headers = {"content-type": "application/json", "authorization": f"Bearer {ready.key}", "x-sluice-timeout": f"{seconds:g}s"}
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": text}]})
    with contextlib.closing(connection):
        try:
            connection.request("POST", "/v1/chat/completions", body, headers)
            response = connection.getresponse()
            said = response.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            return f"HTTP {type(error).__name__}"
    return "" if response.status == 200 else f"HTTP {response.status}: {said[:160]}"


def kill_in_turn(started: Running, names: Sequence[str], step: Callable[[], None]) -> Seen:
    """Kills each of `names`, processes of the ready file, and waits after each until requests succeed again."""
    seen = Seen()
    load = _Load(started.ready)
    with load.running():
        _wait_until(lambda: len(load.outcomes()) >= 20, "the load does not start")
        for name in names:
            seen.kills.append(_kill(started, name, load))
            step()
    outcomes = load.outcomes()
    seen.requests = len(outcomes)
    seen.late = sum(one.is_late for one in outcomes)
    return seen


def _kill(started: Running, name: str, load: _Load) -> Kill:
    ready = started.ready
    pid = ready.pids[name]
    is_up = _nats_probe(ready.nats) if name == NATS else _health_probe(ready.grpc[name])
    _wait_until(is_up, f"{name} does not serve before it is killed")
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    went_down = _reached(lambda: not is_up(), RECOVERY_SECONDS)
    came_back = _reached(lambda: is_up() and started.ready.pids.get(name) not in (None, pid), _WATCH_SECONDS)
    serving = time.monotonic() - began

    last_down = time.monotonic()

    def is_quiet() -> bool:
        nonlocal last_down
        # Asked all the while: callers that fail although it serves are another matter than a process that went again.
        if not is_up():
            last_down = time.monotonic()
        failed = load.failures_since(began)
        return time.monotonic() - max((one.ended for one in failed), default=began) >= _CLEAN_SECONDS

    # When it never gets quiet the last failure is late enough to say so.
    _reached(is_quiet, _WATCH_SECONDS)
    failed = load.failures_since(began)

    def last(caller: str) -> float:
        return max((one.ended for one in failed if one.error.startswith(caller)), default=began) - began

    logs = None
    if last("") > RECOVERY_SECONDS:
        logs = ROOT / ".cache" / "proof" / f"{started.directory.name}-{name}-{pid}"
        shutil.copytree(started.directory / "logs", logs, dirs_exist_ok=True)
    return Kill(
        name,
        recovery_seconds=last(""),
        serving_seconds=serving,
        flipped=went_down and came_back,
        errors=Counter(one.error for one in failed),
        recovery_by_caller={caller: last(caller) for caller in ("HTTP", "gRPC")},
        health_seconds=last_down - began,
        logs=logs,
    )


def _health_probe(address: str) -> Callable[[], bool]:
    def is_up() -> bool:
        # A channel of its own each time: one that has seen its server go waits before it tries again.
        with grpc.insecure_channel(address, options=_UNSHARED) as channel:
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=1.0)
            except grpc.RpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    return is_up


def _nats_probe(url: str) -> Callable[[], bool]:
    parts = urlsplit(url)
    address = (parts.hostname or "", parts.port or 0)

    def is_up() -> bool:
        try:
            with socket.create_connection(address, timeout=1.0) as connection:
                return connection.recv(4) == b"INFO"
        except OSError:
            return False

    return is_up


def _reached(state: Callable[[], bool], seconds: float) -> bool:
    ends = time.monotonic() + seconds
    while True:
        try:
            if state():
                return True
        except Failure:
            # The ready file is gone while it is written anew.
            pass
        if time.monotonic() > ends:
            return False
        time.sleep(_PAUSE_SECONDS)


def _wait_until(state: Callable[[], bool], otherwise: str) -> None:
    assert _reached(state, _WATCH_SECONDS), otherwise
