"""Several pieces of work at once, results as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


def each(work: Callable[[Item], Outcome], items: Iterable[Item], *, at_once: int) -> Iterator[Outcome]:
    """Results of `work` in the order in which they come; items are taken only a little ahead. The first error ends it."""
    waiting: set[Future[Outcome]] = set()
    with ThreadPoolExecutor(at_once) as executor:
        for item in items:
            waiting.add(executor.submit(work, item))
            if len(waiting) >= 2 * at_once:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (one.result() for one in done)
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (one.result() for one in done)
