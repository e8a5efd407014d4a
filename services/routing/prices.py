"""Prices as routing needs them: what a request may cost with a model. The price book is metering's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

MILLION: Final = 1_000_000
Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Rates:
    """Nano-dollars per million tokens, and per request."""

    input: int
    output: int
    request: int = 0

    def cost(self, input_tokens: int, output_tokens: int) -> int:
        """Nano-dollars, rounded up."""
        return -(-(input_tokens * self.input + output_tokens * self.output) // MILLION) + self.request


class Prices(Generic[Row]):
    """The prices of this moment by model. A row is kept as it came, since execution bills by it."""

    def __init__(self) -> None:
        self._rows: Mapping[str, tuple[Rates, Row]] = {}
        self.is_known = False
        """Whether the book was ever read."""

    def use(self, rows: Iterable[tuple[str, Rates, Row]]) -> None:
        """Takes another book as a whole."""
        self._rows = {model: (rates, row) for model, rates, row in rows}
        self.is_known = True

    def rates(self, model: str) -> Rates | None:
        """None: no price is known."""
        found = self._rows.get(model)
        return None if found is None else found[0]

    def row(self, model: str) -> Row | None:
        """None: no price is known."""
        found = self._rows.get(model)
        return None if found is None else found[1]
