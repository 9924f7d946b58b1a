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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support import local_region

from idc.channel import ByteChannel, MessageChannel
from idc.conduit import NOTE_LIMIT, ChannelConduit, SocketConduit, decode_note, encode_note
from idc.errors import IdcError, PeerGoneError, TimedOutError
from idc.transfer import Conduit, Outcome, TransferError, receive, send

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


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


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", "a\0b", 7, None, "x" * 256, "\ud800"])
def test_unusable_names_are_refused(
        tmp_path: Path, conduits: tuple[Conduit, Conduit], name: object) -> None:
    conduits[0].send_note({"note": "offer", "name": name, "size": 1, "sha256": "0" * 64}, 5)
    with pytest.raises(TransferError, match="unusable name"):
        receive(conduits[1], tmp_path)
    assert "unusable name" in conduits[0].receive_note(5)["reason"]  # and the sender is told


@pytest.mark.parametrize("size", [-1, 1 << 70, 1.5, True, None])
def test_unusable_sizes_are_refused(tmp_path: Path, conduits: tuple[Conduit, Conduit], size: object) -> None:
    conduits[0].send_note({"note": "offer", "name": "f", "size": size, "sha256": "0" * 64}, 5)
    with pytest.raises(TransferError, match=r"unusable size|no space left"):
        receive(conduits[1], tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["with space", "new\nline", "-rf", "\u00fc" * 127, "\U0001f600" * 63, "not\udcffutf8", "a'b\"$(c)"])
def test_any_name_a_file_can_have_arrives(tmp_path: Path, conduits: tuple[Conduit, Conduit], name: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / name).write_bytes(b"content")
    sent, got = both(lambda: send(conduits[0], tmp_path / name), lambda: receive(conduits[1], tmp_path / "in"))
    assert (sent.name, got.name) == (name, name)
    assert names(tmp_path / "in") == [name]


def test_pipes_devices_and_files_without_a_size_are_refused(conduits: tuple[Conduit, Conduit], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    for source in (tmp_path / "pipe", Path("/dev/null"), Path("/dev/zero")):
        with pytest.raises(TransferError, match="is not a regular file"):
            send(conduits[0], source)
    with pytest.raises(TransferError, match="content but no size"):
        send(conduits[0], Path("/proc/self/status"))


def test_what_is_no_file_is_not_replaced(tmp_path: Path, conduits: tuple[Conduit, Conduit]) -> None:
    source = tmp_path / "data"
    source.write_bytes(b"x")
    (tmp_path / "in" / "data").mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path / "in", tmp_path / "pipe"):
        sent, got = both(lambda: send(conduits[0], source), partial(receive, conduits[1], target))
        assert "exists and is no regular file" in str(sent)
        assert "exists and is no regular file" in str(got)
    assert (tmp_path / "pipe").is_fifo()
    assert names(tmp_path) == ["data", "in", "pipe"]


def test_a_missing_directory_and_one_that_is_a_file_are_told_to_both(
        tmp_path: Path, conduits: tuple[Conduit, Conduit]) -> None:
    source = tmp_path / "data"
    source.write_bytes(b"x")
    for target in (tmp_path / "none" / "f", source / "f"):
        sent, got = both(lambda: send(conduits[0], source), partial(receive, conduits[1], target))
        assert f"{target.parent} is no directory" in str(sent)
        assert f"{target.parent} is no directory" in str(got)
    sent, got = both(lambda: send(conduits[0], source), lambda: receive(conduits[1], tmp_path / ("x" * 300)))
    assert "File name too long" in str(sent)
    assert isinstance(got, TransferError)
    assert names(tmp_path) == ["data"]


def test_a_read_only_file_system_is_called_that(tmp_path: Path, conduits: tuple[Conduit, Conduit],
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").write_bytes(b"x")
    fields = list(os.statvfs(tmp_path))
    fields[4], fields[8] = 0, os.ST_RDONLY  # f_bavail, f_flag: as erofs says
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(fields))
    sent, _ = both(lambda: send(conduits[0], tmp_path / "data"), lambda: receive(conduits[1], tmp_path / "in"))
    assert "read-only file system" in str(sent)


