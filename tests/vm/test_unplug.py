"""Regions come and go in two running VMs, whose programs ring each other as fast as they can: QEMU survives it, and
nothing is left behind. What makes that so is in testbed/unplug.py.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from host.region import RegionSpec
from idc.layout import Rights
from testbed.bed import Testbed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.calls import Process
    from testbed.vm import Vm

VECTORS = 2
LIMIT = 60.0

# Opens the region that it is told, says so once it has been rung, and rings the other until it is told to close it.
RINGER = f"""
import os, select
from guest.ivshmem import open_region
while name := os.read(0, 100).decode().strip():
    with open_region(name, 60) as region:
        bells = [region.bell(1 - region.member, vector) for vector in range({VECTORS})]
        rung = False
        while not select.select([0], [], [], 0.005)[0]:
            for bell in bells:
                bell.ring()
            if not rung and all(select.select([event], [], [], 0)[0] for event in region.events):
                rung = True
                print("rung", name, flush=True)
        os.read(0, 100)
        del bell, bells  # they have the registers mapped
    print("closed", name, flush=True)
"""


@pytest.fixture(scope="module")
def bed() -> Iterator[Testbed]:
    with Testbed(keep="never") as bed:
        bed.boot("front", "back")
        yield bed


class Ringer:
    """The program in one VM."""

    def __init__(self, vm: Vm) -> None:
        self.process: Process = vm.spawn(["python3", "-c", RINGER], stdin=True)
        self._lines = self.process.lines(LIMIT)

    def tell(self, words: str) -> None:
        self.process.write(f"{words}\n".encode())

    def hear(self, words: str) -> None:
        said = next(self._lines, None)
        assert said == words, (said, self.process.wait(LIMIT).err)


def files(pid: int) -> Counter[str]:
    """A process's descriptors by what they are; sockets are told apart by nothing, and counted."""
    found = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed since
            found.append(os.readlink(f"/proc/{pid}/fd/{number}"))
    return Counter("socket" if name.startswith("socket:") else name for name in found)


def holdings(bed: Testbed) -> list[object]:
    """What could leak: of each QEMU and of the region service."""
    service = bed.service
    assert service is not None
    vms = list(bed.vms.values())
    return [*([files(vm.pid), vm.devices, len(vm.qmp("query-chardev"))] for vm in vms),
            files(service.holder_pid), files(service.server_pid), service.regions(), list(bed.regions)]


def settled(bed: Testbed, before: list[object]) -> None:
    """QEMU frees a device's memory some time after it has said that the device is gone."""
    deadline = time.monotonic() + LIMIT
    while (now := holdings(bed)) != before:
        assert time.monotonic() < deadline, (now, before)
        time.sleep(0.02)


def cycle(bed: Testbed, ringers: dict[str, Ringer], name: str, first: str) -> None:
    """A region is made, plugged into both, rung by both, and taken out of one while the other rings on."""
    region = bed.region(RegionSpec(name, 1 << 20, dict.fromkeys(ringers, Rights.RW), vectors=VECTORS))
    for ringer in ringers.values():
        ringer.tell(name)
    for ringer in ringers.values():
        ringer.hear(f"rung {name}")
    for vm in sorted(ringers, key=lambda other: other != first):
        ringers[vm].tell("close")
        ringers[vm].hear(f"closed {name}")
        bed.unplug(bed.vms[vm], region)
    bed.drop(name)


def cycles(bed: Testbed, count: int) -> None:
    ringers = {name: Ringer(vm) for name, vm in bed.vms.items()}
    bed.drop(bed.region(RegionSpec("none", 1 << 20, dict.fromkeys(ringers, Rights.RW)), plug_in=False).name)
    before = holdings(bed)
    cycle(bed, ringers, "first", "front")
    settled(bed, before)
    threads = {name: len(os.listdir(f"/proc/{vm.pid}/task")) for name, vm in bed.vms.items()}
    for number in range(count):
        cycle(bed, ringers, f"link-{number}", ("front", "back")[number % 2])
        settled(bed, before)
    for name, ringer in ringers.items():
        ringer.tell("")
        assert ringer.process.wait(LIMIT).exit_code == 0
        # QEMU's pool for its own I/O comes and goes; a thread that each round left behind would show
        assert len(os.listdir(f"/proc/{bed.vms[name].pid}/task")) < threads[name] + count // 2


def test_thirty_rounds_of_plugging_under_doorbells_leave_nothing(bed: Testbed) -> None:
    cycles(bed, 30)


@pytest.mark.soak
def test_a_hundred_rounds_of_plugging_under_doorbells_leave_nothing(bed: Testbed) -> None:
    cycles(bed, 100)
