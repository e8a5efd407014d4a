"""Shortening a conversation until it fits into a window.

Dropped are whole exchanges, the oldest first: a user turn with everything up to the next user turn, so that a tool call never
stands without its result nor a result without its call. System and developer turns and the last exchange always stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.tokenization.conversation import Conversation, Role
from services.tokenization.counting import Count
from services.tokenization.errors import DoesNotFit


@dataclass(frozen=True, slots=True)
class Fitted:
    """A conversation that fits."""

    kept: tuple[int, ...]
    """Indexes of the turns that stay, in order."""
    count: Count
    dropped: int
    """How many turns were dropped."""


def exchanges(conversation: Conversation) -> list[list[int]]:
    """Indexes of the turns that may be dropped, in groups that stand or fall together, oldest first."""
    groups: list[list[int]] = []
    for index, turn in enumerate(conversation.turns):
        if turn.role in (Role.SYSTEM, Role.DEVELOPER):
            continue
        if turn.role is Role.USER or not groups:
            groups.append([])
        groups[-1].append(index)
    return groups


def _upper(count: Count) -> float:
    return count.tokens * (1 + count.error_bound)


def fit(conversation: Conversation, window: int, count: Callable[[Conversation], Count]) -> Fitted:
    """The longest end of the conversation whose count, at the upper end of its bound, is at most `window`.

    Raises DoesNotFit when even the system turns and the last exchange are too long. Counts O(log n) times.
    """
    groups = exchanges(conversation)
    always = {i for i, turn in enumerate(conversation.turns) if turn.role in (Role.SYSTEM, Role.DEVELOPER)}

    def without(number: int) -> tuple[tuple[int, ...], Count]:
        kept = sorted(always | {index for group in groups[number:] for index in group})
        return tuple(kept), count(_only(conversation, kept))

    kept, total = without(0)
    if _upper(total) <= window:
        return Fitted(kept, total, 0)
    low, high = 1, max(1, len(groups) - 1)
    best: tuple[tuple[int, ...], Count] | None = None
    while low <= high:
        middle = (low + high) // 2
        candidate = without(middle)
        if _upper(candidate[1]) <= window and len(groups) > middle:
            best, high = candidate, middle - 1
        else:
            low = middle + 1
    if best is None:
        _, smallest = without(max(0, len(groups) - 1))
        raise DoesNotFit(int(_upper(smallest)), window)
    return Fitted(best[0], best[1], len(conversation.turns) - len(best[0]))


def _only(conversation: Conversation, kept: Sequence[int]) -> Conversation:
    return conversation._replace(turns=tuple(conversation.turns[index] for index in kept))
