"""Regions between host processes: fixed ids, members that die and return, hostile clients, servers killed."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from region_support import (
    DEADLINE,
    PAIR,
    alive,
    descriptors,
    link,
    memory_word,
    running,
    settle,
    short_directory,
    until,
    wait_word,
    word,
)

from host import wire
from host.errors import PeerError, ProtocolError, RegionError, ServerError, SocketPathError
from host.holder import Holder
from host.ivshmem.client import connect
from host.region import DoorbellAttachment, PlainAttachment, RegionService, RegionSpec
from idc.layout import HEADER_BYTES, LayoutError, Rights, pack_header, parse_header

ROOT = Path(__file__).resolve().parents[2]


def raw(path: Path) -> socket.socket:
    """A client that does nothing by itself."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(DEADLINE)
    sock.connect(str(path))
    return sock


def test_two_members_share_memory_and_ring_each_other() -> None:
    with running() as service:
        region = service.create(link())
        with connect(region.socket("front")) as front, connect(region.socket("back")) as back:
            assert (front.id, back.id) == (0, 1)
            assert {peer: len(fds) for peer, fds in front.peers.items()} == {1: 3}
            assert {peer: len(fds) for peer, fds in back.peers.items()} == {0: 3}
            assert len(front.events) == len(back.events) == 3
            settle(service)
            front.memory[70_000:70_004] = b"ring"
            front.ring(1, 2)
            assert back.wait(2, DEADLINE) == 1
            assert back.memory[70_000:70_004] == b"ring"
            back.ring(0, 1)
            back.ring(0, 1)
            # The host rang every vector when the other came.
            assert front.wait(1, DEADLINE) == 3
            assert parse_header(front.memory[:HEADER_BYTES], front.size).name == "link"
            service.ring("link", "back")
            assert back.wait(0, DEADLINE) == 1


def test_an_unknown_peer_or_vector_is_an_error_here() -> None:
    with running() as service:
        region = service.create(link())
        with connect(region.socket("front")) as front:
            for peer, vector in ((1, 3), (1, -1), (2, 0)):
                with pytest.raises(PeerError, match="none of them"):
                    front.ring(peer, vector)


def test_presence_and_incarnation_are_stamped_and_the_others_rung() -> None:
    with running() as service:
        region = service.create(link())
        with connect(region.socket("front")) as front:
            assert word(front, 0) == (1, True)
            assert word(front, 1) == (0, False)
            for incarnation in (1, 2, 3):
                back = connect(region.socket("back"))
                assert word(back, 1) == (incarnation, True)
                wait_word(front, 1, (incarnation, True))
                assert service.members("link")["back"] == (incarnation, True)
                back.close()
                wait_word(front, 1, (incarnation, False))
            for vector in (1, 2):
                assert front.wait(vector, DEADLINE) > 0


def test_a_returning_member_has_its_id_and_eventfds_and_the_survivor_is_told_nothing() -> None:
    with running() as service:
        region = service.create(link())
        with connect(region.socket("front")) as front:
            with connect(region.socket("back")) as back:
                first = os.fstat(back.events[1])
            wait_word(front, 1, (1, False))
            front.ring(1, 1)
            front.ring(1, 1)
            with connect(region.socket("back")) as back:
                assert back.id == 1
                # The very same eventfd: it kept what was rung while nobody was there.
                assert back.wait(1, DEADLINE) == 2
                assert os.fstat(back.events[1]).st_ino == first.st_ino
                front.ring(1, 1)
                assert back.wait(1, DEADLINE) == 1
            assert front.update() == []


def test_a_second_connection_of_a_member_is_refused_and_the_first_goes_on() -> None:
    with running() as service:
        region = service.create(link())
        with connect(region.socket("front")) as front, connect(region.socket("back")) as back:
            with pytest.raises(PeerError, match="ended the connection"):
                connect(region.socket("front"))
            back.ring(0, 2)
            assert front.wait(2, DEADLINE)
            assert front.update() == []
            assert service.members("link")["front"] == (1, True)


@pytest.mark.parametrize("garbage", [b"\0", b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096)])
def test_a_client_that_writes_loses_its_connection_and_harms_nobody(garbage: bytes) -> None:
    with running() as service:
        region = service.create(link())
        with connect(region.socket("front")) as front:
            with raw(region.socket("back")) as sock:
                wait_word(front, 1, (1, True))
                fds = [os.eventfd(0) for _ in range(4)]
                socket.send_fds(sock, [garbage], fds)
                for fd in fds:
                    os.close(fd)
                wait_word(front, 1, (1, False))
            assert front.update() == []
            with connect(region.socket("back")) as back:
                back.ring(0, 1)
                assert front.wait(1, DEADLINE)


