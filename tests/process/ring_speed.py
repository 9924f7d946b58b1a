"""Rings against their floors, between two processes of this machine: python tests/process/ring_speed.py [--rounds N]

Prints round trips of a bare cache line, a bare doorbell and of 64-byte messages, and streams against a bare copy
pipeline, floor and ring in turn so that drift hits both. Only the ratios mean anything elsewhere.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import sys
import time
from typing import TYPE_CHECKING

from idc._core import ffi, lib
from idc.ring import Bell, ByteReceiver, ByteSender, MessageReceiver, MessageSender

if TYPE_CHECKING:
    from collections.abc import Callable

RING = 8 << 20
SIZE = 32 << 20
LIMIT_S = 30.0


class Pair:
    """Memory and four eventfds that a fork shares: A's wake-ups are fds 0 and 1, B's 2 and 3."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, SIZE)
        self.base = ffi.from_buffer("uint8_t[]", self.memory, require_writable=True)
        self.fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(4)]
        for page in range(0, SIZE, 4096):
            self.memory[page] = 0

    def both(self, child: Callable[[], object], parent: Callable[[], object]) -> None:
        """Run the child in a fork and the parent here; fail if the child did."""
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                child()
                code = 0
            finally:
                os._exit(code)
        parent()
        if os.waitpid(pid, 0)[1] != 0:
            sys.exit("the child failed")


def deadline() -> int:
    return int(lib.idc_now_ns()) + int(LIMIT_S * 1e9)


def check(rc: int) -> int:
    if rc < 0:
        raise RuntimeError(ffi.string(lib.idc_result_text(rc)).decode())
    return rc


def quantiles(samples: list[int]) -> str:
    cut = statistics.quantiles(samples, n=1000)
    return f"p50 {cut[499]:8.0f}  p90 {cut[899]:8.0f}  p99 {cut[989]:8.0f} ns"


def line(pair: Pair, n: int, per: int) -> list[int]:
    mine, theirs = pair.base, pair.base + 128
    pair.memory[:256] = bytes(256)
    samples = ffi.new("uint64_t[]", n)
    pair.both(
        lambda: check(lib.idc_loop_line_pong(theirs, mine, n * per, False, deadline())),
        lambda: check(lib.idc_loop_line_ping(mine, theirs, samples, n, per, False, deadline())),
    )
    return list(ffi.unpack(samples, n))


def bell(pair: Pair, n: int) -> list[int]:
    samples = ffi.new("uint64_t[]", n)
    a, b = Bell.eventfd(pair.fds[0]), Bell.eventfd(pair.fds[2])
    pair.both(
        lambda: check(lib.idc_loop_bell_pong(a._struct, pair.fds[2], n, deadline())),
        lambda: check(lib.idc_loop_bell_ping(b._struct, pair.fds[0], samples, n, 1, deadline())),
    )
    return list(ffi.unpack(samples, n))


def messages(pair: Pair, n: int, per: int, length: int, slot: int, spin_ns: int) -> list[int]:
    bells = [Bell.eventfd(fd) for fd in pair.fds]
    memory, slots = pair.memory, 64
    out = 1 << 20
    back = 2 << 20
    a_tx = MessageSender(memory, 0, out, slots, slot, bell=bells[2], wake_fd=pair.fds[1])
    b_rx = MessageReceiver(memory, 0, out, slots, slot, bell=bells[1], wake_fd=pair.fds[2])
    b_tx = MessageSender(memory, 256, back, slots, slot, bell=bells[0], wake_fd=pair.fds[3])
    a_rx = MessageReceiver(memory, 256, back, slots, slot, bell=bells[3], wake_fd=pair.fds[0])
    rings = (a_tx, b_rx, b_tx, a_rx)
    for ring in rings:
        ring.reset()
    samples = ffi.new("uint64_t[]", n)
    pair.both(
        lambda: check(lib.idc_loop_echo(b_rx._ring, b_tx._ring, n * per, spin_ns, deadline())),
        lambda: check(
            lib.idc_loop_ping(a_tx._ring, a_rx._ring, length, samples, n, per, spin_ns, deadline())
        ),
    )
    if a_rx.counters.late:
        sys.stdout.write(f"  LATE wake-ups: {a_rx.counters}\n")
    for ring in rings:
        ring.close()
    return list(ffi.unpack(samples, n))


def stream(pair: Pair, total: int, chunk: int, spin_ns: int) -> float:
    bells = [Bell.eventfd(fd) for fd in pair.fds]
    tx = ByteSender(pair.memory, 0, 1 << 20, RING, bell=bells[2], wake_fd=pair.fds[1])
    rx = ByteReceiver(pair.memory, 0, 1 << 20, RING, bell=bells[1], wake_fd=pair.fds[2])
    tx.reset()
    rx.reset()
    start = time.monotonic_ns()
    pair.both(
        lambda: check(lib.idc_loop_stream_in(rx._ring, total, chunk, spin_ns, deadline())),
        lambda: check(lib.idc_loop_stream_out(tx._ring, total, chunk, spin_ns, deadline())),
    )
    rate = total / (time.monotonic_ns() - start)
    tx.close()
    rx.close()
    return rate


def pipeline(pair: Pair, total: int, chunk: int, routine: int) -> float:
    pair.memory[:256] = bytes(256)
    data = pair.base + (1 << 20)
    slots = min(RING // chunk, 64)
    start = time.monotonic_ns()
    pair.both(
        lambda: check(lib.idc_loop_pipe_in(pair.base, data, slots, chunk, total, routine, deadline())),
        lambda: check(lib.idc_loop_pipe_out(pair.base, data, slots, chunk, total, routine, deadline())),
    )
    return total / (time.monotonic_ns() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    pair = Pair()
    names = [ffi.string(lib.idc_copy_name(lib.idc_copy_chosen(c))).decode() for c in range(3)]
    say = sys.stdout.write
    say(f"copy routines chosen (<=1K, <=16K, above): {names}\n")
    for _ in range(args.rounds):
        floor = line(pair, 20000, 10)
        say(f"line             {quantiles(floor)}\n")
        for length, slot in ((16, 64), (56, 64), (64, 128), (1000, 1024)):
            ring = messages(pair, 20000, 10, length, slot, -1)
            ratio = statistics.median(ring) / statistics.median(floor)
            say(f"msg {length:4} polled  {quantiles(ring)}  x{ratio:.2f}\n")
        low = bell(pair, 3000)
        say(f"doorbell         {quantiles(low)}\n")
        ring = messages(pair, 3000, 1, 64, 128, 0)
        ratio = statistics.median(ring) / statistics.median(low)
        say(f"msg   64 bell    {quantiles(ring)}  x{ratio:.2f}\n")
        ring = messages(pair, 3000, 1, 64, 128, 50000)
        say(f"msg   64 adapt   {quantiles(ring)}\n")
        total = 4 << 30
        for chunk in (4096, 65536):
            best = pipeline(pair, total, chunk, lib.idc_copy_chosen(1 if chunk == 4096 else 2))
            got = stream(pair, total, chunk, -1)
            adaptive = stream(pair, total, chunk, 50000)
            say(f"stream {chunk:6}: pipeline {best:.2f} GB/s, ring {got:.2f} (x{got / best:.2f}),"
                f" adaptive {adaptive:.2f} (x{adaptive / best:.2f})\n")  # fmt: skip


if __name__ == "__main__":
    main()
