"""Asks a gRPC server for its health: `python -m services.runtime.probe HOST:PORT [SERVICE]`, the check of a container without grpcurl.

Exit 0: SERVING. Exit 1: anything else, and the word for it on standard error. SERVICE is a name of grpc.health.v1, say `routing`;
without it the server as a whole is asked.
"""

from __future__ import annotations

import argparse
import sys
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_SECONDS: Final = 3.0


def ask(address: str, service: str = "", *, timeout: float = _SECONDS) -> str:
    """The health of `service` at `address` (host:port): `SERVING`, `NOT_SERVING`, …, or the gRPC code when nobody says it.

    Waits `timeout` seconds at most. Raises nothing that the network can cause.
    """
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout)
        except grpc.RpcError as error:
            code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
            return code.name
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m services.runtime.probe", description="Asks a gRPC server for its health.")
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("service", metavar="SERVICE", nargs="?", default="", help="default: the server as a whole")
    parser.add_argument("--timeout", type=float, default=_SECONDS, metavar="S", help="longest wait in seconds; default: 3")
    arguments = parser.parse_args()
    health = ask(arguments.address, arguments.service, timeout=arguments.timeout)
    if health == "SERVING":
        return 0
    print(health, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
