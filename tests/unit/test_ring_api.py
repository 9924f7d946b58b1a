"""The Python face of the rings: arguments, time-outs, doorbells, life time of buffers."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import threading
import time
from typing import TYPE_CHECKING

import pytest
from ring_support import DATA, DATA_EVENT, HEAD, SPACE_EVENT, TAIL, WATCH, byte_ring, message_ring

from idc.errors import BackPressuredError, ClosedError, MisuseError, TimedOutError, TooBigError
from idc.ring import (
    POLL_ONLY,
    Bell,
    ByteReceiver,
    ByteSender,
    MessageReceiver,
    MessageSender,
    fence,
    load_u32,
    load_u64,
    store_u32,
    store_u64,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def word(memory: mmap.mmap, offset: int) -> int:
    return int(struct.unpack_from("<Q", memory, offset)[0])


@pytest.mark.parametrize(
    ("control", "data", "slots", "slot_size"),
    [
        (0, DATA, 3, 64),  # not a power of two
        (0, DATA, 1, 64),
        (0, DATA, 8, 60),
        (0, DATA, 8, 96),
        (8, DATA, 8, 64),  # misaligned
        (0, DATA + 8, 8, 64),
        (0, DATA, 128, 64),  # beyond the memory
        (-64, DATA, 8, 64),
        (0, 64, 8, 64),  # over the control block
        (8192 - 128, DATA, 8, 64),
    ],
)
def test_ring_that_does_not_fit_is_refused(control: int, data: int, slots: int, slot_size: int) -> None:
    memory = mmap.mmap(-1, 8192)
    for kind in (MessageSender, MessageReceiver):
        with pytest.raises(MisuseError):
            kind(memory, control, data, slots, slot_size)
    memory.close()


def test_read_only_memory_is_refused_for_rings_but_can_be_loaded_from() -> None:
    memory = mmap.mmap(-1, 8192)
    store_u64(memory, 8, 2**64 - 1)
    store_u32(memory, 20, 7)
    with memoryview(memory) as view, view.toreadonly() as frozen:
        with pytest.raises(BufferError):
            ByteSender(frozen, 0, DATA, 4096)
        with pytest.raises(BufferError):
            store_u64(frozen, 8, 1)
        assert load_u64(frozen, 8) == 2**64 - 1
        assert load_u32(frozen, 20) == 7
    for offset in (4, -8, 8192):
        with pytest.raises(MisuseError):
            load_u64(memory, offset)
    fence()
    memory.close()


def test_every_word_lies_where_the_protocol_says() -> None:
    with message_ring(slots=2) as ring:
        ring.tx.send(b"1")
        ring.tx.send(b"2")
        with pytest.raises(TimedOutError):
            ring.tx.send(b"3", timeout=0.001)
        assert (word(ring.memory, TAIL), word(ring.memory, SPACE_EVENT)) == (2, 1)
        ring.rx.recv_batch(2)
        with pytest.raises(TimedOutError):
            ring.rx.recv(timeout=0.001)
        assert (word(ring.memory, HEAD), word(ring.memory, DATA_EVENT)) == (2, 3)
    with byte_ring(64) as stream:
        stream.tx.write(bytes(64))
        with pytest.raises(TimedOutError):
            stream.tx.reserve(10, timeout=0.001)
        assert (word(stream.memory, TAIL), word(stream.memory, SPACE_EVENT)) == (64, 10)
        stream.rx.read(64)
        with pytest.raises(TimedOutError):
            stream.rx.peek(7, timeout=0.001)
        assert (word(stream.memory, HEAD), word(stream.memory, DATA_EVENT)) == (64, 71)


def test_doorbell_only_for_one_who_asked_and_only_once() -> None:
    with message_ring() as ring:
        ring.tx.send(b"1")
        assert ring.tx.counters.doorbells == 0
        ring.rx.recv()
        with pytest.raises(TimedOutError):
            ring.rx.recv(timeout=0.001)  # leaves its wish behind
        ring.tx.post(b"2")
        assert ring.tx.counters.doorbells == 0
        ring.tx.flush()
        ring.tx.send(b"3")
        assert ring.tx.counters.doorbells == 1
        assert os.eventfd_read(ring.data_fd) == 1


def test_doorbell_register_is_one_store_of_the_value() -> None:
    bar = mmap.mmap(-1, 4096)
    bell = Bell.mmio(bar, 12, 3 << 16 | 5)
    bell.ring()
    assert struct.unpack_from("<4I", bar) == (0, 0, 0, 3 << 16 | 5)
    with pytest.raises(BufferError):
        bar.close()  # a bell keeps its register
    bell.close()
    bar.close()


def test_doorbell_on_a_closed_descriptor_is_misuse() -> None:
    fd = os.eventfd(0)
    bell = Bell.eventfd(fd)
    os.close(fd)
    with pytest.raises(MisuseError, match="descriptor"):
        bell.ring()


def test_full_eventfd_does_not_block() -> None:
    with message_ring() as ring:
        os.eventfd_write(ring.data_fd, 2**64 - 2)
        with pytest.raises(TimedOutError):
            ring.rx.recv(timeout=0.01)
        os.eventfd_write(ring.data_fd, 2**64 - 2)
        ring.tx.send(b"x")
        assert ring.tx.counters.doorbells == 1
        assert ring.rx.recv() == b"x"


def test_timeout_zero_is_back_pressure_and_others_take_their_time() -> None:
    with message_ring(slots=2) as ring, byte_ring(64) as stream:
        with pytest.raises(BackPressuredError, match="empty"):
            ring.rx.recv(timeout=0)
        with pytest.raises(BackPressuredError, match="full") as partial:
            stream.tx.write(bytes(100), timeout=0)
        assert partial.value.done == 64
        start = time.monotonic()
        with pytest.raises(TimedOutError):
            ring.rx.recv(timeout=0.25)  # across two safety rechecks
        assert 0.25 <= time.monotonic() - start < 5
        assert ring.rx.counters.sleeps >= 3
        assert ring.rx.counters.late == 0
        for spin in (POLL_ONLY, 0.05):
            ring.rx.spin = spin
            start = time.monotonic()
            with pytest.raises(TimedOutError):
                ring.rx.recv(timeout=0.12)
            assert 0.12 <= time.monotonic() - start < 5


def test_too_big_is_refused_and_moves_nothing() -> None:
    with message_ring() as ring:
        calls: tuple[Callable[[], object], ...] = (
            lambda: ring.tx.send(bytes(57)),
            lambda: ring.tx.send_parts([bytes(50), bytes(7)]),
            lambda: ring.tx.send_batch([bytes(57)]),
        )
        for call in calls:
            with pytest.raises(TooBigError, match="56 bytes"):
                call()
        assert ring.rx.try_recv() is None
        ring.tx.send(bytes(56))
        with pytest.raises(TooBigError, match="stays in the ring"):
            ring.rx.recv_into(bytearray(55))
        assert ring.rx.recv() == bytes(56)
        assert ring.tx.send_batch([b"a", bytes(57)]) == 1


def test_progress_without_a_doorbell_is_found_and_counted_as_late() -> None:
    """A doorbell that was lost (peer's driver dead, device alive) costs time, never data."""
    with message_ring() as ring:
        lost = MessageSender(ring.memory, 0, DATA, 8, 64)  # has no bell

        def send_to_a_sleeper() -> None:
            deadline = time.monotonic() + 20
            while not ring.rx.counters.sleeps and time.monotonic() < deadline:
                time.sleep(0.001)
            lost.send(b"x")

        with lost:
            sender = threading.Thread(target=send_to_a_sleeper)
            sender.start()
            assert ring.rx.recv(timeout=20) == b"x"
            sender.join()
        assert ring.rx.counters.late == 1


def test_spurious_doorbells_are_counted() -> None:
    with message_ring() as ring:
        os.eventfd_write(ring.data_fd, 1)
        with pytest.raises(TimedOutError):
            ring.rx.recv(timeout=0.01)
        assert ring.rx.counters.spurious == 1


@pytest.mark.parametrize("spin", [0.0, POLL_ONLY])
def test_signal_interrupts_a_wait_and_the_wait_goes_on(spin: float) -> None:
    seen: list[int] = []
    old = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    try:
        with message_ring(spin=spin) as ring:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(TimedOutError):
                ring.rx.recv(timeout=0.3)
            assert seen == [1]
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(KeyboardInterrupt):
                ring.rx.recv()
    finally:
        signal.signal(signal.SIGALRM, old)


def test_a_peer_that_rings_without_end_does_not_keep_signals_out() -> None:
    old = signal.signal(signal.SIGALRM, signal.default_int_handler)
    storm = os.eventfd(1 << 31, os.EFD_NONBLOCK | os.EFD_SEMAPHORE)  # readable again after each read
    try:
        with message_ring() as ring:
            os.dup2(storm, ring.data_fd)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            start = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                ring.rx.recv(timeout=20)
            assert time.monotonic() - start < 10  # it came in the wait, not when the wait was over
            with pytest.raises(TimedOutError):
                ring.rx.recv(timeout=0.05)
            ring.tx.send(b"still works")
            assert ring.rx.recv(timeout=20) == b"still works"
            assert ring.rx.counters.spurious > 64
            assert ring.rx.counters.masked > 0  # so it costs no whole CPU either
    finally:
        os.close(storm)
        signal.signal(signal.SIGALRM, old)


def test_closed_end_refuses_and_lets_the_memory_go() -> None:
    memory = mmap.mmap(-1, 8192)
    tx, rx = ByteSender(memory, 0, DATA, 4096), ByteReceiver(memory, 0, DATA, 4096)
    rx.watch(memory, WATCH, 0)
    for ring in (tx, rx):
        ring.close()
        ring.close()
    calls: tuple[Callable[[], object], ...] = (tx.available, tx.reserve, rx.available, rx.peek)
    for call in calls:
        with pytest.raises(ClosedError):
            call()
    memory.close()


def test_fifth_watch_word_and_misaligned_ones_are_refused() -> None:
    with message_ring() as ring:
        with pytest.raises(MisuseError):
            ring.rx.watch(ring.memory, WATCH + 4, 0)
        for i in range(4):
            ring.rx.watch(ring.memory, WATCH + 8 * i, 0)
        with pytest.raises(MisuseError, match="four"):
            ring.rx.watch(ring.memory, WATCH + 64, 0)


def test_span_is_bounded_and_dies_with_its_block() -> None:
    with byte_ring(64) as ring:
        with ring.tx.reserve() as span:
            with pytest.raises(MisuseError):
                span.commit(65)
            with pytest.raises(MisuseError):
                span.commit(-1)
            span.commit(60)
            assert len(span.memory) == 4
        with pytest.raises(ValueError, match="released"):
            bytes(span.memory)
        assert ring.rx.read(100) == bytes(60)
        with ring.tx.reserve(1 << 40) as span:  # need is cut to half the ring
            assert len(span.memory) == 4


def test_file_to_ring_to_file_without_a_copy_between(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_bytes(os.urandom(10_000))
    with byte_ring() as ring, source.open("rb", buffering=0) as read, (tmp_path / "out").open("wb", 0) as out:
        left = 10_000
        while left:
            with ring.tx.reserve() as span:
                span.commit(read.readinto(span.memory) or 0)
            with ring.rx.peek() as span:
                count = out.write(span.memory)
                span.consume(count)
            left -= count
    assert (tmp_path / "out").read_bytes() == source.read_bytes()
