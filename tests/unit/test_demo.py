"""The demo's report without its VMs: what sockperf says, the JSON, the tables."""

import io
import json

import pytest
from rich.console import Console

from testbed.demo import DemoFailed, Report, Row, parse_sockperf, show

#: sockperf 3.7 in a guest: ping-pong --tcp -m 64 -t 1 --full-rtt; its colours and all.
SOCKPERF = """\
sockperf: \x1b[2;35m== version #3.7-no.git == \x1b[0m
sockperf: [Valid Duration] RunTime=0.544 sec; SentMessages=994; ReceivedMessages=994
sockperf: \x1b[2;35m====> avg-rtt=547.172 (std-dev=283.825)\x1b[0m
sockperf: # dropped messages = 0; # duplicated messages = 0; # out-of-order messages = 0
sockperf: Summary: Round trip is 547.172 usec
sockperf: \x1b[2;35mTotal 994 observations\x1b[0m; each percentile contains 9.94 observations
sockperf: ---> <MAX> observation = 3965.953
sockperf: ---> percentile 99.999 = 3965.953
sockperf: ---> percentile 99.990 = 3965.953
sockperf: ---> percentile 99.900 = 3911.241
sockperf: ---> percentile 99.000 = 2006.610
sockperf: ---> percentile 90.000 =  674.687
sockperf: ---> percentile 75.000 =  565.113
sockperf: ---> percentile 50.000 =  480.175
sockperf: ---> percentile 25.000 =  442.825
sockperf: ---> <MIN> observation =  322.250
"""


def report() -> Report:
    rates = [Row("file", path, mode, 10, "B/s", 1, value=value, seconds=0.5)
             for mode in ("front to back", "back to front") for path, value in (("ivshmem", 3e9), ("tcp", 1e8))]
    streams = [Row("stream", path, None, 65536, "B/s", 1, value=value)
               for path, value in (("ivshmem", 2e9), ("tcp", 1e9))]
    trips = [Row("rtt", "ivshmem", "poll", 64, "ns", 9, per=10, p50=400.0, p90=1.0, p99=1.0, p999=1.0, max=1.0),
             parse_sockperf(SOCKPERF)]
    return Report("tcg", "no [kvm] here", "a [bold]name", 10, "ab" * 32, "tap", results=rates + streams + trips)


def test_sockperf_is_read_in_nanoseconds() -> None:
    row = parse_sockperf(SOCKPERF)
    assert (row.p50, row.p90, row.p99, row.p999, row.max) == pytest.approx((480175, 674687, 2006610, 3911241, 3965953))
    assert (row.samples, row.unit, row.path) == (994, "ns", "tcp")


@pytest.mark.parametrize("missing", ["percentile 99.900", "<MAX>", "observations\x1b"])
def test_a_sockperf_that_measured_nothing_is_a_failure(missing: str) -> None:
    with pytest.raises(DemoFailed, match="nothing of percentiles"):
        parse_sockperf(SOCKPERF.replace(missing, ""))


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
