"""Channels between two members in one process: attach in any order, end, come again, refuse."""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from support import LocalRegion, local_region

from idc import layout
from idc.channel import ByteChannel, Handshake, MessageChannel, SideState
from idc.errors import MisuseError, NotConnectedError, PeerGoneError, TimedOutError
from idc.region import Region, wait_event
from idc.ring import Bell, load_u64, store_u64
from idc.transport.shared import SharedCarrier, SharedPort

if TYPE_CHECKING:
    from collections.abc import Iterator

    from idc.words import Memory


@pytest.fixture
def local() -> Iterator[LocalRegion]:
    with local_region() as region:
        yield region


@pytest.fixture
def ends(local: LocalRegion) -> Iterator[tuple[Region, Region]]:
    with local.join(0) as front, local.join(1) as back:
        yield front, back


def attach(ends: tuple[Region, Region], first: int = 0) -> tuple[MessageChannel, MessageChannel]:
    with ThreadPoolExecutor(2) as pool:
        futures = {side: pool.submit(MessageChannel.attach, ends[side], "notes", timeout=10)
                   for side in (first, 1 - first)}
        return futures[0].result(), futures[1].result()


@pytest.mark.parametrize("first", [0, 1])
def test_messages_go_both_ways(ends: tuple[Region, Region], first: int) -> None:
    front, back = attach(ends, first)
    with front, back:
        front.sender.send(b"there")
        assert back.receiver.recv(timeout=5) == b"there"
        back.sender.send(b"and back")
        assert front.receiver.recv(timeout=5) == b"and back"


def test_bytes_go_both_ways(ends: tuple[Region, Region]) -> None:
    data = bytes(range(256)) * 4096
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(ByteChannel.attach, ends[0], "bulk", timeout=10)
        two = pool.submit(ByteChannel.attach, ends[1], "bulk", timeout=10)
        with one.result() as front, two.result() as back:
            sent = pool.submit(front.sender.write, data, timeout=10)
            assert back.receiver.read_exactly(len(data), timeout=10) == data
            assert sent.result() == len(data)


def until_asleep(channel: MessageChannel) -> None:
    """Until the receiver, in another thread, has armed its event word and blocks, or is about to."""
    deadline = time.monotonic() + 10
    while channel.receiver.counters.sleeps == 0:
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("rings", [True, False])
def test_a_handshake_without_its_doorbell_is_counted(
        ends: tuple[Region, Region], monkeypatch: pytest.MonkeyPatch, *, rings: bool) -> None:
    if not rings:
        monkeypatch.setattr(MessageChannel, "_ring_peer", lambda *_: None)
        for fd in (fd for end in ends for fd in end.events):
            wait_event(fd, 0)  # what the host rang
    front, back = attach(ends)
    with front, back:
        assert (front.late + back.late > 0) is not rings


def test_what_was_sent_before_the_end_arrives_and_then_the_end(ends: tuple[Region, Region]) -> None:
    front, back = attach(ends)
    front.sender.send(b"last words")
    front.close(reason=7)
    with back:
        assert back.receiver.recv(timeout=5) == b"last words"
        with pytest.raises(PeerGoneError):
            back.receiver.recv(timeout=5)
    word = load_u64(ends[1].memory, back.entry.offset + layout.SIDE_A + layout.SIDE_STATE)
    assert word == 7 << 32 | SideState.CLOSED


def test_a_sleeping_receiver_learns_of_the_end(ends: tuple[Region, Region]) -> None:
    front, back = attach(ends)
    with back, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(back.receiver.recv, timeout=30)
        until_asleep(back)
        front.close()
        with pytest.raises(PeerGoneError):
            waiting.result(timeout=10)
        assert back.receiver.counters.late == 0


def test_a_vm_that_dies_ends_the_connection(local: LocalRegion, ends: tuple[Region, Region]) -> None:
    front, back = attach(ends)
    with front, back, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(back.receiver.recv, timeout=30)
        until_asleep(back)
        local.present(0, 1, present=False)
        with pytest.raises(PeerGoneError):
            waiting.result(timeout=10)
        assert back.receiver.counters.late == 0


def test_nothing_of_the_connection_before_is_delivered(local: LocalRegion, ends: tuple[Region, Region]) -> None:
    front, back = attach(ends)
    front.sender.send(b"stale")
    back.sender.send(b"stale too")
    back.receiver.close()  # back's process dies here: nobody says CLOSED
    front.sender.close()
    front.receiver.close()
    with local.join(1) as again:
        new_front, new_back = attach((ends[0], again))
        with new_front, new_back:
            new_front.sender.send(b"fresh")
            assert new_back.receiver.recv(timeout=5) == b"fresh"
            new_back.sender.send(b"fresh too")
            assert new_front.receiver.recv(timeout=5) == b"fresh too"
    front.close()
    back.close()


def test_survivor_of_a_restart_is_told(ends: tuple[Region, Region]) -> None:
    front, back = attach(ends)
    restarted = threading.Thread(target=lambda: attach_alone(ends[1]))
    restarted.start()
    with front, pytest.raises(PeerGoneError):
        front.receiver.recv(timeout=10)
    restarted.join()
    back.close()


def attach_alone(region: Region) -> None:
    with pytest.raises(TimedOutError):
        MessageChannel.attach(region, "notes", timeout=0.3)


