"""The device class "trace" between process domains: programs log, the other domain's files have it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from device_support import Bench, bench, until

from host.devices import DeviceError
from idc.errors import MisuseError, TimedOutError
from idc.trace import open_tracer, store
from testbed.trace.align import load
from testbed.trace.merge import merge

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from idc.device.keys import Name
    from idc.trace import Tracer
    from testbed.trace.align import Source

LIMIT = 60.0
#: A program that logs numbers until its trace is over, and says how many were taken and how many dropped.
PROGRAM = """
import sys
from idc.trace import open_tracer
taken = 0
with open_tracer(sys.argv[1], timeout=60) as tracer:
    print("begun", flush=True)
    for number in range(int(sys.argv[2])):
        taken += tracer.instant("number", number.to_bytes(4, "little") + bytes(28))
        if tracer.dropped and len(sys.argv) > 3:
            break
print(taken, tracer.dropped)
"""


class Device:
    """A trace device, and where its files are."""

    def __init__(self, here: Bench, directory: Path) -> None:
        self.here = here
        self.directory = directory
        self.address = f"unix:{here.domains['front'].sockets / 'trace-0'}"
        self.name: Name | None = None

    def attach(self, **options: object) -> None:
        self.name = self.here.controller.attach("trace", "front", "back", {"directory": str(self.directory)} | options,
                                                wait=LIMIT).name

    def detach(self) -> None:
        if self.name is not None:
            self.here.controller.detach(self.name)
            self.name = None

    def tracer(self) -> Tracer:
        return open_tracer(self.address, timeout=LIMIT)

    def sources(self) -> list[Source]:
        """What programs logged; the front end's own comparisons of the clocks are not among it."""
        found = [load(store.read(path)) for path in sorted(self.directory.glob("*.idctrace"))]
        return [source for source in found if any(event.text for event in source.events)]


@pytest.fixture(scope="module")
def domains() -> Iterator[Bench]:
    with bench("front", "back") as here:
        yield here


@pytest.fixture
def device(domains: Bench, tmp_path: Path) -> Iterator[Device]:
    device = Device(domains, tmp_path / "traces")
    yield device
    device.detach()


def numbers(source: Source) -> list[int]:
    return [int.from_bytes(event.data[:4], "little") for event in source.events if event.text == "number"]


def test_what_was_logged_before_it_is_detached_is_there_and_is_merged(device: Device, tmp_path: Path) -> None:
    device.attach(lossless=True)
    with device.tracer() as one, device.tracer() as other:
        for number in range(3000):
            assert one.instant("number", number.to_bytes(4, "little"))
            assert other.instant("number", number.to_bytes(4, "little") + bytes(4000 if number % 100 == 0 else 10))
        device.detach()  # with all of it under way, and both programs there
        assert not one.instant("too late")
        assert "the trace device is detached" in one._sink.reason  # type: ignore[attr-defined]
        assert one.dropped == 1
    first, second = device.sources()
    for source in (first, second):
        assert numbers(source) == list(range(3000))
        assert (source.dropped, source.missing, source.file.unread) == (0, 0, 0)
        assert source.file.ended == "the device was detached"
        assert (source.file.domain, source.file.recorder) == ("front", "back")
    report = merge(sorted(device.directory.glob("*.idctrace")), tmp_path / "all.pftrace")
    assert report.reference == "back"
    (front,) = report.domains
    assert (front.name, front.files, front.dropped, front.missing) == ("front", 3, 0, 0)
    assert 0 < front.worst < 1_000_000_000  # the clocks were compared, though no program did


