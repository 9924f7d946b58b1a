"""A run that has everything a report draws, made up: figures of the right kind and size, and nothing measured."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from testbed.bench.histogram import Histogram
from testbed.bench.rows import Result, Row
from testbed.report.parts import Run

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Path, mode and interface.
Way = tuple[str, str | None, str]
HOST = {"cpu": "<b>a & processor</b>", "cpus": 2, "kernel": "6.1", "commit": "0123456789abcdef", "qemu": "QEMU 7.2"}
ROUND_TRIPS: dict[Way, float] = {
    ("limit", "poll", "core"): 300.0, ("limit", "doorbell", "core"): 90e3, ("ivshmem", "poll", "core"): 500.0,
    ("ivshmem", "doorbell", "core"): 120e3, ("ivshmem", "adaptive", "core"): 600.0,
    ("ivshmem", "poll", "python"): 20e3, ("ivshmem", "doorbell", "python"): 200e3,
    ("ivshmem", "adaptive", "python"): 22e3,
}  # fmt: skip
PEERS = {"vm-vm": ["tcp"], "process": ["unix", "iceoryx2"]}
SIZES = [64, 1024, 4096, 16384, 65536, 262144, 1048576]


def times(rng: random.Random, name: str, where: str, key: Way, middle: float,
          **more: object) -> tuple[Row, Histogram]:  # fmt: skip
    """Round trips with a tail."""
    histogram = Histogram()
    histogram.record(int(middle * rng.lognormvariate(0, 0.1) * (20 if rng.random() < 0.005 else 1)) for _ in range(999))
    at = histogram.percentiles()
    path, mode, api = key
    return Row(name, path, where, mode, api, 64, "ns", 999, p50=at.p50, p90=at.p90, p99=at.p99, p999=at.p999,
               max=at.max, rounds=(at.p50, at.p50 * 1.05), cpu_s=middle / 1e6,
               cpu={"near": middle / 2e6, "host_near": middle / 2e6}, **more), histogram  # type: ignore[arg-type]


def rates(where: str, name: str, key: Way, size: int, unit: str, value: float, **more: object) -> Row:
    """One with a spread."""
    path, mode, api = key
    return Row(name, path, where, mode, api, size, unit, 2, value=value, rounds=(value * 0.9, value * 1.1),
               cpu_s=1e9 / value if unit == "B/s" else 1.0 if name in ("block", "net", "ping") else None, **more)  # type: ignore[arg-type]


def rows(where: str) -> Iterator[tuple[Row, Histogram | None]]:
    """All names that are drawn."""
    rng = random.Random(where)
    peers: list[Way] = [(path, None, api) for path in PEERS[where] for api in ("core", "python")]
    key: Way
    for name in ("rtt", "rtt-open", "rtt-busy"):
        for key, middle in ROUND_TRIPS.items():
            yield times(rng, name, where, key, middle)
        for each in peers if name == "rtt" else []:
            yield times(rng, name, where, each, 350e3)
    for key in [*ROUND_TRIPS, *peers]:
        if key[0] != "limit":
            yield rates(where, "rate", key, 64, "msg/s", 1e9 / ROUND_TRIPS.get(key, 100e3)), None
            yield times(rng, "transact", where, key, 2 * ROUND_TRIPS.get(key, 100e3), outstanding=1)
            yield rates(where, "transact", key, 64, "txn/s", 5e9 / ROUND_TRIPS.get(key, 1e6), outstanding=64), None
    streams: dict[Way, float] = {
        ("limit", "pipeline", "core"): 5e9, ("limit", "copy", "core"): 9e9, ("ivshmem", "poll", "core"): 4.6e9,
        ("ivshmem", "poll", "python"): 2e9, **dict.fromkeys(peers, 6e8)}  # fmt: skip
    for size in SIZES:
        for each, most in streams.items():
            yield rates(where, "stream", each, size, "B/s", most * size / (size + 4096)), None
        yield rates(where, "bulk", ("ring", "poll", "core"), size, "B/s", 4.6e9 * size / (size + 4096)), None
        for strategy, most, half in (("copy", 3e9, 1e5), ("map", 2e10, 1e6), ("handover", 1.5e10, 9e5)):
            for touched in (False, True):
                value = most * size / (size + half) / (3 if touched else 1)
                yield rates(where, "bulk", ("ivshmem", "poll", "python"), size, "B/s", value, outstanding=2,
                            strategy=strategy, touched=touched), None  # fmt: skip


def made_up(accel: str = "tcg", *, domains: tuple[str, ...] = ("vm-vm", "process"), devices: bool = True,
            names: tuple[str, ...] = ()) -> Run:  # fmt: skip
    """The whole run, or what of it has these names."""
    found = [each for where in domains for each in rows(where) if not names or each[0].name in names]
    if devices:
        found += [(rates("vm-vm", "ping", (path, "ipv4", "core"), 64, "us", value), None)
                  for path, value in (("ivshmem", 400.0), ("virtio-net", 700.0))]
        found += [(rates("vm-vm", "block", (path, None, "fio"), 4096, "iops", value, op="randread", depth=1), None)
                  for path, value in (("ivshmem", 5000.0), ("nbd-tcp", 1500.0), ("virtio-blk", 3000.0))]
        found += [(rates("vm-vm", "net", (path, "ipv6-reverse", "core"), 0, "Mbit/s", value), None)
                  for path, value in (("ivshmem", 9000.0), ("virtio-net", 4000.0))]
    result = Result(accel, HOST, tuple(row for row, _ in found), accel_reason="asked for", quick=True,
                    started="2026-01-02T03:04:05+00:00", absent=("vsock: <none>",))  # fmt: skip
    return Run(7, result, {place: histogram for place, (_, histogram) in enumerate(found) if histogram is not None})
