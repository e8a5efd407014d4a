"""What the service adds to its process."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.execution.app import open_service
from services.execution.config import Config
from services.execution.spool import Spool
from services.runtime.process import Process
from services.runtime.settings import MeshSettings
from tests.unit.runtime.fakes import Lines

_CATALOGUE = "providers: {echo: {kind: echo}}\nmodels: {echo/echo: {provider: echo, upstream_model: echo, price: {input: 1, output: 2}}}\n"


async def test_nothing_leaves_the_process_before_the_spool_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write = Spool.write

    def noticed(spool: Spool) -> None:
        written.append("spool")
        write(spool)

    monkeypatch.setattr(Spool, "write", noticed)
    catalogue = tmp_path / "catalogue.yaml"
    catalogue.write_text(_CATALOGUE)
    settings = MeshSettings(state_dir=tmp_path / "state", catalogue=catalogue)
    async with Process("execution", settings, log=Lines()) as process, open_service(Config(), process):
        assert not written
        process.barrier()
        assert written == ["spool"]