@pytest.mark.parametrize("who", ["back", "program"])
def test_lossless_nothing_is_lost_or_doubled_if_that_dies(device: Device, who: str) -> None:
    device.attach(lossless=True, ring_kib=32)
    count = 60_000
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, device.address, str(count)], stdout=subprocess.PIPE,
                               text=True)
    assert program.stdout is not None
    with program:
        assert program.stdout.readline() == "begun\n"
        until(lambda: any(path.stat().st_size > 500_000 for path in device.directory.glob("*.idctrace")), LIMIT)
        if who == "program":
            program.kill()
            program.wait()
            until(lambda: bool(device.sources()) and "ended" in device.sources()[0].file.ended, LIMIT)
            (source,) = device.sources()
            assert numbers(source) == list(range(len(numbers(source))))  # all up to its death
            assert len(numbers(source)) * 71 > 500_000
        else:
            for _ in range(3):
                device.here.domains["back"].replace("kill")
            assert program.stdout.readline() == f"{count} 0\n"
            until(lambda: "ended" in device.sources()[0].file.ended, LIMIT)
            (source,) = device.sources()
            assert numbers(source) == list(range(count))
        assert (source.dropped, source.missing) == (0, 0)


def test_lossy_drops_are_counted_and_nobody_waits(device: Device) -> None:
    device.attach(ring_kib=32)
    os.kill(device.here.domains["front"].worker, signal.SIGSTOP)
    try:
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, device.address, "5000"], stdout=subprocess.PIPE,
                                   text=True)
    finally:
        os.kill(device.here.domains["front"].worker, signal.SIGCONT)
    with process, device.tracer() as tracer:
        os.kill(device.here.domains["front"].worker, signal.SIGSTOP)
        try:
            for number in range(5000):
                tracer.instant("number", number.to_bytes(4, "little"))
            dropped = tracer.dropped
        finally:
            os.kill(device.here.domains["front"].worker, signal.SIGCONT)
        assert dropped > 0
        assert process.wait(LIMIT) == 0
    device.detach()
    mine = next(source for source in device.sources() if numbers(source)[-1:] and source.dropped == dropped)
    assert (len(numbers(mine)), mine.missing) == (5000 - dropped, 0)
    for source in device.sources():
        assert len(numbers(source)) + source.dropped == 5000
        assert source.missing == 0


def test_the_front_ends_drivers_die_and_a_program_is_not_held_up(device: Device) -> None:
    device.attach(lossless=True, ring_kib=32)
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, device.address, "1000000", "until dropped"],
                               stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    with program:
        assert program.stdout.readline() == "begun\n"
        until(lambda: any(path.stat().st_size > 100_000 for path in device.directory.glob("*.idctrace")), LIMIT)
        device.here.domains["front"].replace("kill")
        taken, dropped = map(int, program.stdout.readline().split())
        assert (taken > 1000, dropped) == (True, 1)
    with device.tracer() as tracer:
        assert tracer.instant("number", bytes(4))
    until(lambda: len(device.sources()) == 2, LIMIT)
    old, new = device.sources()
    assert numbers(old) == list(range(len(numbers(old))))
    assert numbers(new) == [0]


def test_no_room_and_rubbish_end_a_programs_trace_and_no_other(device: Device) -> None:
    device.attach(most_mib=1)
    with device.tracer() as big, device.tracer() as rude:
        rude._sink._sender.write(b"\xff" * 40_000)  # type: ignore[attr-defined]
        until(lambda: not rude.instant("x"), LIMIT)
        assert rude._sink.reason == "this program broke the rules"  # type: ignore[attr-defined]
        until(lambda: not all(big.instant("big", bytes(4000)) for _ in range(16)) and bool(big._sink.reason),  # type: ignore[attr-defined]
              LIMIT)
        assert big._sink.reason == "the other domain has no room for more"  # type: ignore[attr-defined]
    assert sum(path.stat().st_size for path in device.directory.glob("*.idctrace")) < 1.1 * (1 << 20)


def test_mistakes(device: Device) -> None:
    with pytest.raises(TimedOutError, match=r"no trace device takes this program within 0\.1 s"):
        open_tracer(device.address, timeout=0.1)
    with pytest.raises(MisuseError, match="whether it is lossless is an option of the device"):
        open_tracer(device.address, lossless=True)
    with pytest.raises(MisuseError, match="lossless=True or False is wanted"):
        open_tracer("member:/x/y")
    with pytest.raises(MisuseError, match="option ring_kib: 1 is less than 32"):
        device.attach(ring_kib=1)
    device.attach()
    with pytest.raises(DeviceError, match="attached already"):
        device.attach()
