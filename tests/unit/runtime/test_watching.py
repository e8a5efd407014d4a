"""A file that is watched: no change is missed, a file that is away is no change."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from services.runtime.watching import Watch


async def test_a_change_between_the_watch_and_its_first_look_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    watch = Watch(path)
    path.write_text("three")
    changes = watch.changes(0.01)
    await asyncio.wait_for(anext(changes), 5)
    await changes.aclose()


async def test_a_replaced_file_is_a_change_and_an_absent_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    watch = Watch(path)
    changes = watch.changes(0.01)
    waiting = asyncio.ensure_future(anext(changes))
    path.unlink()
    await asyncio.sleep(0.05)
    assert not waiting.done()
    (tmp_path / "other").write_text("two")
    os.replace(tmp_path / "other", path)
    await asyncio.wait_for(waiting, 5)
    waiting = asyncio.ensure_future(anext(changes))
    await asyncio.sleep(0.05)
    assert not waiting.done(), "nothing has changed since"
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
