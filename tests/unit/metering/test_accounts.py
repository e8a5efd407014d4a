from __future__ import annotations

import dataclasses

import pytest

from services.metering.accounts import Payer, is_id
from tests.conformance.ledger.examples import NOW, key


def test_a_key_is_active_until_it_ends_or_is_revoked() -> None:
    endless = key(expire_time=None)
    assert endless.is_active(NOW)
    assert not dataclasses.replace(endless, revoke_time=NOW + 5).is_active(NOW)
    ending = key(expire_time=NOW + 10)
    assert ending.is_active(NOW + 9.999)
    assert not ending.is_active(NOW + 10)


def test_a_payer_draws_on_its_key_its_project_and_its_tenant() -> None:
    assert Payer("t", "p", "k").accounts == ("key/k", "project/t/p", "tenant/t")


@pytest.mark.parametrize("text", ["a", "0", "acme", "a-b-", "0" * 63])
def test_ids(text: str) -> None:
    assert is_id(text)


@pytest.mark.parametrize("text", ["", "-a", "A", "a_b", "a/b", "a b", "ä", "a\n", "0" * 64])
def test_what_is_no_id(text: str) -> None:
    assert not is_id(text)
