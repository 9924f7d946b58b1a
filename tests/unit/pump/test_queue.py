"""Two queues of one region, each with its thread; pairs of sockets stand for the interfaces, packet for packet."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import random
import select
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING

import pytest
from support import LocalRegion

from idc._core import lib
from idc.device.classes import DeviceClass, Queues, queue_channel
from idc.device.driver import BackDriver
from idc.endpoint import Client, Endpoint, Resources, State
from idc.errors import MisuseError, NotConnectedError
from idc.layout import RECORD_A, RECORD_B
from idc.pump import Queue, places
from idc.pump.tap import BUFFER_BYTES, DEPTH, INLINE_BYTES, QUOTAS, VNET_BYTES, Tap
from idc.transport.shared import SharedPort

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from idc.endpoint import Completion

LIMIT = 20.0
PLAIN = bytes(VNET_BYTES)
LONGEST = lib.IDC_TAP_LONGEST


class Cable(DeviceClass):
    """One queue and its room."""

    name = "cable"
    back = BackDriver

    @classmethod
    def queues(cls, options: object) -> Queues:
        return Queues(1, QUOTAS, DEPTH, 8 * BUFFER_BYTES)


class Wire:
    """One end: a queue, and the far side of its interface, where the test is the kernel."""

    def __init__(self, region: LocalRegion, member: int, spin: float = 50e-6) -> None:
        self.region = region.join(member)
        self.inside, self.outside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.inside, self.outside):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.news = os.eventfd(0, os.EFD_NONBLOCK)
        self.tap = Tap(self.inside.fileno(), places(self.region, 1)[0])
        self.queue = Queue("queue-0", self.tap, depth=DEPTH, accepts=QUOTAS,
                           told=lambda: os.eventfd_write(self.news, 1))
        self.spin = spin

    def start(self) -> None:
        self.queue.start(SharedPort(self.region, queue_channel(0), spin=self.spin, release=lambda: None))

    def give(self, packet: bytes, vnet: bytes = PLAIN) -> None:
        """As the kernel would, waiting for room."""
        _wait(self.outside, select.POLLOUT)
        self.outside.send(vnet + packet)

    def take(self) -> bytes:
        """The next packet, without its vnet header."""
        _wait(self.outside, select.POLLIN)
        return self.outside.recv(1 << 17)[VNET_BYTES:]

    def close(self) -> None:
        self.queue.stop()
        self.inside.close()
        self.outside.close()
        os.close(self.news)
        self.region.close()


def _wait(end: socket.socket, what: int) -> None:
    poller = select.poll()
    poller.register(end, what)
    assert poller.poll(LIMIT * 1000), "not in time"


def noted_drops(region: LocalRegion) -> tuple[int, int]:
    """What observers are shown, of both sides."""
    entry = next(each for each in region.header.channels if each.name == queue_channel(0))
    with mmap.mmap(region.memfd, region.header.size, prot=mmap.PROT_READ) as memory:
        front, back = (struct.unpack_from("<3Q", memory, entry.offset + at)[2] for at in (RECORD_A, RECORD_B))
    return front, back


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not what():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.002)


@contextlib.contextmanager
def laid() -> Iterator[LocalRegion]:
    channels, size = Cable.plan("front", "back", {})
    region = LocalRegion(channels, size)
    try:
        yield region
    finally:
        region.close()


@contextlib.contextmanager
def cable(spin: float = 50e-6) -> Iterator[tuple[Wire, Wire]]:
    with laid() as region:
        ends = Wire(region, 0, spin), Wire(region, 1, spin)
        try:
            for end in ends:
                end.start()
            until(lambda: all(end.queue.connected for end in ends))
            yield ends
        finally:
            for end in ends:
                end.close()


def packet(number: int, length: int) -> bytes:
    return struct.pack("<I", number) + random.Random(number).randbytes(length - 4)


@pytest.mark.parametrize("length", [14, INLINE_BYTES, INLINE_BYTES + 1, 1514, 9014, LONGEST])
def test_a_packet_arrives_as_it_was_sent_in_both_directions(length: int) -> None:
    with cable() as (front, back):
        for number, (one, other) in enumerate([(front, back), (back, front)]):
            vnet = struct.pack("<BBHHHH", 1, 1 if length > 1514 else 0, 14, 1448 if length > 1514 else 0, 14, 0) \
                if length > 1000 else PLAIN
            one.give(packet(number, length), vnet)
            _wait(other.outside, select.POLLIN)
            assert other.outside.recv(1 << 17) == vnet + packet(number, length)
            until(lambda: (one.tap.packets.sent, other.tap.packets.received) == (1, 1))  # noqa: B023 - called at once
            assert one.tap.packets.sent_gso == other.tap.packets.received_gso == (length > 1514)


@pytest.mark.parametrize("spin", [0.0, 50e-6, 2e-3])
def test_packets_of_all_lengths_arrive_in_order_in_both_directions_at_once(spin: float) -> None:
    count, choose = 600, random.Random(7)
    lengths = [choose.choice([14, 60, 208, 209, 1500, 9000, LONGEST]) for _ in range(count)]
    with cable(spin) as ends:
        wrong: list[int] = []
        windows = [threading.Semaphore(8), threading.Semaphore(8)]  # an interface that is full drops

        def send(end: Wire, window: threading.Semaphore) -> None:
            for number, length in enumerate(lengths):
                assert window.acquire(timeout=LIMIT)
                end.give(packet(number, length))

        def receive(end: Wire, window: threading.Semaphore) -> None:
            for number, length in enumerate(lengths):
                if end.take() != packet(number, length):
                    wrong.append(number)
                window.release()

        threads = [threading.Thread(target=send, args=pair) for pair in zip(ends, windows, strict=True)]
        threads += [threading.Thread(target=receive, args=pair) for pair in zip(ends, windows[::-1], strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        until(lambda: all((end.tap.packets.sent, end.tap.packets.received) == (count, count) for end in ends))
        for one, other in (ends, ends[::-1]):
            assert one.tap.packets.sent == other.tap.packets.received == count
            assert one.tap.packets.sent_bytes == sum(lengths)
            assert one.queue.counters.late == 0
            assert other.tap.packets.refused == 0


def test_one_that_sleeps_is_woken_by_each_packet_and_by_no_answer() -> None:
    with cable(0.0) as (front, back):
        for number in range(100):
            front.give(packet(number, 1000))
            assert back.take() == packet(number, 1000)
        until(lambda: front.queue.counters.sleeps > 0)
        assert front.queue.counters.late == back.queue.counters.late == 0
        assert front.queue.counters.wakeups <= 100 / 4 + 5  # those of whom half the buffers are out, if any


def test_what_was_queued_before_the_connection_is_dropped_and_counted() -> None:
    with laid() as region:
        front, back = Wire(region, 0), Wire(region, 1)
        try:
            front.start()
            for number in range(5):
                front.give(packet(number, 100))
            back.start()
            until(lambda: front.queue.connected and back.queue.connected)
            front.give(packet(9, 100))
            assert back.take() == packet(9, 100)
            assert front.tap.packets.stale == 5
            assert noted_drops(region) == (5, 0)
        finally:
            front.close()
            back.close()


def test_stopped_and_started_again_under_traffic_nothing_of_before_arrives() -> None:
    with laid() as region:
        front, sent, going = Wire(region, 0), 0, True

        def flood() -> None:
            nonlocal sent
            while going:
                with contextlib.suppress(BlockingIOError):
                    front.outside.send(PLAIN + packet(sent, 2000))
                    sent += 1

        flooding = threading.Thread(target=flood)
        front.start()
        flooding.start()
        try:
            last = -1
            for _ in range(12):
                before = sent
                back = Wire(region, 1)
                back.start()
                try:
                    for _ in range(20):
                        got = back.take()
                        number = struct.unpack_from("<I", got)[0]
                        assert got == packet(number, 2000)
                        assert number > last
                        last = number
                    until(lambda: front.queue.connected)
                finally:
                    back.close()
                assert last >= before - 1, "a packet that was queued before this connection"
                until(lambda: not front.queue.connected)
            assert front.queue.connections == 12
        finally:
            going = False
            flooding.join()
            front.close()


def test_stopping_does_not_wait_for_a_peer_that_takes_nothing() -> None:
    with cable() as (front, back):
        while True:  # until the interface at the far end is full, and the packets are refused
            with contextlib.suppress(BlockingIOError):
                front.outside.send(PLAIN + packet(1, LONGEST))
            if back.tap.packets.refused:
                break
        began = time.monotonic()
        front.queue.stop()
        assert time.monotonic() - began < LIMIT


def test_an_interface_that_is_gone_ends_the_queue_with_its_error() -> None:
    with cable() as (front, back):
        front.outside.close()
        until(lambda: front.queue.error is not None)
        assert isinstance(front.queue.error, OSError)
        front.queue.stop()
        until(lambda: not back.queue.connected)
        assert back.queue.error is None


class Liar(Client):
    """A peer that says of a packet whatever it likes."""

    def __init__(self) -> None:
        self.answers: list[Completion] = []


def request(place: int = 0, length: int = 60, *, flags: int = 0, vnet: bytes = PLAIN, more: bytes = b"") -> bytes:
    return struct.pack("<QIH", place % 2**64, length, flags) + vnet + more


def vnet(flags: int = 0, gso: int = 0, headers: int = 0, size: int = 0, start: int = 0, offset: int = 0) -> bytes:
    return struct.pack("<BBHHHH", flags, gso, headers, size, start, offset)


LIES = {
    "short": (b"abc", "shorter than the description"),
    "runt": (request(length=13, more=bytes(13)), "a length that no packet has"),
    "giant": (request(length=LONGEST + 1), "a length that no packet has"),
    "header page": (request(place=0, length=60), "bytes outside of the sender's buffers"),
    "mine": (request(place=-1, length=60), "bytes outside of the sender's buffers"),
    "wraps": (request(place=2**64 - 30, length=60), "bytes outside of the sender's buffers"),
    "beyond": (request(place=2**40, length=60), "bytes outside of the sender's buffers"),
    "at the end": (request(place=-2, length=60), "bytes outside of the sender's buffers"),
    "fewer than it says": (request(length=60, more=bytes(59)), "bytes outside of the sender's buffers"),
    "both": (request(place=4096, length=60, more=bytes(60)), "bytes outside of the sender's buffers"),
    "flags": (request(vnet=vnet(flags=0x80), more=bytes(60)), "flags that a packet cannot have"),
    "unknown gso": (request(vnet=vnet(1, 3, 54, 1448, 34, 16), more=bytes(60)), "segmentation that is unknown"),
    "ecn alone": (request(vnet=vnet(1, 0x80, 54, 1448, 34, 16), more=bytes(60)), "segmentation that is unknown"),
    "gso without size": (request(vnet=vnet(1, 1, 54, 0, 34, 16), more=bytes(60)), "segmentation that is unknown"),
    "gso without checksum": (request(vnet=vnet(0, 1, 54, 1448), more=bytes(60)), "segmentation that is unknown"),
    "checksum outside": (request(vnet=vnet(1, 0, 0, 0, 50, 9), more=bytes(60)), "a checksum outside of the packet"),
    "checksum in ethernet": (request(vnet=vnet(1, 0, 0, 0, 2, 2), more=bytes(60)), "a checksum outside"),
    "checksum far": (request(vnet=vnet(1, 0, 0, 0, 65535, 65535), more=bytes(60)), "a checksum outside"),
    "headers": (request(vnet=vnet(headers=61), more=bytes(60)), "headers longer than the packet"),
    "headers of a runt": (request(vnet=vnet(headers=3), more=bytes(60)), "headers longer than the packet"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_peer_that_lies_loses_that_connection_with_a_reason(lie: str) -> None:
    body, reason = LIES[lie]
    with laid() as region:
        honest = Wire(region, 0)
        mapped = region.join(1)
        part = {p.owner: p for p in region.header.parts}
        place = struct.unpack_from("<Q", body)[0] if len(body) >= 8 else 0
        if place == 2**64 - 1:  # of the honest one's own part
            body = request(place=part[0].offset, length=60)
        elif place == 2**64 - 2:
            body = request(place=part[1].offset + part[1].length - 59, length=60)
        liar = Endpoint(SharedPort(mapped, queue_channel(0), release=lambda: None), Liar(),
                        Resources(QUOTAS, requests=8, messages=0))
        try:
            honest.start()
            until(lambda: liar.pump(0.01) or liar.state is State.CONNECTED)
            until(lambda: (liar.pump(0.001) or True) and liar.state is State.CONNECTED)
            liar.submit_transaction(body)
            until(lambda: (liar.pump(0.001) or True) and liar.connections == 1 and reason in liar.reason)
            assert honest.tap.packets.received == 0
            until(lambda: (liar.pump(0.001) or True) and liar.state is State.CONNECTED)  # another one can follow
            good = packet(3, 60)
            liar.submit_transaction(request(more=good))
            until(lambda: (liar.pump(0.001) or True) and honest.tap.packets.received == 1)
            assert honest.take() == good
        finally:
            liar.abandon()
            honest.close()
            mapped.close()


def test_a_region_without_parts_for_two_is_refused() -> None:
    with laid() as region, region.join(0) as mapped:
        mapped.header = dataclasses.replace(mapped.header, parts=())
        with pytest.raises(NotConnectedError, match="no part for each of two members"):
            places(mapped, 1)


def test_a_queue_needs_room_for_two_buffers() -> None:
    with laid() as region, region.join(0) as mapped:
        (place,) = places(mapped, 1)
        place.mine_bytes = 2 * BUFFER_BYTES - 1
        with pytest.raises(MisuseError, match="2 of 69632 at least"):
            Tap(0, place)
        place.close()
