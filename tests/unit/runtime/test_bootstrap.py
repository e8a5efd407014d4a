"""Whole processes: start, readiness, signals, exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.runtime.bootstrap import Unit, run_services
from services.runtime.errors import Failure, Reason
from services.runtime.link import LinkChannel
from services.runtime.process import Process, Service
from services.runtime.settings import MeshSettings
from sluice.tokenization.v1.tokenization_service_pb2 import CalibrateRequest, CountTextsRequest, FitRequest
from sluice.tokenization.v1.tokenization_service_pb2_grpc import TokenizationServiceStub
from tests.unit.runtime.fakes import IDENTITY, SERVICE_TOKEN, Lines, Script, bindings, eventually
from tests.unit.runtime.scripted import Config, open_service
from tests.unit.runtime.test_link import free_port

ROOT = Path(__file__).parents[3]
SERVING = health_pb2.HealthCheckResponse.SERVING


@dataclass
class Child:
    process: asyncio.subprocess.Process
    report: dict[str, Any]

    async def end(self) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        output, errors = await asyncio.wait_for(self.process.communicate(), 20)
        assert self.process.returncode is not None
        return self.process.returncode, output.decode(), errors.decode()


async def start(tmp_path: Path, environ: Mapping[str, str], *, wait: bool = True) -> Child:
    report = tmp_path / "report.json"
    report.unlink(missing_ok=True)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.unit.runtime.scripted", "--report-file", str(report)),
        cwd=ROOT,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}",
            "SLUICE_MESH__SERVICE_TOKEN": SERVICE_TOKEN,
            "SLUICE_MESH__PING_INTERVAL": "0.1",
            **environ,
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    child = Child(process, {})
    if wait:
        await eventually(lambda: report.exists() and report.read_text().endswith("\n"), 20)
        child.report = json.loads(report.read_text())
    return child


@contextlib.asynccontextmanager
async def started(tmp_path: Path, **environ: str) -> AsyncIterator[Child]:
    child = await start(tmp_path, environ)
    try:
        yield child
    finally:
        if child.process.returncode is None:
            child.process.kill()
            await child.process.communicate()


async def health(address: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service="tokenization"), timeout=2, wait_for_ready=True)
        status: int = answer.status
        return status


async def reaches(address: str, status: int) -> None:
    async with asyncio.timeout(10):
        while await health(address) != status:
            await asyncio.sleep(0.02)


async def test_every_configuration_problem_is_printed_and_the_exit_code_is_2(tmp_path: Path) -> None:
    file = tmp_path / "sluice.yaml"
    file.write_text("mesh: {log_level: loud, pear: 1}\ntokenization: {gat: x}\nroutin: {}\n")
    child = await start(tmp_path, {"SLUICE_CONFIG": str(file), "SLUICE_TOKENIZATION__OPEN_FAILS": "maybe"}, wait=False)
    code, output, errors = await child.end()
    assert code == 2
    assert output == ""
    assert "5 problems in the configuration" in errors
    for expected in ("mesh.log_level", "mesh.pear", "tokenization.gat", "routin:", "tokenization.open_fails"):
        assert expected in errors
    assert "Traceback" not in errors


async def test_a_problem_in_a_file_that_the_configuration_names_is_one_of_the_configuration(tmp_path: Path) -> None:
    child = await start(tmp_path, {"SLUICE_TOKENIZATION__CATALOGUE_FAILS": "true"}, wait=False)
    code, _, errors = await child.end()
    assert code == 2
    assert errors.splitlines() == ["1 problem in the configuration:", "  catalogue.yaml: models is missing"]


async def test_the_report_names_the_addresses(tmp_path: Path) -> None:
    async with started(tmp_path) as child:
        report = child.report
        assert report["service"] == "tokenization"
        assert report["pid"] == child.process.pid
        assert report["http"] == "http://127.0.0.1:1"
        assert report["metrics"].startswith("http://127.0.0.1:")
        await reaches(report["grpc"], SERVING)


async def test_health_follows_the_pings(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    async with started(tmp_path, SLUICE_TOKENIZATION__GATE=str(gate)) as child:
        address = child.report["grpc"]
        assert await health(address) != SERVING
        gate.touch()
        await reaches(address, SERVING)
        gate.unlink()
        await reaches(address, health_pb2.HealthCheckResponse.NOT_SERVING)
        gate.touch()
        await reaches(address, SERVING)


async def test_sigterm_drains_in_order_and_no_call_is_lost(tmp_path: Path) -> None:
    async with started(tmp_path, SLUICE_MESH__DRAIN_NOTICE="0.3", SLUICE_MESH__LOG_FORMAT="json") as child:
        address = child.report["grpc"]
        await reaches(address, SERVING)
        async with LinkChannel("tokenization", (address,), identity=IDENTITY, log=Lines()) as channel:
            tokens: Any = TokenizationServiceStub(channel)  # type: ignore[call-overload]
            open_call = asyncio.create_task(tokens.CountTexts(CountTextsRequest(model="sleep0.8"), timeout=10))
            await asyncio.sleep(0.1)
            child.process.send_signal(signal.SIGTERM)
            await reaches(address, health_pb2.HealthCheckResponse.NOT_SERVING)
            await eventually(lambda: channel.ready_endpoints == ())
            with pytest.raises(Failure) as raised:
                await tokens.Fit(FitRequest(), timeout=5)
            assert raised.value.reason is Reason.DEPENDENCY_UNAVAILABLE
            await open_call
            code, output, errors = await child.end()
        assert code == 0
        assert output.split("\n")[:4] == ["opened", "drained", "worker ended", "closed"]
        events = [json.loads(line)["event"] for line in errors.splitlines()]
        assert events == ["listening", "serving", "draining", "stopped"]


async def test_a_killed_process_is_noticed_and_its_successor_found(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    port = str(free_port())
    async with LinkChannel("tokenization", (f"127.0.0.1:{port}",), identity=IDENTITY, log=Lines()) as channel:
        tokens: Any = TokenizationServiceStub(channel)  # type: ignore[call-overload]
        async with started(tmp_path, SLUICE_MESH__GRPC_PORTS__TOKENIZATION=port) as child:
            await reaches(child.report["grpc"], SERVING)
            await eventually(lambda: channel.ready_endpoints)
            call = asyncio.create_task(tokens.Calibrate(CalibrateRequest(), timeout=30))
            await asyncio.sleep(0.2)
            child.process.kill()
            killed = loop.time()
            with pytest.raises(Failure) as raised:
                await call
            assert raised.value.reason is Reason.DEPENDENCY_UNAVAILABLE
            assert loop.time() - killed < 1
        async with started(tmp_path, SLUICE_MESH__GRPC_PORTS__TOKENIZATION=port) as child:
            await reaches(child.report["grpc"], SERVING)
            serving = loop.time()
            await eventually(lambda: channel.ready_endpoints)
            assert loop.time() - serving < 2
            await tokens.Fit(FitRequest(), timeout=5)


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        ("SLUICE_TOKENIZATION__WORKER_FAILS", "the worker broke"),
        ("SLUICE_TOKENIZATION__OPEN_FAILS", "the ledger can't be opened"),
    ],
)
async def test_what_breaks_is_logged_and_the_exit_code_is_1(tmp_path: Path, variable: str, expected: str) -> None:
    child = await start(tmp_path, {variable: "true"}, wait=False)
    code, _, errors = await child.end()
    assert code == 1
    assert expected in errors


async def test_several_services_share_a_process(tmp_path: Path) -> None:
    stop = asyncio.Event()
    reports: list[Any] = []
    settings = MeshSettings(service_token=SERVICE_TOKEN, drain_notice=0.0, ping_interval=0.1, state_dir=tmp_path)
    units = [Unit("tokenization", Config, open_service)]
    task = asyncio.create_task(
        run_services(units, settings, {"tokenization": Config()}, name="compact", log=Lines(), stop=stop, report=reports.append)
    )
    await eventually(lambda: reports)
    await reaches(reports[0]["grpc"], SERVING)
    stop.set()
    await asyncio.wait_for(task, 10)


async def test_a_worker_that_swallows_a_cancellation_does_not_keep_the_process(tmp_path: Path) -> None:
    working, swallowed = asyncio.Event(), asyncio.Event()

    async def stubborn() -> None:
        working.set()
        # As `asyncio.wait_for` does before Python 3.12 when its answer comes together with the cancellation.
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        swallowed.set()
        await asyncio.Event().wait()

    @contextlib.asynccontextmanager
    async def open_stubborn(config: Config, process: Process) -> AsyncIterator[Service]:
        yield Service("tokenization", bindings(Script()), pings={}, workers=(stubborn,))

    stop = asyncio.Event()
    settings = MeshSettings(service_token=SERVICE_TOKEN, drain_notice=0.0, state_dir=tmp_path)
    units = [Unit("tokenization", Config, open_stubborn)]
    task = asyncio.create_task(
        run_services(units, settings, {"tokenization": Config()}, name="compact", log=Lines(), stop=stop)
    )
    await working.wait()
    stop.set()
    async with asyncio.timeout(20):
        await task
    assert swallowed.is_set()
