"""Rings between two processes: sleeping and waking under stress, streams, and a peer that dies.

The child is a fork, so both see one mapping and one set of eventfds; nothing else passes between them.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import threading
import time
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from ring_support import WATCH, byte_ring, message_ring

from idc._core import ffi, lib
from idc.errors import PeerGoneError
from idc.ring import POLL_ONLY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE = 120.0


@contextmanager
def child(run: Callable[[], None]) -> Iterator[int]:
    """Run in a fork for the length of the block; its exit code is checked at the end, unless it was killed."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    try:
        yield pid
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed: see its traceback above"


@pytest.mark.parametrize("spin", [0.0, 20e-6, POLL_ONLY], ids=["sleep", "adaptive", "poll"])
@pytest.mark.parametrize("slots", [2, 64])
def test_no_wakeup_is_lost(spin: float, slots: int) -> None:
    """Each side pauses at random, so each finds the other asleep, awake and in between; both directions of waiting
    (for data and for room) happen all the time in a ring of two slots."""
    count = 6000 if spin == 0 else 20000
    with message_ring(slots, 64, spin=spin) as ring:

        def produce() -> None:
            dice = random.Random(1)
            for i in range(count):
                if dice.random() < 0.01:
                    time.sleep(dice.random() * 1e-4)
                ring.tx.send(i.to_bytes(8, "little"), timeout=PATIENCE)
            assert ring.tx.counters.late == 0, ring.tx.counters

        with child(produce):
            dice = random.Random(2)
            for i in range(count):
                if dice.random() < 0.01:
                    time.sleep(dice.random() * 1e-4)
                assert int.from_bytes(ring.rx.recv(timeout=PATIENCE), "little") == i
        counters = ring.rx.counters
        assert counters.messages == count
        assert counters.late == 0, counters
        if spin == 0:
            assert counters.wakeups > 0
        if spin == POLL_ONLY:
            assert counters.sleeps == 0


