"""The oracle: a provider that speaks OpenAI's chat completions, takes its time, and keeps a bill of its own.

What it says of an execution is the truth that a ledger is held against: it runs as a process of its own, which nobody kills, and shares
no code with what it judges. Run as `python -m tests.proof.provider DIRECTORY`; it writes its port to `port` there and its log to `bill`,
one JSON line for each thing that happens to an execution: it begins, is completed (then it is billed: the line is synced to the disk
before the answer's end is sent), or its caller goes away.

    request    the last message has the marker between brackets: `[000123] ...`
    answer     `<number of the execution>: ` and some words
    usage      the prompt's tokens are the execution's number, past BASE: no two executions have the same
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import re
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import uvloop

MODEL: Final = "oracle/delphi"
BASE: Final = 1000
PRICE: Final[Mapping[str, str]] = {
    "input": "0.137000321",
    "output": "0.611",
    "cached_input": "0.0343",
    "reasoning": "0.733000007",
}
"""Dollars per million tokens. Not whole nano-dollars a token, so that each answer's sum is rounded."""
_SEED: Final = 20261126
_MARKER: Final = re.compile(r"\[(\w+)\]")
_FASTEST: Final = 0.5
_SLOWEST: Final = 5.0
_WORDS: Final = ("know", "thyself", "nothing", "in", "excess", "surety", "brings", "ruin")


def amount_of(usage: Mapping[str, int]) -> int:
    """Nano-dollars of an answer: exact fractions of the prices, rounded up once."""
    parts = {
        "input": usage["prompt"] - usage["cached"],
        "cached_input": usage["cached"],
        "output": usage["completion"] - usage["reasoning"],
        "reasoning": usage["reasoning"],
    }
    return math.ceil(sum(Fraction(PRICE[name]) / 1_000_000 * 1_000_000_000 * count for name, count in parts.items()))


@dataclass(slots=True)
class Execution:
    """What the bill says of one execution."""

    number: int
    marker: str
    amount: int | None = None
    """Nano-dollars; None: it was not completed, and is not billed."""
    is_streamed: bool = False

    @property
    def input_tokens(self) -> int:
        """By which it is known in a ledger."""
        return BASE + self.number


def read_bill(path: Path) -> dict[int, Execution]:
    """The executions by number."""
    found: dict[int, Execution] = {}
    for line in path.read_text().splitlines():
        said = json.loads(line)
        number = said["execution"]
        if said["event"] == "began":
            found[number] = Execution(number, said["marker"], is_streamed=said["stream"])
        elif said["event"] == "completed":
            found[number].amount = said["amount"]
    return found


