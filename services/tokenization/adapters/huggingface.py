"""A tokenizer from a local Hugging Face folder: `tokenizer.json`, and the chat template of `tokenizer_config.json`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from services.tokenization.errors import TokenizerMissing
from services.tokenization.template import ChatTemplate


@dataclass(frozen=True, slots=True)
class FolderTokenizer:
    """What a folder says about tokens."""

    name: str
    template: ChatTemplate | None
    tokens: Callable[[str], int]
    prompt_tokens: Callable[[str], int]


def _word(value: Any) -> str:
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")


def read(folder: str) -> FolderTokenizer:
    """Reads a folder. Call it off the event loop. Raises TokenizerMissing when there is no tokenizer in it."""
    directory = Path(folder).expanduser()
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise TokenizerMissing(folder, f"copy the model's tokenizer.json into {directory}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        raise TokenizerMissing(folder, "its tokenizer.json can't be read") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings: dict[str, Any] = {}
    if (directory / "tokenizer_config.json").is_file():
        settings = json.loads((directory / "tokenizer_config.json").read_text())
    source = settings.get("chat_template")
    if isinstance(source, list):
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    if source is None and (directory / "chat_template.jinja").is_file():
        source = (directory / "chat_template.jinja").read_text()
    special = {name: _word(settings.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    return FolderTokenizer(
        name=f"{directory.name}@huggingface",
        template=ChatTemplate(source, special) if source else None,
        tokens=count,
        prompt_tokens=count,
    )
