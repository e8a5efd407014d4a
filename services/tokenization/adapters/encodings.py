"""OpenAI's encodings out of the package `bpe-openai`, which ships them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

import bpe_openai

from services.tokenization.errors import TokenizerMissing


def version_of(name: str) -> str:
    """`o200k_base@bpe-openai-0.1.4`."""
    return f"{name}@bpe-openai-{importlib.metadata.version('bpe-openai')}"


def read(name: str) -> Callable[[str], int]:
    """The counting function of an encoding. Call it off the event loop: the first use loads a table. Raises TokenizerMissing."""
    if name not in bpe_openai.list_encoding_names():
        raise TokenizerMissing(name, f"there are {', '.join(bpe_openai.list_encoding_names())}")
    encoding = bpe_openai.get_encoding(name)
    encode = encoding.encode_ordinary
    # The package's own counting of a text, which its public face only gives by way of a list of tokens, three times as dear.
    native: Callable[[str], int] | None = getattr(getattr(encoding, "_backend", None), "count", None)

    def count(text: str) -> int:
        if native is not None:
            try:
                return native(text)
            except UnicodeEncodeError:
                # A lone surrogate: the public face knows what to do with it.
                pass
        return len(encode(text))

    count("warm")
    return count