class _Oracle:
    """Serves connections and keeps the bill."""

    def __init__(self, bill: Path, fastest: float, slowest: float) -> None:
        self._bill = os.open(bill, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._random = random.Random(_SEED)
        self._fastest, self._slowest = fastest, slowest
        self._count = 0

    def _write(self, number: int, event: str, *, synced: bool = False, **values: Any) -> None:
        line = {"execution": number, "event": event, "time": time.time(), **values}
        os.write(self._bill, json.dumps(line).encode() + b"\n")
        if synced:
            os.fsync(self._bill)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
                body = await reader.readexactly(int(length[1])) if length is not None else b""
                if head.startswith(b"POST"):
                    if not await self._answer(json.loads(body), reader, writer):
                        return
                else:
                    _whole(writer, {"object": "list", "data": []})
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    async def _answer(self, asked: Mapping[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """False: the caller went away."""
        said = asked["messages"][-1]["content"]
        marker = _MARKER.search(said if isinstance(said, str) else said[-1]["text"])
        self._count = number = self._count + 1
        streamed = bool(asked.get("stream"))
        self._write(number, "began", marker=marker[1] if marker is not None else "", stream=streamed)
        chance = self._random
        seconds = chance.uniform(self._fastest, self._slowest)
        words = chance.choices(_WORDS, k=chance.randrange(4, 24))
        completion = chance.randrange(1, 300)
        usage = {
            "prompt": BASE + number,
            "cached": chance.choice((0, chance.randrange(BASE))),
            "completion": completion,
            "reasoning": chance.choice((0, chance.randrange(completion))),
        }
        gone = asyncio.ensure_future(reader.read(1))
        try:
            if streamed:
                is_there = await self._stream(number, usage, words, seconds, gone, writer)
            else:
                is_there = not (await asyncio.wait((gone,), timeout=seconds))[0]
            if not is_there:
                self._write(number, "left")
                return False
            self._write(number, "completed", synced=True, amount=amount_of(usage))
            if streamed:
                _send(writer, _chunk(number, None, "stop"), _chunk(number, None, None, usage=usage), "[DONE]")
                _end(writer)
            else:
                choice = {
                    "index": 0,
                    "message": {"role": "assistant", "content": _text(number, words)},
                    "finish_reason": "stop",
                }
                _whole(writer, {**_frame(number, "chat.completion"), "choices": [choice], "usage": _usage(usage)})
            return True
        finally:
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)

    async def _stream(
        self,
        number: int,
        usage: Mapping[str, int],
        words: Sequence[str],
        seconds: float,
        gone: asyncio.Future[bytes],
        writer: asyncio.StreamWriter,
    ) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        pieces = [f"{number}: ", *(f"{word} " for word in words)]
        for piece in pieces:
            if (await asyncio.wait((gone,), timeout=seconds / len(pieces)))[0]:
                return False
            _send(writer, _chunk(number, piece, None))
        return True


def _text(number: int, words: Sequence[str]) -> str:
    return f"{number}: {' '.join(words)}"


def _usage(usage: Mapping[str, int]) -> dict[str, Any]:
    return {
        "prompt_tokens": usage["prompt"],
        "completion_tokens": usage["completion"],
        "total_tokens": usage["prompt"] + usage["completion"],
        "prompt_tokens_details": {"cached_tokens": usage["cached"]},
        "completion_tokens_details": {"reasoning_tokens": usage["reasoning"]},
    }


def _frame(number: int, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{number}", "object": kind, "created": int(time.time()), "model": MODEL}


def _chunk(number: int, text: str | None, finish: str | None, *, usage: Mapping[str, int] | None = None) -> dict[str, Any]:
    if usage is not None:
        return {**_frame(number, "chat.completion.chunk"), "choices": [], "usage": _usage(usage)}
    delta = {} if text is None else {"role": "assistant", "content": text}
    return {
        **_frame(number, "chat.completion.chunk"),
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
        "usage": None,
    }


def _send(writer: asyncio.StreamWriter, *events: Mapping[str, Any] | str) -> None:
    data = "".join(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events).encode()
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))


def _end(writer: asyncio.StreamWriter) -> None:
    writer.write(b"0\r\n\r\n")


def _whole(writer: asyncio.StreamWriter, answer: Mapping[str, Any]) -> None:
    data = json.dumps(answer).encode()
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data))


async def _serve(directory: Path, fastest: float, slowest: float) -> None:
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    oracle = _Oracle(directory / "bill", fastest, slowest)
    server = await asyncio.start_server(oracle.serve, "127.0.0.1", 0)
    # In one step: who waits for the file reads a whole number.
    (directory / "port.new").write_text(str(server.sockets[0].getsockname()[1]))
    (directory / "port.new").replace(directory / "port")
    await stopped.wait()
    server.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("directory", type=Path, help="where the port and the bill are written")
    parser.add_argument("--fastest", type=float, default=_FASTEST, help="least seconds of an answer")
    parser.add_argument("--slowest", type=float, default=_SLOWEST, help="most seconds of an answer")
    given = parser.parse_args(arguments)
    uvloop.run(_serve(given.directory, given.fastest, given.slowest))


if __name__ == "__main__":
    main()
