"""Counts of texts that were counted lately: a conversation grows by a turn at a time, and the old turns need no second count."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

_LONGEST: Final = 64 * 1024
"""Characters above which a text isn't remembered: the memory would be bounded by entries only in name."""


class Pieces:
    """Remembers counts of texts, the least recently used ones are forgotten. Safe to use from several threads."""

    def __init__(self, count: Callable[[str], int], capacity: int) -> None:
        self._count = count
        self._capacity = capacity
        self._known: OrderedDict[str | int, int] = OrderedDict()

    def __call__(self, text: str) -> int:
        """Tokens of `text`."""
        if not text:
            return 0
        if len(text) > _LONGEST or self._capacity == 0:
            return self._count(text)
        # No lock: each of these calls is one step for other threads, and all that may come between two of them is that a text leaves.
        known = self._known
        found = known.get(text)
        if found is not None:
            try:  # noqa: SIM105  # a context manager costs as much as all the rest
                known.move_to_end(text)
            except KeyError:
                pass
            return found
        found = self._count(text)
        known[text] = found
        if len(known) > self._capacity:
            known.popitem(last=False)
        return found
