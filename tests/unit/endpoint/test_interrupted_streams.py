"""A signal that raises as a call of the core returns: no byte is lost, none comes twice, what is to be sent is kept.

A signal is handled once the call is over, before anything is done with its result: a call that raises stands for it.
"""

from __future__ import annotations

import contextlib
import gc
import select
import socket
from typing import TYPE_CHECKING, Any

import pytest

from idc._core import ffi, lib
from idc.endpoint import lane as lanes
from idc.endpoint import stream as streams
from idc.endpoint.endpoint import Resources
from idc.endpoint.frames import Kind, Quotas, bye, encode, hello, parse
from idc.endpoint.stream import Stream
from idc.transport import tcp
from idc.transport.tcp import LONG, ListenPort, TcpCarrier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

WIDE = Quotas(messages=16, parameter_bytes=1 << 20)
BIG = 1 << 18
BODY = bytes(range(256)) * 40


class Signalled(BaseException):
    """What a handler of a signal raises."""


def handle(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, *, before: Callable[[], None] | None = None,
           after: Callable[[], None] | None = None) -> None:
    """Let handlers run around the next call of the core by that name, which waits for nothing."""
    true = getattr(module, name)

    def call(*arguments: Any) -> Any:
        monkeypatch.setattr(module, name, true)
        if before is not None:
            before()
        if name in ("_read", "_take"):
            arguments = (*arguments[:-1], 0)
        result = true(*arguments)
        if after is not None:
            after()
        return result

    monkeypatch.setattr(module, name, call)


def raising() -> None:
    raise Signalled


# -- what is still to be sent


def kept(carrier: TcpCarrier) -> int:
    """How many bodies the core has still to send: each lies in one that is kept."""
    wire = carrier.wire
    spans = [(int(ffi.cast("uintptr_t", ffi.from_buffer(body))), len(body)) for _, body in carrier.lends]
    for index in range(wire.bodies_begin, wire.bodies_end):
        base, length = int(ffi.cast("uintptr_t", wire.bodies[index].base)), wire.bodies[index].len
        assert any(at <= base and base + length <= at + size for at, size in spans)
    return int(wire.bodies_end - wire.bodies_begin)


def drain(sender: TcpCarrier, other: socket.socket) -> bytes:
    """All that was posted, as its peer gets it."""
    got = bytearray()
    while sender.wire.unsent:
        sender.take(0.0)
        kept(sender)
        with contextlib.suppress(BlockingIOError):
            got += other.recv(1 << 16)
    sender.settle()
    with contextlib.suppress(BlockingIOError):
        while True:
            got += other.recv(1 << 16)
    return bytes(got)


@pytest.fixture
def ends() -> Iterator[tuple[TcpCarrier, socket.socket]]:
    """A carrier whose kernel takes little, and who does not read."""
    one, two = socket.socketpair()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    two.setblocking(False)
    carrier = TcpCarrier(one, select.epoll())
    yield carrier, two
    two.close()
    carrier.close()


def exchange(carrier: TcpCarrier, frame: bytes, body: bytes) -> None:
    carrier.exchange(frame, body, 0.0)


WAYS: dict[str, Callable[[TcpCarrier, bytes, bytes], None]] = {
    "_post": TcpCarrier.post, "_send": TcpCarrier.send, "_call": exchange}


def framed(*bodies: bytes) -> bytes:
    return b"".join((len(body) + 4).to_bytes(4, "little") + b"head" + body for body in bodies)


def body_of(letter: bytes) -> bytes:
    return letter * BIG  # a new one, which nobody else has


