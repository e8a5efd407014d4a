"""The state directory of `sluice up`: secrets that survive restarts, and the ready file that says where everything listens."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from services.runtime.errors import Failure, Reason

READY_NAME: Final = "ready.json"
_CALLED: Final = ("gateway", "batching", "metering", "execution")
_SECRETS_NAME: Final = "secrets.json"


def default_state_dir() -> Path:
    """`$SLUICE_STATE_DIR`, else `$XDG_STATE_HOME/sluice`, else `~/.local/state/sluice`."""
    if named := os.environ.get("SLUICE_STATE_DIR"):
        return Path(named)
    if base := os.environ.get("XDG_STATE_HOME"):
        return Path(base) / "sluice"
    return Path.home() / ".local" / "state" / "sluice"


def write_private(path: Path, text: str) -> None:
    """Replaces `path` in one step; only its owner can read it."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@dataclass(frozen=True, slots=True)
class Secrets:
    """What `up` makes once per state directory. Never logged; the key and the admin key are shown to the person who ran `up`."""

    service_token: str
    """Bearer token that services of the mesh present to each other."""
    admin_key: str
    """Bearer token of the administrator."""
    key: str
    """Key of the tenant `default`."""

    @property
    def admin_key_sha256(self) -> str:
        """Hex digest, which is all that services know of the admin key."""
        return hashlib.sha256(self.admin_key.encode()).hexdigest()

    @classmethod
    def load_or_create(cls, state_dir: Path) -> Secrets:
        """The secrets of a state directory, made at the first use."""
        state_dir.mkdir(parents=True, exist_ok=True)
        path = state_dir / _SECRETS_NAME
        if path.exists():
            return cls(**json.loads(path.read_text()))
        made = cls(
            service_token=f"sluice-service-{secrets.token_urlsafe(32)}",
            admin_key=f"sk-sluice-admin-{secrets.token_urlsafe(32)}",
            key=f"sk-sluice-{secrets.token_urlsafe(32)}",
        )
        write_private(path, json.dumps(asdict(made)))
        return made


@dataclass(frozen=True, slots=True)
class Ready:
    """Where a running mesh listens. The file holds exactly these fields as JSON."""

    http: str
    """URL of the HTTP edge, without `/v1`."""
    grpc: Mapping[str, str]
    """`host:port` by service; further replicas as `<service>-2`."""
    metrics: Mapping[str, str]
    """URL of `/metrics` by service."""
    pids: Mapping[str, int]
    """Process by service, `nats` included."""
    key: str
    """A working key of the tenant `default`."""
    admin_key: str
    """The administrator's key."""
    nats: str = ""
    """URL of the NATS server."""
    topology: str = ""
    """`compact` or `mesh`."""
    supervisor_pid: int = 0
    """Process of `sluice up` itself."""
    replicas: Mapping[str, int] = field(default_factory=dict)
    """How many of each service run."""

    def write(self, path: Path) -> None:
        """Replaces the ready file in one step, readable by its owner only: it has keys in it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_private(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def found(cls, state_dir: Path | None, environ: Mapping[str, str]) -> Ready:
        """The mesh that a command is meant for: that of the state directory where one is named (`state_dir`, SLUICE_STATE_DIR), else the
        one whose addresses are in the environment, else that of the default state directory.

        Addresses are SLUICE_GATEWAY, SLUICE_BATCHING, SLUICE_METERING and SLUICE_EXECUTION (`host:port` each), with SLUICE_KEY and
        SLUICE_ADMIN_KEY. Raises Failure (DEPENDENCY_UNAVAILABLE).
        """
        addresses = {service: environ.get(f"SLUICE_{service.upper()}", "") for service in _CALLED}
        if state_dir is not None or environ.get("SLUICE_STATE_DIR") or not any(addresses.values()):
            return cls.read((state_dir or default_state_dir()) / READY_NAME)
        missing = [f"SLUICE_{service.upper()}" for service, address in addresses.items() if not address]
        if missing:
            words = f"{', '.join(missing)} must be set, too, to reach the mesh that the environment names"
            raise Failure(Reason.DEPENDENCY_UNAVAILABLE, words, metadata={"dependency": "sluice up"})
        return cls(
            http=environ.get("SLUICE_URL", ""),
            grpc=addresses,
            metrics={},
            pids={},
            key=environ.get("SLUICE_KEY", ""),
            admin_key=environ.get("SLUICE_ADMIN_KEY", ""),
        )

    @classmethod
    def read(cls, path: Path) -> Ready:
        """The ready file at `path`. Raises Failure (DEPENDENCY_UNAVAILABLE) when there is none: nothing runs there."""
        try:
            raw: Any = json.loads(path.read_text())
        except FileNotFoundError:
            raise Failure(
                Reason.DEPENDENCY_UNAVAILABLE,
                f"nothing runs with the state directory {str(path.parent)!r}; start it with `sluice up`, "
                "or name another one with --state-dir",
                metadata={"dependency": "sluice up"},
            ) from None
        return cls(**raw)
