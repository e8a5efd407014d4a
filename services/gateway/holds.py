"""The worst that an operation may cost, and how long an answer a sum of money covers.

The formula is the one of `sluice/metering/v1/price.proto`, taken at its dearest: all input at the dearest input price, all output at
the dearest output price. Money is integer nano-dollars throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

_MILLION: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Tariff:
    """The dearest a model's price can become: nano-dollars per million tokens, per picture and per request."""

    input_nano_usd_per_million: int
    output_nano_usd_per_million: int
    image_nano_usd: int
    request_nano_usd: int

    def is_free(self) -> bool:
        """Whether nothing is ever charged."""
        return not (
            self.input_nano_usd_per_million or self.output_nano_usd_per_million or self.image_nano_usd or self.request_nano_usd
        )


class Payable(Protocol):
    """A candidate, as far as its cost goes."""

    @property
    def provider(self) -> str:
        """Its provider: candidates of the same one are taken to cut text alike."""

    @property
    def tariff(self) -> Tariff | None:
        """Its price; None: unknown or free, nothing is held."""

    @property
    def context_window(self) -> int:
        """Tokens of prompt and answer; 0: unknown."""

    @property
    def max_output_tokens(self) -> int:
        """Tokens of an answer; 0: unknown."""


Candidate = TypeVar("Candidate", bound=Payable)


@dataclass(slots=True)
class Prompt:
    """What is known of a prompt and of the answer that is wished.

    Nobody changes it. It isn't frozen since every request makes one, and freezing more than doubles what that costs.
    """

    token_count: int
    error_bound: float
    """Share of the count by which the true one may be larger, at the provider that was counted for."""
    byte_bound: int
    """Most tokens at any other provider: no tokenizer that works on bytes makes more."""
    image_count: int
    wanted_output: int
    """0: not said."""
    default_output: int
    """Bound of the answer where neither caller nor model have one."""
    min_output: int
    """Shortest answer of use."""

    def bounds(self, candidate: Payable, counted_provider: str) -> tuple[int, int]:
        """Most tokens of input and of output at a candidate."""
        tokens = self.token_count
        if candidate.provider != counted_provider:
            input_tokens = max(tokens, self.byte_bound)
        elif self.error_bound:
            # Rounded up: a bound that is missed by a fraction of a token is missed.
            input_tokens = tokens - int(-tokens * self.error_bound // 1)
        else:
            input_tokens = tokens
        output_tokens = self.wanted_output
        longest = candidate.max_output_tokens
        if longest and (not output_tokens or longest < output_tokens):
            output_tokens = longest
        window = candidate.context_window
        if window:
            room = window - tokens
            if not output_tokens or room < output_tokens:
                output_tokens = room if room > 0 else 1
        return input_tokens, output_tokens or self.default_output


@dataclass(slots=True)
class Reckoning:
    """What a plan may cost. Not frozen for the same reason as Prompt."""

    worst: int
    """Most that one attempt costs at any candidate."""
    least: int
    """Most that the shortest answer of use costs, at the candidate where that is least; 0: somewhere nothing is charged."""


@dataclass(frozen=True, slots=True)
class Clamp(Generic[Candidate]):
    """What a sum of money covers."""

    candidates: tuple[Candidate, ...]
    """Those where it pays for the prompt and an answer of use."""
    max_output: int
    """Longest answer that it pays for at all of them; 0: as the candidates themselves allow."""


def worst_cost(tariff: Tariff, input_tokens: int, output_tokens: int, image_count: int) -> int:
    """Most that one attempt costs with at most these counts."""
    tokens = input_tokens * tariff.input_nano_usd_per_million + output_tokens * tariff.output_nano_usd_per_million
    return -(-tokens // _MILLION) + image_count * tariff.image_nano_usd + tariff.request_nano_usd


def covered_output(tariff: Tariff, input_tokens: int, image_count: int, amount: int, wanted: int) -> int:
    """Longest answer, at most `wanted` tokens, for which `worst_cost` is no more than `amount`; -1: the prompt alone isn't covered."""
    left = amount - image_count * tariff.image_nano_usd - tariff.request_nano_usd
    tokens = left * _MILLION - input_tokens * tariff.input_nano_usd_per_million
    if left < 0 or tokens < 0:
        return -1
    if tariff.output_nano_usd_per_million == 0:
        return wanted
    return min(wanted, tokens // tariff.output_nano_usd_per_million)


def reckon(candidates: Sequence[Payable], prompt: Prompt) -> Reckoning:
    """What the candidates, of which there is at least one, may cost. The first is the one that was counted for."""
    counted = candidates[0].provider
    worst = 0
    least = -1
    for candidate in candidates:
        tariff = candidate.tariff
        if tariff is None:
            least = 0
            continue
        input_tokens, output_tokens = prompt.bounds(candidate, counted)
        output_price = tariff.output_nano_usd_per_million
        # `worst_cost`, written out: this runs for every candidate of every request.
        cost = -(-(input_tokens * tariff.input_nano_usd_per_million + output_tokens * output_price) // _MILLION)
        cost += prompt.image_count * tariff.image_nano_usd + tariff.request_nano_usd
        if cost > worst:
            worst = cost
        if output_tokens > prompt.min_output:
            spared = (output_tokens - prompt.min_output) * output_price // _MILLION
            cost -= spared
        if least < 0 or cost < least:
            least = cost
    return Reckoning(worst, least)


def clamp(candidates: Sequence[Candidate], prompt: Prompt, amount: int) -> Clamp[Candidate]:
    """What `amount` covers: the candidates it pays for, and the longest answer at all of them."""
    counted = candidates[0].provider
    left = []
    longest = 0
    for candidate in candidates:
        tariff = candidate.tariff
        if tariff is not None:
            input_tokens, output_tokens = prompt.bounds(candidate, counted)
            covered = covered_output(tariff, input_tokens, prompt.image_count, amount, output_tokens)
            if covered < 1 or covered < min(output_tokens, prompt.min_output):
                continue
            if covered < output_tokens and (not longest or covered < longest):
                longest = covered
        left.append(candidate)
    return Clamp(tuple(left), longest)
