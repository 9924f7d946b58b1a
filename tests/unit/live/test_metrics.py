"""Metrics: read back by the official parser, named by the conventions, bounded, and served."""

from __future__ import annotations

import re
import threading
import urllib.request
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from live_looks import bed, calls
from ports import free_port
from prometheus_client.parser import text_string_to_metric_families

from testbed.errors import SpecError
from testbed.live import metrics
from testbed.live.collect import BedNow, ProcessNow

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prometheus_client import Metric

STEPS = {"front": [{"state": "connected", "since": 1.0, "why": 'a "quoted"\nword'}], "back": []}
DEVICE = {"class": "echo", "number": "0", "frontend": "a", "backend": "b", "region": "link", "ends": STEPS}


def parsed(*beds: BedNow) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(metrics.exposition(beds).decode())}


def value(family: Metric, **labels: str) -> float:
    (sample,) = [sample for sample in family.samples if labels.items() <= sample.labels.items()]
    return float(sample.value)


def looked() -> BedNow:
    host = ProcessNow("fd holder", "running", 1, None, None)
    return replace(bed(1.0, calls(316, 300, 20, 3_000_000, 25), cpu=2.5), devices=(DEVICE,), processes=(host,))


def test_the_official_parser_reads_what_was_looked_at() -> None:
    found = parsed(looked())
    assert value(found["idc_testbed_testbeds"]) == 1
    assert value(found["idc_testbed_vm_cpu_seconds"], vm="a") == 2.5
    assert value(found["idc_testbed_vm_memory_private_bytes"], vm="a") == 3 << 20
    assert value(found["idc_testbed_ring_messages"], producer="a", consumer="b") == 300
    assert value(found["idc_testbed_doorbells"], producer="a", end="producer") == 25
    assert value(found["idc_testbed_doorbell_faults"], sender="a", fate="dropped") == 2
    assert value(found["idc_testbed_device_state"], end="front", state="connected") == 1
    assert value(found["idc_testbed_device_state"], end="back", state="closed") == 1
    trips = found["idc_testbed_endpoint_round_trip_seconds"]
    assert trips.type == "histogram"
    buckets = [sample for sample in trips.samples if sample.name.endswith("_bucket")]
    assert [sample.value for sample in buckets] == sorted(sample.value for sample in buckets)
    assert buckets[-1].labels["le"] == "+Inf"
    assert [sample.value for sample in trips.samples if sample.name.endswith("_count")] == [20]
    assert [sample.value for sample in trips.samples if sample.name.endswith("_sum")] == [pytest.approx(0.003)]


def test_names_follow_the_conventions() -> None:
    for family in parsed(looked()).values():
        assert re.fullmatch(r"idc_testbed_[a-z_]+", family.name)
        assert family.documentation.rstrip() == family.documentation != ""
        assert not family.name.endswith(("_total", "_count", "_sum", "_bucket"))  # what the parser takes off, or adds
        for unit in ("milliseconds", "_ms", "_us", "_ns", "kib", "_kb", "percent"):
            assert unit not in family.name, "base units only"
        for sample in family.samples:
            assert (family.type == "counter") == sample.name.endswith("_total")
            assert set(sample.labels) <= {"testbed", "vm", "accel", "process", "region", "member", "sender", "receiver",
                                          "fate", "channel", "producer", "consumer", "end", "class", "number",
                                          "frontend", "backend", "state", "le"}


def test_a_testbed_that_does_not_answer_is_down_and_no_testbed_is_none() -> None:
    found = parsed(BedNow("t", 1.0, trouble="does not answer"), looked())
    assert [sample.value for sample in found["idc_testbed_up"].samples] == [0, 1]
    assert value(parsed()["idc_testbed_testbeds"]) == 0


def test_there_is_a_bound_and_what_is_beyond_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sum(len(family.samples) for family in parsed(looked()).values())
    monkeypatch.setattr(metrics, "MOST", 20)
    found = parsed(looked())
    left_out = value(found["idc_testbed_series_left_out"])
    assert sum(len(family.samples) for family in found.values()) <= 21
    assert left_out > whole - 25


class Looks:
    """Counts how often it was asked to look."""

    def __init__(self) -> None:
        self.count = 0

    def look(self) -> Sequence[BedNow]:
        self.count += 1
        return [looked()]


def test_they_are_served_to_several_at_a_time() -> None:
    looks: Any = Looks()
    answers: list[bytes] = []
    with metrics.serve(looks, "127.0.0.1", 0) as serving:
        def get() -> None:
            with urllib.request.urlopen(f"http://127.0.0.1:{serving.port}/metrics", timeout=20) as answer:
                assert answer.headers["Content-Type"].startswith("text/plain")
                answers.append(answer.read())

        threads = [threading.Thread(target=get) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers) == 4
    for answer in answers:
        assert "idc_testbed_up" in {family.name for family in text_string_to_metric_families(answer.decode())}
    assert 1 <= looks.count <= 4


def test_a_port_that_is_taken_is_named() -> None:
    looks: Any = Looks()
    port = free_port()
    with metrics.serve(looks, "127.0.0.1", port), \
            pytest.raises(SpecError, match=f"cannot listen at 127.0.0.1:{port}: Address already in use"), \
            metrics.serve(looks, "127.0.0.1", port):
        pass
    assert looks.count == 0
