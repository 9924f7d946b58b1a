"""The drop-in for QEMU's ivshmem-server, as a program and as a class: joins and leaves told, ids never reused."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from region_support import DEADLINE, alive, short_directory, until

from host import wire
from host.errors import PeerError
from host.ivshmem.client import Peer, connect
from host.ivshmem.contrib import ContribServer, open_memory
from host.ivshmem.protocol import Joined, Left
from host.ivshmem.server import Loop

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def server(vectors: int = 2, *, first_id: int = 0, send_timeout: float = 10.0) -> Iterator[Path]:
    """The server in a thread of this process; gives its socket."""
    stop, stopped = socket.socketpair()
    with short_directory() as directory, stop, stopped:
        path = directory / "s"
        loop = Loop()
        listener = wire.listen(path, socket.SOCK_STREAM, mode=None)
        memory = open_memory("", str(directory), 1 << 16)
        ContribServer(loop, listener, memory, vectors, first_id=first_id, send_timeout=send_timeout)
        loop.watch(stopped, selectors.EVENT_READ, lambda _: loop.stop())
        thread = threading.Thread(target=loop.run)
        thread.start()
        try:
            yield path
        finally:
            stop.send(b"x")
            thread.join(DEADLINE)
            listener.close()
            loop.close()


def listens(path: Path) -> bool:
    """Whether a socket there accepts connections, found out without making one: the server would count it."""
    accepting = "00010000"  # __SO_ACCEPTCON, in the column Flags
    lines = Path("/proc/net/unix").read_text().splitlines()
    return any(line.endswith(f" {path}") and line.split()[3] == accepting for line in lines)


@contextmanager
def program(*options: str) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """`ivshmem-server -F` with those options; gives its socket, once it serves, and its process."""
    with short_directory() as directory:
        path = directory / "s"
        process = subprocess.Popen(
            [sys.executable, "-m", "host.ivshmem.contrib", "-F", "-v", "-S", str(path), *options],
            cwd=ROOT, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            until("socket", lambda: listens(path) or process.poll() is not None)
            yield path, process
        finally:
            process.terminate()
            assert process.wait(DEADLINE) == 0
            assert process.stderr is not None
            process.stderr.close()
        assert not path.exists()


def hear(peer: Peer, count: int) -> list[Joined | Left]:
    """The next `count` things the server says."""
    events: list[Joined | Left] = []
    while len(events) < count:
        news = peer.update(DEADLINE)
        assert news, f"only {len(events)} of {count} within {DEADLINE:g} s"
        events += news
    return events


def test_peers_hear_who_comes_and_goes_and_no_id_comes_back() -> None:
    with server() as path, connect(path, vectors=2) as first:
        for number in (1, 2, 3):
            other = connect(path, vectors=2)
            assert (first.id, other.id) == (0, number)
            came = hear(first, 2)
            assert [(e.peer, e.vector) for e in came if isinstance(e, Joined)] == [(number, 0), (number, 1)]
            first.ring(number, 1)
            assert other.wait(1, DEADLINE) == 1
            other.ring(0, 0)
            assert first.wait(0, DEADLINE) == 1
            first.memory[0] = number
            assert other.memory[0] == number
            other.close()
            gone = hear(first, 1)
            assert [e.peer for e in gone if isinstance(e, Left)] == [number]
            assert first.peers == {}


def test_ids_run_out_instead_of_being_reused() -> None:
    with server(first_id=0xFFFF) as path:
        with connect(path, vectors=2) as last:
            assert last.id == 0xFFFF
            with pytest.raises(PeerError, match="ended the connection"):
                connect(path, vectors=2)
            assert last.update() == []
        with pytest.raises(PeerError, match="ended the connection"):
            connect(path, vectors=2)


def test_garbage_ends_one_connection_and_is_told_as_a_departure() -> None:
    with server() as path, connect(path, vectors=2) as first, connect(path, vectors=2) as other:
        hear(first, 2)
        with socket.socket(fileno=os.dup(other.fileno())) as sock:
            sock.send(b"garbage")
        assert [e.peer for e in hear(first, 1)] == [1]


def test_a_client_that_does_not_read_is_cut_off_and_delays_nobody() -> None:
    with (
        server(64, send_timeout=0.5) as path,
        connect(path, vectors=64) as first,
        socket.socket(socket.AF_UNIX) as stuck,
    ):
        stuck.connect(str(path))
        hear(first, 64)
        for number in range(2, 12):  # 650 messages that `stuck` does not read
            with connect(path, vectors=64) as other:
                assert other.id == number
        came = hear(first, 650 + 1)
        assert sorted(e.peer for e in came if isinstance(e, Left)) == list(range(1, 12))


def test_no_vectors_is_a_server_for_memory_alone() -> None:
    with server(0) as path, connect(path, vectors=0) as first, connect(path, vectors=0) as second:
        assert (first.id, second.id, first.events, second.peers) == (0, 1, (), {})


def test_program_with_a_named_object() -> None:
    name = f"idc-test-{os.getpid()}"
    backing = Path("/dev/shm") / name
    try:
        with program("-M", name, "-l", "5K", "-n", "3") as (path, _), connect(path, vectors=3) as peer:
            assert peer.size == 8192 == backing.stat().st_size
            peer.memory[5] = 7
            assert backing.read_bytes()[5] == 7
    finally:
        backing.unlink()


def test_a_second_server_leaves_the_memory_of_the_first_alone() -> None:
    name = f"idc-test-{os.getpid()}"
    backing = Path("/dev/shm") / name
    try:
        with program("-M", name, "-l", "1M") as (path, _):
            until("memory", lambda: backing.exists() and backing.stat().st_size == 1 << 20)
            second = [sys.executable, "-m", "host.ivshmem.contrib", "-F", "-S", str(path), "-M", name, "-l", "4K"]
            outcome = subprocess.run(second, cwd=ROOT, stderr=subprocess.PIPE, timeout=DEADLINE, check=False)
            assert b"in use by a running process" in outcome.stderr
            assert backing.stat().st_size == 1 << 20  # less would end every QEMU that maps it by SIGBUS
    finally:
        backing.unlink()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["-M", "../../tmp/escaped"], "no / in its name"),
        (["-m", "/nonexistent"], "No such file"),
        (["-l", "4E"], "cannot have 4611686018427387904 bytes"),
        (["-l", "5E"], "out of range"),
        (["-S", "/nonexistent/s"], "cannot bind /nonexistent/s"),
        (["-S", "/tmp"], "is no socket"),
    ],
)
def test_what_cannot_start_says_so_and_leaves_no_socket(options: list[str], match: str) -> None:
    with short_directory() as directory:
        command = [sys.executable, "-m", "host.ivshmem.contrib", "-F", "-S", str(directory / "s")]
        command += [*([] if "-M" in options else ["-m", str(directory)]), *options]
        outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE, check=False)
        assert outcome.returncode in (1, 2)
        assert match in outcome.stderr
        assert "Traceback" not in outcome.stderr
        assert list(directory.iterdir()) == []


def test_many_that_die_at_once_are_told_one_after_the_other() -> None:
    with short_directory() as directory, program("-m", str(directory), "-n", "0") as (path, process):
        with contextlib.ExitStack() as clients:
            for _ in range(300):
                client = clients.enter_context(socket.socket(socket.AF_UNIX))
                client.settimeout(DEADLINE)
                client.connect(str(path))
                assert client.recv(8) == bytes(8)  # greeted, so it is one of the peers now
            process.send_signal(signal.SIGSTOP)
        process.send_signal(signal.SIGCONT)
        with connect(path, vectors=0) as late:
            assert late.id == 300


def test_program_with_a_directory_leaves_no_file_there() -> None:
    with (
        short_directory() as directory,
        program("-m", str(directory), "-l", "1M") as (path, _),
        connect(path, vectors=1) as peer,
    ):
        assert peer.size == 1 << 20
        assert list(directory.iterdir()) == []


def answers(path: Path) -> bool:
    """Whether a server accepts connections there."""
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


def test_a_socket_left_by_a_killed_server_does_not_keep_the_next_from_starting() -> None:
    with short_directory() as directory:
        path = directory / "s"
        options = ["-F", "-S", str(path), "-m", str(directory)]
        command = [sys.executable, "-m", "host.ivshmem.contrib", *options]
        first = subprocess.Popen(command, cwd=ROOT)
        try:
            until("a server", lambda: answers(path))
            second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE, check=False)
            assert second.returncode == 1
            assert "in use by a running process" in second.stderr
        finally:
            first.kill()
            first.wait()
        assert path.exists()
        third = subprocess.Popen(command, cwd=ROOT)
        try:
            until("a new server", lambda: answers(path))
            with connect(path, vectors=1) as peer:
                assert peer.size == 4 << 20
        finally:
            third.send_signal(signal.SIGINT)
            assert third.wait(DEADLINE) == 0
        assert not path.exists()


def test_as_a_daemon_it_serves_once_the_parent_exits() -> None:
    with short_directory() as directory:
        path, pid_file = directory / "s", directory / "pid"
        command = [sys.executable, "-m", "host.ivshmem.contrib", "-S", str(path), "-m", str(directory)]
        subprocess.run([*command, "-p", str(pid_file)], cwd=ROOT, check=True, timeout=DEADLINE)
        pid = int(pid_file.read_text())
        with connect(path, vectors=1) as peer:
            assert peer.id == 0
        os.kill(pid, signal.SIGTERM)
        until("daemon gone", lambda: not alive(pid))
        assert not path.exists()
        assert not pid_file.exists()
        outcome = subprocess.run(
            [*command, "-p", str(directory / "none" / "pid")],
            cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE, check=False,
        )  # fmt: skip
        assert outcome.returncode == 1
        assert "cannot write the pid file" in outcome.stderr
        assert not path.exists()
