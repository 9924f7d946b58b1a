"""One side stopped or killed at each named point of the protocol: the other never hangs, never reads what was not sent,
and talks again with whoever comes next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from region_support import PAIR, running
from ring_support import message_ring
from traffic import BLOCK, CHANNELS, PATIENCE, Role, converse

from host.ivshmem import client
from host.region import RegionSpec
from idc import faults
from idc._core import lib
from idc.errors import MisuseError
from idc.faults import Action, Fault, Point

if TYPE_CHECKING:
    from collections.abc import Iterator

    from host.region import Region

ROOT = Path(__file__).resolve().parents[2]
ITEMS = 2 * BLOCK
PRODUCER = [Point.COPIED, Point.PUBLISHED, Point.RINGING_DATA, Point.ARMED_SPACE, Point.ASLEEP_SPACE, Point.WOKEN_SPACE]
CONSUMER = [Point.TAKEN, Point.RELEASED, Point.RINGING_SPACE, Point.ARMED_DATA, Point.ASLEEP_DATA, Point.WOKEN_DATA]
ATTACHING = [Point.CLEARED, Point.EPOCH, Point.RESET, Point.OPENED, Point.ACKED, Point.CLOSED]
CASES: list[tuple[Role, Point]] = [
    *(("send", point) for point in PRODUCER + ATTACHING),
    *(("receive", point) for point in CONSUMER + ATTACHING),
]


@pytest.fixture(scope="module")
def region() -> Iterator[Region]:
    with running() as service:
        yield service.create(RegionSpec("link", 1 << 20, PAIR, CHANNELS))


class Victim:
    """The side with the fault, in a process of its own."""

    def __init__(self, region: Region, channel: str, role: Role, fault: Fault | None) -> None:
        command = [sys.executable, str(ROOT / "tests" / "traffic.py"), str(region.socket("back")), channel, role]
        env = os.environ | {"PYTHONPATH": str(ROOT)} | (fault.env if fault else {})
        self.process = subprocess.Popen([*command, str(ITEMS)], env=env)

    def wait_fault(self, action: Action) -> None:
        """Until it was stopped or killed; fails if it ended in another way."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            found = os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is not None:
                how = (os.CLD_STOPPED, signal.SIGSTOP) if action is Action.STOP else (os.CLD_KILLED, signal.SIGKILL)
                assert (found.si_code, found.si_status) == how, "the victim ended before it came to the point"
                return
            time.sleep(0.002)
        raise AssertionError("the victim never came to the point")

    def end(self) -> None:
        self.process.kill()  # also when it is stopped
        self.process.wait()


@contextmanager
def background(run: threading.Thread) -> Iterator[None]:
    run.start()
    try:
        yield
    finally:
        run.join()


@pytest.mark.parametrize("channel", ["messages", "bytes"])
@pytest.mark.parametrize(("role", "point"), CASES, ids=lambda value: value.name if isinstance(value, Point) else value)
def test_killed_at_a_point(region: Region, channel: str, role: Role, point: Point) -> None:
    """What was published arrives; then the connection is over, and a new one starts from nothing."""
    fault = Fault(point, 1 if point in ATTACHING else 3, Action.KILL)
    victims = [Victim(region, channel, role, fault)]

    def replace() -> None:
        victims[0].wait_fault(Action.KILL)
        victims.append(Victim(region, channel, role, None))

    try:
        with client.join(region.socket("front")) as mine, background(threading.Thread(target=replace)):
            ends = converse(mine, channel, "receive" if role == "send" else "send", ITEMS, timeout=1.0)
            if point is Point.CLOSED:
                assert ends == 0  # all had been sent
            elif point not in ATTACHING:
                assert ends == 1
        if point is not Point.CLOSED:
            assert victims[1].process.wait(PATIENCE) == 0
    finally:
        for victim in victims:
            victim.end()


@pytest.mark.parametrize("channel", ["messages", "bytes"])
@pytest.mark.parametrize(("role", "point"), CASES, ids=lambda value: value.name if isinstance(value, Point) else value)
def test_stopped_at_a_point(region: Region, channel: str, role: Role, point: Point) -> None:
    """The other side's waits end in time; let go, the stopped side goes on where it was, and nothing is missing."""
    victim = Victim(region, channel, role, Fault(point, 1 if point in ATTACHING else 3))
    stalled = threading.Event()

    def let_go() -> None:
        try:
            victim.wait_fault(Action.STOP)
            stalled.clear()
            if point is not Point.CLOSED:  # the other side has all that it waits for
                assert stalled.wait(PATIENCE), "the other side's wait did not end"
        finally:
            victim.process.send_signal(signal.SIGCONT)

    try:
        with client.join(region.socket("front")) as mine, background(threading.Thread(target=let_go)):
            other: Role = "receive" if role == "send" else "send"
            ends = converse(mine, channel, other, ITEMS, timeout=0.05, stalled=stalled.set)
            if point not in ATTACHING:
                assert ends == 0
        assert victim.process.wait(PATIENCE) == 0
    finally:
        victim.end()


def test_the_nth_passing_counts_and_comes_once() -> None:
    hits: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: hits.append(number))
    try:
        with message_ring() as ring:
            lib.idc_fault_set(Point.COPIED, 3, signal.SIGUSR1)
            for passing in range(1, 7):
                ring.tx.send(b"x")
                assert len(hits) == (passing >= 3)
            faults.disarm()
    finally:
        faults.disarm()
        signal.signal(signal.SIGUSR1, before)


def test_every_point_says_itself_in_the_environment() -> None:
    for point in Point:
        for action in Action:
            fault = Fault(point, 7, action)
            assert Fault.parse(fault.env["IDC_FAULT"]) == fault


@pytest.mark.parametrize("text", ["", "copied", "copied:1", "copied:0:stop", "nowhere:1:stop",
                                  "copied:1:wait", "a:b:c:d"])
def test_a_fault_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(MisuseError):
        Fault.parse(text)


def test_a_program_refuses_a_fault_that_makes_no_sense() -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "IDC_FAULT": "here:1:stop"}
    command = [sys.executable, "-c", "import idc.ring"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "POINT one of copied, taken" in done.stderr
