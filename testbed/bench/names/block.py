"""Block devices by fio: ours, and what a user would pick instead: NBD over TCP, and virtio-blk.

All on the same two VMs: the device of class `block`; nbd-server in the back end's VM, to which the kernel's nbd of the
front end's connects over the network, by one connection and by several, the better of which counts; a virtio disk of
the front end's; and nbd-server in the front end's VM itself by a Unix socket, which shows what the kernel's nbd takes
when nothing has to cross. All take turns, and all of nbd have the same limits and no scheduler. Images lie in memory
(tmpfs, a memfd), so that no disk is measured. Random reads are measured by a device that is told to poll, too (mode
"poll"); it is asleep while others are measured. Depends on `testbed.devices` and below.
"""

from __future__ import annotations

import json
import os
import statistics
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from testbed import network as networks
from testbed.bed import Testbed
from testbed.bench import facts
from testbed.bench.errors import BenchFailed
from testbed.bench.groups import Found
from testbed.bench.names import Alone, Bench
from testbed.bench.places import places_for_each
from testbed.bench.rows import Row
from testbed.qemu_args import Disk
from testbed.template_build import cpu_seconds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.bench.groups import Pace
    from testbed.bench.setting import Setting
    from testbed.vm import Vm

MIB: Final = 1 << 20
#: Bytes of each image.
SIZE: Final = 128 * MIB
#: op, fio's name, bytes of a request, requests under way.
JOBS: Final = (("randread", "randread", 4096, 1), ("randread", "randread", 4096, 32),
               ("seqread", "read", MIB, 1), ("seqwrite", "write", MIB, 1))
#: Connections of nbd-tcp, by device: the best of them is its row.
CONNECTIONS: Final = {"/dev/nbd8": 1, "/dev/nbd9": 4}
#: Of the device that is told to poll, microseconds.
POLL: Final = 20_000
#: nbd-server in the front end's VM, and its device.
SOCKET, LOCAL = "/run/nbd.sock", "/dev/nbd7"
_SERVER: Final = """[generic]
allowlist = true
{option}
[disk]
exportname = /dev/shm/{image}
"""


@dataclass
class _Way:
    """One way to a disk, and what each job did by it."""

    path: str
    device: str
    variant: str = ""
    mode: str | None = None
    figures: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    costs: dict[tuple[str, int], list[float]] = field(default_factory=dict)


def measure(setting: Setting, pace: Pace) -> Alone:
    """fio on each way in turn."""
    rounds, seconds = (1, 1) if pace.quick else (3, 4)
    with _image() as disk, networks.make(2) as network, \
            Testbed(accel=setting.accel, qemu=setting.qemu, broker=True, boot="cold", notify=setting.steps.say) as bed:
        near, far = ((pin,) if pin is not None else () for pin in places_for_each()[:2])
        front, back = bed.boot(bed.spec("front", memory_mib=512, pin=near, disks=(Disk(disk),)),
                               bed.spec("back", memory_mib=1024, pin=far), network=network)
        ways = _prepare(bed, front, back, network.members[1].address)
        for turn in range(rounds):
            for op, job, size, depth in JOBS:
                for way in ways:
                    if way.mode and op != "randread":
                        continue
                    setting.steps.say(f"round {turn + 1} of {rounds}: {op}, depth {depth}, {way.path} {way.variant}")
                    _take(way, (op, depth), job, size, seconds, front, back)
        note = f"nbd-server over {network.description}"
        found = [row for op, _, size, depth in JOBS for row in _rows(ways, op, size, depth, note)]
        return Alone(bed.verdict, found, facts.of_testbed(bed))


