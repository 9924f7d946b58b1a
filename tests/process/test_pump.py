"""A queue between two processes: killed and started again under traffic; told to poll; and a liar, under
AddressSanitizer."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from region_support import PAIR, running

from host.region import Region, RegionSpec
from idc.device.classes import queue_channel
from idc.layout import ChannelSpec, Kind
from idc.pump import Queue, places
from idc.pump.tap import DEPTH, QUOTAS, VNET_BYTES, Tap
from idc.transport.address import open_port
from idc.transport.shared import SharedPort

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

HERE = Path(__file__).parent
CHANNEL = ChannelSpec(queue_channel(0), Kind.MESSAGE, "front", "back", 256 * 256, 256)
LIMIT = 30.0


@pytest.fixture
def region() -> Iterator[Region]:
    with running() as service:
        yield service.create(RegionSpec("queues", 1 << 22, PAIR, [CHANNEL]))


@contextlib.contextmanager
def side(region: Region, what: str, member: str, first: int = 0) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen([sys.executable, str(HERE / "pump_side.py"), what,
                              f"member:{region.socket(member)}/{CHANNEL.name}", str(first)], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield child
    finally:
        child.kill()
        child.wait(LIMIT)
        for end in (child.stdin, child.stdout):
            assert end is not None
            end.close()


def numbers(child: subprocess.Popen[str], count: int) -> list[int]:
    assert child.stdout is not None
    return [int(child.stdout.readline()) for _ in range(count)]


def ended(child: subprocess.Popen[str]) -> str:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.close()
    said = child.stdout.read().splitlines()[-1]
    assert child.wait(LIMIT) == 0
    return said


def test_the_receiver_killed_and_started_again_under_traffic(region: Region) -> None:
    with side(region, "send", "front") as sender:
        last = -1
        for _ in range(6):
            with side(region, "receive", "back") as receiver:
                got = numbers(receiver, 4)
                assert got[0] > last, "a packet of a former connection"
                last = got[-1]
        assert ended(sender) == "late 0"


def test_the_sender_killed_and_started_again(region: Region) -> None:
    for _ in range(3):
        with side(region, "receive", "back") as receiver, side(region, "send", "front", 1 << 32) as sender:
            numbers(receiver, 3)
            sender.kill()
            sender.wait(LIMIT)
            with side(region, "send", "front"):  # all of whose numbers, whatever it drops, come after higher ones
                assert receiver.wait(LIMIT) == 1


class Polling:
    """Both ends of a queue in this process, told to poll, seconds; pairs of sockets stand for their interfaces."""

    def __init__(self, region: Region, *polls: float) -> None:
        self.queues, self.outside, self.inside = [], [], []
        for member, poll in zip(PAIR, polls, strict=True):
            port = open_port(f"member:{region.socket(member)}/{CHANNEL.name}")
            assert isinstance(port, SharedPort)
            inside, outside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            inside.setblocking(False)
            outside.settimeout(LIMIT)
            self.inside.append(inside)
            self.outside.append(outside)
            queue = Queue(member, Tap(inside.fileno(), places(port.region, 1)[0]), depth=DEPTH, accepts=QUOTAS,
                          told=lambda: None, poll=poll)
            queue.start(port)
            self.queues.append(queue)
        deadline = time.monotonic() + LIMIT
        while not all(queue.connected for queue in self.queues):
            assert time.monotonic() < deadline, "the two ends do not meet"
            time.sleep(0.01)

    def send(self) -> None:
        """A packet, all the way."""
        packet = bytes(VNET_BYTES) + os.urandom(60)
        self.outside[0].send(packet)
        assert self.outside[1].recv(1 << 17) == packet

    def close(self) -> None:
        for queue in self.queues:
            queue.stop()
            assert queue.error is None
        for end in (*self.inside, *self.outside):
            end.close()


def test_a_queue_polls_for_as_long_as_it_was_told_and_then_sleeps(region: Region) -> None:
    poll, undisturbed = 0.1, 0
    with contextlib.ExitStack() as stack:
        with before_others():
            pair = stack.enter_context(contextlib.closing(Polling(region, 0.0, poll)))
        receiver = pair.queues[1]
        for _ in range(40):
            before = receiver.counters
            time.sleep(0.3)  # longer than it goes on sleeping after somebody wanted the CPU
            began = time.monotonic()
            pair.send()  # so that it is awake, and its wait begins after `began`
            sleeps = receiver.counters.sleeps
            while receiver.counters.sleeps == sleeps:
                assert time.monotonic() - began < LIMIT, "it does not sleep"
                time.sleep(0.001)
            slept_after = time.monotonic() - began
            if receiver.counters.yielded == before.yielded:  # else others of this machine wanted the CPU
                assert poll <= slept_after < poll + 1
                undisturbed += 1
            if undisturbed == 3:
                break
        assert undisturbed, f"others wanted the CPU each time: {receiver.counters}"
        assert receiver.counters.late == 0


def test_polling_gives_the_cpu_to_a_thread_that_wants_it(region: Region) -> None:
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mine)})  # of the queues' threads and of the other process, too
    try:
        with contextlib.closing(Polling(region, 0.5, 0.5)) as pair, \
                subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
            try:
                time.sleep(0.5)  # it has started
                own, theirs = time.process_time(), cpu_ns(other.pid)
                for _ in range(200):
                    pair.send()
                    time.sleep(0.01)
                own, theirs = time.process_time() - own, cpu_ns(other.pid) - theirs
            finally:
                other.kill()
            other.wait()
            counters = pair.queues[1].counters
            deadline = time.monotonic() + LIMIT
            while any(queue._pump.shy_ns for queue in pair.queues):  # waits of a moment each, with nobody else there
                assert time.monotonic() < deadline, "it goes on giving way though nobody wants the CPU"
                for end in (0, 1):
                    pair.outside[end].send(bytes(VNET_BYTES) + os.urandom(60))
                    pair.outside[1 - end].recv(1 << 17)
    finally:
        os.sched_setaffinity(0, mine)
    assert counters.yielded > 0
    assert own <= theirs / 1e9 / 4, f"two queues took {own:.2f} s of a CPU, who wanted it had {theirs / 1e9:.2f}"


@contextlib.contextmanager
def before_others() -> Iterator[None]:
    """Threads that are started meanwhile have the CPU before all others, if this user may have that."""
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def cpu_ns(pid: int) -> int:
    """That it has run, ns."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])


def lies(core: Mapping[str, str], seed: int, rounds: int) -> str:
    env = {**core, "PYTHONPATH": core["PYTHONPATH"] + os.pathsep + str(HERE.parent)}
    done = subprocess.run([sys.executable, str(HERE / "pump_liar.py"), str(seed), str(rounds)], env=env,
                          capture_output=True, text=True, check=False, timeout=100 + rounds / 5)
    assert done.returncode == 0, f"seed {seed}\n{done.stdout[-2000:]}{done.stderr[-6000:]}"
    return done.stdout


def test_whatever_a_peer_says_of_a_packet_is_taken_or_ends_its_connection(sanitized_core: dict[str, str]) -> None:
    said = lies(sanitized_core, 20261128, 150)
    taken, refused = (int(word) for word in said.split()[1::2])
    assert taken > 30
    assert refused > 30


@pytest.mark.soak
def test_whatever_a_peer_says_for_long(sanitized_core: dict[str, str]) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    sys.stdout.write(f"seed {seed}\n")
    lies(sanitized_core, seed, 3000)
