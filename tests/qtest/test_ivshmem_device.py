"""QEMU's real ivshmem devices on our servers, with no guest: doorbells, returns, restarts, read-only members."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from qtest_machine import Machine, doorbell_options, options_for
from region_support import DEADLINE, alive, link, memory_word, running, settle, short_directory, until, wait_word

from host import wire
from host.holder import Holder
from host.ivshmem.client import connect
from idc.layout import HEADER_BYTES, MAGIC, Rights, split_member_word

if TYPE_CHECKING:
    from collections.abc import Iterator

    from host.ivshmem.client import Peer
    from host.region import RegionService

ROOT = Path(__file__).resolve().parents[2]
DATA = 0x8000  # an offset behind the channel of `link`
VECTORS = 3
FRONT, BACK, HOST = 0, 1, 2


class Bench:
    """A service, one region of two VMs and the host, and a third VM that only reads it."""

    def __init__(self, service: RegionService, directory: Path) -> None:
        self.service = service
        self.directory = directory
        self.region = service.create(link(host=Rights.RW, eye=Rights.RO))
        holder = Holder(service.holder_socket)
        held = holder.get("region/link")
        holder.close()
        self._fds = held.fds
        self.events = [held.fds[4 + i * VECTORS : 4 + (i + 1) * VECTORS] for i in range(3)]

    def close(self) -> None:
        wire.close_all(self._fds)

    def machine(self, member: str, name: str = "") -> Machine:
        """A QEMU plugged in as that member, that has taken everything the server sent it."""
        attachment = self.region.attachment(member)
        vectors = VECTORS if attachment.id < 3 else 0
        qemu = Machine(self.directory, name or member, options_for(attachment), vectors)
        if vectors:
            # Own vectors come last, and a ring stays in its eventfd until QEMU listens.
            self.service.ring("link", member, VECTORS - 1)
            qemu.wait_rang(VECTORS - 1)
        return qemu

    def quiet(self, *machines: Machine) -> None:
        """Wait until what the server rang has arrived, then forget it."""
        settle(self.service)
        for qemu in machines:
            until("QEMU took its eventfds", lambda q=qemu: not self.pending(q.id))  # type: ignore[misc]
            for vector in range(VECTORS):
                qemu.rang(vector)

    def pending(self, member: int) -> list[int]:
        """Vectors of a member that were rung and that nobody took. Looks without reading: that would steal."""
        poller = select.poll()
        for fd in self.events[member]:
            poller.register(fd, select.POLLIN)
        return [self.events[member].index(fd) for fd, _ in poller.poll(0)]


@pytest.fixture
def bench() -> Iterator[Bench]:
    with running() as service, short_directory() as directory:
        bench = Bench(service, directory)
        try:
            yield bench
        finally:
            bench.close()


def presence(qemu: Machine, member: int) -> tuple[int, bool]:
    """A member's live word as a guest sees it in BAR 2."""
    low, high = (qemu.shared_read(512 + 64 * member + i) for i in (0, 4))
    return split_member_word(high << 32 | low)


def test_two_devices_and_a_host_process_share_memory_and_ring_each_other(bench: Bench) -> None:
    with (
        bench.machine("front") as front,
        bench.machine("back") as back,
        connect(bench.region.socket("host")) as host,
    ):
        assert (front.id, back.id, host.id) == (FRONT, BACK, HOST)
        assert front.shared_read(0) == back.shared_read(0) == int.from_bytes(MAGIC[:4], "little")
        front.shared_write(DATA, 0x1234_5678)
        assert back.shared_read(DATA) == 0x1234_5678
        assert int.from_bytes(host.memory[DATA : DATA + 4], "little") == 0x1234_5678
        bench.quiet(front, back)
        for vector in range(VECTORS):
            front.ring(BACK, vector)
            back.wait_rang(vector)
            back.ring(FRONT, vector)
            front.wait_rang(vector)
            host.ring(FRONT, vector)
            front.wait_rang(vector)
            host.wait(vector, 0)
            back.ring(HOST, vector)
            assert host.wait(vector, DEADLINE)
        assert not any(qemu.rang(vector) for qemu in (front, back) for vector in range(VECTORS))


