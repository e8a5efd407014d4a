"""Ordinary gRPC channels: for the command line, tests, and whoever is no service with links."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

import grpc

from services.runtime.retries import service_config

_KEEPALIVE_MS: Final = 30_000
_KEEPALIVE_TIMEOUT_MS: Final = 10_000


def open_channel(
    endpoints: Iterable[str],
    services: Collection[str],
    *,
    health_service: str | None = "",
    max_message_bytes: int = 16 * 1024 * 1024,
) -> grpc.aio.Channel:
    """A channel over all `endpoints` (host:port) of a service, to be closed by the caller.

    Keepalive, round_robin, health checking (`health_service`: the name to watch, None: none) and retries of the idempotent
    methods of `services` (full names). Errors are raised as `grpc.aio.AioRpcError`; `status.failure_from_rpc` reads them.
    """
    listed = list(endpoints)
    if not listed:
        raise ValueError("endpoints must not be empty; give at least one host:port")
    # Several literal addresses are one target of gRPC's `ipv4:` scheme; names are resolved by its `dns:` scheme, one a channel.
    literal = all(_is_ipv4(endpoint) for endpoint in listed)
    if not literal and len(listed) > 1:
        raise ValueError(f"{listed!r}: several endpoints must be IPv4 addresses; use one DNS name for several replicas")
    target = f"ipv4:{','.join(listed)}" if literal else f"dns:///{listed[0]}"
    return grpc.aio.insecure_channel(
        target,
        options=[
            ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2_000),
            ("grpc.enable_retries", 1),
            ("grpc.service_config", service_config(health_service, services)),
            ("grpc.use_local_subchannel_pool", 1),
        ],
    )


def _is_ipv4(endpoint: str) -> bool:
    parts = endpoint.rpartition(":")[0].split(".")
    return len(parts) == 4 and all(part.isdigit() and int(part) < 256 for part in parts)
