"""The exact tier in the process: the least recently used entries leave first, bounded by number and by bytes.

Entries are kept by reference, with the time at which they end. They are grouped by owner, so that a purge or a count looks at
nobody else's.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, Generic, TypeVar

Value = TypeVar("Value")

Owner = tuple[str, str]
"""Tenant and namespace."""

ENTRY_OVERHEAD: Final = 1024
"""Bytes that an entry costs beside its value: key, links, the message object."""


class _Group:
    __slots__ = ("keys", "owner", "weight")

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.keys: set[bytes] = set()
        self.weight = 0


class _Entry(Generic[Value]):
    __slots__ = ("expire", "group", "value", "weight")

    def __init__(self, value: Value, expire: float, weight: int, group: _Group) -> None:
        self.value = value
        self.expire = expire
        self.weight = weight
        self.group = group


class ExactTier(Generic[Value]):
    """Values by key. Times are Unix times in seconds."""

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._entries: OrderedDict[bytes, _Entry[Value]] = OrderedDict()
        self._groups: dict[str, dict[str, _Group]] = {}
        self.weight = 0
        """Bytes of all entries."""

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes, now: float) -> Value | None:
        """The value, None when there is none or its time is over."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.expire <= now:
            self._remove(key)
            return None
        self._entries.move_to_end(key)
        return entry.value

    def put(self, key: bytes, value: Value, size: int, expire: float, owner: Owner) -> bool:
        """Stores `value` of `size` bytes; False when it can't fit."""
        weight = size + ENTRY_OVERHEAD
        if weight > self._max_bytes or self._max_entries == 0:
            return False
        if key in self._entries:
            self._remove(key)
        try:
            group = self._groups[owner[0]][owner[1]]
        except KeyError:
            group = self._groups.setdefault(owner[0], {})[owner[1]] = _Group(owner)
        self._entries[key] = _Entry(value, expire, weight, group)
        group.keys.add(key)
        group.weight += weight
        self.weight += weight
        while self.weight > self._max_bytes or len(self._entries) > self._max_entries:
            self._remove(next(iter(self._entries)))
        return True

    def sweep(self, now: float) -> int:
        """Removes entries whose time is over; returns how many."""
        gone = [key for key, entry in self._entries.items() if entry.expire <= now]
        for key in gone:
            self._remove(key)
        return len(gone)

    def count(self, tenant: str, namespace: str = "") -> tuple[int, int]:
        """Entries and bytes of a tenant; of one namespace when it is given."""
        groups = self._of(tenant, namespace)
        return sum(len(group.keys) for group in groups), sum(group.weight for group in groups)

    def purge(self, tenant: str, namespace: str = "") -> int:
        """Removes a tenant's entries, of one namespace when it is given; returns how many."""
        keys = [key for group in self._of(tenant, namespace) for key in group.keys]
        for key in keys:
            self._remove(key)
        return len(keys)

    def _of(self, tenant: str, namespace: str) -> list[_Group]:
        groups = self._groups.get(tenant, {})
        if not namespace:
            return list(groups.values())
        group = groups.get(namespace)
        return [] if group is None else [group]

    def _remove(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        self.weight -= entry.weight
        group = entry.group
        group.keys.discard(key)
        group.weight -= entry.weight
        if not group.keys:
            # Namespaces are the callers' words: empty ones must not pile up.
            tenant, namespace = group.owner
            del self._groups[tenant][namespace]
            if not self._groups[tenant]:
                del self._groups[tenant]