def test_many_restarts_of_either_side(ends: tuple[Region, Region]) -> None:
    for turn in range(30):
        front, back = attach(ends, turn % 2)
        front.sender.send(str(turn).encode())
        assert back.receiver.recv(timeout=5) == str(turn).encode()
        if turn % 3:
            front.close()
        if turn % 2:
            back.close()


def test_attach_alone_names_who_is_missing(ends: tuple[Region, Region]) -> None:
    with pytest.raises(TimedOutError, match="'back' did not attach within"):
        MessageChannel.attach(ends[0], "notes", timeout=0.1)


def test_wrong_name_and_wrong_kind_are_said(ends: tuple[Region, Region]) -> None:
    with pytest.raises(NotConnectedError, match="has no channel 'nothing'"):
        MessageChannel.attach(ends[0], "nothing")
    with pytest.raises(NotConnectedError, match="'bulk' is a byte channel"):
        MessageChannel.attach(ends[0], "bulk")


def test_acknowledgement_of_an_older_epoch_does_not_connect(ends: tuple[Region, Region]) -> None:
    entry = ends[0].header.channel("notes")
    mine = Handshake(ends[0], entry)
    mine.begin()
    mine.open()
    side_b = entry.offset + layout.SIDE_B
    store_u64(ends[1].memory, side_b + layout.SIDE_ACK, mine.epoch ^ 1)
    store_u64(ends[1].memory, side_b + layout.SIDE_STATE, SideState.OPEN)
    store_u64(ends[1].memory, side_b + layout.SIDE_EPOCH, 42)
    assert mine.step() == (False, True)
    assert load_u64(ends[0].memory, entry.offset + layout.SIDE_A + layout.SIDE_ACK) == 42
    store_u64(ends[1].memory, side_b + layout.SIDE_ACK, mine.epoch)
    assert mine.step() == (True, False)


def test_peer_that_restarts_while_it_is_looked_at_is_not_connected(
        ends: tuple[Region, Region], monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ends[0].header.channel("notes")
    mine = Handshake(ends[0], entry)
    mine.begin()
    mine.open()
    side_b, real = entry.offset + layout.SIDE_B, load_u64
    store_u64(ends[1].memory, side_b + layout.SIDE_EPOCH, 42)

    def restart_after_the_first_look(memory: Memory, offset: int) -> int:
        value = real(memory, offset)
        if offset == side_b + layout.SIDE_EPOCH and value == 42:
            store_u64(ends[1].memory, side_b + layout.SIDE_EPOCH, 43)
            store_u64(ends[1].memory, side_b + layout.SIDE_STATE, SideState.OPEN)
            store_u64(ends[1].memory, side_b + layout.SIDE_ACK, mine.epoch)
        return value

    monkeypatch.setattr("idc.channel.load_u64", restart_after_the_first_look)
    assert mine.step() == (False, True)
    assert mine.step() == (True, True)
    assert mine.peer_epoch == 43


def test_a_new_incarnation_with_an_old_epoch_can_still_connect(local: LocalRegion, ends: tuple[Region, Region]) -> None:
    entry = ends[0].header.channel("notes")
    mine, theirs = Handshake(ends[0], entry), Handshake(ends[1], entry)
    for side in (mine, theirs):
        side.begin()
        side.open()
    mine.step()
    local.present(1, 2)
    theirs.step()
    assert mine.step() == (True, True)


def test_a_page_that_names_more_vectors_than_there_are_is_refused(local: LocalRegion) -> None:
    os.pwrite(local.memfd, struct.pack("<I", 200), 268)  # `vectors`
    with pytest.raises(layout.LayoutError, match="promises 200 vectors to each member, here are 5"):
        local.join(0)


def test_a_region_in_use_can_be_closed_later(local: LocalRegion) -> None:
    released: list[bool] = []
    memory = mmap.mmap(local.memfd, local.header.size)
    region = Region(memory, 0, local.events[0], lambda _, vector: Bell.eventfd(local.events[1][vector]),
                    lambda: released.append(True))
    channel = MessageChannel(region, "notes")
    with pytest.raises(MisuseError, match="'local' is closed while a ring"):
        region.close()
    assert not released
    channel.close()
    region.close()
    region.close()
    assert released == [True]
    assert memory.closed


def test_a_region_of_another_protocol_is_refused(local: LocalRegion) -> None:
    os.pwrite(local.memfd, struct.pack("<HH", 2, 3), 104)
    with pytest.raises(layout.LayoutError, match="speaks protocol 2 to 3, this library speaks 1"):
        local.join(0)


@pytest.mark.parametrize("word", [layout.SIDE_EPOCH, layout.SIDE_ACK, layout.SIDE_STATE])
def test_a_side_whose_own_words_were_written_over_still_connects(ends: tuple[Region, Region], word: int) -> None:
    """A peer that means ill leaves; an honest one comes after it, and must not wait for ever for what it finds."""
    front, back = ends
    waiting, other = SharedPort(front, "notes", release=lambda: None), SharedPort(back, "notes", release=lambda: None)
    waiting.look()
    store_u64(back.memory, front.header.channel("notes").offset + layout.SIDE_A + word, 0x1234)
    carriers: list[SharedCarrier | None] = [None, None]
    deadline = time.monotonic() + 10
    while None in carriers:
        assert time.monotonic() < deadline
        for n, port in enumerate((waiting, other)):
            port.look()
            carriers[n] = carriers[n] or port.connection()
    waiting.close()
    other.close()
