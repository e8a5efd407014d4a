"""The registry of what is measured, and how one figure comes about.

A scenario runs against a Sluice of one topology and, in the same rounds, against the bare proxy of `reference.py`; both have the same
C upstream behind them. What counts is CPU time per request and the ratio of the two: wall-clock figures of one machine say nothing on
another.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import urlsplit

from tests.bench import rig
from tests.running import Running, running

TOPOLOGIES: Final = ("compact", "mesh")
MODEL: Final = "bench/model"
ANSWER: Final = "The quick brown fox"
"""Stands in every whole answer of the upstream."""
CHUNK: Final = " token"
"""Stands in every streamed answer."""
CHUNKS: Final = 50
GAP_US: Final = 2000
"""Between two streamed chunks. Without a gap several arrive in one read, and a chunk would seem to cost a fifth."""
SECTIONS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        # Every limit is on and none is reached: the path pays for keeping them.
        "metering": MappingProxyType(
            {
                "bootstrap_requests_per_minute": 100_000_000,
                "bootstrap_concurrency": 100_000,
                "bootstrap_budget_nano_usd": 10**15,
            }
        ),
        "mesh": MappingProxyType({"log_level": "warning"}),
    }
)
_BUSY: Final = 0.95
_RIG_BUSY: Final = 0.90
_READY_SECONDS: Final = 20.0
_QUESTION: Final = "What is the capital of France?"
_PARAPHRASE: Final = "What's the capital city of France?"


@dataclass(frozen=True, slots=True)
class Budget:
    """CPU time that a scenario may cost."""

    request_ms: float | None = None
    chunk_us: float | None = None

    @property
    def text(self) -> str:
        """As the table shows it."""
        if self.request_ms is not None:
            return f"{self.request_ms * 1e3:.0f} µs"
        return "-" if self.chunk_us is None else f"{self.chunk_us:.0f} µs/chunk"


NO_BUDGET: Final = Budget()


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is asked, and what it may cost."""

    name: str
    summary: str
    load: Callable[[], rig.Load]
    """The generator's run, with a body of its own at each call: what one round stored must not serve the next."""
    status: str
    """What `x-sluice-cache` says of each request; empty: streamed answers don't say."""
    marks: Mapping[str, Budget]
    """By topology: what has to be reached first, and decides."""
    goals: Mapping[str, Budget]
    """By topology: what performance.md asks for."""
    prime: Callable[[Running, rig.Load], rig.Load] = field(default=lambda _, load: load)
    """Brings a started Sluice into the state that the scenario needs; returns the load to run in it."""
    saturates: bool = True
    """Whether the product's core has to be busy for a round to count."""
    is_timed: bool = False
    """Whether the latency that Sluice adds is measured, too, in runs of its own with one request at a time."""


def _chat(prompt: str, *, stream: bool = False) -> str:
    body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": prompt}]}
    if stream:
        body["stream"] = True
    return json.dumps(body)


def _prompt(marker: str = "") -> str:
    """250 bytes, different in each request (the generator numbers them) and each run."""
    start = f"Request NNNNNNNNNNNN of run {secrets.token_hex(6)} {marker}: "
    return (start + "summarise what the customer wrote about the delivery and propose an answer in plain words. " * 3)[:250]


def _passthrough() -> rig.Load:
    return rig.Load(_chat(_prompt()), expect=ANSWER)


def _stream() -> rig.Load:
    return rig.Load(_chat(_prompt(f"@n{CHUNKS}@g{GAP_US}"), stream=True), stream=True, expect=CHUNK)


def _exact() -> rig.Load:
    return rig.Load(_chat(_prompt().replace("NNNNNNNNNNNN", "000000000000")), fixed=True, expect=ANSWER)


def _semantic() -> rig.Load:
    # Few at once: the embedding model takes milliseconds, and a lookup that waits longer than its timeout is a miss.
    return rig.Load(_chat(_PARAPHRASE), fixed=True, expect=ANSWER, connections=4, headers={"x-sluice-cache": "semantic"})


def _prime_exact(started: Running, load: rig.Load) -> rig.Load:
    _until(lambda: ask(started, load).get("x-sluice-cache") == "hit_exact", "the exact tier does not answer")
    return load


