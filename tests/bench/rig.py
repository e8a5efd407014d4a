"""The load rig: C upstream and C generator of `../shared/bench`, processes pinned, CPU read from /proc.

What is measured: CPU time of every process of the product (children included, NATS too) between two readings, over the number
of good answers in the same window. The generator and the upstream run on another core and don't count. A round counts only
when the product's core was busy and the generator's was not, else the figure says more about the rig than about the product.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
SOURCES: Final = ROOT.parent / "shared" / "bench"
BUILD: Final = ROOT / ".cache" / "bench"
PRODUCT_CORE: Final = 0
RIG_CORE: Final = 1
_TICKS: Final = os.sysconf("SC_CLK_TCK")


class RigError(Exception):
    """The rig can't measure here; the text says why."""


def build() -> None:
    """Compiles the C programs when they are missing or older than their sources."""
    programs = ("mock", "load", "spin")
    if not SOURCES.is_dir():
        raise RigError(f"the rig's sources are expected in {SOURCES}")
    newest = max(path.stat().st_mtime for path in (SOURCES / "src").iterdir())
    if all((BUILD / name).exists() and (BUILD / name).stat().st_mtime > newest for name in programs):
        return
    if shutil.which("gcc") is None:
        raise RigError("gcc is needed to build the load rig: apt-get install gcc")
    subprocess.run(["sh", str(SOURCES / "build.sh"), str(BUILD)], check=True)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def pin_command(core: int, command: Sequence[str]) -> list[str]:
    """`command`, to be run on one core, where there are two."""
    return ["taskset", "-c", str(core), *command] if (os.cpu_count() or 1) > 1 else list(command)


def _stat(pid: int) -> tuple[int, float] | None:
    """Parent and CPU seconds of a process; None when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(") ")[2].split()
    return int(fields[1]), (int(fields[11]) + int(fields[12])) / _TICKS


def tree(root: int) -> dict[int, float]:
    """CPU seconds by process of a whole process tree."""
    parents: dict[int, int] = {}
    cpu: dict[int, float] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (found := _stat(int(entry))) is not None:
            parents[int(entry)], cpu[int(entry)] = found
    members = {root}
    grown = True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in members and pid not in members}
        members |= more
        grown = bool(more)
    return {pid: cpu[pid] for pid in members if pid in cpu}


def precise_cpu(root: int) -> float:
    """CPU seconds of a process tree, from the scheduler's nanosecond counters where the kernel has them."""
    total = 0.0
    for pid, seconds in tree(root).items():
        try:
            tasks = list(Path(f"/proc/{pid}/task").iterdir())
            nanoseconds = sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)
        except (FileNotFoundError, ProcessLookupError, IndexError):
            nanoseconds = 0
        # Threads that ended are missing in schedstat; the tick counter has them. The larger is the nearer.
        total += max(seconds, nanoseconds / 1e9)
    return total


@dataclass(frozen=True, slots=True)
class Upstream:
    """A running C upstream."""

    port: int
    pid: int


@contextlib.contextmanager
def upstream() -> Iterator[Upstream]:
    """The C upstream on a free port."""
    port = free_port()
    process = subprocess.Popen(pin_command(RIG_CORE, [str(BUILD / "mock"), str(port)]))
    try:
        wait_for_port(port, 5.0)
        yield Upstream(port, process.pid)
    finally:
        stop(process)


def wait_for_port(port: int, seconds: float) -> None:
    """Returns when something listens on `port`. Raises RigError when nothing does in time."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        with socket.socket() as probe:
            probe.settimeout(0.5)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise RigError(f"nothing listens on port {port} after {seconds:g} s")


def stop(process: subprocess.Popen[Any], seconds: float = 15.0) -> None:
    """Ends a process that we started."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def served(port: int) -> int:
    """Requests that the upstream has answered."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/__stats", timeout=5) as response:
        count: int = json.load(response)["served"]
        return count


@contextlib.contextmanager
def awake() -> Iterator[None]:
    """Keeps both cores from halting, at idle priority: the time that a virtual core takes to wake is not the product's."""
    spinners = [subprocess.Popen(pin_command(core, [str(BUILD / "spin")])) for core in (PRODUCT_CORE, RIG_CORE)]
    try:
        yield
    finally:
        for spinner in spinners:
            stop(spinner)


@dataclass(frozen=True, slots=True)
class Load:
    """One run of the generator."""

    body: str
    connections: int = 32
    warm_seconds: float = 1.0
    seconds: float = 4.0
    stream: bool = False
    fixed: bool = False
    expect: str | None = None
    headers: Mapping[str, str] | None = None
    path: str = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Reading:
    """What one run showed."""

    ok: int
    errors: int
    requests_per_second: float
    cpu_ms: float
    """CPU milliseconds of the product's process tree per good answer."""
    cpu_us_per_frame: float
    """CPU microseconds per streamed frame; 0 when nothing was streamed."""
    p50_us: float
    p99_us: float
    product_busy: float
    """Share of the product's core that the product used."""
    rig_busy: float
    """Share of the rig's core that generator and upstream used."""
    error: str


def run(port: int, load: Load, product_pid: int, upstream_pid: int | None = None) -> Reading:
    """Loads `port` and reads the CPU of `product_pid`'s tree over the generator's measured window."""
    body = BUILD / f"body-{os.getpid()}.json"
    body.write_text(load.body)
    command = [str(BUILD / "load"), "-p", str(port), "-u", load.path, "-c", str(load.connections)]
    command += ["-w", str(load.warm_seconds), "-d", str(load.seconds), "-b", str(body)]
    for name, value in (load.headers or {}).items():
        command += ["-H", f"{name}: {value}"]
    command += ["-s"] * load.stream + ["-f"] * load.fixed
    if load.expect is not None:
        command += ["-x", load.expect]
    process = subprocess.Popen(pin_command(RIG_CORE, command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        time.sleep(load.warm_seconds)
        began = time.monotonic()
        cpu = precise_cpu(product_pid)
        rig = precise_cpu(process.pid) + (precise_cpu(upstream_pid) if upstream_pid else 0.0)
        time.sleep(max(0.1, load.seconds - 0.15))
        cpu = precise_cpu(product_pid) - cpu
        rig = precise_cpu(process.pid) + (precise_cpu(upstream_pid) if upstream_pid else 0.0) - rig
        elapsed = time.monotonic() - began
        output, complaint = process.communicate(timeout=load.seconds + 60)
    finally:
        stop(process)
        body.unlink(missing_ok=True)
    if process.returncode != 0:
        raise RigError(f"the load generator ended with {process.returncode}: {complaint.strip()}")
    raw = json.loads(output.replace("\n", " "), strict=False)
    ok = int(raw["ok"])
    rate = float(raw["rps"])
    good = rate * elapsed
    frames = float(raw["frames_per_ok"])
    return Reading(
        ok=ok,
        errors=int(raw["bad_status"]) + int(raw["bad_body"]) + int(raw["io_err"]),
        requests_per_second=rate,
        cpu_ms=cpu / good * 1e3 if good else float("inf"),
        cpu_us_per_frame=cpu / (good * frames) * 1e6 if good and load.stream and frames else 0.0,
        p50_us=float(raw["p50_us"]),
        p99_us=float(raw["p99_us"]),
        product_busy=cpu / elapsed,
        rig_busy=rig / elapsed,
        error=str(raw["err"]),
    )
