"""Devices between process domains: the life cycle under everything that can happen to either end."""

from __future__ import annotations

import itertools
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from device_support import Bench, Stream, bench, until
from region_support import descriptors

from host.devices import Controller, DeviceError, ServicePlugger
from idc.device.keys import Name
from idc.device.states import State
from idc.errors import DeniedError, DisconnectedError, MisuseError
from idc.registry import Registry
from idc.transport.address import open_port

if TYPE_CHECKING:
    from host.devices.controller import Seen
    from host.devices.records import Record
    from host.region import RegionSpec

CONNECTED = (State.CONNECTED, State.CONNECTED)
CLOSED = (State.CLOSED, State.CLOSED)
#: Seconds between two connections, if the machine is fast enough.
CONNECT_EVERY = 0.02
#: What a process may grow by meanwhile, KB: interpreters take memory in pieces of this order.
LEAK_KB = 4096
#: Reloads and kills of each end.
COUNT = 20


def nothing_left(here: Bench) -> None:
    assert here.controller.devices() == []
    assert not any(name.startswith("dev-") for name in here.service.regions())
    assert here.registry.list("/link") == []
    for name in here.domains:
        for kind in ("device/echo", "device/ledger", "backend/echo", "backend/ledger"):
            assert [path for path in _leaves(here.registry, f"/domain/{name}/{kind}") if path.endswith("/id")] == []


def _leaves(registry: Registry, path: str) -> list[str]:
    if not registry.exists(path):
        return []
    return [path, *(leaf for name in registry.list(path) for leaf in _leaves(registry, f"{path}/{name}"))]


def ledger(here: Bench, *, wait: float | None = 30.0) -> tuple[Name, Path]:
    path = here.directory / "ledger"
    return here.controller.attach("ledger", "front", "back", {"path": str(path)}, wait=wait).name, path


def test_the_tutorials_device_is_attached_used_and_detached() -> None:
    with bench("front", "back") as here:
        seen = here.controller.attach("echo", "front", "back", {"times": 2})
        assert seen.states == CONNECTED
        assert [step.why for step in reversed(seen.back)][-3:] == [
            "the driver is there", "the front end has opened the region", "the endpoints have met"]
        with here.program("front", "echo-0") as program:
            assert program.transact(b"hello ", timeout=10) == b"hello hello "
        here.controller.detach(seen.name)
        nothing_left(here)


@pytest.mark.parametrize("order", list(itertools.permutations(("attach", "front", "back"))))
def test_any_start_order(order: tuple[str, ...]) -> None:
    with bench("front", "back", start=False) as here:
        for step in order:
            if step == "attach":
                name, path = ledger(here, wait=None)
            else:
                here.domains[step].start()
        until(lambda: here.states() == [CONNECTED])
        with here.program("front", "ledger-0") as program:
            stream = Stream(program)
            stream.go_on()
        stream.check(path)
        here.controller.detach(name)
        nothing_left(here)


def test_a_link_is_kept_only_when_both_ends_have_said_that_they_are_closed() -> None:
    with bench("front", "back", start=False) as here:
        here.domains["back"].start()
        name, _ = ledger(here, wait=None)
        until(lambda: bool(here.controller.devices()[0].back))
        with pytest.raises(DeviceError, match=r": the front end \(has said nothing\) does not close within 1 s"):
            here.controller.detach(name, wait=1, keep_link=True)
        here.controller.detach(name)
        assert here.controller.drop_spares() == 0
        nothing_left(here)


def test_either_end_reloaded_and_killed_under_a_stream() -> None:
    shake(COUNT)


@pytest.mark.soak
def test_either_end_reloaded_and_killed_under_a_stream_for_long() -> None:
    shake(100)