def _prime_semantic(started: Running, load: rig.Load) -> rig.Load:
    """A namespace in which the question has an answer and its paraphrase has none: a hit by meaning stores nothing."""
    found = load

    def hits() -> bool:
        nonlocal found
        found = replace(load, headers={**(load.headers or {}), "x-sluice-cache-namespace": f"bench-{secrets.token_hex(6)}"})
        ask(started, replace(found, body=_chat(_QUESTION)))
        # The answer is embedded and stored behind the path; when the paraphrase came first it has an entry of its own now.
        time.sleep(0.3)
        return ask(started, found).get("x-sluice-cache") == "hit_semantic"

    _until(hits, "the semantic tier does not answer")
    return found


def _until(true: Callable[[], bool], otherwise: str) -> None:
    ends = time.monotonic() + _READY_SECONDS
    while not true():
        if time.monotonic() > ends:
            raise rig.RigError(otherwise)
        time.sleep(0.05)


def ask(started: Running, load: rig.Load) -> dict[str, str]:
    """One request as the generator sends it. Returns the answer's headers; RigError when it is not the one expected."""
    parts = urlsplit(started.ready.http)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_READY_SECONDS)
    with contextlib.closing(connection):
        connection.request(
            "POST",
            load.path,
            load.body.replace("NNNNNNNNNNNN", f"{secrets.randbelow(10**12):012}"),
            {"content-type": "application/json", **authorization(started), **(load.headers or {})},
        )
        response = connection.getresponse()
        body = response.read().decode(errors="replace")
        if response.status != 200 or (load.expect or "") not in body:
            raise rig.RigError(f"a request failed with {response.status}: {body[:500]}")
        return {name.lower(): value for name, value in response.getheaders()}


def authorization(started: Running) -> dict[str, str]:
    """The header with the tenant's key."""
    return {"authorization": f"Bearer {started.ready.key}"}


SCENARIOS: Final = (
    Scenario(
        "passthrough",
        "cache miss: authenticated, limited, counted, routed, held, executed, settled, stored",
        _passthrough,
        "miss",
        {"compact": Budget(request_ms=0.25), "mesh": Budget(request_ms=0.8)},
        {"compact": Budget(request_ms=0.125), "mesh": Budget(request_ms=0.33)},
        is_timed=True,
    ),
    Scenario(
        "exact_hit",
        "the same request again, answered by the exact tier",
        _exact,
        "hit_exact",
        {"compact": Budget(request_ms=0.12)},
        {"compact": Budget(request_ms=1 / 15), "mesh": Budget(request_ms=1 / 6)},
        _prime_exact,
        is_timed=True,
    ),
    Scenario(
        "semantic_hit",
        "a paraphrase, embedded each time and answered by the semantic tier",
        _semantic,
        "hit_semantic",
        {},
        {},
        _prime_semantic,
        saturates=False,
    ),
    Scenario(
        f"stream_{CHUNKS}",
        f"cache miss, streamed in {CHUNKS} chunks {GAP_US / 1000:g} ms apart",
        _stream,
        "",
        {"compact": Budget(chunk_us=45)},
        {"compact": Budget(chunk_us=30), "mesh": Budget(chunk_us=80)},
        saturates=False,
    ),
)


@dataclass(frozen=True, slots=True)
class Round:
    """One run against the bare proxy and one against Sluice, one right after the other."""

    reference: rig.Reading
    product: rig.Reading
    saturated: bool
    lone: tuple[rig.Reading, rig.Reading] | None = None
    """One request at a time: to the upstream itself, and to Sluice. None: the scenario has no such row."""

    def added_us(self, of: Callable[[rig.Reading], float]) -> float:
        """How much longer Sluice takes than the upstream alone, microseconds, of one percentile."""
        assert self.lone is not None, "asked of scenarios that have it"
        direct, product = self.lone
        return of(product) - of(direct)

    def cost(self, *, per_chunk: bool) -> float:
        """CPU microseconds of Sluice, per request or per streamed chunk."""
        return self.product.cpu_us_per_frame if per_chunk else self.product.cpu_ms * 1e3

    @property
    def ratio(self) -> float:
        """Sluice's CPU per request over the bare proxy's."""
        return self.product.cpu_ms / self.reference.cpu_ms


