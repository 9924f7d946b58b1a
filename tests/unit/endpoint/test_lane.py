"""The stream face over TCP, whose messages the core moves: bytes in order, and one judge of what a peer sends."""

from __future__ import annotations

import os
import random
import select
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest

from idc._core import lib
from idc.endpoint import lane as lanes
from idc.endpoint import stream as streams
from idc.endpoint.endpoint import Resources
from idc.endpoint.frames import Kind, Quotas, bye, encode, hello, parse
from idc.endpoint.stream import Stream
from idc.errors import MisuseError, PeerGoneError, TimedOutError
from idc.transport.tcp import LONG, DialPort, ListenPort, TcpCarrier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from idc._core import Pointer

QUOTAS = Quotas(requests=2, messages=2, parameter_bytes=2 * LONG, status_bytes=64)
WIDE = Quotas(messages=16, parameter_bytes=1 << 20)


def message(tag: int, length: int = 1) -> bytes:
    return encode(Kind.MESSAGE, tag, b"m" * length)


#: Each breaks a rule, once the stream has sent one message and received nothing.
BREACHES = {
    "a tag twice": [message(1), message(1)],
    "a long one's tag twice": [message(1, LONG), message(1, LONG)],
    "one too many": [message(1), message(2), message(3)],
    "a long one too many": [message(1), message(2), message(3, LONG)],
    "too long": [message(1, 2 * LONG + 1)],
    "notice of nothing": [encode(Kind.DONE, 77)],
    "notice beyond all slots": [encode(Kind.DONE, 0x1FFFF)],
    "notice of tag 0": [encode(Kind.DONE, 0)],
    "notice with a body": [encode(Kind.DONE, 0x10000, b"x")],
    "no header": [b"short"],
    "nothing": [b""],
    "flags": [b"\x02\x01" + message(1)[2:]],
    "flags of a long one": [b"\x02\x01" + message(1, LONG)[2:]],
    "a reply": [encode(Kind.REPLY, 5, b"?")],
    "unknown kind": [b"\x63" + bytes(7)],
    "a request too long": [encode(Kind.REQUEST, 5, b"x" * (2 * LONG + 1))],
    "HELLO again": [hello(QUOTAS)],
    "BYE": [message(1), bye("enough")],
}


def flushing(stream: Stream) -> None:
    """A victim that reads frames as it waits for notices."""
    with pytest.raises(PeerGoneError, match="not all that was sent"):
        stream.flush(timeout=10)


def receiving(stream: Stream) -> None:
    """One that reads bytes where they are to stay; and completes nothing, as it has not received what came before."""
    while stream.receive(1 << 20, timeout=10):
        pass


def filling(stream: Stream) -> None:
    """The same into a buffer, in odd pieces."""
    into = bytearray(1000)
    while stream.receive_into(into, timeout=10):
        pass


def reason(sent: list[bytes], victim: Callable[[Stream], None]) -> str:
    port = ListenPort("127.0.0.1", 0)
    with Stream(port, Resources(QUOTAS, messages=2)) as stream:
        raw = TcpCarrier(socket.create_connection(port.address), select.epoll())
        raw.post(hello(QUOTAS))
        raw.flush()
        stream.connect(10)
        stream.send(b"of mine")
        for frame in sent:
            raw.post(frame)
        raw.flush()
        victim(stream)
        raw.close()
        return stream._endpoint.reason


