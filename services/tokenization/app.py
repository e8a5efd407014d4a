"""Wiring of the tokenization service."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from services.runtime.config import ConfigError, read_yaml
from services.runtime.dispatch import Binding
from services.runtime.errors import unavailable
from services.runtime.process import Process, Service
from services.runtime.watching import Watch
from services.tokenization import catalogue
from services.tokenization.adapters import encodings, gguf_file, huggingface
from services.tokenization.catalogue import Rule, Rules
from services.tokenization.config import Config
from services.tokenization.counting import Counter
from services.tokenization.errors import TokenizerMissing
from services.tokenization.estimator import Estimator
from services.tokenization.openai import EncodingCounter
from services.tokenization.pieces import Pieces
from services.tokenization.service import TokenizationServicer
from services.tokenization.template import TemplateCounter
from services.tokenization.tokenizers import Tokenizers
from sluice.tokenization.v1 import tokenization_service_pb2

NAME: Final = "tokenization"
_REFERENCE: Final = "o200k_base"


def _load(rule: Rule, capacity: int) -> Counter:
    if rule.kind == "encoding":
        return EncodingCounter(encodings.version_of(rule.place), Pieces(encodings.read(rule.place), capacity))
    found = gguf_file.read(rule.place) if rule.kind == "gguf" else huggingface.read(rule.place)
    return TemplateCounter(found.name, found.template, Pieces(found.tokens, capacity), Pieces(found.prompt_tokens, capacity))


def _read_rules(path: Path) -> Rules:
    """The rules of the catalogue file. Raises ConfigError."""
    content = read_yaml(path)
    return catalogue.parse(content.get("tokenizers") if isinstance(content, dict) else None)


@contextlib.asynccontextmanager
async def open_service(config: Config, process: Process) -> AsyncIterator[Service]:
    """Opens the service: the reference encoding at once, other tokenizers in the background."""
    path = process.settings.catalogue
    file = Watch(path)
    rules = await asyncio.to_thread(_read_rules, path)
    reference = await asyncio.to_thread(encodings.read, _REFERENCE)
    estimator = Estimator(
        Pieces(reference, config.piece_cache_entries), window=config.estimator_window, capacity=config.estimator_models
    )

    def missing(rule: Rule, error: TokenizerMissing) -> None:
        process.log.warning("tokenizer_missing", pattern=rule.pattern, place=rule.place, advice=error.message)

    tokenizers = Tokenizers(lambda rule: _load(rule, config.piece_cache_entries), estimator, rules, missing)

    loaded = asyncio.Event()

    async def watch() -> None:
        await tokenizers.load_all()
        loaded.set()
        async for _ in file.changes(config.reload_interval):
            try:
                tokenizers.use(await asyncio.to_thread(_read_rules, path))
            except ConfigError as error:
                # The last good rules stay.
                process.log.error("tokenizers_not_reloaded", problems=list(error.problems))
                continue
            await tokenizers.load_all()
            process.log.info("tokenizers_reloaded", rules=len(rules.rules))

    async def ready() -> None:
        """Counting needs nothing but this process, and the tokenizers in memory: a first count shouldn't wait for a file."""
        if not loaded.is_set():
            raise unavailable("tokenizers", "tokenizers are being loaded")

    with ThreadPoolExecutor(config.threads, thread_name_prefix="count") as executor:
        servicer = TokenizationServicer(tokenizers, estimator, executor, inline_bytes=config.inline_bytes)
        descriptor = tokenization_service_pb2.DESCRIPTOR.services_by_name["TokenizationService"]
        yield Service(name=NAME, bindings=(Binding(servicer, descriptor),), pings={"tokenizers": ready}, workers=(watch,))
