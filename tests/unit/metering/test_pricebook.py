from __future__ import annotations

import datetime
from typing import Any

import pytest
import yaml

from services.metering.cost import Price
from services.metering.pricebook import PriceBook, build, models_of, versioned
from services.runtime.config import ConfigError

DOLLAR = 1_000_000_000


def day(text: str) -> float:
    return datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.UTC).timestamp()


def no_seed(kind: str, upstream_model: str, context_window: int) -> list[Price]:
    return []


def catalogue(price: str, overrides: str = "") -> dict[str, Any]:
    text = f"providers: {{p: {{kind: openai}}}}\nmodels:\n  p/m: {{provider: p, upstream_model: up, price: {price}}}\n"
    content: dict[str, Any] = yaml.safe_load(text + overrides)
    return content


def problems_of(content: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        build(content, no_seed)
    return list(refused.value.problems)


def price_at(book: PriceBook, time: float) -> Price:
    found = book.at("p/m", time)
    assert found is not None
    return found


def test_the_price_of_a_moment_is_the_last_one_that_began_by_then() -> None:
    book = build(
        catalogue(
            '[{input: 3, output: "6", from: 2026-02-01}, {input: 1, output: 2}, {input: 2, output: 4, from: 2026-01-01}]'
        ),
        no_seed,
    )
    assert [price_at(book, time).input for time in (0.0, day("2025-12-31T23:59:59"))] == [DOLLAR, DOLLAR]
    assert price_at(book, day("2026-01-01")).input == 2 * DOLLAR
    assert price_at(book, day("2026-02-01") - 0.001).input == 2 * DOLLAR
    assert price_at(book, day("2026-02-01")).input == 3 * DOLLAR
    assert price_at(book, day("2100-01-01")).output == 6 * DOLLAR
    # Each ends where the next begins.
    first = price_at(book, 0.0)
    assert (first.effective_from, first.effective_to) == (0.0, day("2026-01-01"))
    assert price_at(book, day("2026-02-01")).effective_to is None


def test_before_its_first_price_and_after_its_last_a_model_has_none() -> None:
    rows = [Price("", "", 1, 1, effective_from=100.0, effective_to=200.0)]
    book = PriceBook({"m": versioned("m", rows)})
    assert book.at("m", 99.9) is None
    assert book.at("m", 100.0) is not None
    assert book.at("m", 200.0) is None
    assert book.at("other", 150.0) is None
    assert list(book.all_at(99.9)) == []


def test_a_version_is_of_the_row_and_stays_when_others_follow() -> None:
    one = build(catalogue("[{input: 1, output: 2}]"), no_seed)
    two = build(catalogue("[{input: 1, output: 2}, {input: 2, output: 2, from: 2026-01-01}]"), no_seed)
    version = price_at(one, 0.0).version
    assert price_at(two, 0.0).version == version
    assert price_at(two, day("2026-01-01")).version != version
    found = two.by_version(version)
    assert found is not None
    assert found.input == DOLLAR
    assert two.by_version("none of them") is None
    assert one.version != two.version
    assert build(catalogue("[{input: 1, output: 2}]"), no_seed).version == one.version


@pytest.mark.parametrize("field", ["cached_input", "reasoning", "cache_write", "image", "request"])
def test_every_amount_is_read_and_part_of_the_version(field: str) -> None:
    plain = price_at(build(catalogue("{input: 1, output: 2}"), no_seed), 0.0)
    priced = price_at(build(catalogue(f"{{input: 1, output: 2, {field}: 0.5}}"), no_seed), 0.0)
    assert getattr(priced, field) == DOLLAR // 2
    assert priced.version != plain.version


def test_the_same_prices_of_two_models_have_two_versions() -> None:
    content = yaml.safe_load("models: {a/x: {price: {input: 1, output: 1}}, b/x: {price: {input: 1, output: 1}}}")
    book = build(content, no_seed)
    versions = {price.model: price.version for price in book.all_at(0.0)}
    assert list(versions) == ["a/x", "b/x"]
    assert len(set(versions.values())) == 2


def test_free_is_a_written_zero_and_silence_is_no_price() -> None:
    free = price_at(build(catalogue("free"), no_seed), 0.0)
    assert (free.input, free.output, free.request) == (0, 0, 0)
    assert build(catalogue("null"), no_seed).at("p/m", 0.0) is None


def test_the_seed_is_asked_only_where_the_catalogue_is_silent_and_overrides_win() -> None:
    asked: list[tuple[str, str]] = []

    def seed(kind: str, upstream_model: str, context_window: int) -> list[Price]:
        asked.append((kind, upstream_model))
        return [Price("", "", 7, 8, source="seed")]

    assert price_at(build(catalogue("null"), seed), 0.0).source == "seed"
    assert asked == [("openai", "up")]
    assert price_at(build(catalogue("{input: 1, output: 2}"), seed), 0.0).input == DOLLAR
    overridden = build(catalogue("{input: 1, output: 2}", "prices: {p/m: [{input: 5, output: 5}]}"), seed)
    assert price_at(overridden, 0.0).input == 5 * DOLLAR
    assert len(asked) == 1


def test_amounts_are_what_was_written_to_the_last_digit() -> None:
    book = build(catalogue('{input: 0.1, output: "0.000000001"}'), no_seed)
    assert (price_at(book, 0.0).input, price_at(book, 0.0).output) == (100_000_000, 1)


@pytest.mark.parametrize("amount", ['"0.0000000001"', "-1", "ten", ".inf", ".nan", "1.0e+10", "[]", "true"])
def test_what_is_no_amount_is_named(amount: str) -> None:
    (problem,) = problems_of(catalogue(f"{{input: {amount}, output: 1}}"))
    assert problem.startswith("prices.p/m[0].input: ")


def test_every_problem_is_told_at_once() -> None:
    content = catalogue('[{input: 1}, {input: 1, output: 1, per: 2}, {input: 1, output: 1, from: "soon"}, cheap]')
    assert [problem.partition(": ")[0] for problem in problems_of(content)] == [
        "prices.p/m[0].output",
        "prices.p/m[1].per",
        "prices.p/m[2].from",
        "prices.p/m[3]",
    ]
    assert problems_of(catalogue("free", "prices: [1]")) == ["prices: must be a mapping of catalogue ids"]


def test_a_moment_with_a_zone_is_honoured() -> None:
    book = build(catalogue("[{input: 1, output: 1, from: 2026-01-01T02:00:00+02:00}]"), no_seed)
    assert price_at(book, day("2026-01-01")).effective_from == day("2026-01-01")


def test_faults_of_the_catalogue_that_are_not_prices_are_left_to_routing() -> None:
    content = yaml.safe_load("providers: 3\nmodels: {p/m: {provider: [p]}, p/n: text}")
    (model,) = models_of(content)
    assert (model.id, model.kind, model.upstream_model, model.price) == ("p/m", "", "m", None)
    assert list(models_of({"models": ["p/m"]})) == []
    (unknown,) = models_of({"providers": {"q": {"kind": "openai"}}, "models": {"p/m": {"provider": ["q"]}}})
    assert unknown.kind == ""
