"""`testbed demo`: two VMs, one shared region, a real file there and back, and the same over TCP.

Measures in turn (shared memory, TCP, shared memory, TCP) in the same two VMs; what is printed and what is in the
JSON are the same objects. Depends on `testbed.bed`, `testbed.transfer`, `testbed.bench` and rich.
"""

from __future__ import annotations

import json
import platform
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from testbed.bed import Testbed
from testbed.bench.groups import QUICK, Group, measure
from testbed.bench.peers import Iperf, Sockperf
from testbed.bench.places import vm_pair
from testbed.bench.subjects import round_trip, stream
from testbed.errors import SpecError, TestbedError
from testbed.qemu_args import DEFAULT_QEMU
from testbed.transfer import OverRegion, OverTcp, Transferred, file_size, transfer

if TYPE_CHECKING:
    from rich.console import Console

    from host.region import Region
    from testbed.accel import Wish
    from testbed.bench.subjects import Subject
    from testbed.progress import Steps
    from testbed.qemu_args import VmSpec
    from testbed.vm import Vm

MESSAGE_BYTES, STREAM_CHUNK = 64, 64 << 10
#: Guest memory beyond twice the file (the sent and the returned one live in a tmpfs of half of it), MiB.
SPARE_MIB = 256


class DemoFailed(TestbedError):
    """What arrived is not what was sent."""


@dataclass(frozen=True)
class Row:
    """One measured thing. Round trips in nanoseconds, everything else in bytes a second.

    `per` is how many round trips one sample averages; `seconds` what a file took; `note` the way it went.
    """

    name: str
    path: str
    mode: str | None
    size: int
    unit: str
    samples: int
    api: str = "core"
    domains: str = "vm-vm"
    value: float | None = None
    seconds: float | None = None
    per: int = 1
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    p999: float | None = None
    max: float | None = None
    late: int = 0
    note: str = ""


@dataclass
class Report:
    """What a demo found."""

    accel: str
    accel_reason: str
    file: str
    size: int
    sha256: str = ""
    network: str = ""
    host: dict[str, str] = field(default_factory=dict)
    results: list[Row] = field(default_factory=list)

    def row(self, name: str, path: str, mode: str | None = None) -> Row:
        """The result of that name. Raises KeyError."""
        for row in self.results:
            if (row.name, row.path) == (name, path) and mode in (None, row.mode):
                return row
        raise KeyError((name, path, mode))

    def as_json(self) -> str:
        """The report as one JSON object."""
        rows = [{key: value for key, value in asdict(row).items() if value is not None or key == "mode"}
                for row in self.results]
        return json.dumps(asdict(self) | {"results": rows}, indent=2)


def run(file: Path | None, steps: Steps, *, accel: Wish = "auto", qemu: str = DEFAULT_QEMU) -> Report:
    """Do all of it.

    Args:
        file: what to send; None for the Debian kernel package that the image was built from.
        steps: where progress is shown.
        accel: see `testbed.accel`.
        qemu: QEMU binary.

    Raises:
        SpecError: the file cannot be sent, or is too large for the guests' memory.
        TestbedError: something failed; everything that was started is ended.
    """
    if file is not None:
        file_size(file)  # before the image is built for nothing
    # Cold: a clone's memory is copied page by page when it is first written, which would be in the measurements.
    with Testbed(accel=accel, qemu=qemu, boot="cold", notify=steps.say) as bed:
        steps.say(f"accelerator: {bed.verdict.accel} ({bed.verdict.reason})")
        source, size = file_to_send(file, bed)
        report = Report(bed.verdict.accel, bed.verdict.reason, source.name, size, host=_host(bed))
        started = time.monotonic()
        with steps.wait("booting front and back"):
            front, back = bed.boot(*specs(bed, size), network=True)
        steps.say(f"booted front and back in {time.monotonic() - started:.1f} s")
        assert bed.network is not None
        report.network = bed.network.description
        link = bed.link(front, back)
        steps.say(f"region {link.name!r}: {link.header.size >> 20} MiB, plugged into front and back and nobody else")
        sent, copy, returned = "/tmp/sent", "/tmp/copy", "/tmp/returned"
        with steps.bar(f"{source.name} into front", size) as bar:
            front.copy_to(source, sent, progress=lambda done, _: bar(done))
        _files(report, front, back, (sent, copy, returned), link, bed, steps)
        with steps.wait(f"{MESSAGE_BYTES}-byte round trips and a stream, and TCP's (sockperf, iperf3)"):
            _measure(report, bed, front, back)
        return report


def file_to_send(file: Path | None, bed: Testbed) -> tuple[Path, int]:
    """The file, by default the kernel package that the image was built from, and its bytes. Raises SpecError."""
    source = file or bed.image.kernel_deb
    size = file_size(source)
    # It lies in tmpfs: sent and returned in the one guest, the copy in the other.
    needed, free = (3 * size >> 20) + 2 * SPARE_MIB, _available_mib()
    if needed > free:
        raise SpecError(f"the guests hold the file in their memory: {source} has {size >> 20} MiB and would "
                        f"need {needed} MiB of this machine's memory, of which {free} MiB are free",
                        hint="`testbed transfer` sends a file of any size, from disk to disk")
    return source, size


