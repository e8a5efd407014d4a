"""Coarse facts about a prompt for routing's classifier.

Only the end of the last user turn is looked at, so that the work is bounded however long the prompt is. The counts are 0 to 3: each
kind of sign counts once. Routing decides what they mean.
"""

from __future__ import annotations

import re
from typing import Final

_WINDOW: Final = 4096
"""Characters of the text that are looked at: half from its begin, half from its end."""

_KEYWORDS: Final = (
    "def ", "return ", "function ", "const ", "import ", "#include", "public ", "select ", "async ", "struct ", "lambda", "void ",
)  # fmt: skip
_CODE_WORDS: Final = ("code", "python", "javascript", "typescript", "golang", "rust ", "java ", "sql", "regex", "compile", "refactor",
    "unit test", "stack trace", "script", "bug")  # fmt: skip
_FILE_NAMES: Final = re.compile(r"\w\.(?:py|js|ts|tsx|go|rs|java|c|cc|cpp|h|rb|php|sql|sh|ya?ml|toml|json|html|css)\b")
_TRACES: Final = (
    "traceback (most recent call last)",
    "exception in thread",
    "panic: ",
    "segmentation fault",
    "error: ",
    "    at ",
)
_THOUGHT: Final = ("step by step", "prove", "proof", "derive", "reason", "think ", "plan ", "explain why", "theorem", "solve", "puzzle",
    "how many", "calculate", "compare", "trade-off", "deduce")  # fmt: skip
_FORMULA: Final = re.compile(r"\d\s*[-+*/^=<>]\s*\d|[a-z]\s*=\s*[-\da-z]|[∑∫√≤≥≠∀∃]|\\frac|\$\$")
_CONDITIONS: Final = re.compile(r"(?:^|\n)\s*\(?[1-9][.)]\s.*\n\s*\(?[1-9][.)]\s")


def look(text: str) -> str:
    """The part of a text that is judged, in lower case."""
    if len(text) > _WINDOW:
        half = _WINDOW // 2
        text = text[:half] + "\n" + text[-half:]
    return text.lower()


def code_signals(text: str) -> int:
    """Signs of code in a text that `look` returned: fenced blocks or traces, keywords or words of the trade, file names."""
    signals = 0
    if "```" in text or any(trace in text for trace in _TRACES):
        signals += 1
    words = 0
    for word in _KEYWORDS:
        if word in text:
            words += 1
    for word in _CODE_WORDS:
        if word in text:
            words += 2
    if words >= 2:
        signals += 1
    if "." in text and _FILE_NAMES.search(text) is not None:
        signals += 1
    return signals


def reasoning_signals(text: str) -> int:
    """Signs of multi-step thought in a text that `look` returned: its words, formulas, numbered conditions."""
    signals = 0
    for word in _THOUGHT:
        if word in text:
            signals = 1
            break
    if _FORMULA.search(text) is not None:
        signals += 1
    if "\n" in text and _CONDITIONS.search(text) is not None:
        signals += 1
    return signals
