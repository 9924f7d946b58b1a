"""A device between two VMs under a checked stream of numbered transactions, while everything happens to either end: any
start order, reloads, kill -9 of drivers, of VMs, of the host's daemons, and a standstill. The connection comes back by
itself, and each number is executed once at most.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from device_support import install

from idc.device.states import State
from testbed.bed import Testbed
from testbed.devices import LOG

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from idc.device.keys import Name

LIMIT = 120.0
LEDGER = "/run/ledger"
CONNECTED = [(State.CONNECTED, State.CONNECTED)]
KEEPER = ["-o", "-f", "python3 -m guest.drivers"]

# Sends one number after the other until its input ends; for each line that it reads it names the next one answered.
STREAM = """
import json, select, sys, time
from idc.domain import Service
from idc.endpoint.blocking import Caller
from idc.errors import OutcomeUnknownError
from idc.transport.address import open_port

first = sent = int(sys.argv[1])
answered, unknown, marks, reading = [], [], 0, True
with Caller(open_port("unix:/run/idc/ledger-0"), Service("ledger").resources()) as program:
    while reading:
        if select.select([0], [], [], 0)[0]:
            reading = sys.stdin.buffer.raw.read(1) == b"."
            marks += reading
        sent += 1
        try:
            answer = program.transact(b"%d" % sent, timeout=120)
        except OutcomeUnknownError:
            unknown.append(sent)
            continue
        assert answer == b"%d noted" % sent, (sent, answer)
        answered.append(sent)
        for _ in range(marks):
            print(sent, flush=True)
        marks = 0
        time.sleep(0.01)  # drivers that start have but this VM's one CPU
print(json.dumps({"sent": sent - first, "answered": answered, "unknown": unknown}))
"""


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    classes = install(tmp_path_factory.mktemp("site") / "classes")
    sys.path.insert(0, str(classes))
    try:
        with Testbed(keep="never", broker=True) as bed:
            bed.boot("front", "back")
            yield bed
            for name, vm in bed.vms.items():  # shown for a test that failed
                sys.stderr.write(f"--- {name}\n{vm.execute(['cat', LOG]).out[-4000:]}\n")
    finally:
        sys.path.remove(str(classes))


@pytest.fixture
def device(bed: Testbed) -> Iterator[Name]:
    bed.vms["back"].succeed(f"rm -f {LEDGER}")
    seen = bed.devices.attach("ledger", "front", "back", {"path": LEDGER}, wait=LIMIT)
    yield seen.name
    bed.devices.detach(seen.name, wait=LIMIT)
    assert bed.devices.list() == []


class Stream:
    """The program in the front end's VM."""

    def __init__(self, bed: Testbed, first: int = 0) -> None:
        self._bed = bed
        self.process = bed.vms["front"].spawn(["python3", "-c", STREAM, str(first)], stdin=True)
        self._lines = self.process.lines(LIMIT)

    def ask(self) -> None:
        self.process.write(b".")

    def answer(self) -> int:
        line = next(self._lines, None)
        assert line is not None, self.process.wait(LIMIT).err
        return int(line)

    def go_on(self) -> int:
        """Until a number is answered that was sent from now on; which."""
        for _ in range(2):  # the first may have been under way
            self.ask()
            number = self.answer()
        return number

    def end(self) -> dict[str, Any]:
        self.process.write(b"x")
        told: dict[str, Any] = json.loads(next(self._lines))
        assert self.process.wait(LIMIT).exit_code == 0
        return told

    def check(self, told: dict[str, Any], since: int = 0) -> None:
        """Each number was executed at most once, in order, and each that was answered was; of those after `since`."""
        noted = [int(line) for line in self._bed.vms["back"].succeed(["cat", LEDGER]).split()]
        answered = {number for number in told["answered"] if number > since}
        assert noted == sorted(set(noted))
        assert answered <= set(noted) <= answered | set(told["unknown"])
        assert told["sent"] == len(told["answered"]) + len(told["unknown"])


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not what():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def connected(bed: Testbed) -> bool:
    return [seen.states for seen in bed.devices.list()] == CONNECTED


ORDERS = list(itertools.permutations(("attach", "front", "back")))


@pytest.mark.parametrize("order", [pytest.param(order, marks=[] if n in (0, 5) else [pytest.mark.soak])
                                   for n, order in enumerate(ORDERS)])
def test_any_start_order(bed: Testbed, order: tuple[str, ...]) -> None:
    for vm in bed.vms.values():
        vm.execute(["pkill", "-9", *KEEPER])  # none runs at first
        vm.execute(["pkill", "-9", "-f", "guest.drivers"])
    with bed.devices.controller() as controller:
        for step in order:
            if step == "attach":
                name = controller.attach("ledger", "front", "back", {"path": LEDGER}, wait=None).name
            else:
                bed.devices.prepare(step, "ledger")
    until(lambda: connected(bed))
    bed.devices.detach(name, wait=LIMIT)


def test_both_ends_reloaded_under_a_stream(bed: Testbed, device: Name) -> None:
    reload(bed, 3)


@pytest.mark.soak
def test_both_ends_reloaded_under_a_stream_for_long(bed: Testbed, device: Name) -> None:
    reload(bed, 100)


def reload(bed: Testbed, count: int) -> None:
    stream = Stream(bed)
    stream.go_on()
    for _ in range(count):
        for end in ("front", "back"):
            bed.vms[end].succeed(["pkill", "-HUP", *KEEPER])
            stream.go_on()
    stream.check(stream.end())
    until(lambda: connected(bed))


def test_kill_9_of_drivers_and_a_standstill_under_a_stream(bed: Testbed, device: Name) -> None:
    stream = Stream(bed)
    for end in ("back", "front"):
        vm = bed.vms[end]
        stream.go_on()
        vm.succeed(["pkill", "-STOP", "-f", "guest.drivers"])
        stream.ask()
        vm.succeed(["pkill", "-CONT", "-f", "guest.drivers"])
        stream.answer()
        stream.go_on()
        vm.succeed(["pkill", "-9", "-f", "guest.drivers"])  # who keeps them, too
        until(lambda: bed.mend() != [])
        stream.go_on()
    stream.check(stream.end())


def test_either_vm_killed_and_booted_again(bed: Testbed, device: Name) -> None:
    stream = Stream(bed)
    before = stream.go_on()
    bed.vms["back"].crash()
    bed.revive("back")
    stream.go_on()
    told = stream.end()
    noted = int(bed.vms["back"].succeed(["head", "-n", "1", LEDGER]))
    assert noted > before
    stream.check(told, since=noted - 1)
    bed.vms["front"].crash()
    bed.revive("front")
    until(lambda: connected(bed))
    again = Stream(bed, first=noted + told["sent"])
    again.go_on()
    both = again.end()
    again.check({"sent": told["sent"] + both["sent"], "answered": told["answered"] + both["answered"],
                 "unknown": told["unknown"] + both["unknown"]}, since=noted - 1)


def test_each_daemon_killed_under_a_stream(bed: Testbed, device: Name) -> None:
    service = bed.service
    assert service is not None
    stream = Stream(bed)
    for daemon in ("region server", "registry", "broker"):
        stream.go_on()
        os.kill(service.processes()[daemon], signal.SIGKILL)
        stream.go_on()
        until(lambda daemon=daemon: bed.mend() == [daemon])  # type: ignore[misc]
        stream.go_on()
    # and their peers can rejoin
    bed.vms["back"].succeed(["pkill", "-HUP", *KEEPER])
    stream.go_on()
    told = stream.end()
    stream.check(told)
    assert len(told["unknown"]) <= 1  # of the reload; the daemons' ends are nothing to it
