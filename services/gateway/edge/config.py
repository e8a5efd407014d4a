"""Settings of the HTTP edge: section `gateway.edge`."""

from __future__ import annotations

from dataclasses import dataclass

from services.runtime.config import setting


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeConfig:
    """Where the edge listens and what it allows a client."""

    host: str = setting("127.0.0.1", "Address to listen on")
    port: int = setting(8080, "Port to listen on; 0: a free one", minimum=0, maximum=65535)
    backlog: int = setting(2048, "Connections that the kernel keeps until they are accepted", minimum=1, maximum=65535)
    max_connections: int = setting(10_000, "Open connections; further ones get 503 and are closed", minimum=1)
    header_timeout: float = setting(
        5.0,
        "Time from the first byte of a request, or from a connection's begin, to the end of its headers",
        unit="s",
        minimum=0.05,
    )
    body_timeout: float = setting(15.0, "Time from the end of the headers to the end of the body", unit="s", minimum=0.05)
    body_minimum_rate: int = setting(
        262_144, "A body that comes at least this fast may take longer than body_timeout", unit="bytes/s", minimum=1024
    )
    idle_timeout: float = setting(75.0, "Time between two requests of a connection", unit="s", minimum=0.05)
    write_timeout: float = setting(
        15.0,
        "Time in which a client that is behind must read write_buffer_bytes, or all that waits for it; else it is cut off",
        unit="s",
        minimum=0.05,
    )
    linger_timeout: float = setting(
        1.0, "Time in which the rest of a refused request is read and thrown away, so that the client sees the refusal",
        unit="s", minimum=0.0, maximum=30.0,
    )  # fmt: skip
    max_target_bytes: int = setting(8192, "Longest path and query", unit="bytes", minimum=256)
    max_header_bytes: int = setting(
        65_536, "Largest head of a request, its names and values together", unit="bytes", minimum=1024
    )
    max_header_count: int = setting(128, "Header lines of a request", minimum=16)
    max_body_bytes: int = setting(20_971_520, "Largest body, counted while it is read", unit="bytes", minimum=1024)
    max_buffered_bytes: int = setting(
        536_870_912, "Bodies held in memory together; a request that would pass it gets 503", unit="bytes", minimum=1_048_576
    )
    write_buffer_bytes: int = setting(
        262_144, "Bytes waiting for a slow reader at which its stream pauses", unit="bytes", minimum=1024
    )
    default_deadline: float = setting(
        300.0, "Time for a request that doesn't set x-sluice-timeout, all attempts together", unit="s", minimum=0.05
    )
    max_deadline: float = setting(
        3600.0,
        "Longest time for a request: x-sluice-timeout may not ask for more, and no gRPC call gets more",
        unit="s",
        minimum=0.05,
    )
    drain_timeout: float = setting(
        4.0, "Time for requests in flight to end when the process stops; then they are cut off", unit="s", minimum=0.0
    )