@contextmanager
def _image() -> Iterator[Path]:
    """A disk's, in memory and by no name: whatever ends this process, and QEMU, leaves nothing behind."""
    image = os.memfd_create("idc-bench-block", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(image, 0, SIZE)
        yield Path(f"/proc/{os.getpid()}/fd/{image}")
    finally:
        os.close(image)


def _prepare(bed: Testbed, front: Vm, back: Vm, address: str) -> list[_Way]:
    for vm, name in ((back, "ours"), (back, "polled"), (back, "tcp"), (front, "local")):
        vm.succeed(f"dd if=/dev/zero of=/dev/shm/{name} bs=1M count={SIZE // MIB} status=none", timeout=120)
    for number, (image, poll) in enumerate((("ours", 0), ("polled", POLL))):
        bed.devices.attach("block", "front", "back", {"image": f"/dev/shm/{image}", "poll": poll}, number=str(number),
                           wait=240)
    for vm, image, option in ((back, "tcp", ""), (front, "local", f"unixsock = {SOCKET}")):
        text = _SERVER.format(image=image, option=option)
        vm.succeed(f"cat > /run/nbd.conf <<'EOF'\n{text}EOF\nnbd-server -C /run/nbd.conf", timeout=60)
    ways = [_Way("ivshmem", "/dev/nbd0"), _Way("ivshmem", "/dev/nbd1", f"poll={POLL}", "poll"),
            _Way("virtio-blk", "/dev/vdb"), _Way("nbd-local", LOCAL)]
    clients = {device: f"{address} {device} -N disk -C {count}" for device, count in CONNECTIONS.items()}
    front.wait_until_succeeds(f"test -S {SOCKET}")
    for device, arguments in (clients | {LOCAL: f"-unix {SOCKET} {LOCAL} -N disk"}).items():
        queue = f"/sys/block/{Path(device).name}/queue"  # of which the device's own is set so, too
        front.succeed(f"nbd-client {arguments}", f"echo 1024 > {queue}/max_sectors_kb",
                      f"echo none > {queue}/scheduler", timeout=60)
    ways += [_Way("nbd-tcp", device, f"{count} connection{'s' if count > 1 else ''}")
             for device, count in CONNECTIONS.items()]
    return ways


def _take(way: _Way, key: tuple[str, int], job: str, size: int, seconds: int, front: Vm, back: Vm) -> None:
    command = ["fio", "--name=bench", f"--filename={way.device}", "--direct=1", "--ioengine=libaio", f"--rw={job}",
               f"--bs={size}", f"--iodepth={key[1]}", f"--size={SIZE}", "--time_based", f"--runtime={seconds}",
               "--ramp_time=1", "--output-format=json", "--allow_file_create=0"]
    before = [cpu_seconds(vm.pid) for vm in (front, back)]
    output = front.succeed(command, timeout=120 + 10 * seconds)
    used = sum(cpu_seconds(vm.pid) - start for vm, start in zip((front, back), before, strict=True))
    figure, done = parse_fio(output, "write" if job == "write" else "read", operations=size == 4096)
    way.figures.setdefault(key, []).append(figure)
    way.costs.setdefault(key, []).append(used / done)


def parse_fio(output: str, direction: str, *, operations: bool) -> tuple[float, float]:
    """(operations a second, thousands of them) or (MB/s, GB) from fio's JSON. Raises BenchFailed."""
    try:
        job = json.loads(output[output.index("{"):])["jobs"][0]
        side = job[direction]
        count, size, taken = float(side["total_ios"]), float(side["io_bytes"]), float(side["runtime"]) / 1e3
        if job["error"] or not count or not taken:
            raise ValueError(f"{count:g} requests in {taken:g} s, error {job['error']}")
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise BenchFailed(f"fio's output is not what it should be: {error}") from error
    return (count / taken, count / 1e3) if operations else (size / taken / 1e6, size / 1e9)


def _rows(ways: list[_Way], op: str, size: int, depth: int, note: str) -> list[Found]:
    key, found = (op, depth), []
    for path, mode in dict.fromkeys((way.path, way.mode) for way in ways if key in way.figures):
        same = [way for way in ways if (way.path, way.mode) == (path, mode)]
        best = max(same, key=lambda way: statistics.median(way.figures[key]))
        variants = {way.variant: statistics.median(way.figures[key]) for way in same if way.variant}
        found.append(Found(Row(
            "block", path, "vm-vm", mode, "fio", size, "iops" if size == 4096 else "MB/s", len(best.figures[key]),
            value=statistics.median(best.figures[key]), rounds=tuple(best.figures[key]), op=op, depth=depth,
            cpu_s=statistics.median(best.costs[key]), variant=best.variant, variants=variants,
            note=note if path == "nbd-tcp" else ""), None))  # fmt: skip
    return found


BENCH = Bench("block", "fio on a block device, beside NBD over TCP, NBD within one VM, and virtio-blk", alone=measure,
              default=False, order=70)