def test_a_client_that_does_not_read_is_cut_off_and_delays_nobody() -> None:
    members = {f"m{i}": Rights.RW for i in range(8)}
    with running(send_timeout=1.0) as service:
        # 483 messages to each, where a socket takes some 280.
        region = service.create(RegionSpec("bus", 1 << 20, members, vectors=60))
        with connect(region.socket("m0")) as witness, raw(region.socket("m1")):
            wait_word(witness, 1, (1, True))
            start = time.monotonic()
            with connect(region.socket("m2")):
                served = time.monotonic() - start
            wait_word(witness, 1, (1, False))
            cut_off = time.monotonic() - start
        assert served < cut_off
        assert "did not take its messages within 1 s" in service.log.read_text()
        with connect(region.socket("m1")) as late:
            assert late.id == 1
            assert len(late.peers) == 7


def test_a_slow_reader_gets_everything() -> None:
    members = {f"m{i}": Rights.RW for i in range(8)}
    with running() as service:
        region = service.create(RegionSpec("bus", 1 << 20, members, vectors=100))
        with raw(region.socket("m7")) as sock:
            until("present", lambda: service.members("bus")["m7"] == (1, True))
            count = 0
            while count < 3 + 8 * 100:
                data, fds, _, _ = socket.recv_fds(sock, 8, 1)
                assert len(data) == 8
                for fd in fds:
                    os.close(fd)
                count += 1
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.recv(8)


def test_killed_server_established_links_go_on_and_the_next_serves_on() -> None:
    with running() as service:
        region = service.create(link())
        with connect(region.socket("front")) as front, connect(region.socket("back")) as back:
            settle(service)
            os.kill(service.server_pid, signal.SIGKILL)
            with pytest.raises(ServerError, match="restart"):
                service.members("link")
            front.ring(1, 1)
            assert back.wait(1, DEADLINE)
            service.restart()
            assert service.members("link") == {"front": (1, True), "back": (1, True)}
            assert front.update() == []
            assert word(front, 1) == (1, True)
            # The new server sees the end of a connection that the old one accepted.
            back.close()
            wait_word(front, 1, (1, False))
            with connect(region.socket("back")) as again:
                assert (again.id, word(again, 1)) == (1, (2, True))
                front.ring(1, 2)
                assert again.wait(2, DEADLINE)


def test_killed_server_who_died_meanwhile_is_marked_gone_and_who_connected_meanwhile_is_served() -> None:
    with running() as service:
        region = service.create(link(third=Rights.RW))
        with connect(region.socket("front")) as front:
            back = connect(region.socket("back"))
            wait_word(front, 1, (1, True))
            settle(service)
            os.kill(service.server_pid, signal.SIGKILL)
            until("server gone", lambda: not alive(service.server_pid))
            back.close()
            with raw(region.socket("third")) as third:  # connects: the holder has the listening socket
                service.restart()
                wait_word(front, 1, (1, False))
                wait_word(front, 2, (1, True))
                assert third.recv(8) == bytes(8)
            assert word(front, 0) == (1, True)


def test_killed_server_while_it_greeted_a_client_cuts_that_client_off() -> None:
    members = {f"m{i}": Rights.RW for i in range(8)}
    with running() as service:
        region = service.create(RegionSpec("bus", 1 << 20, members, vectors=60))
        with raw(region.socket("m1")) as half:
            until("present", lambda: service.members("bus")["m1"] == (1, True))
            service.restart()
            assert service.members("bus")["m1"] == (1, False)
            received = 0
            while data := half.recv(8):
                received += len(data)
            assert received < 483 * 8
        with connect(region.socket("m1")) as again:
            assert word(again, 1) == (2, True)


def test_killed_server_between_its_books_and_the_header_page() -> None:
    with running() as service:
        region = service.create(link())
        with connect(region.socket("front")) as front:
            settle(service)
            os.kill(service.server_pid, signal.SIGKILL)
            until("server gone", lambda: not alive(service.server_pid))
            holder = Holder(service.holder_socket)
            # As if the fifth incarnation had come and gone, and nobody had been told of either.
            holder.put("seat/link/back", [], '{"incarnation": 5, "greeted": true}')
            holder.close()
            service.restart()
            assert word(front, 1) == (5, False)
            for vector in range(3):
                assert front.wait(vector, DEADLINE)


def test_a_member_is_served_whose_predecessor_ended_unseen() -> None:
    with running() as service:
        region = service.create(link())
        first = connect(region.socket("front"))
        settle(service)
        os.kill(service.server_pid, signal.SIGSTOP)
        try:
            # The server will hear of the new connection before it hears of the old one's end.
            second = raw(region.socket("front"))
            first.close()
        finally:
            os.kill(service.server_pid, signal.SIGCONT)
        with second:
            assert second.recv(8) == bytes(8)
        assert service.members("link")["front"][0] == 2