def _available_mib() -> int:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found is not None, "every Linux since 3.14 has it"
    return int(found.group(1)) >> 10


def specs(bed: Testbed, size: int) -> tuple[VmSpec, VmSpec]:
    """The two VMs for a file of `size` bytes."""
    memory = max(512, SPARE_MIB + 4 * (size >> 20))
    return bed.spec("front", memory_mib=memory), bed.spec("back", memory_mib=memory)


def _host(bed: Testbed) -> dict[str, str]:
    return {"system": platform.platform(), "machine": platform.machine(),
            "guest_kernel": str(bed.image.manifest.get("kernel_release", ""))}


def _files(report: Report, front: Vm, back: Vm, paths: tuple[str, str, str], link: Region, bed: Testbed,
           steps: Steps) -> None:
    """There and back by shared memory and by TCP, in turn, checksums compared all the way."""
    sent, copy, returned = paths
    assert bed.network is not None
    addresses = {member: bed.network.members[index].address for index, member in enumerate(("front", "back"))}
    for source, path, target, destination in ((front, sent, back, copy), (back, copy, front, returned)):
        for over in (OverRegion(link.name), OverTcp(addresses[target.name])):
            title = f"{source.name} -> {target.name} over {over.path}"
            with steps.transfer(title) as progress:
                done = transfer(source, path, target, destination, over, progress=progress)
            _same_file(report, done)
            report.results.append(Row("file", over.path, f"{source.name} to {target.name}", done.size, "B/s", 1,
                                      api="python", value=done.rate, seconds=done.seconds))


def _same_file(report: Report, done: Transferred) -> None:
    report.sha256 = report.sha256 or done.sha256
    if done.sha256 != report.sha256:
        raise DemoFailed(f"{done.source} sent {done.sha256}, but the file has {report.sha256}")


def _measure(report: Report, bed: Testbed, front: Vm, back: Vm) -> None:
    """Round trips and a stream through shared memory, and TCP's, in turn; see `testbed.bench`."""
    assert bed.network is not None
    address = bed.network.members[1].address
    with vm_pair(bed, front, back) as pair:
        subjects: list[Subject] = [round_trip(pair, mode, "core", MESSAGE_BYTES) for mode in _MODES]
        subjects += [stream(pair, "adaptive", "core", STREAM_CHUNK), Sockperf(front, back, address, MESSAGE_BYTES,
                     cost=False),
                     Iperf(front, back, address, STREAM_CHUNK)]
        found = measure(Group("round trips and streams", pair, subjects), QUICK)
    for row in (each.row for each in found):
        mode = row.mode if row.name == "rtt" else None
        report.results.append(Row(row.name, row.path, mode, row.size, row.unit, row.samples, value=row.value,
                                  per=row.per, p50=row.p50, p90=row.p90, p99=row.p99, p999=row.p999, max=row.max,
                                  late=row.late, note=row.variant))  # fmt: skip


# -- printing


def show(report: Report, console: Console) -> None:
    """Print a report: two tables, and what they were measured under."""
    console.print(f"\n[bold]{escape(report.file)}[/]\n{report.size / 1e6:.1f} MB, SHA-256 {report.sha256[:16]}... "
                  "the same at every stop\n")
    console.print(_rates(report))
    console.print(_round_trips(report))
    console.print(f"accelerator {report.accel}: {report.accel_reason}", markup=False, soft_wrap=True)
    console.print(f"network {report.network}", markup=False, soft_wrap=True)
    console.print("ratios hold within this run; absolute figures under TCG say nothing about KVM", style="dim")


def _rates(report: Report) -> Table:
    table = Table("", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("shared memory", "TCP", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in report.results:
        if row.path == "ivshmem" and row.value is not None:
            peer = report.row(row.name, "tcp", row.mode)
            title = f"file, {row.mode}" if row.name == "file" else f"memory to memory, {row.size >> 10} KiB"
            ratio = row.value / peer.value if peer.value else 0.0
            table.add_row(title, _rate(row), _rate(peer), f"{ratio:.1f}x")
    return table


def _rate(row: Row) -> str:
    seconds = f"{row.seconds:.2f} s  " if row.seconds is not None else ""
    value = row.value or 0.0
    return seconds + (f"{value / 1e9:.2f} GB/s" if value >= 1e9 else f"{value / 1e6:.1f} MB/s")


def _round_trips(report: Report) -> Table:
    table = Table(f"{MESSAGE_BYTES} bytes there and back, us", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("p50", "p90", "p99", "p99.9", "max", "TCP/this"):
        table.add_column(column, justify="right", no_wrap=True)
    tcp = report.row("rtt", "tcp")
    for row in report.results:
        if row.name != "rtt":
            continue
        title = "TCP, sockperf" if row.path == "tcp" else _MODES.get(row.mode or "", row.mode or "")
        if row.per > 1:
            title += f", means of {row.per}"
        cells = [f"{value / 1e3:.{2 if value < 1e5 else 0}f}"
                 for value in (found or 0.0 for found in (row.p50, row.p90, row.p99, row.p999, row.max))]
        table.add_row(title, *cells, f"{(tcp.p50 or 0) / row.p50:.1f}x" if row.p50 else "")
    return table


_MODES = {"poll": "polled", "doorbell": "by doorbell"}
