"""Rates and concurrency, given out in slices.

A rate is a token bucket per account: it holds a minute's worth and fills evenly. State is in memory: a restart of metering starts
with full buckets, so a rate may be exceeded once by a minute's worth then; money never depends on it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

UNLIMITED: Final = -1
_MOST_BUCKETS: Final = 300_000


@dataclass(slots=True)
class _Bucket:
    limit: int
    level: float
    at: float


class Rates:
    """Token buckets by name."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def _bucket(self, name: str, limit: int, now: float) -> _Bucket:
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._buckets[name] = _Bucket(limit, float(limit), now)
            if len(self._buckets) > _MOST_BUCKETS:
                # The one unused longest is full again by now.
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(name)
            if bucket.limit != limit:
                bucket.level = max(0.0, bucket.level + limit - bucket.limit)
                bucket.limit = limit
            bucket.level = min(float(limit), bucket.level + max(0.0, now - bucket.at) * limit / 60.0)
            bucket.at = now
        return bucket

    def take(self, limits: Mapping[str, int], wanted: int, now: float) -> tuple[int, float]:
        """Takes up to `wanted` from all buckets at once; returns how many, and the seconds until more when it is none.

        `limits` are per minute by name of the bucket; negative: unlimited. UNLIMITED is returned when all are.
        """
        buckets = [self._bucket(name, limit, now) for name, limit in limits.items() if limit >= 0]
        if not buckets:
            return UNLIMITED, 0.0
        granted = min([wanted, *(int(bucket.level) for bucket in buckets)])
        granted = max(0, granted)
        for bucket in buckets:
            bucket.level -= granted
        if granted or not wanted:
            return granted, 0.0
        waits = [(1.0 - bucket.level) * 60.0 / bucket.limit if bucket.limit else 60.0 for bucket in buckets]
        return 0, max(0.05, *waits)

    def give_back(self, names: Iterable[str], count: int) -> None:
        """Returns what was taken and not used."""
        for name in names:
            bucket = self._buckets.get(name)
            if bucket is not None:
                bucket.level = min(float(bucket.limit), bucket.level + count)

    def left(self, name: str, limit: int, now: float) -> int:
        """What a bucket holds."""
        return int(self._bucket(name, limit, now).level)


@dataclass(slots=True)
class _Share:
    granted: int
    wanted: int
    expires: float


@dataclass(slots=True)
class Concurrency:
    """Concurrent requests, shared out among leases. Each lease keeps its share until it expires or asks again."""

    _shares: dict[str, dict[str, _Share]] = field(default_factory=dict)

    def share(self, lease_id: str, limits: Mapping[str, int], wanted: int, expires: float, now: float) -> int:
        """The lease's share under every limit; UNLIMITED when there is none. `limits` by name; negative: unlimited.

        While all wishes fit each lease gets its own; when they don't, a lease that has less than an even part is let up to it by
        the others as they ask again.
        """
        bounded = {name: limit for name, limit in limits.items() if limit >= 0}
        if not bounded:
            return UNLIMITED
        # Beyond its narrowest limit no lease can be served, so a wish for more keeps nothing from others.
        granted = wanted = min(wanted, *bounded.values())
        for name, limit in bounded.items():
            shares = self._shares.setdefault(name, {})
            for other in [key for key, share in shares.items() if share.expires <= now]:
                del shares[other]
            others = [share for key, share in shares.items() if key != lease_id]
            even = max(1, limit // (len(others) + 1))
            free = limit - sum(share.granted for share in others)
            starving = any(share.granted < min(share.wanted, even) for share in others)
            granted = min(granted, max(0, min(free, even) if starving else free))
        for name in bounded:
            self._shares[name][lease_id] = _Share(granted, wanted, expires)
        return granted

    def release(self, lease_id: str) -> None:
        """A lease was returned."""
        for name in [name for name, shares in self._shares.items() if lease_id in shares]:
            del self._shares[name][lease_id]
            if not self._shares[name]:
                del self._shares[name]

    def used(self, name: str) -> int:
        """What is shared out under a limit."""
        return sum(share.granted for share in self._shares.get(name, {}).values())
