"""What observers see of a channel is what its ends have counted, and no bytes at all make looking fail."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_support import CHANNELS, QUOTAS, Echo, endpoints, transact
from support import local_region

from idc import layout
from idc.channel import ByteChannel
from idc.endpoint import Client, Endpoint, Resources, State
from idc.endpoint.engine import Engine
from idc.transport.shared import SharedPort
from testbed.live.memory import ChannelNow, read_channel

if TYPE_CHECKING:
    from support import LocalRegion

    from idc.layout import RegionHeader


def told(header: RegionHeader, number: int) -> dict[str, object]:
    entry = header.channels[number]
    return {"name": entry.name, "kind": entry.kind.name.lower(), "a": "front", "b": "back", "offset": entry.offset,
            "capacity": entry.slots or entry.ring_bytes}


def look(region: LocalRegion, number: int = 0) -> ChannelNow:
    with mmap.mmap(region.memfd, region.header.size, prot=mmap.PROT_READ) as memory, \
            memoryview(memory) as view, view.cast("Q") as words:
        return read_channel(words, told(region.header, number))


def test_an_endpoint_shows_what_it_does() -> None:
    with local_region(CHANNELS) as region, region.join(0) as a, region.join(1) as b:
        front, back = endpoints(*(SharedPort(one, "calls", release=lambda: None) for one in (a, b)))
        try:
            transact(front, back, 64)
            assert front._carrier is not None
            assert front._carrier.trips is not None
            front._carrier.trips.dropped(3)
            for end in (front, back):
                assert end.arm()
            now = look(region)
            assert now.connected
            assert [side.member for side in now.sides] == ["front", "back"]
            out, back_way = now.rings
            assert (out.producer, out.consumer, out.filled) == ("front", "back", 0)
            assert out.sent["messages"] == out.taken["messages"] == out.head == out.tail == 65  # HELLO is one
            assert back_way.sent["messages"] == back_way.taken["messages"] == 65
            assert out.sent["bytes"] == out.taken["bytes"] > 64 * 10
            assert out.sent["doorbells"] + out.sent["suppressed"] > 0
            mine, theirs = now.sides
            assert mine.samples == sum(mine.buckets) == 8, "one of eight is timed"
            assert 0 < mine.total_ns < 64 * 10**10
            assert (theirs.samples, mine.dropped, theirs.dropped) == (0, 3, 0)
        finally:
            front.abandon()
            back.abandon()
        assert not look(region).connected


def test_the_timed_ones_are_spread_over_the_slots() -> None:
    with local_region(CHANNELS) as region, region.join(0) as a, region.join(1) as b:
        front, back = endpoints(*(SharedPort(one, "calls", release=lambda: None) for one in (a, b)))
        counts = []
        try:
            for _ in range(5):
                transact(front, back, 8)
                counts.append(look(region).sides[0].samples)
        finally:
            front.abandon()
            back.abandon()
        assert counts == [1, 2, 3, 4, 5]


def test_transactions_that_the_core_moves_are_timed_too() -> None:
    with local_region(CHANNELS) as region, region.join(0) as a, region.join(1) as b:
        ports = [SharedPort(one, "calls", spin=0.0, release=lambda: None) for one in (a, b)]
        engine = Engine(8, QUOTAS)
        front = engine.endpoint(ports[0], Client())
        back = Endpoint(ports[1], Echo(), Resources(QUOTAS))
        try:
            while State.CONNECTED not in (front.state, back.state) or front.state is not back.state:
                front.pump()
                back.pump()
            for number in range(64):
                engine.submit(b"x", number)
                engine.notify()
                while not engine.poll():
                    back.pump()
            assert look(region).sides[0].samples == 4, "one of sixteen uses of a slot"
        finally:
            front.abandon()
            back.abandon()


def test_a_new_connection_counts_from_zero() -> None:
    with local_region(CHANNELS) as region, region.join(0) as a, region.join(1) as b:
        for expected in (16, 8):
            front, back = endpoints(*(SharedPort(one, "calls", release=lambda: None) for one in (a, b)))
            transact(front, back, expected)
            now = look(region)
            front.abandon()
            back.abandon()
            assert now.rings[0].head == expected + 1
            assert now.sides[0].samples == expected // 8


def test_bytes_in_a_ring_fill_it() -> None:
    with local_region(CHANNELS) as region, region.join(0) as a, region.join(1) as b:
        ours, theirs = ByteChannel.begin(a, "bulk"), ByteChannel.begin(b, "bulk")
        try:
            waiting = [ours, theirs]
            while waiting:
                waiting = [channel for channel in waiting if not channel.advance()]
            ours.sender.write(bytes(1000))
            ring = look(region, 1).rings[0]
            assert (ring.filled, ring.capacity) == (1000, 65536)
            theirs.receiver.read(600)
            assert look(region, 1).rings[0].filled == 400
        finally:
            ours.close()
            theirs.close()


@pytest.mark.parametrize(("tail", "head", "filled"), [
    (5, 3, 2), (3, 5, 0), (2, (1 << 64) - 1, 3), (0, 1 << 40, None), (1 << 63, 0, None)])
def test_indexes_that_cannot_be_are_no_fill(tail: int, head: int, filled: int | None) -> None:
    words = [0] * 512
    words[layout.RING_AB // 8], words[(layout.RING_AB + layout.RING_HEAD) // 8] = tail, head
    channel = {"name": "c", "kind": "message", "a": "a", "b": "b", "offset": 0, "capacity": 16}
    assert read_channel(words, channel).rings[0].filled == filled


@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=32))
@settings(max_examples=50)
def test_any_bytes_are_read(found: list[int]) -> None:
    words = (found * 512)[:512]
    now = read_channel(words, {"name": "c", "kind": "byte", "a": "a", "b": "b", "offset": 0, "capacity": 4096})
    assert len(now.sides[0].buckets) == layout.TRIP_BUCKETS
    assert now.rings[0].filled is None or 0 <= now.rings[0].filled <= 4096