def shake(count: int) -> None:
    with bench("front", "back") as here:
        name, path = ledger(here)
        with here.program("front", "ledger-0") as program:
            stream = Stream(program)
            for what in ("reload", "kill"):
                for end in ("front", "back"):
                    domain = here.domains[end]
                    for _ in range(count):
                        stream.go_on()
                        domain.replace(what)
                        stream.go_on()
        stream.check(path)
        until(lambda: here.states() == [CONNECTED])
        here.controller.detach(name)
        nothing_left(here)


def test_unloaded_and_loaded_again() -> None:
    with bench("front", "back") as here:
        name, path = ledger(here)
        with here.program("front", "ledger-0") as program:
            stream = Stream(program)
            stream.go_on()
            here.domains["back"].stop()
            until(lambda: here.states() == [(State.INITIALISED, State.CLOSED)])
            here.domains["back"].start()
            stream.go_on()
            here.domains["front"].stop()
            until(lambda: here.states()[0][0] is State.CLOSED)
            here.domains["front"].start()
            stream.go_on()
        stream.check(path)
        here.controller.detach(name)
        nothing_left(here)


def test_an_end_that_is_stopped_goes_on_where_it_was() -> None:
    with bench("front", "back") as here:
        name, _ = ledger(here)
        with here.program("front", "ledger-0") as program:
            stream = Stream(program)
            for end in ("back", "front"):
                stream.go_on()
                os.kill(here.domains[end].worker, signal.SIGSTOP)
                with pytest.raises(TimeoutError):
                    program.transact(b"", timeout=0.3)
                os.kill(here.domains[end].worker, signal.SIGCONT)
                stream.go_on()
            assert not stream.unknown
        assert here.states() == [CONNECTED]
        here.controller.detach(name)
        nothing_left(here)


def test_the_registry_killed_parts_nobody() -> None:
    with bench("front", "back") as here:
        name, path = ledger(here)
        with here.program("front", "ledger-0") as program:
            stream = Stream(program)
            stream.go_on()
            os.kill(here.service.registry_pid, signal.SIGKILL)
            for _ in range(20):
                assert stream.one()
            here.service.restart_registry()
            for _ in range(20):
                assert stream.one()
        stream.check(path)
        until(lambda: here.states() == [CONNECTED])
        here.controller.detach(name)
        nothing_left(here)


def test_two_devices_of_one_class_and_a_link_that_was_plugged_before() -> None:
    with bench("front", "back", "other") as here:
        region = here.controller.spare("echo", "front", "back")
        other = here.controller.attach("echo", "other", "back")
        assert other.record.link != region
        first = here.controller.attach("echo", "front", "back")
        assert first.record.link == region
        second = here.controller.attach("echo", "front", "back", {"times": 3}, number="7")
        assert second.record.link != region
        for device, answer in (("echo-0", b"x"), ("echo-7", b"xxx")):
            with here.program("front", device) as program:
                assert program.transact(b"x", timeout=10) == answer
        here.controller.detach(first.name, keep_link=True)
        again = here.controller.attach("echo", "front", "back", number="3")
        assert again.record.link == region
        for seen in (again, second, other):
            here.controller.detach(seen.name)
        nothing_left(here)


def test_connecting_and_disconnecting_leaks_nothing() -> None:
    cycle(500, 20)


@pytest.mark.soak
def test_connecting_and_disconnecting_for_a_minute_leaks_nothing() -> None:
    cycle(3000, 500)


def answered(here: Bench) -> bool:
    """Whether a program of its own got its answer. An answer goes before the end of the connection that follows it, so
    who connects in between is told that nobody knows what became of its request.
    """
    try:
        with here.program("front", "ledger-0") as program:
            assert program.transact(b"x", timeout=10) == b"x noted"
    except DisconnectedError:
        return False
    return True


