"""Counters, gauges and histograms that cost a fraction of a microsecond, exposed in Prometheus' format.

`prometheus_client`'s own values take a lock per operation, about 1 µs; a request of the hot path has some twenty. Here a
child is a plain attribute, added to without a lock: an in-place addition of numbers makes no call between its load and its
store, and CPython switches threads only at calls and backward jumps, so it is safe from any thread.

Bind children once (`requests = registry.counter(…).labels("hit")`) and keep them; `labels` itself is a dictionary lookup.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Generic, TypeVar, overload

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

SECONDS: Final = (
    0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
)  # fmt: skip
"""Bounds for latencies, from an in-process call to a long answer."""

MAX_CHILDREN: Final = 2000
"""Label combinations kept per metric; further ones share one child whose labels are all `other`."""


class Counter:
    """A number that only rises. A metric without labels is its own only child."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1) -> None:
        """Adds `amount`, which isn't negative."""
        self.value += amount


class Gauge:
    """A number that rises and falls."""

    __slots__ = ("_read", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self._read: Callable[[], float] | None = None

    def set(self, value: float) -> None:
        """Sets it."""
        self.value = value

    def inc(self, amount: float = 1) -> None:
        """Adds `amount`."""
        self.value += amount

    def dec(self, amount: float = 1) -> None:
        """Takes `amount` away."""
        self.value -= amount

    def set_function(self, read: Callable[[], float]) -> None:
        """Lets the value be read at each scrape instead."""
        self._read = read

    def current(self) -> float:
        """The value now."""
        return self.value if self._read is None else float(self._read())


class Histogram:
    """Counts of observations in buckets, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = list(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Counts one observation."""
        index = bisect_left(self.bounds, value)
        self.counts[index] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by upper bound, as Prometheus wants them."""
        rows = []
        seen = 0
        for bound, count in zip([*map(str, self.bounds), "+Inf"], list(self.counts), strict=True):
            seen += count
            rows.append((bound, float(seen)))
        return rows


Child = TypeVar("Child", Counter, Gauge, Histogram)


class Family(Generic[Child]):
    """The children of a metric with labels."""

    def __init__(self, label_names: tuple[str, ...], create: Callable[[], Child]) -> None:
        self.label_names = label_names
        self._create: Callable[[], Child] = create
        self._children: dict[tuple[str, ...], Child] = {}

    def labels(self, *values: str, **named: str) -> Child:
        """The child with these label values, in the order of the names or by name."""
        if named:
            values = (*values, *(named[name] for name in self.label_names[len(values) :]))
        child = self._children.get(values)
        if child is not None:
            return child
        if len(values) != len(self.label_names):
            raise ValueError(f"labels {self.label_names!r} need as many values, got {values!r}")
        if len(self._children) >= MAX_CHILDREN:
            # Label values that come from outside must not fill the memory.
            values = ("other",) * len(self.label_names)
        return self._children.setdefault(values, self._create())

    def items(self) -> list[tuple[tuple[str, ...], Child]]:
        """A snapshot of label values and children."""
        return list(self._children.items())


class Registry:
    """The metrics of a process. Asking again for a name gives the metric that is there already.

    Names start with `sluice_` by themselves; counters end in `_total` when exposed.
    """

    def __init__(self) -> None:
        self.collector = CollectorRegistry(auto_describe=False)
        self._families: dict[str, tuple[str, Family[Any]]] = {}
        self.collector.register(_Families(self._families))
        ProcessCollector(registry=self.collector)
        PlatformCollector(registry=self.collector)
        GCCollector(registry=self.collector)

    @overload
    def counter(self, name: str, doc: str) -> Counter: ...
    @overload
    def counter(self, name: str, doc: str, labels: Sequence[str]) -> Family[Counter]: ...
    def counter(self, name: str, doc: str, labels: Sequence[str] = ()) -> Counter | Family[Counter]:
        """A counter, or with labels a family of them."""
        family = self._family(name.removesuffix("_total"), doc, labels, Counter)
        return family if labels else family.labels()

    @overload
    def gauge(self, name: str, doc: str) -> Gauge: ...
    @overload
    def gauge(self, name: str, doc: str, labels: Sequence[str]) -> Family[Gauge]: ...
    def gauge(self, name: str, doc: str, labels: Sequence[str] = ()) -> Gauge | Family[Gauge]:
        """A gauge, or with labels a family of them."""
        family = self._family(name, doc, labels, Gauge)
        return family if labels else family.labels()

    @overload
    def histogram(self, name: str, doc: str, *, buckets: Sequence[float] = SECONDS) -> Histogram: ...
    @overload
    def histogram(
        self, name: str, doc: str, labels: Sequence[str], *, buckets: Sequence[float] = SECONDS
    ) -> Family[Histogram]: ...
    def histogram(
        self, name: str, doc: str, labels: Sequence[str] = (), *, buckets: Sequence[float] = SECONDS
    ) -> Histogram | Family[Histogram]:
        """A histogram, or with labels a family of them. `buckets` are rising upper bounds without infinity."""
        family = self._family(name, doc, labels, lambda: Histogram(buckets))
        return family if labels else family.labels()

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.collector)

    def _family(self, name: str, doc: str, labels: Sequence[str], create: Callable[[], Child]) -> Family[Child]:
        name = name if name.startswith("sluice_") else f"sluice_{name}"
        entry = self._families.get(name)
        if entry is None:
            entry = self._families[name] = (doc, Family(tuple(labels), create))
        return entry[1]


class _Families(Collector):
    """Presents the families to prometheus_client."""

    def __init__(self, families: Mapping[str, tuple[str, Family[Any]]]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for name, (doc, family) in list(self._families.items()):
            children = family.items()
            if not children:
                continue
            kind = type(children[0][1])
            if kind is Counter:
                metric: Any = CounterMetricFamily(name, doc, labels=family.label_names)
            elif kind is Gauge:
                metric = GaugeMetricFamily(name, doc, labels=family.label_names)
            else:
                metric = HistogramMetricFamily(name, doc, labels=family.label_names)
            for values, child in children:
                if isinstance(child, Histogram):
                    metric.add_metric(values, child.buckets(), child.total)
                else:
                    metric.add_metric(values, child.current() if isinstance(child, Gauge) else child.value)
            yield metric
