"""What a peer can write into shared memory, and what may come of it: an error with a reason, in one call."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ring_support import DATA, DATA_EVENT, HEAD, SPACE_EVENT, TAIL, WATCH, byte_ring, message_ring

from idc.errors import BackPressuredError, CorruptError, IdcError, PeerGoneError

if TYPE_CHECKING:
    from collections.abc import Callable

U64 = st.integers(0, 2**64 - 1)


def slot_word(seq: int, length: int) -> int:
    return length << 32 | seq & 0xFFFFFFFF


@pytest.mark.parametrize("seq", [2, 7, 9, 0xFFFFFFFF, 1 << 31])
def test_slot_that_is_neither_empty_nor_next_is_corrupt(seq: int) -> None:
    with message_ring() as ring:
        ring.poke(DATA, slot_word(seq, 4))
        with pytest.raises(CorruptError, match="slot word is neither empty nor next") as caught:
            ring.rx.recv(timeout=10)
        assert caught.value.value == slot_word(seq, 4)
        ring.poke(DATA, 0)
        with pytest.raises(CorruptError):  # for good, also when the word is mended
            ring.rx.try_recv()


def test_slot_of_an_older_lap_is_corrupt() -> None:
    with message_ring(slots=4) as ring:
        for _ in range(12):
            ring.tx.send(b"x")
            ring.rx.recv()
        assert ring.rx.try_recv() is None
        ring.poke(DATA, slot_word(5, 1))  # the lap before holds 9
        with pytest.raises(CorruptError):
            ring.rx.try_recv()


@pytest.mark.parametrize("length", [57, 64, 1 << 16, 0xFFFFFFFF])
def test_length_beyond_the_slot_is_corrupt(length: int) -> None:
    with message_ring() as ring:
        ring.poke(DATA, slot_word(1, length))
        with pytest.raises(CorruptError, match="length"):
            ring.rx.recv(timeout=10)


@pytest.mark.parametrize("tail", [4097, 1 << 32, 2**64 - 1])
def test_tail_beyond_the_ring_is_corrupt(tail: int) -> None:
    with byte_ring() as ring:
        ring.poke(TAIL, tail)
        with pytest.raises(CorruptError, match="producer's index"):
            ring.rx.read(10, timeout=10)


def test_tail_that_goes_back_is_corrupt() -> None:
    with byte_ring() as ring:
        ring.tx.write(b"12345")
        assert ring.rx.read(2) == b"12"  # takes note of tail 5
        ring.poke(TAIL, 4)
        with pytest.raises(CorruptError, match="producer's index"):
            ring.rx.read_exactly(4, timeout=10)


@pytest.mark.parametrize("head", [9, 1 << 40, 2**64 - 1])
def test_head_beyond_the_tail_is_corrupt(head: int) -> None:
    with message_ring() as ring:
        for _ in range(8):
            ring.tx.send(b"")
        ring.poke(HEAD, head)
        with pytest.raises(CorruptError, match="consumer's index"):
            ring.tx.send(b"", timeout=10)


def test_a_word_that_a_restart_reset_is_no_corruption() -> None:
    """A peer that starts again changes its epoch, then resets its words."""
    with byte_ring() as ring, message_ring() as notes:
        ring.rx.watch(ring.memory, WATCH, 0)
        notes.rx.watch(notes.memory, WATCH, 0)
        for side in (ring, notes):
            side.tx.reset()
        ring.tx.write(b"12345")
        ring.rx.read(2)
        ring.poke(WATCH, 77)
        ring.tx.reset()
        assert ring.rx.read_exactly(3) == b"345", "what the old tail covered is still delivered"
        with pytest.raises(PeerGoneError):
            ring.rx.read(1)
        for _ in range(9):
            notes.tx.send(b"x")
            notes.rx.recv()
        notes.poke(WATCH, 77)
        notes.tx.reset()
        with pytest.raises(PeerGoneError):
            notes.rx.recv()


@pytest.mark.parametrize("wait", [None, 0])
def test_what_was_published_before_the_end_is_delivered(wait: float | None) -> None:
    with byte_ring() as ring, message_ring() as notes:
        ring.poke(WATCH, 5)
        ring.rx.watch(ring.memory, WATCH, 5)
        notes.rx.watch(notes.memory, WATCH, 0)
        ring.tx.write(b"last words")
        notes.tx.send(b"last")
        ring.poke(WATCH, 6)
        notes.poke(WATCH, 6)
        with ring.rx.peek(100, timeout=wait) as span:
            assert bytes(span.memory) == b"last words"
        assert ring.rx.read(100, timeout=wait) == b"last words"
        assert notes.rx.recv(timeout=wait) == b"last"
        with pytest.raises(PeerGoneError):
            ring.rx.read(1, timeout=wait)
        with pytest.raises(PeerGoneError):
            notes.rx.recv(timeout=wait)


def test_sender_sees_the_end_when_it_would_wait() -> None:
    with byte_ring() as ring:
        ring.tx.watch(ring.memory, WATCH, 0)
        ring.poke(WATCH, 1)
        with pytest.raises(PeerGoneError) as caught:
            ring.tx.write(bytes(5000))
        assert caught.value.done == 4096


@settings(max_examples=300, deadline=None)
@given(
    words=st.lists(
        st.tuples(st.sampled_from([TAIL, SPACE_EVENT, HEAD, DATA_EVENT, *range(DATA, DATA + 256, 64)]), U64),
        min_size=1,
        max_size=12,
    )
)
@example(words=[(DATA_EVENT, 1), (DATA, slot_word(1, 56))])
def test_no_words_of_a_peer_do_more_than_end_the_connection(words: list[tuple[int, int]]) -> None:
    """Each call returns in the closed set of results; whatever data comes is inside the ring."""
    with message_ring(4) as notes, byte_ring(256) as ring:
        for offset, value in words:
            notes.poke(offset, value)
            ring.poke(offset, value)
            calls: tuple[Callable[[], object], ...] = (
                notes.rx.try_recv,
                lambda: notes.rx.recv_batch(9, timeout=0),
                lambda: notes.tx.send_batch([b"a"] * 9, timeout=0),
                lambda: notes.tx.send(b"b", timeout=0),
                lambda: ring.rx.read(100, timeout=0),
                lambda: ring.tx.try_write(b"c" * 100),
                lambda: ring.rx.peek(timeout=0).release(),
                lambda: ring.tx.reserve(timeout=0).release(),
            )
            for call in calls:
                try:
                    call()
                except (BackPressuredError, CorruptError):
                    continue
                except IdcError as error:
                    pytest.fail(f"not in the closed set here: {error!r}")


def test_slot_word_layout_is_sequence_then_length() -> None:
    with message_ring() as ring:
        ring.tx.send(b"abc")
        assert struct.unpack_from("<II3s", ring.memory, DATA) == (1, 3, b"abc")
