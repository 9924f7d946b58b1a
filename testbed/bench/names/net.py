"""The device class `net` beside virtio-net on TAP, between the same two VMs in turn: iperf3 and ping, IPv4 and IPv6.

The peer is the strongest that QEMU offers between VMs of one host: a TAP for each on one bridge, vnet headers,
segmentation offload, the largest MTU; the device has the same MTU. Both have one queue. The device is measured twice:
as it is by default, and told to poll (modes that end in "-poll"), by a device of its own that is asleep while others
are measured. virtio-net has no such thing, but part of what polling gains is that the VM's CPU does not halt; so its
pings are measured with that, too: a loop of SCHED_IDLE in both VMs.
Depends on `testbed.devices` and below.
"""

from __future__ import annotations

import contextlib
import re
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from testbed import network as networks
from testbed.bed import Testbed
from testbed.bench import facts
from testbed.bench.errors import BenchFailed
from testbed.bench.groups import Found
from testbed.bench.histogram import Histogram
from testbed.bench.names import Alone, Bench
from testbed.bench.peers import IPERF_INTERVAL, IPERF_PORT, parse_iperf_intervals
from testbed.bench.places import VM_MIB, places_for_each
from testbed.bench.rows import Row
from testbed.template_build import cpu_seconds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.bench.groups import Pace
    from testbed.bench.setting import Setting
    from testbed.vm import Vm

#: Bytes of one write of iperf3, its default; bytes of a ping behind its IP header.
WRITE, PING = 128 << 10, 64
#: Addresses of front and back end.
_DEVICE: Final = {4: ("10.79.0.1", "10.79.0.2"), 6: ("fd79::1", "fd79::2")}
_POLLING: Final = {4: ("10.80.0.1", "10.80.0.2"), 6: ("fd80::1", "fd80::2")}
#: Of the device that is told to poll, microseconds: two of ping's intervals.
POLL: Final = 20_000
_VIRTIO6: Final = ("fd78::1", "fd78::2")
_TIME: Final = re.compile(r"time=([0-9.]+) ms")


@dataclass
class _Way:
    """One row: what was taken of it so far."""

    name: str
    path: str
    mode: str
    address: str
    awake: bool = False  # the VMs' CPUs, by a loop that gives way to all
    values: list[float] = field(default_factory=list)
    samples: list[list[int]] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def reverse(self) -> bool:
        """Whether the far VM sends."""
        return "reverse" in self.mode.split("-")


def measure(setting: Setting, pace: Pace) -> Alone:
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
        for number, (poll, addresses) in enumerate(((0, _DEVICE), (POLL, _POLLING))):
            say("attaching the device" + f", polling for {poll / 1e3:g} ms" * bool(poll))
            ends = {f"{role}_address": f"{addresses[4][end]}/24,{addresses[6][end]}/64"
                    for end, role in enumerate(("front", "back"))}
            bed.devices.attach("net", "front", "back", {"mtu": networks.TAP_MTU, "poll": poll, **ends},
                               number=str(number), wait=120)
        taken = ways(network.members[1].address)
        for _ in range(rounds):
            for way in taken:
                say(f"{way.name} {way.mode} {way.path}")
                (_iperf if way.name == "net" else _ping)(way, front, back, seconds if way.name == "net" else pings)
        return Alone(bed.verdict, [_found(way) for way in taken], facts.of_testbed(bed))


def ways(virtio: str) -> list[_Way]:
    """In the order that they take turns in; `virtio` is the far VM's address of virtio-net."""
    there = {4: virtio, 6: _VIRTIO6[1]}
    found = [way for version in (4, 6) for turned in ("", "-reverse")
            for mode in (f"ipv{version}{turned}",)
            for way in (_Way("net", "ivshmem", mode, _DEVICE[version][1]),
                        _Way("net", "virtio-net", mode, there[version]),
                        _Way("net", "ivshmem", f"{mode}-poll", _POLLING[version][1]))]
    return found + [way for version in (4, 6) for mode in (f"ipv{version}",)
                   for way in (_Way("ping", "ivshmem", mode, _DEVICE[version][1]),
                               _Way("ping", "virtio-net", mode, there[version]),
                               _Way("ping", "ivshmem", f"{mode}-poll", _POLLING[version][1]),
                               _Way("ping", "virtio-net", f"{mode}-poll", there[version], awake=True))]


@contextlib.contextmanager
def kept_awake(*vms: Vm) -> Iterator[None]:
    """Keep the VMs' CPUs from halting, with a loop that gives way to whatever else wants to run (sched(7))."""
    with contextlib.ExitStack() as stack:
        for vm in vms:
            # sched(7): SCHED_IDLE ranks a thread within its session's group only, so the group is made the least one
            loop = vm.spawn("echo 19 > /proc/self/autogroup; exec chrt --idle 0 sh -c 'while :; do :; done'")
            stack.callback(loop.wait, 30)
            stack.callback(loop.kill)
        yield


def _iperf(way: _Way, front: Vm, back: Vm, seconds: int) -> None:
    said = ["--json", "--interval", str(IPERF_INTERVAL)]
    server = back.spawn(["iperf3", "--server", "--one-off", "--port", str(IPERF_PORT), *said])
    try:
        back.wait_until_succeeds(f"ss -Hltn sport = {IPERF_PORT} | grep -q .", every=0.05)
        before = cpu_seconds(front.pid) + cpu_seconds(back.pid)
        options = ["--reverse"] if way.reverse else []
        text = front.succeed(["iperf3", "--client", way.address, "--port", str(IPERF_PORT), *said, "--time",
                              str(seconds), *options], timeout=60 + seconds)
        used = cpu_seconds(front.pid) + cpu_seconds(back.pid) - before
        if not options:
            text = server.wait(30).out  # whoever receives has counted
    finally:
        server.kill()
        server.wait(30)
    received = parse_iperf_intervals(text)
    way.values.append(received.rate * 8 / 1e6)
    way.cpu.append(used / (received.total / 1e9))


def _ping(way: _Way, front: Vm, back: Vm, count: int) -> None:
    before = cpu_seconds(front.pid) + cpu_seconds(back.pid)
    with kept_awake(*(front, back) if way.awake else ()):
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
    if way.mode.endswith("-poll"):
        note += "; a SCHED_IDLE loop in both VMs" if way.awake else f"; poll={POLL}"
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