def test_presence_is_seen_and_rung_in_a_vm(bench: Bench) -> None:
    with bench.machine("front") as front:
        bench.quiet(front)
        assert (presence(front, FRONT), presence(front, BACK)) == ((1, True), (0, False))
        for incarnation in (1, 2):
            back = bench.machine("back")
            for vector in range(VECTORS):
                front.wait_rang(vector)
            assert presence(front, BACK) == (incarnation, True)
            back.kill()
            for vector in range(VECTORS):
                front.wait_rang(vector)
            until("gone", lambda n=incarnation: presence(front, BACK) == (n, False))  # type: ignore[misc]


def test_a_vm_comes_back_again_and_again_and_the_survivor_lives(bench: Bench) -> None:
    with bench.machine("front") as front:
        for incarnation in range(1, 5):
            with bench.machine("back") as back:
                assert back.id == BACK
                bench.quiet(front, back)
                front.ring(BACK, 1)
                back.wait_rang(1)
                back.ring(FRONT, 2)
                front.wait_rang(2)
                front.shared_write(DATA, incarnation)
                assert back.shared_read(DATA) == incarnation
            until("noticed", lambda: not bench.service.members("link")["back"][1])
            # Rung while nobody is there: kept. But the next QEMU takes it when it starts, long before a driver
            # enables interrupts: whoever attaches must look at its rings.
            front.ring(BACK, 0)
            until("kept", lambda: bench.pending(BACK) == [0])
            assert front.running
        with bench.machine("back") as back:
            until("taken", lambda: not bench.pending(BACK))
            assert presence(back, BACK) == (5, True)


def test_doorbells_to_nobody_and_to_wrong_vectors_harm_nothing(bench: Bench) -> None:
    with bench.machine("front") as front, bench.machine("back") as back:
        bench.quiet(front, back)
        for peer, vector in ((BACK, VECTORS), (BACK, 255), (3, 0), (0xFFFF, 0xFFFF)):
            front.ring(peer, vector)
        front.ring(BACK, 1)
        back.wait_rang(1)
        assert not any(back.rang(vector) for vector in range(VECTORS))
        assert front.running
        assert back.running


def test_server_killed_and_restarted_under_live_vms(bench: Bench) -> None:
    with bench.machine("front") as front:
        back = bench.machine("back")
        settle(bench.service)
        os.kill(bench.service.server_pid, signal.SIGKILL)
        until("server gone", lambda: not alive(bench.service.server_pid))
        bench_rings(front, back)  # established links need no server
        bench.service.restart()
        assert bench.service.members("link")["front"] == (1, True)
        assert bench.service.members("link")["back"] == (1, True)
        bench.quiet(front, back)
        bench_rings(front, back)
        back.kill()
        until("noticed by the new server", lambda: presence(front, BACK) == (1, False))
        with bench.machine("back", "back2") as again:
            assert again.id == BACK
            bench.quiet(front, again)
            bench_rings(front, again)
            assert presence(front, BACK) == (2, True)


def bench_rings(front: Machine, back: Machine) -> None:
    """Each rings the other once."""
    front.ring(BACK, 1)
    back.wait_rang(1)
    back.ring(FRONT, 1)
    front.wait_rang(1)


def test_a_vm_that_starts_while_the_server_is_dead_gets_its_device_from_the_next(bench: Bench) -> None:
    with bench.machine("front") as front:
        settle(bench.service)
        os.kill(bench.service.server_pid, signal.SIGKILL)
        until("server gone", lambda: not alive(bench.service.server_pid))
        with socket.socket(socket.AF_UNIX) as early:
            early.connect(str(bench.region.socket("host")))  # queued in the socket that the holder kept
            bench.service.restart()
            early.settimeout(DEADLINE)
            assert early.recv(8) == bytes(8)
        with bench.machine("back") as back:
            bench.quiet(front, back)
            bench_rings(front, back)


def test_a_read_only_member_sees_everything_and_changes_nothing(bench: Bench) -> None:
    with bench.machine("front") as front, bench.machine("eye") as eye:
        front.shared_write(DATA, 0xAAAA_5555)
        assert eye.shared_read(DATA) == 0xAAAA_5555
        assert eye.shared_read(0) == int.from_bytes(MAGIC[:4], "little")
        for offset in (0, 512, HEADER_BYTES, DATA, bench.region.header.size - 4):
            before = memory_word(bench.region, offset)
            eye.shared_write(offset, before ^ 0xFFFF_FFFF)
            assert eye.shared_read(offset) == before
            assert memory_word(bench.region, offset) == before
        assert eye.running


