"""The fd holder: gives back what it got, to its own user alone, and ends with whoever started it."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from region_support import alive, descriptors, short_directory, until

from host import wire
from host.errors import HolderError, SocketPathError
from host.holder import Holder

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def holding() -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A running holder: its socket and its process."""
    with short_directory() as directory:
        path = directory / "holder.sock"
        process = start(path)
        try:
            yield path, process
        finally:
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(10) == 0
        assert not path.exists()


def start(path: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-S", "-m", "host.holder", str(path), "--lifeline", "0", "--ready", "1"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.read(1) == b"\n"
    process.stdout.close()
    return process


def pipe_ends(n: int) -> list[int]:
    """n descriptors that can be told apart: file i has i bytes."""
    fds = []
    for i in range(n):
        fd = os.memfd_create("t", os.MFD_CLOEXEC)
        os.ftruncate(fd, i)
        fds.append(fd)
    return fds


@pytest.mark.parametrize("count", [0, 1, 250, 251, 600])
def test_put_and_get_any_number_in_order(count: int) -> None:
    with holding() as (path, process):
        holder = Holder(path)
        fds = pipe_ends(count)
        at = holder.put("a", fds, "text")
        wire.close_all(fds)
        held = holder.get("a")
        assert held.blob == "text"
        assert held.at == at
        assert [os.fstat(fd).st_size for fd in held.fds] == list(range(count))
        assert holder.names() == ["a"]
        assert holder.pid() == process.pid
        wire.close_all(held.fds)
        before = descriptors(process.pid)
        holder.drop("a")
        assert descriptors(process.pid) == before - count
        holder.close()


def test_put_replaces_and_closes_what_was_there() -> None:
    with holding() as (path, process):
        holder = Holder(path)
        fds = pipe_ends(3)
        holder.put("a", fds[:2])
        before = descriptors(process.pid)
        holder.put("a", fds[2:], "new")
        assert descriptors(process.pid) == before - 1
        held = holder.get("a")
        assert (held.blob, [os.fstat(fd).st_size for fd in held.fds]) == ("new", [2])
        wire.close_all(fds + held.fds)
        holder.close()


def test_unknown_names_are_refused_and_the_connection_goes_on() -> None:
    with holding() as (path, _):
        holder = Holder(path)
        with pytest.raises(HolderError, match="no such name"):
            holder.get("x")
        with pytest.raises(HolderError, match="no such name"):
            holder.drop("x")
        assert holder.names() == []
        holder.close()


@pytest.mark.parametrize(
    "garbage",
    [b"\0", b"[]", b"{}", b'{"fds": "x"}',
     b'{"fds": -1}', b'{"fds": 1e9}', b'{"fds": 3}', b"x" * 100_000, b"[" * 100_000],
)
def test_garbage_ends_its_own_connection_only(garbage: bytes) -> None:
    with holding() as (path, process):
        holder = Holder(path)
        assert holder.names() == []
        before = descriptors(process.pid)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(10)
            sock.connect(str(path))
            # It may close before it has read all of it, and before all of it is sent.
            with open(os.devnull) as null, contextlib.suppress(ConnectionResetError, BrokenPipeError):
                socket.send_fds(sock, [garbage], [null.fileno()])
                socket.send_fds(sock, [b"?"], [null.fileno()])
                assert sock.recv(100) == b""
        assert holder.names() == []
        until("descriptors closed", lambda: descriptors(process.pid) == before)
        holder.close()


def test_it_outlives_the_lack_of_descriptors() -> None:
    with holding() as (path, process):
        holder = Holder(path)
        with open(os.devnull) as null:
            holder.put("a", [null.fileno()])
            free = descriptors(process.pid)
            _, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (free, hard))
            with pytest.raises(HolderError, match="'list'"):
                Holder(path).names()
            with pytest.raises(HolderError, match="'put b'"):
                holder.put("b", [null.fileno()])
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (hard, hard))
        assert holder.names() == ["a"]
        holder.close()


def test_requests_it_does_not_know_are_answered() -> None:
    with holding() as (path, _), wire.connect(path, 10) as sock:
        for request in ({"op": "boom"}, {}, {"op": "get", "name": 3}, {"op": "put", "name": "a"}):
            wire.send_message(sock, request)
            answer = wire.receive_message(sock)
            assert answer is not None
            assert answer[0]["ok"] is False


def test_a_second_holder_on_the_same_socket_is_refused_and_a_dead_ones_socket_is_replaced() -> None:
    with short_directory() as directory:
        path = directory / "holder.sock"
        first = start(path)
        with pytest.raises(SocketPathError, match="in use"):
            wire.listen(path, socket.SOCK_SEQPACKET)
        first.kill()
        first.wait()
        assert path.exists()
        second = start(path)
        holder = Holder(path)
        assert holder.pid() == second.pid
        holder.close()
        for process in (first, second):
            assert process.stdin is not None
            process.stdin.close()
        assert second.wait(10) == 0
        assert not alive(second.pid)
        assert not path.exists()


def test_a_file_in_the_way_is_left_alone() -> None:
    with short_directory() as directory:
        (directory / "x").write_text("precious")
        with pytest.raises(SocketPathError, match="no socket"):
            wire.listen(directory / "x", socket.SOCK_STREAM)
        assert (directory / "x").read_text() == "precious"


def test_a_path_too_long_says_so() -> None:
    with pytest.raises(SocketPathError, match="107"):
        wire.listen(Path("/tmp") / ("x" * 103), socket.SOCK_STREAM)


def test_the_socket_is_private() -> None:
    with holding() as (path, _):
        assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.needs_root
def test_another_user_is_not_answered() -> None:
    with holding() as (path, _):
        path.parent.chmod(0o755)
        path.chmod(0o666)
        program = (
            "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET);"
            'os.close(0); s.connect(sys.argv[1])\ntry: s.send(b\'{"op": "list", "fds": 0}\'); print(s.recv(99))\n'
            "except OSError as error: print(type(error).__name__)"
        )
        outcome = subprocess.run(
            [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True, timeout=30
        )
        assert outcome.stdout.strip() in ("b''", "BrokenPipeError", "ConnectionResetError")


def test_no_holder_is_one_clear_error() -> None:
    with pytest.raises(HolderError, match="does not answer 'list'"):
        Holder(Path("/nonexistent/holder.sock")).names()
