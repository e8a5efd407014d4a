from __future__ import annotations

import threading

import pytest

from services.runtime import metrics
from services.runtime.metrics import Registry


def test_the_exposition_is_what_prometheus_reads() -> None:
    registry = Registry()
    registry.counter("answers_total", "Answers.").inc(3)
    registry.gauge("open", "Open ones.", ("kind",)).labels("a").set(2)
    registry.gauge("read", "Read at the scrape.").set_function(lambda: 7)
    seconds = registry.histogram("wait_seconds", "Waiting.", buckets=(0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 3.0):
        seconds.observe(value)
    text = registry.exposition().decode()
    for line in (
        "# TYPE sluice_answers_total counter",
        "sluice_answers_total 3.0",
        'sluice_open{kind="a"} 2.0',
        "sluice_read 7.0",
        'sluice_wait_seconds_bucket{le="0.1"} 2.0',
        'sluice_wait_seconds_bucket{le="1.0"} 3.0',
        'sluice_wait_seconds_bucket{le="+Inf"} 4.0',
        "sluice_wait_seconds_count 4.0",
        "sluice_wait_seconds_sum 3.65",
    ):
        assert line in text, line
    assert "process_resident_memory_bytes" in text


def test_the_same_name_is_the_same_metric() -> None:
    registry = Registry()
    registry.counter("hits", "Hits.", ("tier",)).labels("exact").inc()
    registry.counter("hits", "Hits.", ("tier",)).labels(tier="exact").inc()
    assert 'sluice_hits_total{tier="exact"} 2.0' in registry.exposition().decode()


def test_wrong_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="need as many values"):
        Registry().counter("hits", "Hits.", ("tier",)).labels("a", "b")


def test_label_values_from_outside_are_bounded() -> None:
    family = Registry().counter("hits", "Hits.", ("model",))
    for number in range(metrics.MAX_CHILDREN + 100):
        family.labels(str(number)).inc()
    assert len(family.items()) == metrics.MAX_CHILDREN + 1
    assert dict(family.items())[("other",)].value == 100


def test_additions_from_threads_are_not_lost() -> None:
    counter = Registry().counter("n", "N.")

    def add() -> None:
        for _ in range(50_000):
            counter.inc()

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.value == 200_000
