"""Rings of bytes: a stream, copied in and out or filled and emptied in place.

Depends on idc._core and idc.ringbase. Users import idc.ring.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from idc._core import ffi, lib
from idc.errors import MisuseError
from idc.ringbase import DEFAULT_SPIN, Deadline, Ring, gather

if TYPE_CHECKING:
    from collections.abc import Sequence

    from idc.bell import Bell
    from idc.words import Memory, Readable


class Span:
    """A contiguous run of a byte ring's own memory, to fill or to empty in place. A context manager.

    Attributes:
        memory: the bytes; a view into shared memory, which a hostile peer can change at any time: copy,
            then check.
    """

    def __init__(self, ring: Ring, memory: memoryview) -> None:
        self._owner = ring
        self.memory = memory

    def commit(self, count: int) -> None:
        """Hand the first `count` bytes over: to the consumer if this was reserved, back if it was peeked.

        Raises:
            MisuseError: more than the span holds, or the span was released.
        """
        self._owner._check_open()
        if not 0 <= count <= len(self.memory):
            raise MisuseError(f"{count} bytes of a span of {len(self.memory)}")
        rc = lib.idc_bytes_advance(self._owner._ring, count)
        if rc != lib.IDC_OK:
            raise self._owner._fail(rc)
        self.memory, rest = self.memory[count:], self.memory
        rest.release()

    #: The same, by the name a reader looks for.
    consume = commit

    def release(self) -> None:
        """Let go of the memory; what was not committed stays as it was."""
        self.memory.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class _ByteRing(Ring):
    """What both ends of a byte ring share.

    Args:
        memory: the mapping; writable.
        control: offset of the ring's 256-byte control block, multiple of 64.
        data: offset of the bytes, multiple of 64.
        size: bytes, a power of two.
        bell: wakes the other end; None for one that only polls.
        wake_fd: eventfd that the other end rings; None to poll only.
        spin: see `Ring.spin`.

    Raises:
        MisuseError: sizes or offsets that do not fit each other or the memory.
    """

    _kind = lib.IDC_BYTES

    def __init__(
        self,
        memory: Memory,
        control: int,
        data: int,
        size: int,
        *,
        bell: Bell | None = None,
        wake_fd: int | None = None,
        spin: float = DEFAULT_SPIN,
    ) -> None:
        super().__init__(memory, control, data, size, 0, bell, wake_fd, spin)
        self.size = size
        self._spans = ffi.new("struct idc_span[2]")
        self._done = ffi.new("uint64_t *")

    def available(self) -> int:
        """Bytes of room (sender) or of data (receiver) at this moment."""
        self._check_open()
        if (rc := lib.idc_available(self._ring)) < 0:
            raise self._fail(rc)
        return int(rc)

    def _span(self, need: int, timeout: float | None) -> Span:
        self._check_open()
        need, waiting = min(need, self.size // 2), Deadline(timeout)
        while (rc := lib.idc_bytes_spans(self._ring, need, self._spin_ns, waiting.ns, self._spans)) < 0:
            if rc != lib.IDC_INTR:
                raise self._fail(rc)
            waiting.update()
        first, whole = self._spans[0], memoryview(self._memory)
        with whole, whole.cast("B") as flat:
            start = self._data_at + first.offset
            return Span(self, flat[start : start + first.len])


class ByteSender(_ByteRing):
    """The producer's end of a byte ring. See `_ByteRing` for the arguments."""

    _role = lib.IDC_PRODUCER

    def write(self, *parts: Readable, timeout: float | None = None) -> int:
        """Write all of the parts, in order; returns how many bytes that was.

        Raises:
            TimedOutError: not all went in time; `done` says how many bytes did. With timeout=0 it is
                BackPressuredError.
        """
        self._check_open()
        total, waiting = 0, Deadline(timeout)
        flat = [memoryview(part).cast("B") for part in parts]
        while True:
            vector, keep = gather(flat)
            rc = lib.idc_bytes_write(self._ring, vector, len(keep), self._spin_ns, waiting.ns, self._done)
            total += int(self._done[0])
            if rc == lib.IDC_OK:
                return total
            if rc != lib.IDC_INTR:
                raise self._fail(rc, total)
            flat = after(flat, self._done[0])
            waiting.update()

    def try_write(self, *parts: Readable) -> int:
        """Write as much as there is room for now; returns how many bytes went, 0 for none."""
        self._check_open()
        vector, keep = gather(parts)
        rc = lib.idc_bytes_write(self._ring, vector, len(keep), 0, 0, self._done)
        if rc not in (lib.IDC_OK, lib.IDC_AGAIN):
            raise self._fail(rc, self._done[0])
        return int(self._done[0])

    def reserve(self, need: int = 1, *, timeout: float | None = None) -> Span:
        """Wait for `need` free bytes (half the ring at most), then give the free run up to the ring's end.

        The run can be shorter than `need` where the ring wraps. Nothing is published before `Span.commit`.

        Raises:
            TimedOutError: not in time; BackPressuredError with timeout=0.
        """
        return self._span(need, timeout)