@pytest.mark.parametrize("name", WAYS)
def test_a_body_is_kept_if_a_signal_raises_once_the_core_has_it(
        ends: tuple[TcpCarrier, socket.socket], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    carrier, other = ends
    handle(monkeypatch, tcp, name, after=raising)
    with pytest.raises(Signalled):
        WAYS[name](carrier, b"head", body_of(b"a"))
    gc.collect()
    assert kept(carrier) == 1
    WAYS[name](carrier, b"head", body_of(b"b"))
    assert kept(carrier) == 2
    assert drain(carrier, other) == framed(body_of(b"a"), body_of(b"b"))
    assert not carrier.lends


@pytest.mark.parametrize("name", WAYS)
def test_one_that_the_core_never_had_takes_no_others_place(
        ends: tuple[TcpCarrier, socket.socket], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    carrier, other = ends
    WAYS[name](carrier, b"head", body_of(b"a"))
    for _ in range(2):
        handle(monkeypatch, tcp, name, before=raising)
        with pytest.raises(Signalled):
            WAYS[name](carrier, b"head", body_of(b"-"))
    WAYS[name](carrier, b"head", body_of(b"b"))
    carrier.settle()
    assert kept(carrier) == 2
    WAYS[name](carrier, b"head", body_of(b"c"))
    assert drain(carrier, other) == framed(*map(body_of, (b"a", b"b", b"c")))
    assert not carrier.lends


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", WAYS)
def test_a_handler_that_sends_too_takes_no_others_place(
        ends: tuple[TcpCarrier, socket.socket], name: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    carrier, other = ends
    got = b""

    def sending() -> None:
        nonlocal got
        carrier.send(b"head", body_of(b"h"))
        if when == "before":
            got = drain(carrier, other)

    handle(monkeypatch, tcp, name, **{when: sending})
    WAYS[name](carrier, b"head", body_of(b"a"))
    gc.collect()
    assert kept(carrier) == (1 if when == "before" else 2)
    got += drain(carrier, other)
    letters = (b"h", b"a") if when == "before" else (b"a", b"h")
    assert got == framed(*map(body_of, letters))
    assert not carrier.lends


def test_one_body_again_and_again_is_kept_no_oftener_than_it_waits(ends: tuple[TcpCarrier, socket.socket]) -> None:
    carrier, other = ends
    body = body_of(b"a")
    for _ in range(20):
        carrier.send(b"head", body)
        while carrier.wire.unsent > BIG:
            carrier.take(0.0)
            with contextlib.suppress(BlockingIOError):
                other.recv(1 << 16)
        carrier.settle()
        assert len(carrier.lends) == carrier.wire.bodies_end - carrier.wire.bodies_begin
        assert carrier.wire.unsent


# -- streams


def framing(*frames: bytes) -> bytes:
    return b"".join(len(frame).to_bytes(4, "little") + frame for frame in frames)


class Peer:
    """Of a stream: a bare socket."""

    def __init__(self, port: ListenPort) -> None:
        self.socket = socket.create_connection(port.address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(framing(hello(WIDE)))

    def send(self, stream: Stream, data: bytes) -> None:
        """And wait until it is there."""
        wire = stream._endpoint._carrier.wire  # type: ignore[union-attr]
        self.socket.sendall(data)
        with socket.socket(fileno=socket.dup(wire.fd)) as there:
            while len(there.recv(1 << 17, socket.MSG_PEEK)) < len(data):
                pass

    def frame(self) -> tuple[int, int, bytes]:
        """The next one that came: its kind, tag and body."""
        self.socket.settimeout(10)
        length = int.from_bytes(self.socket.recv(4, socket.MSG_WAITALL), "little")
        kind, _, tag, body = parse(self.socket.recv(length, socket.MSG_WAITALL))
        return kind, tag, body


@pytest.fixture
def met() -> Iterator[tuple[Stream, Peer]]:
    port = ListenPort("127.0.0.1", 0)
    with Stream(port, Resources(WIDE, messages=16)) as stream:
        peer = Peer(port)
        stream.connect(10)
        assert peer.frame()[0] == Kind.HELLO
        yield stream, peer
        peer.socket.close()


def receive(stream: Stream, most: int) -> bytes:
    return stream.receive(most, timeout=10)


def fill(stream: Stream, most: int) -> bytes:
    into = bytearray(most)
    return bytes(into[:stream.receive_into(into, timeout=10)])


READERS = {"receive": (receive, lanes), "receive_into": (fill, streams)}


def all_of(stream: Stream, number: int) -> bytes:
    got = b""
    while len(got) < number:
        got += stream.receive(1 << 20, timeout=10)
    return got


def completed(peer: Peer, *tags: int) -> None:
    """It is told of each, once and in order, and of nothing else."""
    assert [peer.frame()[:2] for _ in tags] == [(Kind.DONE, tag) for tag in tags]
    peer.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        peer.socket.recv(1)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("cut", [100, 5000, len(BODY) + 12], ids=["little", "half", "whole"])
def test_what_was_read_as_a_signal_raised_is_what_comes_next(met: tuple[Stream, Peer], reader: str, cut: int,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    stream, peer = met
    read, module = READERS[reader]
    data = framing(encode(Kind.MESSAGE, 0x10001, BODY), encode(Kind.MESSAGE, 0x10002, BODY[::-1]))
    peer.send(stream, data[:cut])
    assert lib.idc_lane_read(stream._core, ffi.NULL, 0, 0, 0) == 0
    handle(monkeypatch, module, "_read", after=raising)
    with pytest.raises(Signalled):
        read(stream, 1 << 20)
    peer.socket.sendall(data[cut:])
    assert all_of(stream, 2 * len(BODY)) == BODY + BODY[::-1]
    completed(peer, 0x10001, 0x10002)


def flushed(stream: Stream) -> None:
    """It takes what comes before the notice that it waits for."""
    with pytest.raises(Signalled):
        stream.flush(timeout=10)


@pytest.mark.parametrize("pieces", [1, 2], ids=["whole", "half"])
def test_the_rest_that_was_read_as_a_signal_raised_is_what_comes_next(met: tuple[Stream, Peer], pieces: int,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    stream, peer = met
    data = framing(encode(Kind.MESSAGE, 0x10001, BODY))
    stream.send(b"mine")
    mine = peer.frame()[1]
    peer.send(stream, data[:1000])
    got = stream.receive(100, timeout=10)
    half = 1000 + (len(data) - 1000) // pieces
    peer.send(stream, data[1000:half])
    handle(monkeypatch, lanes, "_read", after=raising)
    flushed(stream)
    peer.socket.sendall(data[half:] + framing(encode(Kind.MESSAGE, 0x10002, b"next"), encode(Kind.DONE, mine)))
    got += all_of(stream, len(BODY) - len(got) + 4)
    assert got == BODY + b"next"
    stream.flush(timeout=10)
    completed(peer, 0x10001, 0x10002)


@pytest.mark.parametrize("length", [3, LONG], ids=["short", "long"])
def test_a_message_that_was_taken_as_a_signal_raised_is_what_comes_next(met: tuple[Stream, Peer], length: int,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    stream, peer = met
    stream.send(b"mine")
    mine = peer.frame()[1]
    peer.send(stream, framing(encode(Kind.MESSAGE, 0x10001, BODY[:length]), encode(Kind.MESSAGE, 0x10002, b"next"),
                              encode(Kind.DONE, mine)))
    for _ in range(2):
        handle(monkeypatch, lanes, "_take", after=raising)
        flushed(stream)
    if length == LONG:  # all that is known is its length; the next call has its body
        def memory(number: int) -> bytes:
            handle(monkeypatch, lanes, "_take", after=raising)
            return bytes(number)

        monkeypatch.setattr(lanes, "bytes", memory, raising=False)
        flushed(stream)
        monkeypatch.delattr(lanes, "bytes")
    assert all_of(stream, length + 4) == BODY[:length] + b"next"
    stream.flush(timeout=10)
    completed(peer, 0x10001, 0x10002)


@pytest.mark.parametrize("words", ["enough", "e" * (LONG - 16)], ids=["short", "long"])
def test_an_end_that_was_taken_as_a_signal_raised_is_met(met: tuple[Stream, Peer], words: str,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    stream, peer = met
    stream.send(b"mine")
    peer.send(stream, framing(bye(words)))
    handle(monkeypatch, lanes, "_take", after=raising)
    flushed(stream)
    monkeypatch.setattr(stream._endpoint, "pump", lambda _: raising())
    flushed(stream)
    monkeypatch.undo()
    assert stream.receive(10, timeout=10) == b""
    assert words[:9] in stream._endpoint.reason


def test_what_a_stream_sends_is_kept_if_a_signal_raises_as_it_waits(met: tuple[Stream, Peer],
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    stream, peer = met
    carrier = stream._endpoint._carrier
    assert isinstance(carrier, TcpCarrier)
    count = 0
    while not carrier.wire.unsent:
        handle(monkeypatch, lanes, "_send", after=raising)
        with pytest.raises(Signalled):
            stream.send(body_of(b"%c" % (97 + count)) * 4)
        count += 1
        assert count <= 16, "the kernel takes all"
    gc.collect()
    assert kept(carrier) == 1
    other = [bytes(4 * BIG) for _ in range(4)]  # which would be given that memory, were it free
    for index in range(count):
        peer.socket.setblocking(True)
        length = int.from_bytes(peer.socket.recv(4, socket.MSG_WAITALL), "little")
        got = bytearray()
        while len(got) < length:
            carrier.flush()
            with contextlib.suppress(BlockingIOError):
                got += peer.socket.recv(length - len(got), socket.MSG_DONTWAIT)
        assert got[8:] == body_of(b"%c" % (97 + index)) * 4
    del other
    carrier.settle()
    assert not carrier.lends
