"""A provider's key is seen nowhere but in its header, whatever goes wrong (T31)."""

from __future__ import annotations

import base64
import logging
import traceback
from pathlib import Path
from typing import Any, Final

import pytest

from services.execution.probes import Prober
from services.runtime.errors import Failure
from sluice.execution.v1 import execution_service_pb2 as pb2
from tests.unit.execution.adapters.recorded import RECORDED, Recorded
from tests.unit.execution.examples import SECRET, embedding
from tests.unit.execution.upstream import PATIENCE, Exchange, Script, chunked, document, pool_to, upstream, whole
from tests.unit.execution.world import World, attempts_of, world

WORDS: Final = f"the key {SECRET} is not what we gave you"


async def repeats_the_request(exchange: Exchange) -> None:
    """As a careless proxy does: the whole request as the error."""
    said = f"{exchange.method} {exchange.path} {dict(exchange.headers)}"
    await document({"error": {"message": said, "param": said, "code": said, "type": said}}, 400)(exchange)


async def resets(exchange: Exchange) -> None:
    exchange.reset()


def scripts(recorded: Recorded) -> dict[str, Script]:
    """Everything that goes wrong, with the key in it wherever it can be."""
    made: dict[str, Script] = {
        str(status): document(recorded.error_body(WORDS), status, x_key=SECRET, retry_after=SECRET)
        for status in (302, 400, 401, 402, 403, 404, 408, 409, 413, 422, 429, 500, 503, 529)
    }
    made |= {
        "request": repeats_the_request,
        "text": whole(WORDS.encode(), 400),
        "page": whole(f"<html>{WORDS}</html>".encode(), 502),
        "not json": whole(WORDS.encode()),
        "other json": document({"key": SECRET, "choices": SECRET, "content": SECRET, "candidates": SECRET}),
        "event error": chunked([recorded.beginning, b'data: {"type":"error","error":{"message":"%b"}}\n\n' % WORDS.encode()]),
        "event garbage": chunked([recorded.beginning, b"data: %b\n\n" % WORDS.encode()]),
        "cut": chunked([recorded.beginning, WORDS.encode()], ends=False),
        "reset": resets,
    }
    return made


def shown(failure: BaseException) -> str:
    """All that a failure can put into a log or an answer."""
    metadata = dict(failure.metadata) if isinstance(failure, Failure) else {}
    return "".join([repr(failure), str(failure), repr(metadata), *traceback.format_exception(failure)])


@pytest.mark.parametrize("kind", RECORDED)
async def test_no_error_has_the_key(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    recorded = RECORDED[kind]
    seen: list[str] = []

    async def note(made: World, call: Any) -> None:
        try:
            await call
        except Failure as failure:
            seen.append(shown(failure))
        seen.extend(str(report) for report in made.reports)

    async def followed(operation: Any) -> None:
        async for _ in await operation.open_stream():
            pass

    async with upstream(resets) as server, world(tmp_path) as made:
        async with pool_to(server.url) as pool:
            provider = recorded.make(pool)
            made.targets.use({"p": provider})
            for name, script in scripts(recorded).items():
                server.plays(script)
                # Breakers would spare the provider, and this test its errors.
                made.clock.now += 10_000
                whole_one = made.operation("p", operation_id=f"{name}/1")
                await note(made, whole_one.complete())
                made.clock.now += 10_000
                streamed = made.stream("p", operation_id=f"{name}/2", accepted_wire=provider.wire)
                await note(made, followed(streamed))
                made.clock.now += 10_000
                await note(made, made.operation("p", kind=pb2.EmbedRequest, operation_id=f"{name}/3").embed())
                seen += [str(attempt) for attempt in (*attempts_of(whole_one), *attempts_of(streamed))]
                try:
                    await provider.embed(embedding("a"))
                except Failure as failure:
                    seen.append(shown(failure))
                await Prober(made.targets, interval=PATIENCE, timeout=PATIENCE).round()
                seen.append(made.targets.probes["p"].detail)
        asked = server.exchanges
        spooled = b"".join(path.read_bytes() for path in tmp_path.glob("*.spool"))
        seen += [str(record) for record in await made.settled()]
    # The key was there to be shown: every request carried it.
    assert len(asked) >= 3 * len(scripts(recorded))
    assert all(SECRET in exchange.headers[recorded.key_header[0]] for exchange in asked)
    assert not any(SECRET in exchange.path or SECRET.encode() in exchange.body for exchange in asked)
    everything = "\n".join([*seen, caplog.text, spooled.decode("latin-1")])
    assert len(everything) > 10_000
    for form in (SECRET, base64.b64encode(SECRET.encode()).decode(), SECRET[:12]):
        assert form not in everything