def test_garbage_and_refused_connections_do_not_reach_the_vms(bench: Bench) -> None:
    with bench.machine("front") as front, bench.machine("back") as back:
        for path in (bench.region.socket("front"), bench.region.socket("host")):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(path))
                sock.settimeout(DEADLINE)
                try:
                    sock.send(b"\xff" * 64)
                    while sock.recv(4096):
                        pass
                except (ConnectionResetError, BrokenPipeError):
                    pass  # refused, or cut off with some of it unread
        bench.quiet(front, back)
        bench_rings(front, back)
        assert bench.service.members("link") == {"front": (1, True), "back": (1, True), "host": (1, False)}


def test_a_region_dropped_under_live_vms_leaves_them_running(bench: Bench) -> None:
    with bench.machine("front") as front, bench.machine("back") as back:
        bench.quiet(front, back)
        bench.service.drop("link")
        bench_rings(front, back)
        front.shared_write(DATA, 77)
        assert back.shared_read(DATA) == 77


def test_contrib_mode_with_stock_devices(bench: Bench) -> None:
    path = bench.directory / "contrib.sock"
    server = subprocess.Popen(
        [sys.executable, "-m", "host.ivshmem.contrib", "-F", "-S", str(path), "-m", str(bench.directory), "-l", "1M",
         "-n", "2"], cwd=ROOT,
    )  # fmt: skip
    try:
        until("a server that listens", lambda: listens(path))
        with connect(path, vectors=2) as host, contrib_machine(bench, path, "a") as first:
            assert (host.id, first.id) == (0, 1)
            for number in (2, 3, 4):
                with contrib_machine(bench, path, f"b{number}") as second:
                    assert second.id == number
                    until("told of the vectors", lambda n=number: len(host_peers(host).get(n, ())) == 2)  # type: ignore[misc]
                    host.ring(1, 1)
                    first.wait_rang(1)
                    host.ring(number, 1)
                    second.wait_rang(1)
                    until_rings(first, number, second)
                    second.shared_write(DATA, number)
                    assert first.shared_read(DATA) == number
                # The survivors are told, and live on: the id is never used again.
                until("told of the end", lambda n=number: n not in host_peers(host))  # type: ignore[misc]
                assert first.running
            first.ring(0, 0)
            assert host.wait(0, DEADLINE)
    finally:
        server.terminate()
        assert server.wait(DEADLINE) == 0
    assert not path.exists()


def listens(path: Path) -> bool:
    """Whether somebody does there: a socket has its path some time before. No connection, which would take an id."""
    accepts = "00010000"  # __SO_ACCEPTCON, the fourth column
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return any(words[-1] == str(path) and words[3] == accepts for words in lines)


@contextmanager
def contrib_machine(bench: Bench, path: Path, name: str) -> Iterator[Machine]:
    with Machine(bench.directory, name, doorbell_options(path, 2), 2) as qemu:
        yield qemu


def host_peers(host: Peer) -> dict[int, tuple[int, ...]]:
    """The peers a host process knows, after hearing the news."""
    host.update()
    return host.peers


def until_rings(sender: Machine, peer: int, receiver: Machine) -> None:
    """Ring until it arrives: a stock server does not say when the sender's device has heard of the new peer,
    and a doorbell to a peer it does not know is dropped."""

    def arrived() -> bool:
        sender.ring(peer, 0)
        return receiver.rang(0)

    until("a doorbell between two devices", arrived)


def test_killed_vms_leave_no_process_and_no_socket(bench: Bench) -> None:
    machines = [bench.machine(name) for name in ("front", "back")]
    with connect(bench.region.socket("host")) as host:
        wait_word(host, FRONT, (1, True))
        for qemu in machines:
            qemu.kill()
        for member in (FRONT, BACK):
            wait_word(host, member, (1, False))
    assert not any(alive(qemu.process.pid) for qemu in machines)
    assert sorted(path.suffix for path in bench.directory.iterdir()) == [".log", ".log"]