@dataclass(frozen=True, slots=True)
class Figure:
    """What a scenario costs in a topology."""

    scenario: Scenario
    topology: str
    rounds: tuple[Round, ...]
    void: str = ""
    """Why there is no figure; empty: there is one."""

    @property
    def name(self) -> str:
        """`<topology>.<scenario>`."""
        return f"{self.topology}.{self.scenario.name}"

    @property
    def mark(self) -> Budget:
        """What decides."""
        return self.scenario.marks.get(self.topology, NO_BUDGET)

    @property
    def goal(self) -> Budget:
        """What performance.md asks for."""
        return self.scenario.goals.get(self.topology, NO_BUDGET)

    def spread(self, of: Callable[[Round], float]) -> tuple[float, float, float]:
        """Minimum, median and maximum over the rounds."""
        values = [of(one) for one in self.rounds]
        return min(values), statistics.median(values), max(values)

    @property
    def measured(self) -> float:
        """CPU microseconds, median of the rounds: per chunk where the budget is one for chunks, else per request."""
        per_chunk = self.mark.chunk_us is not None or self.goal.chunk_us is not None
        return self.spread(lambda one: one.cost(per_chunk=per_chunk))[1]

    @property
    def bound(self) -> float | None:
        """The mark in CPU microseconds, of what `measured` counts; None: there is none."""
        return self.mark.request_ms * 1e3 if self.mark.request_ms is not None else self.mark.chunk_us

    @property
    def verdict(self) -> str:
        """`ok`, `short`, `void`, or `-` where nothing has to be reached."""
        if self.void:
            return "void"
        if self.bound is None:
            return "-"
        return "ok" if self.measured <= self.bound else "short"

    @property
    def note(self) -> str:
        """What to know about the figure besides its numbers."""
        if self.void:
            return self.void
        idle = sum(not one.saturated for one in self.rounds) if self.scenario.saturates else 0
        return f"core not busy enough in {idle} of {len(self.rounds)} rounds" if idle else ""


def catalogue(upstream_port: int) -> dict[str, Any]:
    """One provider, the C upstream, and one model there that has a price."""
    chain = [MODEL]
    return {
        "providers": {"bench": {"kind": "openai", "base_url": f"http://127.0.0.1:{upstream_port}/v1"}},
        "models": {
            MODEL: {
                "provider": "bench",
                "upstream_model": "mock",
                "context_window": 128_000,
                "max_output_tokens": 4096,
                "capabilities": ["chat", "streaming", "vision"],
                "price": [{"input": "0.15", "output": "0.60"}],
            }
        },
        "policies": {
            "default": {
                "waive_fallbacks": "the bench has one upstream",
                "task_types": dict.fromkeys(("simple", "reasoning", "code", "vision"), chain),
            }
        },
        "task_types": {
            name: {"latency_target": "5s", "attempt_timeout": "60s"} for name in ("simple", "reasoning", "code", "vision")
        },
        "tokenizers": {"bench/*": {"encoding": "o200k_base"}},
    }


@dataclass(frozen=True, slots=True)
class Stand:
    """Everything that one topology's measurements need, running."""

    sluice: Running
    upstream: rig.Upstream
    reference: subprocess.Popen[bytes]
    reference_port: int

    @property
    def sluice_port(self) -> int:
        """Port of the HTTP edge."""
        port = urlsplit(self.sluice.ready.http).port
        assert port is not None, "the edge's URL has its port"
        return port


@contextlib.contextmanager
def stand(topology: str) -> Iterator[Stand]:
    """Starts the upstream, the bare proxy and a Sluice, all pinned, and stops them at the end."""
    rig.build()
    with contextlib.ExitStack() as stack:
        upstream = stack.enter_context(rig.upstream())
        port = rig.free_port()
        command = [sys.executable, "-m", "tests.bench.reference", str(port), f"http://127.0.0.1:{upstream.port}"]
        reference = subprocess.Popen(rig.pin_command(rig.PRODUCT_CORE, command), cwd=rig.ROOT)
        stack.callback(rig.stop, reference)
        rig.wait_for_port(port, 15.0)
        sluice = stack.enter_context(
            running(
                topology,
                sections=SECTIONS,
                catalogue=catalogue(upstream.port),
                prefix=rig.pin_command(rig.PRODUCT_CORE, []),
            )
        )
        yield Stand(sluice, upstream, reference, port)


@dataclass(frozen=True, slots=True)
class Plan:
    """How long it is measured."""

    rounds: int
    seconds: float
    warm_seconds: float = 1.0


FULL: Final = Plan(rounds=5, seconds=4.0)
SHORT: Final = Plan(rounds=3, seconds=1.5, warm_seconds=0.5)


