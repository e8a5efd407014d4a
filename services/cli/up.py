"""`sluice up`: plans the processes of a topology, starts NATS and them, waits until all serve, supervises, stops."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import fcntl
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import grpc
import typer
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from services.cli import nats
from services.cli.rendering import open_console, print_table
from services.cli.state import READY_NAME, Ready, Secrets, default_state_dir, write_private
from services.cli.supervisor import Child, Spec, Supervisor
from services.metering.config import Config as MeteringConfig
from services.runtime.errors import Failure, Reason, invalid
from services.runtime.settings import SERVICES

HTTP_PORT: Final = 8080
GRPC_PORT: Final = 50051
_START_SECONDS: Final = 60.0
_LIMITS: Final = MeteringConfig()
_MALLOC: Final = (
    "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=4:glibc.malloc.trim_threshold=268435456:glibc.malloc.top_pad=16777216"
)
"""Messages live in the C heap: large pages, and not giving every freed page back at once, save some 5 % of the CPU of a request."""
_STOP_SECONDS: Final = 11.0
"""A service's own share of the 15 s in which `up` promises to be gone; NATS gets what is left."""
_NATS_STOP_SECONDS: Final = 3.0
_MAX_REPLICAS: Final = 16


def default_catalogue() -> Path:
    """The catalogue that ships with Sluice."""
    return Path(__file__).resolve().parents[2] / "deploy" / "catalogue.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `up` is asked for."""

    state_dir: Path
    config: Path | None = None
    mesh: bool = False
    port: int | None = None
    """Port of the HTTP edge; 0: a free one; None: the config file's `gateway.edge.port`, else 8080."""
    grpc_port: int | None = None
    """First of the gRPC ports, one per service in order of `SERVICES`; 0: free ones; None: 50051, with a free HTTP port free ones."""
    ready_file: Path | None = None
    """Written beside the one in the state directory."""
    replicas: Mapping[str, int] = field(default_factory=dict)
    catalogue: Path | None = None
    """Wins over the config file's; None: that one, else the shipped one."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What will run and where."""

    specs: tuple[Spec, ...]
    grpc: Mapping[str, str]
    """`host:port` by service and replica."""
    nats_url: str
    secrets: Secrets
    topology: str
    replicas: Mapping[str, int]


class _Ports:
    """Hands out ports: the wished ones, or free ones that nobody else of this plan got."""

    def __init__(self) -> None:
        self._taken: set[int] = set()

    def take(self, wished: int) -> int:
        if wished:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", wished))
                except OSError:
                    raise Failure(
                        Reason.DEPENDENCY_UNAVAILABLE,
                        f"port {wished} is taken; stop what listens there, or choose others with --port and --grpc-port (0: free ones)",
                        metadata={"dependency": f"port {wished}"},
                    ) from None
            self._taken.add(wished)
            return wished
        while True:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                found: int = probe.getsockname()[1]
            if found not in self._taken:
                self._taken.add(found)
                return found


