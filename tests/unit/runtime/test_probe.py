from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from services.runtime.probe import ask
from tests.unit.runtime.test_link import free_port


@pytest.fixture
def server() -> Iterator[str]:
    """A server that serves as a whole and `routing`, and whose `caching` isn't ready."""
    answer = health_pb2.HealthCheckResponse
    servicer = health.HealthServicer()
    for name, status in {"": answer.SERVING, "routing": answer.SERVING, "caching": answer.NOT_SERVING}.items():
        servicer.set(name, status)
    server = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_says_the_health_of_the_server_and_of_each_service(server: str) -> None:
    assert ask(server) == "SERVING"
    assert ask(server, "routing") == "SERVING"
    assert ask(server, "caching") == "NOT_SERVING"
    assert ask(server, "billing") == "NOT_FOUND"


def test_nobody_there_is_no_error_but_an_answer() -> None:
    assert ask(f"127.0.0.1:{free_port()}") == "UNAVAILABLE"


def _run(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "services.runtime.probe", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return ended.returncode, ended.stderr.strip()


def test_a_container_is_judged_by_the_exit_code(server: str) -> None:
    assert _run(server) == (0, "")
    assert _run(server, "caching") == (1, "NOT_SERVING")
