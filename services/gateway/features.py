"""Coarse facts about a prompt for routing's classifier.

Only the begin and the end of the last user turn are looked at, so that the work is bounded however long the prompt is. The counts are
0 to 3: each kind of sign counts once. Routing decides what they mean. Words are looked up in sets, and a pattern is tried only where a
character that it needs is there: this runs for every request that isn't answered from the cache.
"""

from __future__ import annotations

import re
from typing import Final

_WINDOW: Final = 4096
"""Characters of the text that are looked at: half from its begin, half from its end."""


def _written(*words: str) -> frozenset[str]:
    """Words as they may stand between two spaces."""
    return frozenset(word + end for word in words for end in ("", ".", ",", ":", ";", "?", "!", ")", "s"))


_KEYWORDS: Final = frozenset(
    (
        "def", "return", "function", "const", "import", "#include", "public", "async", "struct", "lambda", "void", "elif", "null",
        "==", "=>", "->", "!=", "{", "}", "};", "{}", "//", "var", "let", "select", "from",
    )
)  # fmt: skip
_CODE_WORDS: Final = _written(
    "code", "python", "javascript", "typescript", "golang", "rust", "java", "sql", "regex", "compile", "compiler", "refactor", "script",
    "bug", "function", "unittest", "api", "algorithm",
)  # fmt: skip
_ENDING: Final = re.compile(r"(?:py|js|ts|tsx|go|rs|java|c|cc|cpp|h|rb|php|sql|sh|ya?ml|toml|json|html|css)\b")
_TRACES: Final = ("traceback (most recent call last)", "exception in thread", "segmentation fault", "\n    at ")
_THOUGHT: Final = _written(
    "prove", "proof", "derive", "theorem", "solve", "puzzle", "calculate", "compare", "deduce", "reasoning", "lemma", "infer",
    "trade-off", "step-by-step", "probability", "optimal",
)  # fmt: skip
_WORDS: Final = _KEYWORDS | _CODE_WORDS | _THOUGHT
_NOTHING: Final[frozenset[str]] = frozenset()
_FORMULA: Final = re.compile(r"\d ?[-+*/^=<>] ?\d|[a-z] ?= ?[-\da-z]|[∑∫√≤≥≠∀∃]|\\frac|\$\$")
_CONDITIONS: Final = re.compile(r"(?:^|\n)[ \t]{0,8}\(?[1-9][.)][ \t].*\n[ \t]{0,8}\(?[1-9][.)][ \t]")


def signals(text: str) -> tuple[int, int]:
    """Signs of code and of multi-step thought, each 0 to 3.

    Code: fenced blocks or stack traces; keywords or words of the trade; file names. Thought: its words; formulas; numbered conditions.
    """
    if len(text) > _WINDOW:
        half = _WINDOW // 2
        text = text[:half] + "\n" + text[-half:]
    text = text.lower()
    # One pass over the words for all three sets; most prompts end it with nothing left to look at.
    split = text.split()
    words = _NOTHING if _WORDS.isdisjoint(split) else _WORDS.intersection(split)
    code = 0
    lines = "\n" in text
    # Here and below: one character is found many times faster than several, and the rare one is mostly not there.
    if ("`" in text and "```" in text) or (lines and _has_one(text, _TRACES)):
        code = 1
    if words and (not words.isdisjoint(_CODE_WORDS) or len(words & _KEYWORDS) >= 3):
        code += 1
    if "." in text and _has_file_name(text):
        code += 1
    thought = 0
    # The searches are written out: a loop over a tuple of signs costs as much as the searches themselves.
    if (
        (words and not words.isdisjoint(_THOUGHT))
        or "step by step" in text
        or "how many" in text
        or "explain why" in text
        or "think about" in text
        or "make a plan" in text
        or "pros and cons" in text
    ):
        thought = 1
    if (
        "=" in text
        or "+" in text
        or "*" in text
        or "^" in text
        or "<" in text
        or ("$" in text and "$$" in text)
        or ("\\" in text and "\\frac" in text)
        or not text.isascii()
    ) and _FORMULA.search(text) is not None:
        thought += 1
    if lines and _CONDITIONS.search(text) is not None:
        thought += 1
    return code, thought


def _has_file_name(text: str) -> bool:
    """Whether a word's end after a dot is that of a source file. Dots are few; a pattern would try every character."""
    last = len(text) - 1
    at = text.find(".", 1)
    # After the dot of a sentence comes a space or the end: no need to try the pattern there.
    while 0 < at < last:
        if text[at + 1].isalpha() and text[at - 1].isalnum() and _ENDING.match(text, at + 1) is not None:
            return True
        at = text.find(".", at + 1)
    return False


def _has_one(text: str, signs: tuple[str, ...]) -> bool:
    # A generator inside any() costs more than the search itself.
    for sign in signs:  # noqa: SIM110
        if sign in text:
            return True
    return False