@pytest.mark.parametrize("spin", [0.0, 20e-6], ids=["sleep", "adaptive"])
@pytest.mark.parametrize("size", [64, 65536])
def test_stream_arrives_whole(spin: float, size: int) -> None:
    total = 400_000 if size == 64 else 40_000_000
    seed = random.Random(3).randbytes(1 << 20)

    def source(at: int, length: int) -> bytes:
        start = at % (len(seed) - 70_000)
        return seed[start : start + length]

    expected = hashlib.sha256()
    with byte_ring(size, spin=spin) as ring:
        lengths, dice, left = [], random.Random(4), total
        while left:
            lengths.append(min(left, dice.randrange(1, 4 * size if size == 64 else size)))
            left -= lengths[-1]
        at = 0
        for length in lengths:
            expected.update(source(at, length))
            at += length

        def produce() -> None:
            at = 0
            for length in lengths:
                chunk = source(at, length)
                ring.tx.write(chunk[: length // 3], chunk[length // 3 :], timeout=PATIENCE)
                at += length
            assert ring.tx.counters.late == 0, ring.tx.counters

        with child(produce):
            got, count = hashlib.sha256(), 0
            while count < total:
                if dice.random() < 0.5:
                    with ring.rx.peek(timeout=PATIENCE) as span:
                        got.update(span.memory)
                        count += len(span.memory)
                        span.consume(len(span.memory))
                else:
                    piece = ring.rx.read(dice.randrange(1, 2 * size), timeout=PATIENCE)
                    got.update(piece)
                    count += len(piece)
        assert ring.rx.counters.late == 0, ring.rx.counters
        assert got.digest() == expected.digest()


@pytest.mark.parametrize("spin", [0.0, POLL_ONLY], ids=["sleep", "poll"])
def test_peer_killed_while_we_wait(spin: float) -> None:
    """The host notices, changes the peer's presence word and rings: the wait ends, and no sooner than that."""
    with message_ring(spin=spin) as ring, byte_ring(spin=spin) as stream:
        for end in (ring.rx, stream.rx):
            end.watch(ring.memory, WATCH, 0)
        told_r, told_w = os.pipe()

        def live() -> None:
            ring.tx.send(b"last words")
            os.write(told_w, b"x")
            signal.pause()

        def host(pid: int) -> None:
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            ring.poke(WATCH, 1)
            os.eventfd_write(ring.data_fd, 1)

        with child(live) as pid:
            assert os.read(told_r, 1) == b"x"
            killer = threading.Timer(0.05, host, (pid,))
            killer.start()
            assert ring.rx.recv(timeout=PATIENCE) == b"last words"
            with pytest.raises(PeerGoneError):
                ring.rx.recv()
            killer.join()
        with pytest.raises(PeerGoneError):
            stream.rx.read(1)
        os.close(told_r)
        os.close(told_w)


def test_polled_exchange_rings_no_doorbell() -> None:
    with message_ring(64, 128, spin=POLL_ONLY) as there, message_ring(64, 128, spin=POLL_ONLY) as back:
        deadline = lib.idc_now_ns() + int(PATIENCE * 1e9)
        samples = ffi.new("uint64_t[]", 200)

        def echo() -> None:
            assert lib.idc_loop_echo(there.rx._ring, back.tx._ring, 2000, -1, deadline) == 2000

        with child(echo):
            assert lib.idc_loop_ping(there.tx._ring, back.rx._ring, 64, samples, 200, 10, -1, deadline) == 200
        assert all(ffi.unpack(samples, 200))
        for end in (there.tx, back.rx):
            assert end.counters.doorbells == 0
            assert end.counters.sleeps == 0


def test_two_sides_that_sleep_find_out_that_polling_pays() -> None:
    """Each may poll for less than the other, asleep, takes to answer, and begins as one whom it never paid.

    In blocks, of which one has to be quick: on a busy machine polling pays only while both sides have a CPU.
    """
    rounds, allowed = 4_000, 2_000
    with message_ring(64, 128, spin=0.0) as there, message_ring(64, 128, spin=0.0) as back:
        deadline = lib.idc_now_ns() + int(PATIENCE * 1e9)
        there.rx._ring.spin_score = back.rx._ring.spin_score = 0
        samples = ffi.new("uint64_t[]", rounds)

        def echo() -> None:
            lib.idc_loop_echo(there.rx._ring, back.tx._ring, 1 << 40, allowed, deadline)

        with child(echo) as pid:
            sleeps = rounds
            while sleeps > rounds / 20 and lib.idc_now_ns() < deadline:
                before = back.rx.counters.sleeps
                ping = lib.idc_loop_ping(there.tx._ring, back.rx._ring, 64, samples, rounds, 1, allowed, deadline)
                assert ping == rounds
                sleeps = back.rx.counters.sleeps - before
            os.kill(pid, signal.SIGKILL)
        assert sleeps <= rounds / 20


def test_loops_give_up_at_their_deadline() -> None:
    """A dead peer hangs none of them."""
    with message_ring() as ring, byte_ring() as stream:
        samples = ffi.new("uint64_t[]", 10)
        words = ffi.new("uint64_t[64]")
        data = ffi.new("uint8_t[8192]")
        soon = lib.idc_now_ns() + 20_000_000
        bell = ffi.addressof(ring.tx._ring, "bell")
        for rc in (
            lib.idc_loop_echo(ring.rx._ring, ring.tx._ring, 1, -1, soon),
            lib.idc_loop_ping(ring.tx._ring, ring.rx._ring, 8, samples, 10, 1, 0, soon) - 10,  # its own echo
            *(lib.idc_loop_line_ping(words, words + 16, samples, 10, 1, gap, soon) for gap in (False, True)),
            *(lib.idc_loop_line_pong(words + 32, words + 48, 10, gap, soon) for gap in (False, True)),
            lib.idc_loop_bell_ping(bell, ring.space_fd, samples, 10, 1, soon),
            lib.idc_loop_bell_pong(bell, ring.space_fd, 10, soon),
            lib.idc_loop_stream_out(stream.tx._ring, 1 << 20, 4096, 0, soon),
            lib.idc_loop_pipe_out(words, data, 2, 4096, 1 << 20, 0, soon),
        ):
            assert rc in (lib.IDC_TIMEOUT, 0)
        assert lib.idc_now_ns() - soon < 10_000_000_000
