"""The demo's report without its VMs: the JSON, the tables."""

import io
import json

import pytest
from rich.console import Console

from testbed.demo import Report, Row, show


def report() -> Report:
    rates = [Row("file", path, mode, 10, "B/s", 1, value=value, seconds=0.5)
             for mode in ("front to back", "back to front") for path, value in (("ivshmem", 3e9), ("tcp", 1e8))]
    streams = [Row("stream", path, None, 65536, "B/s", 1, value=value)
               for path, value in (("ivshmem", 2e9), ("tcp", 1e9))]
    trips = [Row("rtt", "ivshmem", "poll", 64, "ns", 9, per=10, p50=400.0, p90=1.0, p99=1.0, p999=1.0, max=1.0),
             Row("rtt", "tcp", None, 64, "ns", 994, p50=480175.0, p90=1.0, p99=1.0, p999=1.0, max=1.0, note="sockperf")]
    return Report("tcg", "no [kvm] here", "a [bold]name", 10, "ab" * 32, "tap", results=rates + streams + trips)


def test_the_tables_hold_every_figure_and_take_names_as_they_are() -> None:
    out = io.StringIO()
    show(report(), Console(file=out, width=80, highlight=False))
    text = out.getvalue()
    assert "a [bold]name" in text
    assert "no [kvm] here" in text
    assert [line.split()[-1] for line in text.splitlines() if line.lstrip().startswith(("file,", "memory to"))] == [
        "30.0x", "30.0x", "2.0x"]
    assert "1200.4x" in text  # sockperf's median by ours
    assert max(map(len, text.splitlines())) <= 80


def test_the_json_is_what_the_tables_are_made_from() -> None:
    data = json.loads(report().as_json())
    assert (data["accel"], data["accel_reason"], data["sha256"]) == ("tcg", "no [kvm] here", "ab" * 32)
    assert [row["name"] for row in data["results"]] == ["file"] * 4 + ["stream"] * 2 + ["rtt"] * 2
    assert "p50" not in data["results"][0], "a figure that was not measured is absent"
    assert data["results"][-1]["p50"] == pytest.approx(480175)
