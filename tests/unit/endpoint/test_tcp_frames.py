"""Frames over a TCP carrier whose kernel takes and gives them in odd pieces: each arrives whole and in order."""

from __future__ import annotations

import select
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idc.errors import PeerGoneError, ProtocolError
from idc.transport.tcp import LONG, MOST_UNSENT, ROOM, TcpCarrier

BODIES = [0, 0, 1, 100, LONG - 9, LONG - 8, LONG, 70_000, ROOM - 4, ROOM, 9 * ROOM + 3]
FRAME = st.tuples(st.integers(0, 40), st.sampled_from(BODIES))


BIG = 1 << 18


def taken(carrier: TcpCarrier, timeout: float) -> list[bytes]:
    """The frames, whole: of a long one the first 8 bytes come apart."""
    return [b"".join(frame) if isinstance(frame, tuple) else frame for frame in carrier.take(timeout)]


def pair() -> tuple[TcpCarrier, TcpCarrier]:
    """Two carriers; as little room between them as the kernel allows."""
    one, two = socket.socketpair()
    for end in (one, two):
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return TcpCarrier(one, select.epoll()), TcpCarrier(two, select.epoll())


@given(st.lists(FRAME, max_size=12), st.lists(st.booleans(), max_size=12))
@settings(max_examples=40, deadline=None)
def test_frames_arrive_whole_and_in_order(shapes: list[tuple[int, int]], flushes: list[bool]) -> None:
    sender, receiver = pair()
    sent: list[bytes] = []
    got: list[bytes] = []
    for index, (head, body) in enumerate(shapes):
        frame, rest = bytes([index]) * head, bytes([100 + index]) * body
        sender.post(frame, rest)
        sent.append(frame + rest)
        if index < len(flushes) and flushes[index]:
            sender.flush()
            got += taken(receiver, 0.0)
    for _ in range(100_000):
        if len(got) == len(sent):
            break
        sender.take(0.0)  # what the kernel did not take before goes out from here
        got += taken(receiver, 0.001)
    assert got == sent
    sender.close()
    with pytest.raises(PeerGoneError):
        receiver.take(0.1)
    receiver.close()


def test_what_was_posted_does_not_change_afterwards() -> None:
    sender, receiver = pair()
    body = bytearray(b"x" * 5000)
    sender.post(b"head", body)  # type: ignore[arg-type]
    body[:] = b"y" * 5000
    sender.flush()
    got: list[bytes] = []
    while not got:
        sender.take(0.0)
        got += taken(receiver, 0.01)
    assert got == [b"head" + b"x" * 5000]
    for end in (sender, receiver):
        end.close()


def overfill(sender: TcpCarrier) -> None:
    for _ in range(2 * MOST_UNSENT // BIG):
        sender.post(b"head", bytes(BIG))
        sender.flush()


def test_a_peer_that_does_not_read_is_told_from_one_that_is_slow() -> None:
    sender, receiver = pair()
    with pytest.raises(ProtocolError, match="does not read"):
        overfill(sender)
    receiver.close()
    sender.close()
