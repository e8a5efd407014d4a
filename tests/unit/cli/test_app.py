"""The command as a whole."""

from __future__ import annotations

from typer.testing import CliRunner

from services import __version__
from services.cli.app import app


def test_the_version_is_printed_without_a_command() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"sluice {__version__}\n")
