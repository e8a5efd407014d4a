"""What needs no server; the rest is in tests/conformance/jobs."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.batching.adapters.jetstream import text_of, token


@given(st.text(max_size=60))
def test_a_token_is_one_token_and_has_its_text_back(text: str) -> None:
    made = token(text)
    assert re.fullmatch(r"[A-Za-z0-9_=-]+", made)
    assert text_of(made) == text


@given(st.text(max_size=10), st.text(max_size=10))
def test_different_texts_have_different_tokens(one: str, two: str) -> None:
    assert (token(one) == token(two)) is (one == two)


@pytest.mark.parametrize("text", ["a.b", "*", ">", "a b", "", "x" * 129, "ä", "=YQ"])
def test_what_reaches_further_is_encoded(text: str) -> None:
    assert token(text).startswith("=")


def test_plain_names_stay_readable() -> None:
    assert token("acme_1-x") == "acme_1-x"


@pytest.mark.parametrize("foreign", ["", "a.b", "=YQ", "=!!!", "=_w", "ä", "a=b"])
def test_a_token_that_nobody_made_is_refused(foreign: str) -> None:
    with pytest.raises(ValueError):
        text_of(foreign)
