from __future__ import annotations

import random

from services.caching.exact import ENTRY_OVERHEAD, ExactTier

OWNER = ("acme", "default")


def test_an_entry_ends_with_its_time() -> None:
    tier: ExactTier[str] = ExactTier(10, 100_000)
    assert tier.put(b"k", "v", 1, 100.0, OWNER)
    assert tier.get(b"k", 99.9) == "v"
    assert tier.get(b"k", 100.0) is None
    assert tier.weight == 0


def test_the_least_recently_used_leaves_first() -> None:
    tier: ExactTier[int] = ExactTier(2, 100_000)
    for number in (1, 2):
        tier.put(bytes([number]), number, 1, 10.0, OWNER)
    assert tier.get(b"\x01", 0.0) == 1
    tier.put(b"\x03", 3, 1, 10.0, OWNER)
    assert tier.get(b"\x02", 0.0) is None
    assert tier.get(b"\x01", 0.0) == 1


def test_what_is_larger_than_everything_is_refused() -> None:
    tier: ExactTier[int] = ExactTier(10, ENTRY_OVERHEAD + 10)
    assert tier.put(b"a", 1, 10, 10.0, OWNER)
    assert not tier.put(b"b", 1, 11, 10.0, OWNER)
    assert tier.get(b"a", 0.0) == 1
    assert not ExactTier[int](0, 10_000_000).put(b"a", 1, 1, 10.0, OWNER)


def test_a_purge_takes_one_namespace_of_one_tenant() -> None:
    tier: ExactTier[int] = ExactTier(10, 100_000)
    for number, owner in enumerate((("a", "x"), ("a", "x"), ("a", "y"), ("b", "x"))):
        tier.put(bytes([number]), number, 1, 10.0, owner)
    assert tier.count("a") == (3, 3 * (1 + ENTRY_OVERHEAD))
    assert tier.purge("a", "x") == 2
    assert tier.count("a")[0] == 1
    assert tier.purge("a") == 1
    assert len(tier) == 1
    assert tier.get(b"\x03", 0.0) == 3


def test_bounds_and_books_hold_under_any_order_of_calls() -> None:
    chance = random.Random(7)
    tier: ExactTier[int] = ExactTier(20, 20 * (ENTRY_OVERHEAD + 500))
    for step in range(5000):
        now = float(step)
        key = bytes([chance.randrange(60)])
        owner = (chance.choice("abc"), chance.choice("xy"))
        match chance.randrange(6):
            case 0:
                tier.get(key, now)
            case 1:
                tier.purge(owner[0], chance.choice(("", owner[1]))) if chance.random() < 0.1 else None
            case 2:
                tier.sweep(now)
            case _:
                tier.put(key, step, chance.randrange(2000), now + chance.randrange(50), owner)
        assert len(tier) <= 20
        assert tier.weight <= 20 * (ENTRY_OVERHEAD + 500)
        counts = [tier.count(tenant) for tenant in "abc"]
        assert (sum(count for count, _ in counts), sum(weight for _, weight in counts)) == (len(tier), tier.weight)
    tier.sweep(1e9)
    assert (len(tier), tier.weight) == (0, 0)
