"""The kernel's side of a connection in nbd.c: any bytes, in any pieces, with a back end that is not there."""

from __future__ import annotations

import errno
import os
import socket
import struct
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from block_support import DISC, FLUSH, READ, REPLY, TRIM, WRITE, ZEROES, request
from hypothesis import given
from hypothesis import strategies as st

from idc._core import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGES, LONGEST = 16, 32 << 10


@dataclass
class Side:
    """nbd.c with a socket; `kernel` is the other end."""

    core: Any
    pump: Any
    kernel: socket.socket
    used: Any
    held: tuple[Any, ...]

    def feed(self, data: bytes) -> None:
        self.kernel.setblocking(False)
        at = 0
        while at < len(data) and self.core.end == lib.IDC_NBD_STANDS:
            with suppress(BlockingIOError, BrokenPipeError):
                at += self.kernel.send(data[at:])
            self.turn()
            if self.core.wants_room:
                lib.idc_nbd_fail(self.core, errno.EIO)
        self.turn()

    def turn(self) -> None:
        while self.pump.ready(self.pump, 0, 0) > 0:
            pass

    def replies(self) -> list[tuple[int, int]]:
        """(handle, error), in order; reads that succeed are none of these tests."""
        self.kernel.setblocking(False)
        got = b""
        while True:
            while lib.idc_nbd_fail(self.core, errno.EIO) > 0:
                pass
            try:
                more = self.kernel.recv(65536)
            except BlockingIOError:
                break
            if not more:
                break
            got += more
        assert len(got) % REPLY.size == 0
        return [(handle, error) for _, error, handle in REPLY.iter_unpack(got)]


@contextmanager
def side() -> Iterator[Side]:
    ours, kernel = socket.socketpair()
    kick = os.eventfd(0, os.EFD_NONBLOCK)
    ours.setblocking(False)
    try:
        memory, used = ffi.new("uint8_t[]", (PAGES + 2) << 12), ffi.new("uint8_t[]", PAGES)
        core = ffi.new("struct idc_nbd *", {"kick_fd": kick, "memory": memory, "part_at": 4096, "part_pages": PAGES,
                                            "longest": LONGEST, "used": used})
        pump = ffi.new("struct idc_pump *", {"stop_fd": -1})
        assert lib.idc_nbd_start(core, pump) == 0
        lib.idc_nbd_open(core, ours.fileno())
        made = Side(core, pump, kernel, used, (memory,))
        yield made
        made.kernel.close()
        assert bytes(ffi.buffer(memory, 4096)) == bytes(4096)
        assert bytes(ffi.buffer(memory + ((PAGES + 1) << 12), 4096)) == bytes(4096)
        lib.idc_nbd_stop(core)
    finally:
        ours.close()
        kernel.close()
        os.close(kick)


KINDS = st.sampled_from([READ, WRITE, FLUSH, TRIM, ZEROES, 5, 7, 9, 65535])
LENGTHS = st.one_of(st.integers(0, 9000), st.sampled_from([LONGEST, LONGEST + 1, 3 * LONGEST]))


@given(st.lists(st.tuples(KINDS, LENGTHS, st.integers(0, 2**64 - 1)), max_size=40), st.randoms())
def test_each_request_is_answered_once_in_whatever_pieces_it_comes(asked: list[tuple[int, int, int]],
                                                                   chance: Any) -> None:
    wire = b"".join(request(kind, handle, offset, length, bytes(length) if kind == WRITE else b"")
                    for handle, (kind, length, offset) in enumerate(asked))
    with side() as s:
        answered = []
        while wire:
            cut = chance.choice((1, 27, 28, 29, 4096, 1 << 20))
            s.feed(wire[:cut])
            wire = wire[cut:]
            answered += s.replies()
        answered += s.replies()
        assert s.core.end == lib.IDC_NBD_STANDS
        assert sorted(handle for handle, _ in answered) == list(range(len(asked)))
        for handle, error in answered:
            kind, length, _ = asked[handle]
            known = kind in (FLUSH, TRIM, ZEROES) or (kind in (READ, WRITE) and 0 < length <= LONGEST)
            assert error == (errno.EIO if known else errno.EINVAL)
        assert bytes(ffi.buffer(s.used)) == bytes(PAGES)
        assert s.core.outstanding == 0