def read_config(path: Path | None) -> dict[str, Any]:
    """The config file as it is; the processes themselves check it and report every problem."""
    if path is None:
        return {}
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise invalid("--config", f"{str(path)!r} does not exist") from None
    except yaml.YAMLError as error:
        raise invalid("--config", f"{str(path)!r} is not YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise invalid("--config", f"{str(path)!r} must be a mapping of sections")
    return content


def _given_port(given: Mapping[str, Any]) -> int:
    """The HTTP port that the config file names. Raises Failure (REQUEST_INVALID)."""
    gateway = given.get("gateway")
    edge = gateway.get("edge") if isinstance(gateway, Mapping) else None
    port = edge.get("port", HTTP_PORT) if isinstance(edge, Mapping) else HTTP_PORT
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
        raise invalid("gateway.edge.port", f"must be 0 to 65535, got {port!r}")
    return port


def _database_url(given: Mapping[str, Any]) -> str:
    metering = given.get("metering")
    found = metering.get("database_url") if isinstance(metering, Mapping) else None
    return str(os.environ.get("SLUICE_METERING__DATABASE_URL") or found or "")


def _given_state_dir(config: Path | None) -> Path | None:
    mesh = read_config(config).get("mesh")
    found = mesh.get("state_dir") if isinstance(mesh, Mapping) else None
    return Path(found).expanduser() if isinstance(found, str) and found else None


@contextlib.contextmanager
def locked(state: Path) -> Iterator[None]:
    """Keeps a state directory to this process. Raises Failure: it can't be used, or another `up` uses it."""
    try:
        state.mkdir(parents=True, exist_ok=True)
        lock = (state / "lock").open("a")
    except OSError as error:
        raise invalid("--state-dir", f"{str(state)!r} can't be used: {error.strerror}; name another directory") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            words = f"another `sluice up` is starting or stopping with {str(state)!r}; wait for it"
            with contextlib.suppress(Failure):
                running = Ready.read(state / READY_NAME)
                words = f"Sluice runs there already: pid {running.supervisor_pid}, {running.http}; stop it, or name another directory"
            raise invalid("--state-dir", words) from None
        yield


def replica_names(service: str, count: int) -> list[str]:
    """Names of the processes of a service: `gateway`, `gateway-2`, …"""
    return [service if index == 0 else f"{service}-{index + 1}" for index in range(count)]


def plan(options: Options) -> Plan:
    """Decides on processes, ports and configuration, and writes the configuration into the state directory."""
    for service, count in options.replicas.items():
        if service not in SERVICES:
            raise invalid("--replicas", f"{service!r} is no service; there are {', '.join(SERVICES)}")
        if not options.mesh:
            raise invalid("--replicas", "replicas need --mesh: the compact topology is one process")
        if not 1 <= count <= _MAX_REPLICAS:
            raise invalid("--replicas", f"{service}={count} must be between 1 and {_MAX_REPLICAS}")
    given = read_config(options.config)
    if options.replicas.get("metering", 1) > 1 and not _database_url(given):
        raise invalid(
            "--replicas", "metering on SQLite is exactly one process; more need PostgreSQL: set metering.database_url"
        )
    state = options.state_dir.resolve()
    state.mkdir(parents=True, exist_ok=True)
    secrets = Secrets.load_or_create(state)
    ports = _Ports()
    counts = {service: options.replicas.get(service, 1) for service in SERVICES}

    grpc_ports: dict[str, int] = {}
    wished = options.grpc_port
    if wished is None:
        wished = 0 if options.port == 0 else GRPC_PORT
    for service in SERVICES:
        for name in replica_names(service, counts[service]):
            grpc_ports[name] = ports.take(wished)
            wished += 1 if wished else 0
    http_ports: dict[str, int] = {}
    wished = options.port
    if wished is None:
        wished = _given_port(given)
    for name in replica_names("gateway", counts["gateway"]):
        http_ports[name] = ports.take(wished)
        wished += 1 if wished else 0

    given_mesh = given.get("mesh") or {}
    specs = []
    nats_url = given_mesh.get("nats_url") or os.environ.get("SLUICE_MESH__NATS_URL")
    if not nats_url:
        nats_port = ports.take(0)
        nats_url = f"nats://{secrets.service_token}@127.0.0.1:{nats_port}"
        specs.append(
            Spec(
                name="nats",
                command=nats.command(state / "nats", nats_port, secrets.service_token),
                environment={},
                log=state / "logs" / "nats.log",
                stop_seconds=_NATS_STOP_SECONDS,
                stop_order=2,
            )
        )

    common: dict[str, Any] = {
        "state_dir": str(state),
        "nats_url": nats_url,
        "service_token": given_mesh.get("service_token") or secrets.service_token,
        "admin_key_sha256": given_mesh.get("admin_key_sha256") or secrets.admin_key_sha256,
        "catalogue": str((options.catalogue or Path(given_mesh.get("catalogue") or default_catalogue())).resolve()),
    }
    run = state / "run"
    run.mkdir(exist_ok=True)

    def spec(name: str, module: str, overrides: Mapping[str, Any], http_port: int, order: int) -> Spec:
        sections = copy.deepcopy(given)
        sections["mesh"] = {**given_mesh, **common, "replica": name, **overrides}
        metering = sections.setdefault("metering", {}) or {}
        metering.setdefault("bootstrap_key", secrets.key)
        sections["metering"] = metering
        gateway = sections.setdefault("gateway", {}) or {}
        gateway["edge"] = {**(gateway.get("edge") or {}), "port": http_port}
        sections["gateway"] = gateway
        if not options.mesh:
            # One process shares its answers with nobody, and the NATS that would keep them ends with it. Whoever has more says so.
            caching = sections.setdefault("caching", {}) or {}
            caching["shared"] = {"enabled": False, **(caching.get("shared") or {})}
            sections["caching"] = caching
        config = run / f"{name}.yaml"
        write_private(config, yaml.safe_dump(sections, sort_keys=False))
        return Spec(
            name=name,
            command=(sys.executable, "-m", module, "--config", str(config)),
            environment={"PYTHONUNBUFFERED": "1", "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", _MALLOC)},
            log=state / "logs" / f"{name}.log",
            stop_seconds=_STOP_SECONDS,
            stop_order=order,
        )

    if options.mesh:
        peers = {
            service: [f"127.0.0.1:{grpc_ports[name]}" for name in replica_names(service, counts[service])]
            for service in SERVICES
        }
        for service in SERVICES:
            for name in replica_names(service, counts[service]):
                overrides: dict[str, Any] = {"peers": peers, "grpc_ports": {service: grpc_ports[name]}}
                if name != service:
                    # Spool and indexes belong to one process each.
                    overrides["state_dir"] = str(state / "replicas" / name)
                # Callers stop before those they call, so that nobody drains into a peer that is gone.
                order = 0 if service in ("gateway", "batching") else 1
                specs.append(spec(name, f"services.{service}", overrides, http_ports.get(name, 0), order))
    else:
        specs.append(spec("compact", "services.cli.compact", {"grpc_ports": dict(grpc_ports)}, http_ports["gateway"], 0))
    return Plan(
        specs=tuple(specs),
        grpc={name: f"127.0.0.1:{port}" for name, port in grpc_ports.items()},
        nats_url=nats_url,
        secrets=secrets,
        topology="mesh" if options.mesh else "compact",
        replicas=counts,
    )


