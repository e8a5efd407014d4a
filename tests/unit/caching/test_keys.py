from __future__ import annotations

import itertools

from services.caching import keys


def test_every_field_is_part_of_the_key() -> None:
    fields = ("tenant", "namespace", "model", "version", 1, "scope")
    prefixes = {keys.prefix(*fields)}
    for place, value in enumerate(("x", "x", "x", "x", 2, "x")):
        changed = [*fields[:place], value, *fields[place + 1 :]]
        prefixes.add(keys.prefix(*changed))  # type: ignore[arg-type]
    assert len(prefixes) == 7
    assert len({keys.exact_key(prefix, b"c") for prefix in prefixes}) == 7


def test_no_two_lists_of_fields_give_the_same_bytes() -> None:
    words = ("", "a", "1:a", "a1:", "1", "0:", "é", "a1:a")
    seen = {keys.prefix(a, b, c, d, 0, e) for a, b, c, d, e in itertools.product(words, repeat=5)}
    assert len(seen) == len(words) ** 5


def test_key_and_scope_of_the_same_bytes_have_nothing_in_common() -> None:
    key = keys.exact_key(b"p", b"c")
    assert len(key) == keys.KEY_BYTES
    assert keys.exact_key(b"p", b"d") != key
    assert key[: keys.SCOPE_BYTES] != keys.scope_fingerprint(b"p", b"c")


def test_a_partition_suits_every_engine() -> None:
    assert keys.partition("a.*>/é") != keys.partition("a.*>/e")
    assert set(keys.partition("a.*>/é")) <= set("0123456789abcdef")
