"""A process that posts settlements for ever and tells which of them were confirmed; a test kills it.

`python -m tests.conformance.ledger.writer <round> sqlite <directory>`, or `postgres <url>`. Each line on standard output is the id of an attempt.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from services.metering.adapters import postgres, sqlite
from services.metering.ports import Store
from tests.conformance.ledger.examples import settlement

_POSTERS = 8
_BATCH = 3


def store_of(kind: str, place: str) -> AbstractAsyncContextManager[Store]:
    """The store that the arguments name."""
    if kind == "sqlite":
        return sqlite.open_store(Path(place))
    if kind == "postgres":
        return postgres.open_store(postgres.url_of(place))
    raise SystemExit(f"no store of kind {kind!r}")


async def _post_forever(store: Store, prefix: str) -> None:
    for number in itertools.count():
        batch = [settlement(f"{prefix}-{number}/{attempt}", amount=1) for attempt in range(1, _BATCH + 1)]
        await store.post(batch)
        # One write per confirmation, so that what the killed process had said is what the pipe has.
        sys.stdout.write("".join(f"{one.entry.attempt_id}\n" for one in batch))
        sys.stdout.flush()


async def main(round_number: str, kind: str, place: str) -> None:
    """Posts until it is killed."""
    async with store_of(kind, place) as store, asyncio.TaskGroup() as group:
        for poster in range(_POSTERS):
            group.create_task(_post_forever(store, f"op-{round_number}-{poster}"))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
