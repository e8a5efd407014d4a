"""Counts for models whose tokenizer is not public or not at hand, calibrated by what providers report.

Before the first reports a count is the middle of a wide interval that holds for the tokenizers in use today (byte-level BPE,
SentencePiece and WordPiece vocabularies of 32,000 and more). Once a provider has reported enough usage for a model, tokens are
predicted from a few features of the conversation by least squares on relative errors, and the bound is the 99.5 % quantile of
the errors that the predictor made on conversations it had not seen (split conformal prediction, Vovk et al. 2005; the order
statistic has the finite-sample correction), times a margin for drift.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from services.tokenization.conversation import Conversation
from services.tokenization.counting import Count, Method

_LEAST: Final = 100
"""Observations before the first fit, and residuals before a bound is taken from them."""
_REFIT_EVERY: Final = 50
_LEVEL: Final = 0.995
_MARGIN: Final = 1.15
_RIDGE: Final = 1e-4
_EDGES: Final = (64, 256, 1024, 4096)
"""Sizes, in predicted tokens, between which relative errors are alike: short prompts have larger ones."""
_MOST: Final = 4.0
"""Reports further away than this factor from the uncalibrated interval are taken for faults and not learnt from."""
_PICTURE_LOW: Final = 64
_PICTURE_HIGH: Final = 4800

_FEATURES: Final = 5
_Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Features:
    """What a conversation's tokens are predicted from."""

    encoded: int
    """Tokens of all texts by the reference encoding."""
    wide: int
    """Characters outside ASCII, which vocabularies differ most about."""
    digits: int
    """Digits, which some tokenizers split one by one."""
    turns: int
    pictures: int

    def vector(self) -> _Vector:
        """As numbers, a constant last."""
        return np.array([self.encoded, self.wide, self.digits, self.turns, 1.0])

    def interval(self) -> tuple[float, float]:
        """Least and most tokens without any calibration."""
        low = 0.6 * self.encoded + self.turns + self.pictures * _PICTURE_LOW
        # A byte-level vocabulary that doesn't know a script spends up to a token per byte: three for most of it.
        high = 1.6 * self.encoded + 3.0 * self.wide + self.digits + 12.0 * self.turns + 48.0 + self.pictures * _PICTURE_HIGH
        return low, high


def features(conversation: Conversation, tokens: Callable[[str], int]) -> Features:
    """The features of a conversation; `tokens` counts with the reference encoding."""
    texts: list[str] = []
    pictures = 0
    for turn in conversation.turns:
        texts.append(turn.text)
        pictures += len(turn.pictures)
        if turn.name:
            texts.append(turn.name)
        for call in turn.tool_calls:
            texts += (call.name, call.arguments)
    for tool in conversation.tools:
        texts += (tool.name, tool.description, tool.parameters)
    if conversation.schema:
        texts.append(conversation.schema)
    return _features_of(texts, len(conversation.turns) + 2 * len(conversation.tools), pictures, tokens)


def _features_of(texts: list[str], turns: int, pictures: int, tokens: Callable[[str], int]) -> Features:
    encoded = wide = digits = 0
    for text in texts:
        encoded += tokens(text)
        if not text.isascii():
            wide += sum(1 for character in text if character > "\x7f")
        digits += sum(map(text.count, "0123456789"))
    return Features(encoded, wide, digits, turns, pictures)


class _Model:
    """What is known of one model."""

    def __init__(self, window: int) -> None:
        self.rows: deque[tuple[_Vector, float]] = deque(maxlen=window)
        self.residuals = [deque[float](maxlen=window) for _ in range(len(_EDGES) + 1)]
        self.weights: _Vector | None = None
        self.bounds: list[float | None] = [None] * (len(_EDGES) + 1)
        self.since_fit = 0
        self.version = 0

    def predict(self, vector: _Vector) -> float | None:
        return None if self.weights is None else max(1.0, float(vector @ self.weights))

    def learn(self, vector: _Vector, reported: float) -> None:
        predicted = self.predict(vector)
        if predicted is not None:
            # Judged before it is learnt from: an error on a conversation that the predictor had not seen.
            self.residuals[_bucket(predicted)].append(abs(reported - predicted) / predicted)
        self.rows.append((vector, reported))
        self.since_fit += 1
        if len(self.rows) >= _LEAST and self.since_fit >= _REFIT_EVERY:
            self._fit()

    def _fit(self) -> None:
        self.since_fit = 0
        self.version += 1
        matrix = np.stack([row for row, _ in self.rows])
        target = np.array([reported for _, reported in self.rows])
        scaled = matrix / target[:, None]
        gram = scaled.T @ scaled + _RIDGE * np.eye(_FEATURES)
        self.weights = np.linalg.solve(gram, scaled.T @ np.ones(len(target)))
        self.bounds = [_quantile(bucket) for bucket in self.residuals]


