"""The transfer protocol over a socket pair: what arrives, what is refused, and that nothing half-made stays."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from support import local_region

from idc.channel import ByteChannel, MessageChannel
from idc.conduit import NOTE_LIMIT, ChannelConduit, SocketConduit, decode_note, encode_note
from idc.errors import IdcError, PeerGoneError
from idc.transfer import Conduit, Outcome, TransferError, receive, send

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@contextmanager
def over_tcp() -> Iterator[tuple[SocketConduit, SocketConduit]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    with near, far:
        yield SocketConduit(near), SocketConduit(far)


@contextmanager
def over_channels() -> Iterator[tuple[ChannelConduit, ChannelConduit]]:
    with local_region() as local, local.join(0) as front, local.join(1) as back, ExitStack() as stack, \
            ThreadPoolExecutor(4) as pool:
        notes = [pool.submit(MessageChannel.attach, end, "notes", timeout=10) for end in (front, back)]
        bulk = [pool.submit(ByteChannel.attach, end, "bulk", timeout=10) for end in (front, back)]
        near, far = (ChannelConduit(stack.enter_context(n.result()), stack.enter_context(b.result()))
                     for n, b in zip(notes, bulk, strict=True))
        yield near, far


@pytest.fixture(params=[over_tcp, over_channels], ids=["tcp", "channels"])
def conduits(request: pytest.FixtureRequest) -> Iterator[tuple[Conduit, Conduit]]:
    with request.param() as pair:
        yield pair


@pytest.fixture
def sockets() -> Iterator[tuple[SocketConduit, SocketConduit]]:
    with over_tcp() as pair:
        yield pair


def both(sending: Callable[[], Outcome], receiving: Callable[[], Outcome]) -> tuple[Any, Any]:
    """Run both ends; what each returned or raised."""
    ends: list[Any] = [None, None]

    def play(index: int, end: Callable[[], Outcome]) -> None:
        try:
            ends[index] = end()
        except IdcError as error:
            ends[index] = error

    threads = [threading.Thread(target=play, args=pair) for pair in enumerate((sending, receiving))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return ends[0], ends[1]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("size", [0, 1, 4096, 3_000_001])
def test_file_arrives_whole(tmp_path: Path, conduits: tuple[Conduit, Conduit], size: int) -> None:
    source = tmp_path / "data.bin"
    source.write_bytes(os.urandom(size))
    (tmp_path / "in").mkdir()
    sent, got = both(lambda: send(conduits[0], source), lambda: receive(conduits[1], tmp_path / "in"))
    assert (sent.size, sent.sha256) == (size, hashlib.sha256(source.read_bytes()).hexdigest())
    assert got.sha256 == sent.sha256
    assert names(tmp_path / "in") == ["data.bin"]
    assert (tmp_path / "in" / "data.bin").read_bytes() == source.read_bytes()


def test_existing_target_is_replaced_only_by_a_whole_file(
        tmp_path: Path, conduits: tuple[Conduit, Conduit]) -> None:
    source, target = tmp_path / "new", tmp_path / "in"
    source.write_bytes(b"new")
    target.write_bytes(b"old")
    both(lambda: send(conduits[0], source), lambda: receive(conduits[1], target))
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["in", "new"]


def test_full_disk_is_refused_before_the_first_byte(
        tmp_path: Path, conduits: tuple[Conduit, Conduit], monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "big"
    source.write_bytes(b"x" * 100_000)
    (tmp_path / "in").mkdir()
    real = os.statvfs

    def nearly_full(path: Path) -> os.statvfs_result:
        fields = list(real(path))
        fields[4] = 1  # f_bavail
        return os.statvfs_result(fields)

    monkeypatch.setattr(os, "statvfs", nearly_full)
    sent, got = both(lambda: send(conduits[0], source), lambda: receive(conduits[1], tmp_path / "in"))
    assert isinstance(sent, TransferError)
    assert "no space left" in str(sent)
    assert isinstance(got, TransferError)
    assert names(tmp_path / "in") == []


def test_disk_that_fills_up_half_way(
        tmp_path: Path, conduits: tuple[Conduit, Conduit], monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "big"
    source.write_bytes(os.urandom(8_000_000))
    (tmp_path / "in").mkdir()
    real, written = os.write, 0

    def filling(fd: int, data: memoryview) -> int:
        nonlocal written
        written += len(data)
        if written > 2_000_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data)

    monkeypatch.setattr(os, "write", filling)
    sent, got = both(lambda: send(conduits[0], source), lambda: receive(conduits[1], tmp_path / "in"))
    assert isinstance(sent, TransferError)
    assert "no space left" in str(sent), sent
    assert isinstance(got, TransferError)
    assert names(tmp_path / "in") == []


def test_bytes_that_change_on_the_way_are_noticed(
        tmp_path: Path, conduits: tuple[Conduit, Conduit], monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "data"
    source.write_bytes(b"a" * 50_000)
    (tmp_path / "in").mkdir()
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, b"b" * len(data)))
    sent, got = both(lambda: send(conduits[0], source), lambda: receive(conduits[1], tmp_path / "in"))
    assert "checksum" in str(sent)
    assert "checksum" in str(got)
    assert names(tmp_path / "in") == []


def test_sender_gone_half_way_leaves_nothing(
        tmp_path: Path, sockets: tuple[SocketConduit, SocketConduit]) -> None:
    (tmp_path / "in").mkdir()

    def half() -> Outcome:
        sockets[0].send_note({"note": "offer", "name": "f", "size": 1000, "sha256": "0" * 64}, 5)
        sockets[0].receive_note(5)
        sockets[0]._socket.sendall(b"x" * 500)
        sockets[0]._socket.shutdown(socket.SHUT_WR)
        return Outcome("f", 0, "", None)

    _, got = both(half, lambda: receive(sockets[1], tmp_path / "in"))
    assert isinstance(got, PeerGoneError)
    assert names(tmp_path / "in") == []


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", "a\0b", 7, None])
def test_unusable_names_are_refused(
        tmp_path: Path, conduits: tuple[Conduit, Conduit], name: object) -> None:
    conduits[0].send_note({"note": "offer", "name": name, "size": 1, "sha256": "0" * 64}, 5)
    with pytest.raises(TransferError, match="unusable name"):
        receive(conduits[1], tmp_path)


def test_missing_file_is_one_clear_line(conduits: tuple[Conduit, Conduit], tmp_path: Path) -> None:
    with pytest.raises(TransferError, match=r"cannot read .*absent: No such file"):
        send(conduits[0], tmp_path / "absent")
    with pytest.raises(TransferError, match="not a regular file"):
        send(conduits[0], tmp_path)


def test_silent_sender_is_given_up(conduits: tuple[Conduit, Conduit], tmp_path: Path) -> None:
    with pytest.raises(IdcError, match="in time"):
        receive(conduits[1], tmp_path, wait=0.05)


def test_oversized_note_is_refused(sockets: tuple[SocketConduit, SocketConduit]) -> None:
    sockets[0]._socket.sendall(struct.pack("<I", NOTE_LIMIT + 1))
    with pytest.raises(IdcError, match="announces a note"):
        sockets[1].receive_note(5)


def test_long_reasons_are_cut_and_other_long_notes_refused() -> None:
    assert len(encode_note({"note": "failed", "reason": "x" * 10_000})) < NOTE_LIMIT
    with pytest.raises(IdcError, match="longer than"):
        encode_note({"note": "x" * 10_000})


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"7", b"{"])
def test_notes_that_are_no_objects(data: bytes) -> None:
    with pytest.raises(IdcError):
        decode_note(data)