def cycle(connections: int, devices: int) -> None:
    """Connections of one device, 50 a second if the machine does so many, and devices attached and detached."""
    with bench("front", "back") as here:
        name = here.controller.attach("ledger", "front", "back", {"flap": True}).name

        def connect(count: int) -> None:
            begun = time.monotonic()
            for number in range(count):
                while not answered(here):
                    pass
                time.sleep(max(0.0, begun + number * CONNECT_EVERY - time.monotonic()))

        def attach(count: int) -> None:
            for number in range(count):
                seen = here.controller.attach("echo", "front", "back", number=str(number % 3))
                here.controller.detach(seen.name, keep_link=number % 2 == 0)
            here.controller.drop_spares()

        connect(50)
        attach(8)
        before = held(here)
        connect(connections)
        attach(devices)
        until(lambda: here.states() == [CONNECTED])
        # Drivers learn in their own time that a device is gone.
        until(lambda: all(now[0] <= before[who][0] and now[1] <= before[who][1] for who, now in held(here).items()))
        after = held(here)
        for who, (files, threads, kilobytes) in after.items():
            assert files <= before[who][0], who
            assert threads <= before[who][1], who
            assert kilobytes < before[who][2] + LEAK_KB, who
        here.controller.detach(name)
        nothing_left(here)


def held(here: Bench) -> dict[str, tuple[int, int, int]]:
    """Open files, threads and KB of resident memory of all processes that take part."""
    pids = {"registry": here.service.registry_pid, "server": here.service.server_pid,
            "holder": here.service.holder_pid, "controller": os.getpid()}
    pids |= {name: domain.worker for name, domain in here.domains.items()}
    found = {}
    for who, pid in pids.items():
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        found[who] = descriptors(pid), int(status["Threads"]), int(status["VmRSS"].split()[0])
    return found


@pytest.mark.parametrize("point", ["before", "after", "keys"])
def test_a_controller_killed_in_the_middle_leaves_what_the_next_one_finds(point: str) -> None:
    with bench("front", "back") as here:
        pid = os.fork()
        if not pid:
            _die(here, point)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        here.controller.recover()
        if point == "keys":  # it is attached, and nobody waits for it any more
            until(lambda: here.states() == [CONNECTED])
            here.controller.detach(here.controller.find("echo", "front"))
        nothing_left(here)
        here.controller.detach(here.controller.attach("echo", "front", "back").name)
        nothing_left(here)


def _die(here: Bench, point: str) -> None:
    """Attach a device, in a process of its own that is killed before a region is plugged, after, or when all keys are
    written."""

    class Deadly(ServicePlugger):
        def plug(self, spec: RegionSpec) -> None:
            if point == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            here.service.create(spec)
            if point == "after":
                os.kill(os.getpid(), signal.SIGKILL)

    class Waiting(Controller):
        def _await_met(self, name: Name, record: Record, wait: float) -> Seen:
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

    try:
        here.service._control = None  # a connection of its own
        registry = Registry(open_port(f"unix:{here.service.registry_socket}"))
        Waiting(registry, Deadly(here.service)).attach("echo", "front", "back")
    finally:
        os._exit(1)


def test_bad_input_is_told_and_leaves_nothing() -> None:
    with bench("front", "back") as here:
        attach = here.controller.attach
        with pytest.raises(MisuseError, match=r"no device class 'ekho' here \(there are: .*echo"):
            attach("ekho", "front", "back")
        with pytest.raises(MisuseError, match="option times: 'two' is no int"):
            attach("echo", "front", "back", {"times": "two"})
        with pytest.raises(MisuseError, match="option times: 9 is more than 8"):
            attach("echo", "front", "back", texts={"times": "9"})
        with pytest.raises(MisuseError, match="no option 'time'; did you mean 'times'"):
            attach("echo", "front", "back", {"time": 1})
        with pytest.raises(DeviceError, match=r"backend 'bakc' is no domain .*\(there are: back, front\)"):
            attach("echo", "front", "bakc")
        with pytest.raises(DeviceError, match="both 'front'"):
            attach("echo", "front", "front")
        with pytest.raises(DeviceError, match="'x' is no number"):
            attach("echo", "front", "back", number="x")
        with pytest.raises(DeviceError, match=r"no device echo-0 of front \(there are: none\)"):
            here.controller.detach(Name("echo", "front", "0"))
        nothing_left(here)
        seen = attach("echo", "front", "back")
        with pytest.raises(DeviceError, match="attached already, number 0"):
            attach("echo", "front", "back")
        with pytest.raises(DeviceError, match="attached already, number 0"):
            attach("echo", "front", "back", number="0")
        assert here.states() == [CONNECTED]
        here.controller.detach(seen.name)
        nothing_left(here)


