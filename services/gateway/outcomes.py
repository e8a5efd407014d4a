"""What callers said of their answers."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Report:
    """One caller's verdict on one answer."""

    served: bool
    score: float | None
    comment: str


class Outcomes:
    """The last report per operation, and sums over all of them. Remembers the latest `max_count` operations; the sums of those that
    were forgotten stay, and a second report on one of them counts again.
    """

    def __init__(self, max_count: int) -> None:
        self._max_count = max_count
        self._reports: OrderedDict[tuple[str, str], Report] = OrderedDict()
        self.served_count = 0
        self.failed_count = 0

    def report(self, tenant_id: str, operation_id: str, report: Report) -> None:
        """Takes a report in; a later one for the same operation of the same tenant replaces it."""
        key = (tenant_id, operation_id)
        previous = self._reports.pop(key, None)
        if previous is not None:
            self._add(previous, -1)
        self._reports[key] = report
        self._add(report, 1)
        if len(self._reports) > self._max_count:
            self._reports.popitem(last=False)

    def get(self, tenant_id: str, operation_id: str) -> Report | None:
        """The last report, if it is still remembered."""
        return self._reports.get((tenant_id, operation_id))

    def _add(self, report: Report, count: int) -> None:
        if report.served:
            self.served_count += count
        else:
            self.failed_count += count