class ByteReceiver(_ByteRing):
    """The consumer's end of a byte ring. See `_ByteRing` for the arguments."""

    _role = lib.IDC_CONSUMER

    def read(self, most: int, *, timeout: float | None = None) -> bytes:
        """Wait for a byte, then return what is there, `most` bytes at most.

        Raises:
            TimedOutError: nothing came in time; BackPressuredError with timeout=0.
        """
        buffer = bytearray(most)
        count = self._read_into(buffer, min(most, 1), timeout)
        return bytes(memoryview(buffer)[:count])

    def read_exactly(self, count: int, *, timeout: float | None = None) -> bytes:
        """Wait for `count` bytes and return them.

        Raises:
            TimedOutError: not all in time; what came of them (`done`) is lost to the caller.
        """
        buffer = bytearray(count)
        self._read_into(buffer, count, timeout)
        return bytes(buffer)

    def read_into(self, buffer: Memory, minimum: int = 1, *, timeout: float | None = None) -> int:
        """Wait for `minimum` bytes, then take what is there into `buffer`; returns how many.

        Raises:
            TimedOutError: fewer than `minimum` in time; `done` of them are in the buffer.
        """
        return self._read_into(buffer, minimum, timeout)

    def _read_into(self, buffer: Memory, minimum: int, timeout: float | None) -> int:
        self._check_open()
        into = ffi.from_buffer(buffer, require_writable=True)
        total, waiting = 0, Deadline(timeout)
        while True:
            rc = lib.idc_bytes_read(
                self._ring,
                into + total,
                len(into) - total,
                max(minimum - total, 0),
                self._spin_ns,
                waiting.ns,
                self._done,
            )
            total += int(self._done[0])
            if rc == lib.IDC_OK:
                return total
            if rc != lib.IDC_INTR:
                raise self._fail(rc, total)
            waiting.update()

    def arm(self, count: int = 1) -> bool:
        """Ask to be rung once `count` bytes are there, for who sleeps on the wake-up descriptor elsewhere.

        False if they are there already, or the connection is over: then do not sleep. May be repeated.
        """
        self._check_open()
        lib.idc_notify(self._ring)
        lib.idc_store64(self._ring.my_event, self._ring.pos + count)
        lib.idc_fence()  # pairs with the sender's between its bytes and its look at the word: docs/protocol.md
        return bool(0 <= lib.idc_available(self._ring) < count)

    def peek(self, need: int = 1, *, timeout: float | None = None) -> Span:
        """Wait until `need` bytes (half the ring at most) are there, then give the run up to the ring's end.

        Fewer than `need` only where the ring wraps, or when the peer is gone and this is what it left.

        Raises:
            TimedOutError: not in time; BackPressuredError with timeout=0.
        """
        return self._span(need, timeout)


def after(parts: Sequence[memoryview], count: int) -> list[memoryview]:
    """The parts without their first `count` bytes."""
    rest = []
    for part in parts:
        cut = min(count, len(part))
        count -= cut
        if cut < len(part):
            rest.append(part[cut:])
    return rest