def test_restarts_again_and_again() -> None:
    with running() as service:
        region = service.create(link())
        with connect(region.socket("front")) as front:
            before = descriptors(service.holder_pid)
            for n in range(1, 4):
                with connect(region.socket("back")):
                    settle(service)
                    service.restart()
                    assert service.members("link") == {"front": (1, True), "back": (n, True)}
                wait_word(front, 1, (n, False))
            until("descriptors released", lambda: descriptors(service.holder_pid) == before)


def test_what_members_write_into_the_header_page_does_not_mislead_the_server() -> None:
    with running() as service:
        region = service.create(link())
        with connect(region.socket("front")) as front:
            settle(service)
            front.memory[:HEADER_BYTES] = os.urandom(HEADER_BYTES)
            service.restart()
            with connect(region.socket("back"), vectors=3) as back:
                assert (back.id, word(back, 1)) == (1, (1, True))
            assert service.members("link")["front"] == (1, True)


def test_holder_gone_links_go_on_and_new_members_are_refused_with_the_reason_in_the_log() -> None:
    with short_directory() as directory, RegionService(directory) as service:
        region = service.create(link())
        with connect(region.socket("front")) as front, connect(region.socket("back")) as back:
            os.kill(service.holder_pid, signal.SIGKILL)
            front.ring(1, 1)
            assert back.wait(1, DEADLINE)
            back.close()
            wait_word(front, 1, (1, False))
            with pytest.raises(PeerError, match="ended the connection"):
                connect(region.socket("back"))
            assert "fd holder" in service.log.read_text()
            with pytest.raises(RegionError, match="is gone"):
                region.open_memory()
            with pytest.raises(RegionError, match="fd holder"):
                service.create(link("other"))


def test_attachments_say_what_to_plug() -> None:
    with running() as service:
        region = service.create(link(eye=Rights.RO))
        doorbell = region.attachment("back")
        assert doorbell == DoorbellAttachment("link", "back", 1, 1 << 20, region.socket("back"), 3)
        assert isinstance(doorbell, DoorbellAttachment)
        assert doorbell.socket.stat().st_mode & 0o777 == 0o600
        assert doorbell.socket.parent.stat().st_mode & 0o777 == 0o700
        plain = region.attachment("eye")
        assert isinstance(plain, PlainAttachment)
        assert (plain.id, plain.size, plain.memory.stat().st_size) == (2, 1 << 20, 1 << 20)
        assert memory_word(region, 12) == HEADER_BYTES
        with pytest.raises(RegionError, match="front, back"):
            region.socket("eye")
        with pytest.raises(RegionError, match="front, back, eye"):
            region.attachment("nobody")


def test_nobody_can_change_the_size_of_a_region() -> None:
    with running() as service:
        fd = service.create(link()).open_memory(writable=True)
        for size in (0, 1 << 21):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        os.close(fd)


@pytest.mark.parametrize("size", [3 << 19, 4096, 1000, 0])
def test_sizes_that_would_abort_qemu_are_refused(size: int) -> None:
    with pytest.raises(RegionError, match="power of two"):
        RegionSpec("link", size, PAIR).plan()


def test_a_region_exists_once_and_can_be_dropped() -> None:
    with running() as service:
        before = descriptors(service.holder_pid)
        server_before = descriptors(service.server_pid)
        region = service.create(link())
        with pytest.raises(RegionError, match="exists already"):
            service.create(link())
        with connect(region.socket("front")) as front:
            service.drop("link")
            with pytest.raises(PeerError, match="ended"):
                front.update(DEADLINE)
            assert word(front, 0) == (1, False)
        assert not region.socket("front").exists()
        with pytest.raises(PeerError, match="no ivshmem server"):
            connect(region.socket("front"))
        with pytest.raises(RegionError, match="no region"):
            service.drop("link")
        assert descriptors(service.holder_pid) == before
        until("server lets go", lambda: descriptors(service.server_pid) <= server_before + 1)  # control connection
        with connect(service.create(link()).socket("front")) as front:
            assert word(front, 0) == (1, True)


def test_memory_that_the_server_cannot_map_is_refused_and_nothing_is_left_of_it() -> None:
    with running() as service:
        service.create(link())
        before = descriptors(service.holder_pid)
        page = pack_header(link("file").plan())
        control = service.log.with_name("control.sock")
        with tempfile.NamedTemporaryFile() as file:
            os.truncate(file.name, 1 << 20)
            os.pwrite(file.fileno(), page, 0)
            with open(file.name, "rb") as readonly, wire.connect(control, DEADLINE) as sock:
                wire.send_message(sock, {"op": "create"}, [readonly.fileno()])
                answer = wire.receive_message(sock)
        assert answer is not None
        assert answer[0] == {"ok": False, "error": "[Errno 13] Permission denied"}
        assert descriptors(service.holder_pid) == before
        assert not service.log.with_name("front@file.sock").exists()
        assert service.create(link("file")).name == "file"


