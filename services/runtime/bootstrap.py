"""Starts, runs and stops a process: `main` for one service, `run_services` for several in one process.

Start: configuration, services in the given order, servers (NOT_SERVING), addresses reported, pings until they pass, SERVING.
Stop, at SIGTERM or SIGINT: NOT_SERVING, a pause in which clients turn away, each service's own drain in the opposite order, the
transports, workers, the services' resources, NATS.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import uvloop

from services.runtime.admission import Admission
from services.runtime.authentication import Authenticator
from services.runtime.config import ConfigError, load
from services.runtime.dispatch import build_table
from services.runtime.errors import Failure
from services.runtime.exposition import open_metrics
from services.runtime.grpcserver import GrpcServer
from services.runtime.interceptors import border_chain
from services.runtime.logs import LibraryLog, Redactor, open_log
from services.runtime.process import Process, Service
from services.runtime.settings import SERVICES, MeshSettings

OpenService = Callable[[Any, Process], AbstractAsyncContextManager[Service]]
Report = Callable[[Mapping[str, Any]], None]

OTHER_SECTIONS: Final = (*SERVICES, "mesh", "cli")
"""Sections that a file may have for other processes."""

_GC_ALLOCATIONS: Final = 50_000
_FIRST_PING_SECONDS: Final = 0.1
_LAG_SECONDS: Final = 0.5
_CANCEL_SECONDS: Final = 0.2


@dataclass(frozen=True, slots=True)
class Unit:
    """A service that can be opened: its name, the class of its configuration and what opens it."""

    name: str
    config: type[Any]
    open: OpenService


def main(name: str, config: type[Any], open_service: OpenService) -> NoReturn:
    """Runs one service as this process: `python -m services.<name> [--config FILE]`. Exit 2: the configuration is wrong."""
    _main(f"python -m services.{name}", name, [Unit(name, config, open_service)])


def main_compact(units: Sequence[Unit]) -> NoReturn:
    """Runs all of `units` in this process, like `main`. Its name, for ports and logs, is `compact`."""
    _main("compact", "compact", units)


def _main(program: str, name: str, units: Sequence[Unit]) -> NoReturn:
    parser = argparse.ArgumentParser(
        prog=program,
        description=f"Sluice: {', '.join(unit.name for unit in units)}. "
        "Settings come from the file and from variables SLUICE_<SECTION>__<FIELD>, which win.",
    )
    parser.add_argument("--config", type=Path, default=None, help="sluice.yaml; default: the variable SLUICE_CONFIG, else none")
    parser.add_argument("--report-file", type=Path, default=None, help="where to write the addresses, one JSON line a service")
    arguments = parser.parse_args()
    file = arguments.config
    if file is None and os.environ.get("SLUICE_CONFIG"):
        file = Path(os.environ["SLUICE_CONFIG"])
    sys.exit(run(units, name=name, file=file, report_file=arguments.report_file))


def run(units: Sequence[Unit], *, name: str, file: Path | None, report_file: Path | None = None) -> int:
    """Loads the configuration of `units`, runs them until a signal; returns the exit code: 0, 1 (failed), 2 (configuration)."""
    try:
        configs = load(
            {"mesh": MeshSettings, **{unit.name: unit.config for unit in units}},
            file,
            os.environ,
            others=OTHER_SECTIONS,
        )
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    settings: MeshSettings = configs.pop("mesh")
    # Ledger, spool and logs are nobody else's to read.
    os.umask(0o077)
    # Messages and frames of a request make no cycles; the default would look for some after every few requests.
    gc.set_threshold(_GC_ALLOCATIONS, 20, 50)
    return uvloop.run(_run(units, settings, configs, name=name, report_file=report_file))


async def _run(
    units: Sequence[Unit],
    settings: MeshSettings,
    configs: Mapping[str, Any],
    *,
    name: str,
    report_file: Path | None,
) -> int:
    redact = Redactor((settings.service_token,))
    log = open_log(settings.log_level, settings.log_format, redact, process=name)
    library = LibraryLog(log)
    logging.getLogger().addHandler(library)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        with contextlib.ExitStack() as reports:
            report = _reporter(settings, report_file, reports)
            await run_services(units, settings, configs, name=name, log=log, redact=redact, stop=stop, report=report)
    # A file that the configuration names, say the catalogue, can be wrong, too.
    except ConfigError as error:
        print(redact(str(error)), file=sys.stderr)
        return 2
    # The process' own boundary: what went wrong is logged once, and the supervisor decides.
    except Exception as error:  # noqa: BLE001
        _log_end(log, error)
        return 1
    finally:
        logging.getLogger().removeHandler(library)
    return 0


def _log_end(log: Any, error: Exception) -> None:
    if isinstance(error, ExceptionGroup):
        for inner in error.exceptions:
            _log_end(log, inner)
    elif isinstance(error, Failure):
        log.error("stopped", reason=error.reason.value, message=error.message)
    elif isinstance(error, OSError):
        log.error("stopped", message=str(error))
    else:
        log.error("stopped by an unexpected error", exc_info=error)


def _reporter(settings: MeshSettings, report_file: Path | None, stack: contextlib.ExitStack) -> Report:
    outputs = []
    descriptor = os.environ.get("SLUICE_REPORT_FD", "")
    if descriptor.isdigit():
        outputs.append(stack.enter_context(os.fdopen(int(descriptor), "w", encoding="utf-8")))
    path = report_file or settings.report_file
    if path is not None:
        outputs.append(stack.enter_context(path.open("w", encoding="utf-8")))

    def report(values: Mapping[str, Any]) -> None:
        line = json.dumps(values) + "\n"
        for output in outputs:
            # A supervisor that is gone doesn't end us.
            with contextlib.suppress(OSError):
                output.write(line)
                output.flush()

    return report


async def run_services(
    units: Sequence[Unit],
    settings: MeshSettings,
    configs: Mapping[str, Any],
    *,
    name: str,
    log: Any,
    stop: asyncio.Event,
    report: Report = lambda values: None,
    redact: Redactor | None = None,
) -> None:
    """Runs `units` in this process until `stop` is set, then drains.

    Give units in the order of `settings.SERVICES`: each after those it calls. `configs` has one Config per unit's name.
    `report` gets one mapping per service when its addresses are known: service, grpc, metrics, pid and the service's own
    (`http`). Raises what opening a service raises, and an ExceptionGroup when a worker fails.
    """
    async with contextlib.AsyncExitStack() as stack:
        process = await stack.enter_async_context(
            Process(name, settings, log=log, redact=redact, hosts=[unit.name for unit in units])
        )
        services: list[Service] = []
        for unit in units:
            service = await stack.enter_async_context(unit.open(configs[unit.name], process))
            # At once, so that the next one may call it while it opens.
            process.serve(service.name, service.bindings)
            services.append(service)
        servers = await _start_servers(process, services, stack)
        port = settings.metrics_ports.get(name, 0)
        metrics = await stack.enter_async_context(open_metrics(process.metrics, settings.listen_host, port))
        for service, (_, address) in zip(services, servers, strict=True):
            report(
                {
                    "service": service.name,
                    "grpc": address,
                    "metrics": metrics,
                    "pid": os.getpid(),
                    **service.addresses,
                }
            )
            log.info("listening", service=service.name, grpc=address, metrics=metrics, **service.addresses)
        # What lives from here to the end needn't be looked through at every collection.
        gc.collect()
        gc.freeze()
        async with asyncio.TaskGroup() as group:
            background = [
                group.create_task(worker(), name=f"{service.name} worker {index}")
                for service in services
                for index, worker in enumerate(service.workers)
            ]
            watches = [
                group.create_task(_watch(service, server, process), name=f"{service.name} readiness")
                for service, (server, _) in zip(services, servers, strict=True)
            ]
            watches.append(group.create_task(_measure_lag(process), name="loop lag"))
            await stop.wait()
            for task in watches:
                task.cancel()
            await _drain(services, [server for server, _ in servers], settings, log)
            await _end(background)
    log.info("stopped")


async def _start_servers(
    process: Process, services: Sequence[Service], stack: contextlib.AsyncExitStack
) -> list[tuple[GrpcServer, str]]:
    settings = process.settings
    authenticator = Authenticator(settings.service_token, settings.admin_key_sha256)
    admission = Admission(settings.max_concurrent_calls)
    process.metrics.gauge("open_calls", "Calls being served over sockets.").set_function(lambda: admission.open_count)
    servers = []
    for service in services:
        chain = border_chain(
            log=process.log,
            registry=process.metrics,
            authenticator=authenticator,
            slow_seconds=settings.slow_call,
            trace=process.telemetry.stage(),
        )
        table = build_table(service.bindings, chain)
        names = (service.name, *sorted({method.service for method in table.values()}))
        server = GrpcServer(
            settings,
            table,
            names,
            authenticator=authenticator,
            admission=admission,
            replica_id=process.replica_id,
            barrier=process.barrier,
            log=process.log,
        )
        address = await server.start(settings.grpc_ports.get(service.name, 0))
        # For the way out after an error; after a drain there is nothing left to stop.
        stack.push_async_callback(server.stop, 0.0)
        servers.append((server, address))
    return servers


async def _watch(service: Service, server: GrpcServer, process: Process) -> None:
    """Keeps the health of a service equal to its pings."""
    settings = process.settings
    gauge = process.metrics.gauge("serving", "1 while the service is SERVING.", ("service",)).labels(service.name)
    serving = False
    first = True
    last: dict[str, str] = {}
    while True:
        problems = await _ping(service, settings.ping_timeout)
        if problems != last:
            last = problems
            if problems:
                process.log.warning("not ready", service=service.name, **problems)
        if serving == bool(problems):
            serving = not problems
            first = first and not serving
            await server.set_serving(serving)
            gauge.set(float(serving))
            process.log.info("serving" if serving else "not serving", service=service.name)
        await asyncio.sleep(_FIRST_PING_SECONDS if first else settings.ping_interval)


async def _ping(service: Service, timeout: float) -> dict[str, str]:
    """What the pings that didn't pass say."""

    async def one(ping: Callable[[], Any]) -> str | None:
        try:
            async with asyncio.timeout(timeout):
                await ping()
        except Failure as failure:
            return failure.message
        except TimeoutError:
            return f"no answer within {timeout:g} s"
        # Whatever a dependency raises, it isn't ready; the check itself must go on.
        except Exception as error:  # noqa: BLE001
            return f"{type(error).__name__}: {error}"[:200]
        return None

    answers = await asyncio.gather(*(one(ping) for ping in service.pings.values()))
    return {name: answer for name, answer in zip(service.pings, answers, strict=True) if answer is not None}


