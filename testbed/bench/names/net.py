"""The device class `net` beside virtio-net on TAP, between the same two VMs in turn: iperf3 and ping, IPv4 and IPv6.

The peer is the strongest that QEMU offers between VMs of one host: a TAP for each on one bridge, vnet headers,
segmentation offload, the largest MTU; the device has the same MTU. Both have one queue.
Depends on `testbed.devices` and below.
"""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from testbed import network as networks
from testbed.bed import Testbed
from testbed.bench.errors import BenchFailed
from testbed.bench.groups import Found
from testbed.bench.histogram import Histogram
from testbed.bench.names import Bench
from testbed.bench.peers import IPERF_PORT, parse_iperf
from testbed.bench.places import VM_MIB, places_for_each
from testbed.bench.rows import Row
from testbed.template_build import cpu_seconds

if TYPE_CHECKING:
    from testbed.accel import Verdict
    from testbed.bench.groups import Pace
    from testbed.bench.setting import Setting
    from testbed.vm import Vm

#: Bytes of one write of iperf3, its default; bytes of a ping behind its IP header.
WRITE, PING = 128 << 10, 64
#: Addresses of front and back end.
_DEVICE: Final = {4: ("10.79.0.1", "10.79.0.2"), 6: ("fd79::1", "fd79::2")}
_VIRTIO6: Final = ("fd78::1", "fd78::2")
_TIME: Final = re.compile(r"time=([0-9.]+) ms")


@dataclass
class _Way:
    """One row: what was taken of it so far."""

    name: str
    path: str
    mode: str
    address: str
    values: list[float] = field(default_factory=list)
    samples: list[list[int]] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def measure(setting: Setting, pace: Pace) -> tuple[Verdict, list[Found]]:
    """Both paths in turn, all that is compared in each round."""
    rounds, seconds, pings = (2, 1, 50) if pace.quick else (5, 3, 300)
    say = setting.steps.say
    pins = places_for_each()
    with networks.make(2, wish="tap") as network, \
            Testbed(accel=setting.accel, qemu=setting.qemu, boot="cold", broker=True, notify=say) as bed:
        specs = [bed.spec(name, memory_mib=VM_MIB, pin=() if pin is None else (pin,))
                 for name, pin in zip(("front", "back"), pins, strict=False)]
        bed.boot(*specs, network=network)
        front, back = bed.vms["front"], bed.vms["back"]
        for vm, address in zip((front, back), _VIRTIO6, strict=True):
            vm.succeed(f"ip -6 addr add {address}/64 dev $(ip -o -4 addr show to 10.77.0.0/16 | cut -d' ' -f2) nodad")
        options = {"mtu": networks.TAP_MTU} | {f"{role}_address": f"{_DEVICE[4][end]}/24,{_DEVICE[6][end]}/64"
                                               for end, role in enumerate(("front", "back"))}
        say("attaching the device")
        bed.devices.attach("net", "front", "back", options, wait=120)
        there = {("ivshmem", 4): _DEVICE[4][1], ("ivshmem", 6): _DEVICE[6][1], ("virtio-net", 6): _VIRTIO6[1],
                 ("virtio-net", 4): network.members[1].address}
        ways = [_Way("net", path, f"ipv{version}{turned}", address) for version in (4, 6) for turned in ("", "-reverse")
                for (path, of), address in there.items() if of == version]
        ways += [_Way("ping", path, f"ipv{version}", address) for version in (4, 6)
                 for (path, of), address in there.items() if of == version]
        for _ in range(rounds):
            for way in ways:
                say(f"{way.name} {way.mode} {way.path}")
                (_iperf if way.name == "net" else _ping)(way, front, back, seconds if way.name == "net" else pings)
        return bed.verdict, [_found(way) for way in ways]


def _iperf(way: _Way, front: Vm, back: Vm, seconds: int) -> None:
    server = back.spawn(["iperf3", "--server", "--one-off", "--port", str(IPERF_PORT)])
    try:
        back.wait_until_succeeds(f"ss -Hltn sport = {IPERF_PORT} | grep -q .", every=0.05)
        before = cpu_seconds(front.pid) + cpu_seconds(back.pid)
        options = ["--reverse"] if way.mode.endswith("-reverse") else []
        text = front.succeed(["iperf3", "--client", way.address, "--port", str(IPERF_PORT), "--json", "--time",
                              str(seconds), *options], timeout=60 + seconds)
        used = cpu_seconds(front.pid) + cpu_seconds(back.pid) - before
    finally:
        server.kill()
        server.wait(30)
    rate = parse_iperf(text)
    way.values.append(rate * 8 / 1e6)
    way.cpu.append(used / (rate * seconds / 1e9))


def _ping(way: _Way, front: Vm, back: Vm, count: int) -> None:
    before = cpu_seconds(front.pid) + cpu_seconds(back.pid)
    text = front.succeed(["busybox", "ping", "-c", str(count), "-i", "0.01", way.address], timeout=60 + count)
    way.cpu.append((cpu_seconds(front.pid) + cpu_seconds(back.pid) - before) / (count / 1e3))
    way.samples.append(parse_ping(text))


def parse_ping(text: str) -> list[int]:
    """Round trips in ns, without the first, which asks for the neighbour's address. Raises BenchFailed without any."""
    found = [round(float(time) * 1e6) for time in _TIME.findall(text)][1:]
    if not found:
        raise BenchFailed(f"ping had no answer: {text[-200:]!r}")
    return found


def _found(way: _Way) -> Found:
    cpu = statistics.fmean(way.cpu)
    note = "one queue, MTU 65521" + ("" if way.path == "ivshmem" else "; TAP, bridge, vnet headers, offloads")
    if way.name == "net":
        return Found(Row("net", way.path, "vm-vm", way.mode, "core", WRITE, "Mbit/s", len(way.values),
                         value=statistics.median(way.values), rounds=tuple(way.values), cpu_s=cpu, note=note), None)
    histogram = Histogram()
    for samples in way.samples:
        histogram.record(samples)
    at, us = histogram.percentiles(), 1e-3
    return Found(Row("ping", way.path, "vm-vm", way.mode, "core", PING, "us", histogram.count, p50=at.p50 * us,
                     p90=at.p90 * us, p99=at.p99 * us, p999=at.p999 * us, max=at.max * us, cpu_s=cpu, note=note,
                     rounds=tuple(statistics.median_low(samples) * us for samples in way.samples)), None)


BENCH = Bench("net", "a network device between two VMs beside virtio-net on TAP: iperf3 and ping", alone=measure,
              default=False, order=70)
