"""Generates `gen/` from `protos/`: messages, gRPC stubs, and type stubs for both.

`python -m tools.generate` writes, `--check` compares and exits 1 when `gen/` is stale. The compiler comes from `grpcio-tools`,
so its version is the locked one.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Final

from google.rpc import status_pb2
from grpc_tools import protoc

ROOT: Final = Path(__file__).resolve().parents[1]
PROTOS: Final = ROOT / "protos"
GENERATED: Final = ROOT / "gen"
IMPORTED: Final = ROOT / ".cache" / "protos"
"""Protos of other projects that ours import, copied out of installed packages for tools that know no Python path."""


def copy_imports() -> None:
    """Copies `google/rpc/status.proto` out of `googleapis-common-protos` for buf."""
    # `google.rpc` is a namespace package, which has no folder of its own: go by a module in it.
    source = Path(status_pb2.__file__).with_name("status.proto")
    target = IMPORTED / "google" / "rpc" / "status.proto"
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists() or target.read_bytes() != source.read_bytes():
        shutil.copyfile(source, target)


def generate(target: Path) -> None:
    """Writes the whole tree into `target`, which must be empty. Raises RuntimeError when the compiler refuses."""
    copy_imports()
    target.mkdir(parents=True, exist_ok=True)
    protos = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    services = [name for name in protos if name.endswith("_service.proto")]
    well_known = Path(str(files("grpc_tools"))) / "_proto"
    includes = [f"--proto_path={PROTOS}", f"--proto_path={IMPORTED}", f"--proto_path={well_known}"]
    scripts = Path(sys.executable).parent
    plugins = [
        f"--plugin=protoc-gen-mypy={scripts / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={scripts / 'protoc-gen-mypy_grpc'}",
    ]
    messages = ["protoc", *includes, *plugins, f"--python_out={target}", f"--mypy_out=quiet:{target}", *protos]
    stubs = ["protoc", *includes, *plugins, f"--grpc_python_out={target}", f"--mypy_grpc_out=quiet:{target}", *services]
    for command in (messages, stubs):
        if protoc.main(command) != 0:
            raise RuntimeError("the protobuf compiler refused; its words are above")
    for directory in sorted({path.parent for path in target.rglob("*.py")} | {target / "sluice"}):
        for package in [directory, *directory.parents]:
            if package == target or target not in package.parents:
                break
            (package / "__init__.py").touch()


def differences(left: Path, right: Path) -> list[str]:
    """Files that are missing in one tree or differ, as paths relative to both."""
    names = {
        str(path.relative_to(tree))
        for tree in (left, right)
        for path in tree.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    return sorted(
        name
        for name in names
        if not (left / name).exists()
        or not (right / name).exists()
        or not filecmp.cmp(left / name, right / name, shallow=False)
    )


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with what is committed, write nothing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / "gen"
        generate(fresh)
        if arguments.check:
            stale = differences(fresh, GENERATED)
            for name in stale:
                print(f"gen/{name} is stale; run `make gen`", file=sys.stderr)
            return 1 if stale else 0
        shutil.rmtree(GENERATED, ignore_errors=True)
        shutil.copytree(fresh, GENERATED)
    return 0


if __name__ == "__main__":
    sys.exit(main())