def measure(
    on: Stand, scenario: Scenario, plan: Plan, *, during: Callable[[int], contextlib.AbstractContextManager[None]] | None = None
) -> Figure:
    """The figure of one scenario. `during` wraps each run against Sluice and is told how many seconds it takes."""
    topology = on.sluice.topology
    # Every round costs its time whether it counts or not; twice as many are tried before idle ones are taken as they are.
    counted: list[Round] = []
    others: list[Round] = []
    for _ in range(2 * plan.rounds):
        try:
            one = _round(on, scenario, plan, during)
        except _Void as void:
            return Figure(scenario, topology, tuple(counted + others), str(void))
        (counted if one.saturated or not scenario.saturates else others).append(one)
        if len(counted) == plan.rounds:
            break
    return Figure(scenario, topology, tuple((counted + others)[: plan.rounds]))


class _Void(Exception):
    """A round that says nothing; the text says why."""


def _round(
    on: Stand,
    scenario: Scenario,
    plan: Plan,
    during: Callable[[int], contextlib.AbstractContextManager[None]] | None,
) -> Round:
    load = replace(scenario.load(), seconds=plan.seconds, warm_seconds=plan.warm_seconds)
    reference = rig.run(on.reference_port, load, on.reference.pid, on.upstream.pid)
    _check(reference, "the bare proxy")
    load = scenario.prime(on.sluice, load)
    load = replace(load, headers={**(load.headers or {}), **authorization(on.sluice)})
    served = rig.served(on.upstream.port)
    with during(int(plan.seconds + plan.warm_seconds)) if during is not None else contextlib.nullcontext():
        product = rig.run(on.sluice_port, load, on.sluice.process.pid, on.upstream.pid)
    _check(product, "Sluice")
    served = rig.served(on.upstream.port) - served
    if scenario.status.startswith("hit") and served:
        raise _Void(f"{served} requests reached the upstream instead of the cache")
    if not scenario.status.startswith("hit") and served < product.ok:
        raise _Void(f"only {served} of {product.ok} requests reached the upstream: the cache answered the others")
    if scenario.status and (said := ask(on.sluice, load).get("x-sluice-cache")) != scenario.status:
        raise _Void(f"the cache says {said!r} instead of {scenario.status!r}")
    saturated = product.product_busy >= _BUSY and product.rig_busy < _RIG_BUSY
    return Round(reference, product, saturated, _alone(on, load, plan) if scenario.is_timed else None)


def _alone(on: Stand, load: rig.Load, plan: Plan) -> tuple[rig.Reading, rig.Reading]:
    """One request at a time, at the upstream itself and at Sluice."""
    one = replace(load, connections=1, seconds=plan.seconds / 2)
    with rig.awake():
        direct = rig.run(on.upstream.port, one, on.upstream.pid)
        _check(direct, "the upstream")
        product = rig.run(on.sluice_port, one, on.sluice.process.pid)
        _check(product, "Sluice")
    return direct, product


def _check(reading: rig.Reading, what: str) -> None:
    if reading.errors or not reading.ok:
        raise _Void(
            f"{what}: {reading.errors} errors, {reading.ok} good answers; {reading.error or 'a body was not as expected'}"
        )


def select(only: Sequence[str]) -> list[tuple[str, Scenario]]:
    """Topologies and scenarios whose name has one of `only` in it; all when it is empty."""
    return [
        (topology, scenario)
        for topology in TOPOLOGIES
        for scenario in SCENARIOS
        if not only or any(part in f"{topology}.{scenario.name}" for part in only)
    ]


@contextlib.contextmanager
def profiled(pid: int, path: Path, seconds: int) -> Iterator[None]:
    """Samples a process and its children with py-spy while the context is open, and writes a flame graph to `path`.

    Only threads that hold the GIL are counted: py-spy takes threads that wait in native code for busy ones.
    """
    program = Path(sys.executable).with_name("py-spy")
    if not program.exists():
        raise rig.RigError("py-spy is not installed; run `make install`")
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [str(program), "record", "--pid", str(pid), "--subprocesses", "--duration", str(seconds), "--rate", "200"]
    command += ["--output", str(path), "--gil"]
    process = subprocess.Popen(
        rig.pin_command(rig.RIG_CORE, command), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        yield
        try:
            _, complaint = process.communicate(timeout=seconds + 30)
        except subprocess.TimeoutExpired:
            raise rig.RigError("py-spy did not end") from None
        if process.returncode != 0:
            raise rig.RigError(f"py-spy ended with {process.returncode}: {complaint.decode(errors='replace')[-500:]}")
    finally:
        rig.stop(process)