@given(st.binary(min_size=28, max_size=300))
def test_what_is_no_request_ends_the_connection(data: bytes) -> None:
    if data[:4] == struct.pack(">I", 0x25609513):
        return
    with side() as s:
        s.feed(data)
        assert s.core.end == lib.IDC_NBD_MALFORMED
        assert s.pump.fds[0].want == 0


def test_the_kernel_says_goodbye_or_just_goes() -> None:
    with side() as s:
        s.feed(request(DISC, 0))
        assert s.core.end == lib.IDC_NBD_DISCONNECTED
    with side() as s:
        s.kernel.close()
        s.turn()
        assert s.core.end == lib.IDC_NBD_CLOSED


def test_requests_without_room_wait_and_go_on_when_there_is_some() -> None:
    with side() as s:
        for handle in range(4):
            s.kernel.sendall(request(READ, handle, 0, 8 << 12))
        s.turn()
        assert s.core.wants_room == 1
        assert s.core.stalls == 1
        assert s.replies() == [(handle, errno.EIO) for handle in (1, 0, 2, 3)]


def test_a_new_socket_forgets_the_requests_of_the_old_one() -> None:
    with side() as s:
        s.kernel.sendall(request(READ, 1, 0, 4096) + request(WRITE, 2, 0, 4096, b"half"))
        s.turn()
        assert s.core.outstanding == 2
        ours, kernel = socket.socketpair()
        ours.setblocking(False)
        lib.idc_nbd_open(s.core, ours.fileno())
        assert s.core.outstanding == 0
        assert bytes(ffi.buffer(s.used)) == bytes(PAGES)
        kernel.sendall(request(FLUSH, 3))
        s.kernel.close()
        s.kernel = kernel
        assert s.replies() == [(3, errno.EIO)]
        lib.idc_nbd_open(s.core, -1)
        ours.close()


def test_many_requests_or_a_long_payload_are_gathered_and_a_single_one_is_not() -> None:
    with side() as s:
        s.pump.processors = 1
        before = os.sched_getscheduler(0)
        try:
            for count, gathers in ((1, 0), (4, 1), (1, 0)):
                lib.idc_nbd_go(s.core)  # no longer is each answered with an error as it comes
                s.feed(b"".join(request(FLUSH, handle) for handle in range(count)))
                assert s.pump.gathers == gathers
                assert len(s.replies()) == count
            for length, gathers in ((LONGEST, 0), (LONGEST + 1, 1)):  # a piece, and more
                s.core.longest = length
                lib.idc_nbd_go(s.core)
                s.feed(request(WRITE, 1, length=length, data=bytes(length)))
                assert s.pump.gathers == gathers
                assert len(s.replies()) == 1
        finally:
            os.sched_setscheduler(0, before, os.sched_param(0))


def test_the_processor_is_held_for_what_goes_in_several_pieces_and_for_no_other() -> None:
    with side() as s:
        s.pump.processors = 1
        for length, holds in ((4096, 0), (LONGEST, 1), (4096, 1)):
            s.feed(request(READ, 7, length=length))
            cookie = s.core.waiting - 1
            s.core.waiting, s.core.slots[cookie].state = 0, lib.IDC_NBD_SENT  # the back end has it
            lib.idc_nbd_complete(s.core, cookie, 1, 0)
            s.turn()
            assert len(s.kernel.recv(1 << 20)) == REPLY.size + length
            assert s.pump.count_of.holds + s.pump.count_of.unheld == holds
            assert os.sched_getscheduler(0) == os.SCHED_OTHER