def _bucket(predicted: float) -> int:
    return sum(predicted >= edge for edge in _EDGES)


def _quantile(residuals: deque[float]) -> float | None:
    """The conformal bound, or None while there are too few residuals."""
    count = len(residuals)
    if count < _LEAST:
        return None
    rank = math.ceil((count + 1) * _LEVEL)
    ordered = sorted(residuals)
    # With too few for the level the largest seen stands in, widened.
    bound = ordered[rank - 1] if rank <= count else ordered[-1] * 1.25
    return bound * _MARGIN


class Estimator:
    """Estimates, for any number of models. Safe to use from several threads."""

    def __init__(self, tokens: Callable[[str], int], *, window: int = 2000, capacity: int = 1000) -> None:
        """`tokens` counts a text with the reference encoding."""
        self._tokens = tokens
        self._window = window
        self._capacity = capacity
        self._models: OrderedDict[str, _Model] = OrderedDict()
        self._lock = threading.Lock()

    def count(self, model: str, conversation: Conversation) -> Count:
        """An estimate of the prompt's tokens."""
        found = features(conversation, self._tokens)
        return self._estimate(model, found)

    def count_text(self, text: str) -> Count:
        """An estimate of a text's tokens; texts alone are not calibrated."""
        found = _features_of([text], 0, 0, self._tokens)
        low = 0.6 * found.encoded
        high = 1.6 * found.encoded + 3.0 * found.wide + found.digits + 2.0
        return _middle(low, high, "estimator@1")

    def _estimate(self, model: str, found: Features) -> Count:
        low, high = found.interval()
        with self._lock:
            known = self._models.get(model)
            predicted = known.predict(found.vector()) if known is not None and not found.pictures else None
            if known is not None and predicted is not None:
                bound = known.bounds[_bucket(predicted)]
                if bound is not None:
                    name = f"estimator@1/{model}/{known.version}"
                    # Rounding to whole tokens is an error of its own, of up to half a token.
                    return Count(max(1, round(predicted)), Method.ESTIMATED, name, bound + 0.5 / predicted)
        return _middle(low, high, "estimator@1")

    def observe(self, model: str, conversation: Conversation, reported: int) -> bool:
        """Learns from the tokens that a provider reported; False when the report is not credible and was not used."""
        found = features(conversation, self._tokens)
        low, high = found.interval()
        if found.pictures or not low / _MOST <= reported <= high * _MOST or reported < 1:
            return False
        with self._lock:
            known = self._models.get(model)
            if known is None:
                known = self._models[model] = _Model(self._window)
                if len(self._models) > self._capacity:
                    self._models.popitem(last=False)
            self._models.move_to_end(model)
            known.learn(found.vector(), float(reported))
        return True

    def bound(self, model: str) -> float:
        """The present bound of a prompt of usual size for `model`; 1 while it is uncalibrated."""
        with self._lock:
            known = self._models.get(model)
            bounds = [bound for bound in known.bounds if bound is not None] if known is not None else []
        return max(bounds, default=1.0)


def _middle(low: float, high: float, name: str) -> Count:
    middle = max(1, round((low + high) / 2))
    bound = max(high - middle, middle - low) / middle
    return Count(middle, Method.ESTIMATED, name, bound)


class EstimatedCounter:
    """The estimator as the counter of one model."""

    name: Final = "estimator@1"
    method: Final = Method.ESTIMATED

    def __init__(self, model: str, estimator: Estimator) -> None:
        self._model = model
        self._estimator = estimator

    @property
    def error_bound(self) -> float:
        """See Counter."""
        return self._estimator.bound(self._model)

    def count(self, conversation: Conversation) -> Count:
        """See Counter."""
        return self._estimator.count(self._model, conversation)

    def count_text(self, text: str) -> Count:
        """See Counter."""
        return self._estimator.count_text(text)