async def _drain(services: Sequence[Service], servers: Sequence[GrpcServer], settings: MeshSettings, log: Any) -> None:
    loop = asyncio.get_running_loop()
    log.info("draining")
    for server in servers:
        await server.announce_stop()
    await asyncio.sleep(settings.drain_notice)
    end = loop.time() + settings.drain_grace + settings.drain_flush
    for service in reversed(services):
        if service.drain is None:
            continue
        try:
            async with asyncio.timeout_at(max(end, loop.time() + 0.5)):
                await service.drain()
        # One service that can't drain must not keep the others from it.
        except Exception as error:
            log.error("drain failed", service=service.name, exc_info=error)
    grace = max(0.5, min(settings.drain_grace, end - loop.time()))
    await asyncio.gather(*(server.stop(grace) for server in servers))


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancels until all have ended: before Python 3.12 `asyncio.wait_for`, which nats-py waits with, may swallow a cancellation."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_CANCEL_SECONDS)


async def _measure_lag(process: Process) -> None:
    """Shows how late the event loop is: more than some milliseconds means that something blocks it."""
    lag = process.metrics.histogram("loop_lag_seconds", "How late a timer of the event loop fired.")
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _LAG_SECONDS
        await asyncio.sleep(_LAG_SECONDS)
        lag.observe(max(0.0, loop.time() - due))