def test_a_back_end_that_never_comes() -> None:
    with bench("front", start=True) as here:
        here.add("back", start=False)
        until(lambda: "has its drivers" in here.domains["front"].log.read_text())
        with pytest.raises(DeviceError, match=r"not connected after 3 s, and detached again; the front end in front "
                           r"says initialised: waits for the back end; the back end in back says nothing: do drivers "
                           r"run there\?"):
            here.controller.attach("echo", "front", "back", wait=3.0)
        nothing_left(here)


def test_a_driver_that_fails_says_why_and_is_tried_again() -> None:
    with bench("front", "back") as here:
        until(lambda: all("has its drivers" in domain.log.read_text() for domain in here.domains.values()))
        with pytest.raises(DeviceError, match=r"not connected after several tries, .*: OSError: this driver is broken"):
            here.controller.attach("ledger", "front", "back", {"broken": True}, wait=60.0)
        nothing_left(here)
        name, _ = ledger(here)
        here.controller.detach(name)


def test_a_path_without_permission_is_told_in_the_drivers_words() -> None:
    path = "/proc/sys/kernel/osrelease"  # which root may not write either
    with bench("front", "back") as here:
        here.controller.detach(ledger(here)[0])  # so both have drivers
        with pytest.raises(DeviceError, match=rf"PermissionError: .*Permission denied: '{path}'"):
            here.controller.attach("ledger", "front", "back", {"path": path}, wait=5.0)
        nothing_left(here)


def test_detached_by_force_while_an_end_is_stuck() -> None:
    with bench("front", "back") as here:
        name, _ = ledger(here)
        stuck = here.domains["back"].worker
        os.kill(stuck, signal.SIGSTOP)
        with pytest.raises(DeviceError, match=r"the back end \(connected\) does not close within 0.3 s.* by force"):
            here.controller.detach(name, wait=0.3)
        with pytest.raises(DeviceError, match="cannot be kept"):
            here.controller.detach(name, keep_link=True, force=True)
        assert here.controller.detach(name, wait=0.3, force=True) == ()
        nothing_left(here)
        os.kill(stuck, signal.SIGCONT)
        again, path = ledger(here)
        with here.program("front", "ledger-0") as program:
            stream = Stream(program)
            stream.go_on()
        stream.check(path)
        here.controller.detach(again)
        nothing_left(here)


def test_no_region_to_be_had_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with bench("front", "back") as here:

        def no_port(*_: object) -> None:
            raise DeviceError("VM front: all 4 region ports are taken")

        monkeypatch.setattr(here.service, "create", no_port)
        with pytest.raises(DeviceError, match="all 4 region ports are taken"):
            here.controller.attach("echo", "front", "back")
        monkeypatch.undo()
        nothing_left(here)


def test_a_domain_reads_only_its_own_keys_and_its_peers_end() -> None:
    with bench("front", "back", start=True) as here:
        seen = here.controller.attach("echo", "front", "back")
        (rogue,) = here.add("rogue", start=False)
        with Registry(open_port(rogue.address)) as registry:
            for path in ("/domain/front/device/echo/0/state", "/domain/back/backend/echo/front/0/link",
                         "/device/echo/front/0", f"/link/{seen.record.link}"):
                with pytest.raises(DeniedError):
                    registry.read(path)
                with pytest.raises(DeniedError):
                    registry.write(path, b"mine")
        here.controller.detach(seen.name)
        nothing_left(here)
