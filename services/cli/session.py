"""What every client command needs: the running mesh, a console, failures shown as words and an exit code."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType
from typing import Annotated

import typer

from services.cli.client import Client, connect
from services.cli.rendering import open_console
from services.cli.state import Ready

StateDirOption = Annotated[
    Path | None,
    typer.Option(
        "--state-dir",
        help="State directory of the running `sluice up`. Default: $SLUICE_STATE_DIR, else ~/.local/state/sluice.",
    ),
]
TimeoutOption = Annotated[float, typer.Option("--timeout", help="Seconds that the call may take.", min=0.001)]
KeyOption = Annotated[
    str | None, typer.Option("--key", envvar="SLUICE_KEY", help="Key to call with. Default: the one that `up` made.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


class Session:
    """A client command's connection to the running mesh; failures leave it as `Failure` for `main` to show."""

    def __init__(self, state_dir: Path | None, timeout: float, *, key: str | None = None) -> None:
        self.console = open_console()
        self.errors = open_console(stderr=True)
        self.timeout = timeout
        self.ready = Ready.found(state_dir, os.environ)
        self._key = key
        self._stack = contextlib.ExitStack()
        self.client: Client

    def __enter__(self) -> Session:
        self.client = self._stack.enter_context(connect(self.ready, key=self._key))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stack.close()
