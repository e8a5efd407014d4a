"""Settings that every process of a mesh shares: the section `mesh` of sluice.yaml."""

from __future__ import annotations

import enum
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.runtime.config import setting

SERVICES: Final = ("tokenization", "metering", "routing", "caching", "execution", "batching", "gateway")
"""Names of the services, each after those it calls: open them in this order, drain them in the opposite one."""

_MEBIBYTE: Final = 1024 * 1024


class Profile(enum.StrEnum):
    """What the defaults are tuned for."""

    DEV = "dev"
    PRODUCTION = "production"


class Reflection(enum.StrEnum):
    """Who may list services by gRPC reflection."""

    AUTO = "auto"
    """On in the dev profile, off in production."""
    ON = "on"
    OFF = "off"
    AUTHENTICATED = "authenticated"
    """Only with the admin key."""


class LogLevel(enum.StrEnum):
    """Least severe level that is written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(enum.StrEnum):
    """How a log line looks."""

    JSON = "json"
    CONSOLE = "console"


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshSettings:
    """Settings of the mesh."""

    profile: Profile = setting(Profile.DEV, "Profile; production turns reflection off and asks for a service token")
    reflection: Reflection = setting(Reflection.AUTO, "Who may use gRPC reflection; auto: on in dev, off in production")
    replica: str = setting(
        "",
        "Name of this process among its replicas, the same after a restart and no other's: what an earlier process of that name had "
        "leased is then free at once, not when its lease ends. Empty: every start is a new replica",
        maximum=64,
    )
    state_dir: Path = setting(Path(".sluice"), "Directory of everything that is kept: ledger, spool, indexes")
    catalogue: Path = setting(
        Path("deploy/catalogue.yaml"),
        "File with providers, models, policies, task types, tokenizers and price overrides; watched",
    )
    nats_url: str = setting("nats://127.0.0.1:4222", "Where NATS is; several servers separated by commas", minimum=1)
    nats_credentials: Path | None = setting(None, "NATS credentials file")
    service_token: str = setting(
        "",
        "Token by which services know each other, the same in every process. Empty: no network caller is taken for a service",
        maximum=1024,
        secret=True,
    )
    admin_key_sha256: str = setting(
        "", "SHA-256 of the admin key, 64 hexadecimal digits. Empty: there is no administrator", maximum=64
    )
    peers: Mapping[str, tuple[str, ...]] = setting(
        types.MappingProxyType({}),
        "Where the other services are, in the mesh topology: service name to a list of host:port. "
        "A host name stands for all its addresses and is resolved again every few seconds",
    )
    listen_host: str = setting("127.0.0.1", "Address on which gRPC and metrics listen", minimum=1)
    grpc_ports: Mapping[str, int] = setting(types.MappingProxyType({}), "gRPC port per service; absent or 0: a free one")
    metrics_ports: Mapping[str, int] = setting(
        types.MappingProxyType({}),
        "Port of /metrics per process, by its service's name (`compact` for the compact topology); absent or 0: a free one",
    )
    report_file: Path | None = setting(None, "File to which each service's addresses are written, one JSON line each")
    log_level: LogLevel = setting(LogLevel.INFO, "Least severe level that is logged")
    log_format: LogFormat = setting(LogFormat.JSON, "How log lines look")
    otlp_endpoint: str | None = setting(None, "OTLP endpoint for traces, over gRPC, say http://127.0.0.1:4317; null: no traces")
    trace_ratio: float = setting(
        1.0, "Share of the requests without a trace context of their own that are traced", minimum=0, maximum=1
    )
    max_message_bytes: int = setting(
        16 * _MEBIBYTE, "Largest gRPC message", unit="bytes", minimum=64 * 1024, maximum=256 * _MEBIBYTE
    )
    max_concurrent_calls: int = setting(
        2000, "Calls a server runs at once; more are refused as OVERLOADED", unit="calls", minimum=1
    )
    slow_call: float = setting(5.0, "A call that took longer is logged", unit="s", minimum=0)
    ping_interval: float = setting(2.0, "Time between two readiness checks", unit="s", minimum=0.05, maximum=60)
    ping_timeout: float = setting(1.0, "Time one readiness check may take", unit="s", minimum=0.05, maximum=60)
    drain_notice: float = setting(
        1.0, "Time between NOT_SERVING and the end of service, for clients to turn away", unit="s", minimum=0, maximum=60
    )
    drain_grace: float = setting(
        5.0, "Time that open calls get to end when the process stops", unit="s", minimum=0, maximum=3600
    )
    drain_flush: float = setting(
        3.0, "Time that each service gets to flush what it holds when the process stops", unit="s", minimum=0, maximum=600
    )

    def __post_init__(self) -> None:
        if self.admin_key_sha256 and not _is_sha256(self.admin_key_sha256):
            raise ValueError("admin_key_sha256 must be 64 lower-case hexadecimal digits: `printf %s KEY | sha256sum`")
        if self.profile is Profile.PRODUCTION and len(self.service_token) < 16:
            raise ValueError("service_token must have at least 16 characters in the production profile")
        for service, endpoints in self.peers.items():
            for endpoint in endpoints:
                host, _, port = endpoint.rpartition(":")
                if not host or not port.isdigit() or not 0 < int(port) < 65536:
                    raise ValueError(f"peers.{service}: {endpoint!r} must be host:port")
        for ports in (self.grpc_ports, self.metrics_ports):
            for service, number in ports.items():
                if not 0 <= number < 65536:
                    raise ValueError(f"port {number!r} of {service} must be between 0 and 65535")


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and all(character in "0123456789abcdef" for character in text)
