"""Writes `deploy/sluice.example.yaml`: every setting of every service with its meaning, unit, bounds and default.

`--check` compares and exits 1 when the file is stale, and proves that it can be loaded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Final

from services.cli.compact import UNITS
from services.runtime.config import describe, load
from services.runtime.settings import MeshSettings

ROOT: Final = Path(__file__).resolve().parents[1]
TARGET: Final = ROOT / "deploy" / "sluice.example.yaml"
HEADER: Final = """\
# Every setting with its default. Written by `make example`; a setting left out has the value shown here.
# An environment variable SLUICE_<SECTION>__<FIELD> wins over the file, say SLUICE_METERING__REQUESTS_PER_MINUTE=600.
# Models, policies, fallback chains, prices and tokenizers stand in the catalogue file (mesh.catalogue).

"""


def sections() -> dict[str, type[Any]]:
    """The sections of the file, `mesh` first."""
    return {"mesh": MeshSettings, **{unit.name: unit.config for unit in sorted(UNITS, key=lambda unit: unit.name)}}


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with what is committed, write nothing")
    arguments = parser.parse_args()
    text = HEADER + describe(sections())
    if not arguments.check:
        TARGET.write_text(text)
    if not TARGET.exists() or TARGET.read_text() != text:
        print(f"{TARGET.relative_to(ROOT)} is stale; run `make example`", file=sys.stderr)
        return 1
    load(sections(), TARGET, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