def test_a_file_system_without_nameless_files_will_do(
        tmp_path: Path, conduits: tuple[Conduit, Conduit], monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def overlay(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", overlay)
    (tmp_path / "data").write_bytes(b"x" * 10_000)
    (tmp_path / "in").mkdir()
    both(lambda: send(conduits[0], tmp_path / "data"), lambda: receive(conduits[1], tmp_path / "in"))
    assert names(tmp_path / "in") == ["data"]
    monkeypatch.setattr("idc.transfer._digest", lambda *_: "0" * 64)
    conduits[0].send_note({"note": "offer", "name": "data", "size": 0, "sha256": "1" * 64}, 5)
    with pytest.raises(TransferError, match="checksum"):
        receive(conduits[1], tmp_path / "in")
    assert names(tmp_path / "in") == ["data"]  # nothing half-made stays


@pytest.mark.parametrize("change", ["shrinks", "grows", "is written over"])
def test_a_file_that_changes_while_it_is_sent(
        tmp_path: Path, conduits: tuple[Conduit, Conduit], change: str) -> None:
    source, size = tmp_path / "data", 3_000_000
    source.write_bytes(os.urandom(size))
    before = source.read_bytes()
    (tmp_path / "in").mkdir()

    def act(phase: str, done: int, _size: int) -> None:
        if phase == "checksum" and done == size:
            if change == "grows":
                with source.open("ab") as file:
                    file.write(b"more")
            elif change == "shrinks":
                os.truncate(source, 100_000)
            else:
                with source.open("r+b") as file:
                    file.write(b"x" * 1000)

    sent, got = both(lambda: send(conduits[0], source, act), lambda: receive(conduits[1], tmp_path / "in", stall=1))
    if change == "grows":
        assert sent.size == got.size == size
        assert (tmp_path / "in" / "data").read_bytes() == before
        return
    assert isinstance(sent, TransferError)
    assert ("shrank to 100000 of 3000000" if change == "shrinks" else "did it change") in str(sent)


@pytest.mark.parametrize("claims", [[0], [5, 5], [5, 4], [7, 11], ["x"], [[]], [None], [1.5]])
def test_a_receiver_that_verifies_for_ever_is_left(
        tmp_path: Path, conduits: tuple[Conduit, Conduit], claims: list[object]) -> None:
    (tmp_path / "data").write_bytes(b"0123456789")

    def claim() -> Outcome:
        conduits[1].receive_note(5)
        conduits[1].send_note({"note": "accept"}, 5)
        with open(os.devnull, "wb") as null:
            conduits[1].receive_bulk(null.fileno(), 10, lambda _: None, 5)
        conduits[1].send_note({"note": "landed"}, 5)
        for done in claims:
            conduits[1].send_note({"note": "working", "done": done}, 5)
        return Outcome("", 0, "", None)

    sent, _ = both(lambda: send(conduits[0], tmp_path / "data", stall=5), claim)
    assert "claims to have verified" in str(sent)


def test_a_sender_that_falls_silent_is_no_failed_write(tmp_path: Path, conduits: tuple[Conduit, Conduit]) -> None:
    conduits[0].send_note({"note": "offer", "name": "f", "size": 1000, "sha256": "0" * 64}, 5)
    with pytest.raises(TimedOutError, match="in time") as caught:
        receive(conduits[1], tmp_path, stall=0.05)
    assert "write" not in str(caught.value)
    assert conduits[0].receive_note(5) == {"note": "accept"}
    assert conduits[0].receive_note(5)["note"] == "failed"


def test_a_reason_reaches_a_terminal_without_control_characters(
        tmp_path: Path, conduits: tuple[Conduit, Conduit]) -> None:
    (tmp_path / "data").write_bytes(b"x")
    conduits[1].send_note({"note": "failed", "reason": "\x1b[2J gone"}, 5)
    with pytest.raises(TransferError, match=r"gave up: \?\[2J gone"):
        send(conduits[0], tmp_path / "data")


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
    for letter in "x\u00fc\U0001f600":
        for limit in (NOTE_LIMIT, 1016):
            assert limit // 20 < len(encode_note({"note": "failed", "reason": letter * 10_000}, limit)) <= limit
    with pytest.raises(IdcError, match="longer than"):
        encode_note({"note": "x" * 10_000})


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"7", b"{", b"[" * NOTE_LIMIT])
def test_notes_that_are_no_objects(data: bytes) -> None:
    with pytest.raises(IdcError):
        decode_note(data)