class Running:
    """A topology under supervision."""

    def __init__(self, planned: Plan, options: Options, console: Console) -> None:
        self.plan = planned
        self._options = options
        self._console = console
        self._stop = asyncio.Event()
        self._changed = asyncio.Event()
        self._announced = False
        self.supervisor = Supervisor(list(planned.specs), self._on_change)

    def stop(self) -> None:
        """Asks for the end."""
        self._stop.set()

    async def stopped(self) -> None:
        """Returns when the end was asked for."""
        await self._stop.wait()

    def _on_change(self, child: Child) -> None:
        self._changed.set()
        if child.returncode is not None and child.pid is None and not self._stop.is_set():
            words = f"{child.spec.name} ended with {child.returncode}; it is started again. Its log: {child.spec.log}"
            self._console.print(words, style="yellow", markup=False)
        if self._announced:
            self.write_ready()

    def _reports(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for child in self.supervisor.children:
            for service, report in child.reports.items():
                name = child.spec.name if self.plan.topology == "mesh" else service
                found[name] = {**report, "pid": child.pid or report.get("pid", 0)}
        return found

    def ready(self) -> Ready:
        """Where everything listens at the moment."""
        reports = self._reports()
        pids = {name: int(report["pid"]) for name, report in reports.items()}
        for child in self.supervisor.children:
            if child.spec.name == "nats" and child.pid is not None:
                pids["nats"] = child.pid
        return Ready(
            http=str(reports.get("gateway", {}).get("http", "")),
            grpc=dict(self.plan.grpc),
            metrics={name: str(report["metrics"]) for name, report in reports.items() if report.get("metrics")},
            pids=pids,
            key=self.plan.secrets.key,
            admin_key=self.plan.secrets.admin_key,
            nats=self.plan.nats_url,
            topology=self.plan.topology,
            supervisor_pid=os.getpid(),
            replicas=dict(self.plan.replicas),
        )

    def urls(self) -> list[str]:
        """URLs of the HTTP edges, one per gateway; what stands before several is the deployment's."""
        return [str(report["http"]) for _, report in sorted(self._reports().items()) if report.get("http")]

    def ready_paths(self) -> list[Path]:
        """The ready files: in the state directory, and where the caller wants another."""
        paths = [self._options.state_dir / READY_NAME]
        if self._options.ready_file is not None and self._options.ready_file.resolve() != paths[0].resolve():
            paths.append(self._options.ready_file)
        return paths

    def write_ready(self) -> None:
        """Writes the ready files anew."""
        ready = self.ready()
        for path in self.ready_paths():
            ready.write(path)

    async def wait_until_serving(self) -> None:
        """Returns when every service says SERVING. Raises Failure when one can't start, with the end of its log."""
        names = list(self.plan.grpc)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task("starting", total=len(names))
            waiting = set(names)

            async def one(name: str) -> None:
                await _serving(self.plan.grpc[name])
                waiting.discard(name)
                progress.update(task, advance=1, description=f"waiting for {', '.join(sorted(waiting)) or 'nothing'}")

            progress.update(task, description=f"waiting for {', '.join(sorted(waiting))}")
            try:
                async with asyncio.timeout(_START_SECONDS):
                    await self._first_of(asyncio.gather(*(one(name) for name in names)), self._watch_for_failure())
            except TimeoutError:
                said = "\n".join(_tail(child) for child in self.supervisor.children if child.spec.name in {*waiting, "compact"})
                raise Failure(
                    Reason.DEPENDENCY_UNAVAILABLE,
                    f"{', '.join(sorted(waiting))} did not serve within {_START_SECONDS:g} s.\n{said}",
                    metadata={"dependency": ",".join(sorted(waiting))},
                ) from None
        ends = asyncio.get_running_loop().time() + 5.0
        while len(self._reports()) < len(names) and asyncio.get_running_loop().time() < ends:
            await asyncio.sleep(0.02)
        self._announced = True
        self.write_ready()

    @staticmethod
    async def _first_of(wanted: asyncio.Future[Any], unwanted: Coroutine[Any, Any, None]) -> None:
        """Returns when `wanted` is done; raises what either raises first."""
        other = asyncio.ensure_future(unwanted)
        try:
            done, _ = await asyncio.wait({wanted, other}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            wanted.cancel()
            other.cancel()
            await asyncio.gather(wanted, other, return_exceptions=True)

    async def _watch_for_failure(self) -> None:
        """Raises when a child ended twice while starting, or said that its configuration is wrong: starting again won't help."""
        while True:
            self._changed.clear()
            for child in self.supervisor.children:
                ended = child.returncode is not None and child.pid is None
                if ended and (child.returncode == 2 or child.start_count >= 3):
                    raise Failure(
                        Reason.DEPENDENCY_UNAVAILABLE,
                        f"{child.spec.name} can't start (exit code {child.returncode}):\n{_tail(child)}",
                        metadata={"dependency": child.spec.name},
                    )
            await self._changed.wait()


def _tail(child: Child, limit: int = 4000) -> str:
    """What the child wrote since `up` was started."""
    try:
        text = child.spec.log.read_bytes()[child.log_start :].decode(errors="replace")
    except FileNotFoundError:
        return ""
    return f"--- end of {child.spec.log}\n{text[-limit:]}"


async def _serving(address: str) -> None:
    """Returns when the server at `address` says SERVING for itself as a whole."""
    while True:
        try:
            async with grpc.aio.insecure_channel(address) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                response = await stub.Check(health_pb2.HealthCheckRequest(), timeout=2.0)
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    return
        except grpc.aio.AioRpcError:
            pass
        await asyncio.sleep(0.05)


async def _run(options: Options, console: Console, body: Callable[[Running], Awaitable[None]]) -> None:
    running = Running(plan(options), options, console)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, running.stop)
    for path in running.ready_paths():
        path.unlink(missing_ok=True)
    supervision = asyncio.create_task(running.supervisor.run(), name="supervision")
    stopping = asyncio.create_task(running.stopped(), name="stop")
    work = asyncio.create_task(_ready_then(running, body), name="work")
    try:
        await asyncio.wait({supervision, stopping, work}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
    finally:
        running.stop()
        work.cancel()
        stopping.cancel()
        await asyncio.shield(running.supervisor.stop())
        for path in running.ready_paths():
            path.unlink(missing_ok=True)
        await asyncio.gather(work, stopping, supervision, return_exceptions=True)


async def _ready_then(running: Running, body: Callable[[Running], Awaitable[None]]) -> None:
    await running.wait_until_serving()
    await body(running)


def run(options: Options, body: Callable[[Running], Awaitable[None]], console: Console | None = None) -> None:
    """Starts the topology, runs `body` when all serve, and stops it when `body` returns, raises, or at SIGTERM or SIGINT."""
    # What is written here, logs too, is nobody else's to read.
    os.umask(0o077)
    with locked(options.state_dir.resolve()):
        asyncio.run(_run(options, console or Console(stderr=True), body))


def parse_replicas(values: list[str]) -> dict[str, int]:
    """`gateway=3` → {"gateway": 3}. Raises Failure (REQUEST_INVALID)."""
    parsed = {}
    for value in values:
        name, _, count = value.partition("=")
        if not count.isdigit():
            raise invalid("--replicas", f"{value!r} must look like gateway=3")
        parsed[name] = int(count)
    return parsed


def command(
    mesh: Annotated[
        bool, typer.Option("--mesh", help="One process per service, gRPC between them. Default: all in one.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML file; deploy/sluice.example.yaml has every setting.")
    ] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option("--state-dir", help="Ledger, spool, keys, logs. Default: $SLUICE_STATE_DIR, else ~/.local/state/sluice."),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            "--port", help="HTTP port; 0: a free one. Default: gateway.edge.port of the config, else 8080.", min=0, max=65535
        ),
    ] = None,
    grpc_port: Annotated[
        int | None,
        typer.Option(
            "--grpc-port", help="First gRPC port, one per service follows; 0: free ones. Default: 50051, with --port 0: 0."
        ),
    ] = None,
    ready_file: Annotated[Path | None, typer.Option("--ready-file", help="Written as JSON when everything serves.")] = None,
    replicas: Annotated[
        list[str] | None, typer.Option("--replicas", help="Say gateway=3; repeat for more. Needs --mesh.")
    ] = None,
) -> None:
    """Starts Sluice and its NATS, prints addresses and a working key, supervises until SIGTERM or Ctrl-C."""
    options = Options(
        state_dir=state_dir or _given_state_dir(config) or default_state_dir(),
        config=config,
        mesh=mesh,
        port=port,
        grpc_port=grpc_port,
        ready_file=ready_file,
        replicas=parse_replicas(replicas or []),
    )
    console = open_console()

    async def announce(running: Running) -> None:
        ready = running.ready()
        rows = [("HTTP (OpenAI, Anthropic)", f"{url}/v1", "") for url in running.urls()]
        for name, address in ready.grpc.items():
            rows.append((name, address, ready.metrics.get(name, "")))
        print_table(console, ("service", "address", "metrics"), rows, title=f"Sluice is up, {ready.topology}")
        console.print(f"key        {ready.key}", markup=False, highlight=False, soft_wrap=True)
        limits = f"{_LIMITS.requests_per_minute} requests a minute and {_LIMITS.concurrency} at once"
        console.print(
            f"           limited as metering.bootstrap_* of the config says, {limits} by default",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        console.print(f"admin key  {ready.admin_key}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"state      {options.state_dir}", markup=False, highlight=False, soft_wrap=True)
        console.print("Ctrl-C stops.")
        await running.stopped()

    with contextlib.suppress(asyncio.CancelledError):
        run(options, announce, console)
