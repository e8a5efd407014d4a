"""What may be cached, and what may be looked for by meaning."""

from __future__ import annotations

import re
from typing import Final

_WORD: Final = re.compile(r"[a-z']+")


def _words(words: str) -> frozenset[str]:
    return frozenset(words.split())


_ENGLISH: Final = _words(
    "the of is are what how who when where why which do does did can could should would will my your our their this that these those"
    " with from for and to it you we they have has tell explain describe list give show write please about into there be been make"
    " define summarize name compare find"
)
"""Words that hardly any other language in Latin letters has."""
_MOST_FOREIGN: Final = 0.2


def question_refusal(question: str, max_bytes: int) -> str | None:
    """Why a question can't be compared by meaning, in words; None: it can.

    The embedding model and the guard read English. A text in another language would have a vector too, just not a sensible one.
    """
    if not question.strip():
        return "the last user turn has no text"
    if len(question) > max_bytes or len(question.encode()) > max_bytes:
        return f"the last user turn is longer than {max_bytes} bytes"
    letters = sum(character.isalpha() for character in question)
    foreign = sum(character.isalpha() and not character.isascii() for character in question)
    if letters == 0 or foreign > letters * _MOST_FOREIGN:
        return "the embedding model reads English only"
    if _ENGLISH.isdisjoint(_WORD.findall(question.lower())):
        return "the embedding model reads English only, and no English word was found"
    return None