def test_a_path_too_long_for_a_socket_says_what_to_do() -> None:
    with short_directory() as directory, RegionService(directory / ("d" * 30)) as service:
        with pytest.raises(RegionError, match="shorter path"):
            service.create(link("x" * 64))
        assert service.create(link("y")).name == "y"


def test_a_run_directory_too_deep_says_so_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(SocketPathError, match="shorter"):
        RegionService(tmp_path / ("d" * 90)).start()


def test_a_start_that_fails_shows_the_log() -> None:
    with short_directory() as directory:
        (directory / "ivshmem").mkdir()
        (directory / "ivshmem" / "holder.sock").write_text("in the way")
        service = RegionService(directory)
        with pytest.raises(ServerError, match=r"(?s)fd holder ended with code 1.*exists and is no socket"):
            service.start()
        service.close()


def test_a_foreign_server_needs_the_number_of_vectors() -> None:
    with running() as service:
        region = service.create(link())
        fd = region.open_memory(writable=True)
        os.pwrite(fd, bytes(8), 0)
        os.close(fd)
        with pytest.raises(LayoutError, match="magic") as caught:
            connect(region.socket("front"))
        assert "how many vectors" in caught.value.__notes__[0]
        with connect(region.socket("front"), vectors=3) as front:
            assert len(front.events) == 3


def test_a_greeting_that_stops_is_given_up() -> None:
    with short_directory() as directory, socket.socket(socket.AF_UNIX) as server:
        server.bind(str(directory / "s"))
        server.listen()
        with pytest.raises(PeerError, match="state VERSION"):
            connect(directory / "s", timeout=0.2)


@pytest.mark.parametrize("vectors", [None, 0])
def test_memory_that_cannot_be_mapped_is_the_servers_fault(vectors: int | None) -> None:
    with short_directory() as directory, socket.socket(socket.AF_UNIX) as server:
        server.bind(str(directory / "s"))
        server.listen()
        reader, writer = os.pipe()
        files = len(os.listdir("/proc/self/fd"))

        def greet() -> None:
            with server.accept()[0] as sock:
                for number, fds in ((0, []), (7, []), (-1, [reader])):
                    socket.send_fds(sock, [struct.pack("<q", number)], fds)

        with ThreadPoolExecutor(1) as pool:
            greeted = pool.submit(greet)
            with pytest.raises(ProtocolError, match="what the server calls shared memory cannot be"):
                connect(directory / "s", vectors=vectors)
            greeted.result()
        assert len(os.listdir("/proc/self/fd")) == files
        os.close(reader)
        os.close(writer)


OWNER = """
import sys
from pathlib import Path
from host.ivshmem.client import connect
from host.region import RegionService, RegionSpec
from idc.layout import Rights
service = RegionService(Path(sys.argv[1]))
service.start()
region = service.create(RegionSpec("link", 1 << 20, {"a": Rights.RW, "b": Rights.RW}))
print(service.holder_pid, service.server_pid, region.socket("a"), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("server_dies_first", [False, True])
def test_nothing_is_left_when_the_owner_is_killed(server_dies_first: bool) -> None:
    with short_directory() as directory:
        owner = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(directory)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert owner.stdin is not None
        assert owner.stdout is not None
        holder, server, path = owner.stdout.readline().split()
        with raw(Path(path)) as sock:
            assert sock.recv(8) == bytes(8)
            if server_dies_first:
                os.kill(int(server), signal.SIGKILL)
            owner.kill()
            owner.wait()
            owner.stdin.close()
            owner.stdout.close()
            until("holder gone", lambda: not alive(int(holder)))
            until("server gone", lambda: not alive(int(server)))
            with contextlib.suppress(ConnectionResetError):
                while sock.recv(8):
                    pass
        left = sorted(p.name for p in (directory / "ivshmem").iterdir() if p.suffix != ".log")
        if server_dies_first:
            # Sockets that nobody answers: the next service in this directory starts all the same, and clears them.
            assert left == ["a@link.sock", "b@link.sock", "control.sock"]
            with RegionService(directory) as service, connect(service.create(link()).socket("front")):
                pass
            left = sorted(p.name for p in (directory / "ivshmem").iterdir() if p.suffix != ".log")
        assert left == []


def test_a_process_out_of_descriptors_is_told_so_and_keeps_none() -> None:
    with running() as service:
        region = service.create(link())
        files = os.listdir("/proc/self/fd")
        free = (number for number in range(1 << 16) if str(number) not in files)
        few = [next(free) for _ in range(4)][-1] + 1  # room for four more, where connecting takes eight
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
        try:
            with pytest.raises(ProtocolError, match="limit of open files"):
                connect(region.socket("front"))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert len(os.listdir("/proc/self/fd")) == len(files)
