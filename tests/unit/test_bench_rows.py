"""What a benchmark's JSON holds and refuses, and the bars judged from it."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import replace

import pytest

from testbed.bench.bars import BARS, judge
from testbed.bench.rows import Result, Row, json_schema, parse
from testbed.bench.show import crossings
from testbed.errors import SpecError


def rtt(path: str, mode: str | None, p50: float, *, api: str = "core", name: str = "rtt",
        domains: str = "vm-vm") -> Row:
    return Row(name, path, domains, mode, api, 64, "ns", 1000, p50=p50, p90=2 * p50, p99=3 * p50, p999=4 * p50,
               max=5 * p50)


def stream(path: str, mode: str | None, value: float, *, api: str = "core", domains: str = "vm-vm",
           variants: dict[str, float] | None = None) -> Row:
    return Row("stream", path, domains, mode, api, 65536, "B/s", 3, value=value, rounds=(value,),
               variants=variants or {})


def transact(path: str, mode: str | None, figure: float, depth: int | None = 1, *, api: str = "core", size: int = 64,
             domains: str = "vm-vm") -> Row:
    """One at a time `figure` ns, else so many a second."""
    if depth in (1, None):
        return dataclasses.replace(rtt(path, mode, figure, api=api, name="transact", domains=domains), size=size,
                                   outstanding=depth)
    return Row("transact", path, domains, mode, api, size, "txn/s", 3, value=figure, rounds=(figure,),
               outstanding=depth)


def bulk(path: str, value: float, size: int, strategy: str | None = None, *, touched: bool | None = None,
         api: str = "python") -> Row:
    depth, route = (2, "direct") if strategy else (None, None)
    return Row("bulk", path, "vm-vm", "poll", api if strategy else "core", size, "B/s", 3, value=value,
               rounds=(value,), outstanding=depth, strategy=strategy, route=route, touched=touched)


def idc_rows() -> Iterator[Row]:
    yield transact("ring", "poll", 500, None)
    yield transact("ivshmem", "poll", 1000)
    yield transact("ivshmem", "doorbell", 100_000)
    yield transact("ivshmem", "doorbell", 100_000, 64)
    yield transact("ivshmem", "poll", 40_000, api="python")
    yield transact("tcp", None, 400_000, None, api="python")
    yield bulk("ring", 4e9, 1 << 20)
    yield bulk("ivshmem", 3.8e9, 1 << 20, "copy", touched=False, api="core")
    for strategy, value in (("copy", 3.4e9), ("map", 9e9), ("handover", 8e9)):
        yield bulk("ivshmem", value, 1 << 20, strategy, touched=False)
    for domains in ("vm-vm", "process"):
        for size in (64, 65536):
            yield transact("idc-tcp", None, 200, api="python", size=size, domains=domains)
            yield transact("tcp", None, 150, api="python", size=size, domains=domains)
        for size in (65536, 1 << 20):
            for path, value in (("idc-tcp", 3e9), ("tcp", 4e9)):
                yield dataclasses.replace(stream(path, None, value, api="python", domains=domains), name="face",
                                          size=size)


def net_rows() -> Iterator[Row]:
    for path, rate, time in (("ivshmem", 450.0, 220.0), ("virtio-net", 300.0, 400.0)):
        for mode in ("ipv4", "ipv4-reverse", "ipv6", "ipv6-reverse"):
            yield Row("net", path, "vm-vm", mode, "core", 128 << 10, "Mbit/s", 5, value=rate, rounds=(rate,) * 5)
        for mode, took in (("ipv4", time), ("ipv6", time), ("ipv6-poll", time * 0.9 if path == "virtio-net" else 120)):
            yield Row("ping", path, "vm-vm", mode, "core", 64, "us", 100, p50=took, p90=took, p99=took, p999=took,
                      max=took, rounds=(took,) * 5)


def disk(path: str, op: str, depth: int, value: float, mode: str | None = None) -> Row:
    size, unit = (4096, "iops") if op == "randread" else (1 << 20, "MB/s")
    return Row("block", path, "vm-vm", mode, "fio", size, unit, 1, value=value, rounds=(value,), op=op, depth=depth)


def traced(name: str, mode: str, value: float, *, api: str = "core", depth: int | None = None) -> Row:
    return Row(name, "ivshmem", "process", mode, api, 64, "%", 3, value=value, rounds=(value,), outstanding=depth)


def rows() -> Iterator[Row]:
    yield from idc_rows()
    yield from net_rows()
    for op, depth, value in (("randread", 1, 300), ("randread", 32, 150), ("seqread", 1, 600)):
        yield disk("ivshmem", op, depth, value)
        yield disk("nbd-tcp", op, depth, 100)
    yield disk("ivshmem", "randread", 1, 400, "poll")
    yield disk("nbd-tcp", "randread", 1, 160, "poll")
    yield disk("ivshmem", "randread", 32, 220, "poll")
    yield disk("virtio-blk", "seqread", 1, 1000)
    for domains in ("vm-vm", "process"):
        yield rtt("limit", "poll", 100, domains=domains)
        yield rtt("limit", "doorbell", 1000, domains=domains)
        yield rtt("ivshmem", "poll", 140, domains=domains)
        yield stream("limit", "pipeline", 10e9, domains=domains)
        yield stream("ivshmem", "poll", 9e9, domains=domains)
    yield rtt("ivshmem", "doorbell", 1200)
    yield rtt("ivshmem", "adaptive", 250)
    yield rtt("ivshmem", "poll", 900, name="rtt-busy")
    yield rtt("ivshmem", "doorbell", 800, name="rtt-busy")
    yield rtt("ivshmem", "adaptive", 1700, name="rtt-busy")
    for mode in ("poll", "doorbell", "adaptive"):
        yield rtt("ivshmem", mode, 900, api="python")
    yield rtt("tcp", None, 9000, api="python")
    yield stream("tcp", None, 1e9, variants={"plain socket": 1e9, "iperf3": 0.5e9, "iperf3 --zerocopy": 0.6e9})
    yield stream("ivshmem", "poll", 4e9, api="python")
    yield stream("tcp", None, 1e9, api="python")
    yield traced("trace-bound", "off", -2.5, api="python")
    yield traced("trace-cost", "on", 12.0, api="python")
    yield traced("trace-bound", "off", 1.5)
    yield traced("trace-cost", "on", 16.0)
    yield traced("trace-cost", "on", 9.0, depth=16)


def result(*found: Row) -> Result:
    return Result("tcg", {"cpu": "one"}, found, accel_reason="because")


def test_json_is_what_the_issue_says_and_comes_back_the_same() -> None:
    whole = result(*rows())
    text = whole.as_json()
    data = json.loads(text)
    assert {"accel", "host", "results"} <= data.keys()
    for row in data["results"]:
        assert {"name", "path", "domains", "mode", "api", "size", "unit", "samples"} <= row.keys()
        assert {"p50", "p90", "p99", "p999", "max"} <= row.keys() or "value" in row
    assert parse(text, "here") == whole
    assert set(json_schema()["required"]) == {"accel", "host", "results"}


@pytest.mark.parametrize(("change", "said"), [
    (lambda data: data.pop("accel"), "accel: Field required"),
    (lambda data: data["results"][0].update(size="large"), "results.0.size"),
    (lambda data: data["results"][0].pop("p50"), "results.0 needs percentiles or a value"),
    (lambda data: data["results"][0].update(value=1.0), "results.0 needs percentiles or a value"),
])
def test_what_is_no_result_is_one_line(change: object, said: str) -> None:
    data = json.loads(result(*rows()).as_json())
    assert callable(change)
    change(data)
    with pytest.raises(SpecError, match=said) as caught:
        parse(json.dumps(data), "file.json")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("file.json is no result")


def test_every_bar_is_judged_from_the_rows() -> None:
    expected: dict[str, tuple[object, bool | None]] = {
        "vm-vm: core polled 64 B by the bare cache line": (pytest.approx(1.4), True),
        "vm-vm: core by doorbell 64 B by the bare doorbell": (pytest.approx(1.2), True),
        "vm-vm: core adaptive by the better of polled and doorbell, light load": (pytest.approx(250 / 140), True),
        "vm-vm: core adaptive by the better of polled and doorbell, both VMs busy": (pytest.approx(2.125), False),
        "vm-vm: core adaptive by the better of polled and doorbell, both VMs busy, rare messages": (None, None),
        "vm-vm: python adaptive by the better of polled and doorbell, light load": (pytest.approx(1), True),
        "vm-vm: Python polled 64 B by Python's TCP echo": (pytest.approx(0.1), True),
        "vm-vm: core stream 64 KiB by the bare copy pipeline": (pytest.approx(0.9), True),
        "vm-vm: core stream 64 KiB by iperf3": (pytest.approx(15), True),
        "vm-vm: Python stream 64 KiB by Python's TCP stream": (pytest.approx(4), False),
        "process: core polled 64 B by the bare cache line": (pytest.approx(1.4), True),
        "process: core stream 64 KiB by the bare copy pipeline": (pytest.approx(0.9), True),
        "vm-vm: transaction of 64 B in the core, polled, by the ring's round trip": (pytest.approx(2), True),
        "vm-vm: transaction of 64 B in Python, polled, by Python's TCP echo": (pytest.approx(0.1), True),
        "vm-vm: 64 transactions outstanding by doorbell, core, by one by doorbell": (pytest.approx(10), True),
        "vm-vm: bulk copy of 1 MiB, handler in the core, by the core's stream": (pytest.approx(0.95), True),
        "vm-vm: bulk copy of 1 MiB, Python, by the core's stream": (pytest.approx(0.85), True),
        "process: Python round trip, tracing off: %, the farther end of the 95 % interval": (2.5, False),
        "process: Python round trip, tracing on: %": (12.0, True),
        "process: core round trip, tracing off: %, the farther end of the 95 % interval": (1.5, True),
        "process: core round trip, tracing on: %": (16.0, False),
        "process: core transactions, 16 under way, tracing off: %, the farther end of the 95 % interval": (None, None),
        "process: core transactions, 16 under way, tracing on: %": (9.0, True),
        "vm-vm: ms to connect a device, its link plugged before, p50": (None, None),
        "vm-vm: ms to connect a device, its link hot-plugged, p50": (None, None),
        "vm-vm: block randread, depth 1, by NBD over TCP": (pytest.approx(3), True),
        "vm-vm: block randread, depth 32, by NBD over TCP": (pytest.approx(1.5), False),
        "vm-vm: block, told to poll, randread, depth 1, by NBD over TCP": (pytest.approx(2.5), True),
        "vm-vm: block, told to poll, randread, depth 32, by NBD over TCP": (pytest.approx(2.2), True),
        "vm-vm: block seqread, depth 1, by NBD over TCP": (pytest.approx(6), True),
        "vm-vm: block seqwrite, depth 1, by NBD over TCP": (None, None),
    }
    for mode in ("ipv4", "ipv4-reverse", "ipv6", "ipv6-reverse"):
        expected[f"vm-vm: TCP over {mode}, device net by virtio-net on TAP"] = (pytest.approx(1.5), True)
        expected[f"vm-vm: TCP over {mode}, device net, told to poll, by virtio-net on TAP"] = (None, None)
    for mode in ("ipv4", "ipv6"):
        expected[f"vm-vm: ping over {mode}, device net by virtio-net on TAP"] = (pytest.approx(0.55), True)
    polled = "vm-vm: ping over {}, device net, told to poll, by virtio-net on TAP"
    expected |= {polled.format("ipv4"): (None, None), polled.format("ipv6"): (pytest.approx(1 / 3), True)}
    for domains in ("process", "vm-vm"):
        for size in (64, 65536):
            expected[f"{domains}: transactions of {size} B over TCP by a plain socket, Python"] = (
                pytest.approx(0.75), True)
        for size in (65536, 1 << 20):
            expected[f"{domains}: stream face over TCP in pieces of {size} B by a plain socket, Python"] = (
                pytest.approx(0.75), True)
    assert {verdict.bar.what: (verdict.have, verdict.held) for verdict in judge(result(*rows()))} == expected


def test_where_to_map_beats_to_copy_is_said() -> None:
    found = [bulk("ivshmem", value, size, strategy, touched=touched)
             for touched in (False, True)
             for size, figures in ((4096, (5, 4, 3)), (65536, (5, 6, 4)), (1 << 20, (5, 6, 7)))
             for strategy, value in zip(("copy", "map", "handover"), figures, strict=True)
             if not (touched and size > 4096)]
    assert crossings(found) == ["map beats copy from 64 KiB on, untouched",
                                "handover beats copy from 1 MiB on, untouched",
                                "map beats copy at no size up to 4 KiB, every byte summed",
                                "handover beats copy at no size up to 4 KiB, every byte summed"]
    assert crossings(list(rows()))[0] == "map beats copy from 1 MiB on, untouched"
    assert crossings([]) == []


def test_what_a_row_of_the_api_is_comes_back_from_json() -> None:
    whole = result(*idc_rows())
    assert parse(whole.as_json(), "here") == whole
    (row,) = [row for row in json.loads(whole.as_json())["results"] if row.get("strategy") == "map"]
    assert (row["route"], row["touched"], row["outstanding"]) == ("direct", False, 2)


@pytest.mark.parametrize(("mode", "median", "held"), [("shared", 49.0, True), ("shared", 51.0, False),
                                                      ("hotplug", 1500.0, True), ("hotplug", 1501.0, False)])
def test_connecting_is_judged_in_milliseconds(mode: str, median: float, held: bool) -> None:
    row = Row("connect", "ivshmem", "vm-vm", mode, "python", 0, "ms", 3, p50=median, p90=median, p99=median,
              p999=median, max=median)
    judged = [verdict for verdict in judge(result(row)) if verdict.held is not None]
    assert [(verdict.have, verdict.held) for verdict in judged] == [(median, held)]


def test_a_bar_without_its_rows_is_open() -> None:
    assert [(verdict.have, verdict.held) for verdict in judge(result())] == [(None, None)] * len(BARS)


def test_a_row_of_one_variant_only_is_judged_by_its_name() -> None:
    alone = dataclasses.replace(stream("tcp", None, 0.3e9), variant="plain socket")
    found = [row for row in rows() if (row.name, row.path) != ("stream", "tcp")]
    (verdict,) = [verdict for verdict in judge(result(*found, alone)) if "iperf3" in verdict.bar.what]
    assert verdict.held is None


def test_rounds_are_compared_with_their_neighbours() -> None:
    """Half of the run was slow for all: the ratio in each round is what it would have been on a quiet machine."""
    fast, slow = 100.0, 40.0
    ours = replace(stream("ivshmem", "poll", slow), rounds=(slow, slow, slow, fast, fast))
    limit = replace(stream("limit", "pipeline", fast), rounds=(slow, slow, fast, fast, fast))
    (verdict,) = [verdict for verdict in judge(result(ours, limit)) if verdict.have is not None]
    assert (verdict.have, verdict.held) == (1.0, True)


def test_the_rounds_of_the_idc_rows_are_compared_too_and_their_range_is_told() -> None:
    ring = replace(transact("ring", "poll", 500, None), rounds=(500, 1000, 500))
    ours = replace(transact("ivshmem", "poll", 1000), rounds=(1000, 4000, 2000))
    (verdict,) = [verdict for verdict in judge(result(ring, ours)) if verdict.have is not None]
    assert (verdict.have, verdict.least, verdict.most, verdict.range) == (4.0, 2.0, 4.0, "2-4")
    alone = [verdict for verdict in judge(result(replace(ring, rounds=()), ours)) if verdict.have is not None]
    assert [(verdict.have, verdict.range) for verdict in alone] == [(2.0, "")]


@pytest.mark.parametrize(("samples", "told"), [
    (99, (10, None, None, None, 50)), (999, (10, 20, None, None, 50)), (9_999, (10, 20, 30, None, 50)),
    (10_000, (10, 20, 30, 40, 50)),
])
def test_a_tail_is_told_where_ten_samples_lie_beyond(samples: int, told: tuple[float | None, ...]) -> None:
    assert replace(rtt("ivshmem", "poll", 10), samples=samples).told == told


def test_tcp_over_less_than_a_tap_is_no_peer() -> None:
    ours, tcp = rtt("ivshmem", "poll", 100, api="python"), rtt("tcp", None, 2000, api="python")
    call, echo = transact("ivshmem", "poll", 40_000, api="python"), transact("tcp", None, 400_000, None, api="python")
    for network, judged in (("tap (bridge)", 2), ("sockets (no right to make TAPs)", 0), ("", 2)):
        found = dataclasses.replace(result(ours, tcp, call, echo), host={"network": network})
        assert sum(verdict.held is not None for verdict in judge(found)) == judged