@pytest.mark.parametrize("breach", BREACHES)
def test_the_core_and_the_session_judge_alike(breach: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_core = reason(BREACHES[breach], flushing)
    monkeypatch.setattr(streams, "lane_of", lambda *_: None)
    assert with_core == reason(BREACHES[breach], flushing)
    assert with_core


#: Those that are the same for who completes each message as it comes: there is none of the peer's outstanding.
AT_ONCE = sorted(BREACHES.keys() - {"a tag twice", "a long one's tag twice", "one too many", "a long one too many"})


@pytest.mark.parametrize("victim", [receiving, filling])
@pytest.mark.parametrize("breach", AT_ONCE)
def test_who_reads_in_place_judges_alike(breach: str, victim: Callable[[Stream], None],
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    with_core = reason(BREACHES[breach], victim)
    monkeypatch.setattr(streams, "lane_of", lambda *_: None)
    assert with_core == reason(BREACHES[breach], flushing)
    assert with_core


@pytest.fixture
def ends() -> Iterator[tuple[Stream, Stream]]:
    """Two that are connected."""
    listening = ListenPort("127.0.0.1", 0)
    with (Stream(listening, Resources(WIDE)) as one,
          Stream(DialPort(*listening.address), Resources(WIDE)) as two):
        meeting = threading.Thread(target=two.connect, args=(10,))
        meeting.start()
        one.connect(10)
        meeting.join()
        yield one, two


def receive(stream: Stream, number: int, most: int = 1 << 16) -> bytes:
    whole = bytearray()
    while len(whole) < number:
        whole += stream.receive(min(most, number - len(whole)), timeout=20)
    return bytes(whole)


def fill(stream: Stream, number: int, most: int) -> bytes:
    """As `receive`, into a buffer of `most` bytes."""
    whole, into = bytearray(), bytearray(most)
    while len(whole) < number:
        got = stream.receive_into(into, min(most, number - len(whole)), timeout=20)
        whole += into[:got]
    return bytes(whole)


def either(seed: int) -> Callable[[Stream, int, int], bytes]:
    """Both, in turns."""
    odd = random.Random(seed)

    def read(stream: Stream, number: int, most: int) -> bytes:
        whole = bytearray()
        while len(whole) < number:
            some = min(number - len(whole), odd.choice([1, 1000, 70_000]))
            whole += odd.choice([receive, fill])(stream, some, most)
        return bytes(whole)

    return read


@pytest.mark.parametrize("read", [receive, fill, either(7)], ids=["receive", "receive_into", "either"])
@pytest.mark.parametrize("seed", range(4))
def test_bytes_arrive_in_order(ends: tuple[Stream, Stream], seed: int,
                               read: Callable[[Stream, int, int], bytes]) -> None:
    odd = random.Random(seed)
    sizes = [odd.choice([1, 3, 100, LONG - 9, LONG - 8, LONG, 65536, 300_000, 3 << 20]) for _ in range(60)]
    data, (one, two) = odd.randbytes(sum(sizes)), ends if seed % 2 else ends[::-1]
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(read(two, len(data), odd.choice([1000, 65536, 1 << 20]))))
    reader.start()
    at = 0
    for size in sizes:
        one.send(data[at:at + size], timeout=20)
        at += size
    one.flush(timeout=20)
    reader.join()
    assert got == [data]


def test_two_that_both_send_first_do_not_wait_for_each_other(ends: tuple[Stream, Stream]) -> None:
    piece = bytes(1 << 20)

    def side(index: int) -> None:
        for _ in range(16):  # all that the other accepts: more than the kernel keeps
            ends[index].send(piece, timeout=20)
        receive(ends[index], 16 << 20)
        ends[index].flush(timeout=20)

    other = threading.Thread(target=side, args=(1,))
    other.start()
    side(0)
    other.join()


def test_a_reader_that_stops_holds_the_writer_back(ends: tuple[Stream, Stream]) -> None:
    one, two = ends
    for _ in range(16):
        one.send(b"x", timeout=10)
    with pytest.raises(TimedOutError, match="does not receive"):
        one.send(b"y", timeout=0.1)
    assert two.receive(100, timeout=10) == b"x"


def test_what_was_received_is_known_though_the_reader_calls_no_more(ends: tuple[Stream, Stream]) -> None:
    one, two = ends
    for size in (1, 100, LONG, 1 << 20, 10):
        for _ in range(3):
            one.send(bytes(size))
        assert len(receive(two, 3 * size)) == 3 * size
        one.flush(timeout=10)


def test_a_message_read_in_part_goes_on_while_its_reader_sends(ends: tuple[Stream, Stream]) -> None:
    one, two = ends
    data = random.Random(3).randbytes(1 << 20)
    one.send(data, timeout=20)
    one.send(b"and more", timeout=20)
    got = two.receive(1000, timeout=20)
    into = bytearray(5000)
    got += into[:two.receive_into(into, timeout=20)]
    for _ in range(16):  # all that the other accepts
        two.send(bytes(1000), timeout=20)
    with pytest.raises(TimedOutError, match="does not receive"):
        two.flush(timeout=0.2)  # takes what comes meanwhile, and keeps it
    with pytest.raises(TimedOutError, match="does not receive"):
        one.flush(timeout=0.2)  # the rest is kept there, and not received
    assert len(receive(one, 16_000)) == 16_000
    got += fill(two, len(data) - len(got), 300_000)
    two.flush(timeout=20)
    assert (got, receive(two, 8)) == (data, b"and more")
    one.flush(timeout=20)


def test_a_buffer_is_to_hold_what_is_asked_for(ends: tuple[Stream, Stream]) -> None:
    one, two = ends
    one.send(b"abc")
    with pytest.raises(MisuseError, match="5 bytes into a buffer of 4"):
        two.receive_into(bytearray(4), 5, timeout=10)
    with pytest.raises(MisuseError, match="for one at least"):
        two.receive_into(bytearray(), timeout=10)
    with pytest.raises(BufferError):
        two.receive_into(memoryview(b"1234"), timeout=10)
    into = bytearray(b"....")
    assert two.receive_into(memoryview(into)[1:], timeout=10) == 3
    into += b"!"  # nobody holds it
    assert into == b".abc!"
    with pytest.raises(TimedOutError, match=r"nothing was sent within 0\.05 s"):
        two.receive_into(into, timeout=0.05)
    one.close()
    assert two.receive_into(into, timeout=10) == 0


def test_nothing_is_sent_after_the_end(ends: tuple[Stream, Stream]) -> None:
    one, two = ends
    one.send(b"last")
    assert two.receive(10, timeout=10) == b"last"
    one.flush(timeout=10)
    two.close()
    assert one.receive(10, timeout=10) == b""
    with pytest.raises(PeerGoneError):
        one.send(b"more", timeout=1)


@pytest.mark.parametrize("first", [1, 2], ids=["one message", "part of a message"])
def test_what_was_received_before_there_is_a_lane_is_completed_by_it(first: int) -> None:
    """A side that receives first, and never connects in words; the peer sends as soon as it can."""
    port = ListenPort("127.0.0.1", 0)
    with Stream(port, Resources(WIDE, messages=4)) as one:
        def sender() -> None:
            with Stream(DialPort(*port.address[:2]), Resources(WIDE, messages=16)) as other:
                for piece in (b"abcd", b"ef", b"gh"):
                    other.send(piece, timeout=10)
                answers.append(other.receive(2, timeout=10))
                other.send(b"ij", timeout=10)
                other.flush(timeout=10)
                answers.append(b"flushed")

        answers: list[bytes] = []
        thread = threading.Thread(target=sender)
        thread.start()
        got = one.receive(4 // first, timeout=10)
        one.send(b"ok", timeout=10)
        while len(got) < 10:
            got += one.receive(100, timeout=10)
        thread.join(20)
        assert got == b"abcdefghij"
        assert answers == [b"ok", b"flushed"]
        assert one._lane is not None
        assert one._lane.core.holds == 0


class Peer:
    """Of a stream: a bare socket, which has said hello."""

    def __init__(self, quotas: Quotas = WIDE) -> None:
        port = ListenPort("127.0.0.1", 0)
        self.stream = Stream(port, Resources(quotas, messages=16))
        self.socket = socket.create_connection(port.address)
        self.send(hello(quotas))
        self.stream.connect(10)
        self.core: Pointer = self.stream._core
        assert self.frame()[0] == Kind.HELLO

    def send(self, *frames: bytes) -> None:
        self.socket.sendall(b"".join(len(frame).to_bytes(4, "little") + frame for frame in frames))

    def arrived(self, number: int) -> None:
        """Wait until so many bytes can be read by the stream."""
        fd = self.stream._endpoint._carrier._socket.fileno()  # type: ignore[union-attr]
        with socket.socket(fileno=os.dup(fd)) as there:
            while len(there.recv(number, socket.MSG_PEEK)) < number:
                pass

    def frame(self) -> tuple[int, int]:
        """The next that comes: its kind and tag."""
        self.socket.settimeout(10)
        length = int.from_bytes(self.socket.recv(4, socket.MSG_WAITALL), "little")
        kind, _, tag, _ = parse(self.socket.recv(length, socket.MSG_WAITALL))
        return kind, tag


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.stream.close()
    peer.socket.close()


def once(stream: Stream, most: int) -> bytes:
    return stream.receive(most, timeout=10)


def once_into(stream: Stream, most: int) -> bytes:
    into = bytearray(most)
    return bytes(into[:stream.receive_into(into, timeout=10)])


@pytest.mark.parametrize("read", [once, once_into], ids=["receive", "receive_into"])
@pytest.mark.parametrize("behind", [Kind.DONE, Kind.REQUEST], ids=["a notice", "another frame"])
@pytest.mark.parametrize("length", [5, LONG], ids=["short", "long"])
def test_it_is_told_beside_what_is_no_message(peer: Peer, length: int, behind: Kind,
                                              read: Callable[[Stream, int], bytes]) -> None:
    peer.stream.send(b"mine")
    mine = peer.frame()[1]
    frames = [message(0x10001, length), encode(behind, mine)]
    peer.send(*frames)
    peer.arrived(sum(map(len, frames)) + 8)
    assert len(read(peer.stream, 1 << 20)) == length
    assert peer.frame() == (Kind.DONE, 0x10001)


@pytest.mark.parametrize("read", [once, once_into], ids=["receive", "receive_into"])
def test_an_empty_message_is_not_the_end(peer: Peer, read: Callable[[Stream, int], bytes]) -> None:
    peer.stream.send(b"mine")
    mine = peer.frame()[1]
    frames = [message(0x10001, 0), message(0x10002, 0), message(0x10003, 5), encode(Kind.DONE, mine)]
    peer.send(*frames)
    peer.arrived(sum(map(len, frames)) + 16)
    assert read(peer.stream, 100) == b"m" * 5
    assert [peer.frame() for _ in range(3)] == [(Kind.DONE, tag) for tag in (0x10001, 0x10002, 0x10003)]
    peer.send(message(0x10004, 0))
    with pytest.raises(TimedOutError):
        peer.stream.receive(100, timeout=0.01)
    peer.send(bye("enough"))
    assert read(peer.stream, 100) == b""


def test_an_empty_message_is_not_the_end_where_the_core_moves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "lane_of", lambda *_: None)
    peer = Peer()
    with peer.stream, peer.socket:
        peer.send(message(0x10001, 0), message(0x10002, 5))
        assert once(peer.stream, 100) == b"m" * 5
        assert [peer.frame() for _ in range(2)] == [(Kind.DONE, 0x10001), (Kind.DONE, 0x10002)]


@pytest.mark.parametrize("read", [
    lambda stream: stream.receive(1 << 20, timeout=0),
    lambda stream: stream.receive_into(bytearray(1 << 20), timeout=0) * b"m",
], ids=["receive", "receive_into"])
def test_who_does_not_wait_gets_what_is_here(peer: Peer, read: Callable[[Stream], bytes]) -> None:
    whole = b"".join(len(frame).to_bytes(4, "little") + frame for frame in (message(0x10001, 10_000),))
    peer.socket.sendall(whole[:5000])
    assert peer.stream.receive(100, timeout=10) == b"m" * 100
    peer.stream.send(b"mine")
    with pytest.raises(TimedOutError):
        peer.stream.flush(timeout=0)  # the rest is kept from here on
    assert peer.core.kept
    with pytest.raises(TimedOutError):
        read(peer.stream)
    peer.socket.sendall(whole[5000:])
    peer.arrived(5012)
    assert read(peer.stream) == b"m" * 9900
    peer.send(bye("enough"))
    peer.arrived(4 + len(bye("enough")))
    assert read(peer.stream) == b""


def test_a_time_out_is_waited_for_once(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it takes two calls of the core, and the first has waited for a message to begin."""
    waited: list[int] = []
    clock = [0]

    def reading(core: object, memory: object, most: int, how: int, ns: int) -> int:
        waited.append(ns)
        clock[0] += 300_000_000
        if most:
            return int(lib.IDC_TIMEOUT)
        peer.core.left = 5
        return 0

    monkeypatch.setattr(lanes, "_read", reading)
    monkeypatch.setattr(time, "monotonic_ns", lambda: clock[0])
    lane = peer.stream._lane
    assert lane is not None
    lane.within(0.5)
    assert lane.read(100) is None
    assert waited == [500_000_000, 200_000_000]


@pytest.mark.parametrize("since", ["TIMEOUT", "INTR"])
def test_what_was_waited_counts_whatever_ended_it(peer: Peer, since: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    rests: list[float] = []

    def reading(*_: object) -> int:
        clock[0] += 0.4
        return int(getattr(lib, f"IDC_{since}"))

    def taking(rest: float) -> None:
        rests.append(round(rest, 3))
        clock[0] += rest

    monkeypatch.setattr(lanes, "_read", reading)
    monkeypatch.setattr(peer.stream._lane, "take", taking)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with pytest.raises(TimedOutError):
        peer.stream.receive(100, timeout=0.5)
    assert rests == [0.1, 0.0]


def owing(peer: Peer) -> None:
    """It has read a message, and cannot say so."""
    peer.send(message(0x10001, 5))
    peer.core.wire.most = 0  # may wait to be sent
    assert once(peer.stream, 5) == b"m" * 5
    assert peer.core.owed


@pytest.mark.parametrize("read", [once, once_into], ids=["receive", "receive_into"])
def test_why_it_cannot_be_told_is_said_at_the_next_call(peer: Peer, read: Callable[[Stream, int], bytes]) -> None:
    owing(peer)
    assert read(peer.stream, 5) == b""
    assert "the peer does not read" in peer.stream._endpoint.reason


@pytest.mark.parametrize("read", [once, once_into], ids=["receive", "receive_into"])
def test_so_it_is_if_there_was_no_memory(peer: Peer, read: Callable[[Stream, int], bytes],
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    owing(peer)
    for module in (lanes, streams):
        monkeypatch.setattr(module, "_read", lambda *_: lib.IDC_EINVAL)
    with pytest.raises(MemoryError):
        read(peer.stream, 5)


def test_the_endpoint_reads_nothing_beside_its_lane(peer: Peer) -> None:
    for tag in range(3):
        peer.send(encode(Kind.REQUEST, tag, b"?"))
        peer.arrived(13)
        with pytest.raises(TimedOutError):
            peer.stream.receive(1, timeout=0.02)
        assert peer.frame()[0] == Kind.REPLY
        assert peer.stream._endpoint._line is None
