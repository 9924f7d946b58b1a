"""What all ends of rings have in common: opening, watching, waiting, counting, failing.

Depends on idc._core, idc.bell, idc.faults, idc.words and idc.errors. Users import idc.ring.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from idc import faults
from idc._core import ffi, lib
from idc.errors import (
    BackPressuredError,
    ClosedError,
    CorruptError,
    IdcError,
    MisuseError,
    PeerGoneError,
    TimedOutError,
    TooBigError,
)
from idc.layout import RING_RECORD_BYTES as RECORD_BYTES
from idc.words import check_range, pin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from idc._core import Pointer
    from idc.bell import Bell
    from idc.words import Memory, Readable

#: Bytes of one ring's control block.
CONTROL_BYTES: Final = 256
#: How long a wait polls before it blocks, seconds, as long as polling pays, which the core learns; as long as two
#: wake-ups take where those are by way of a hypervisor, 2 ms at most (idc/core/wait.c). Two sides that are awake never
#: sleep in a lively exchange.
DEFAULT_SPIN: Final = 50e-6
#: Spin value for a ring that only polls and never sleeps.
POLL_ONLY: Final = -1.0

_LINE = 64

faults.arm_from()


@dataclass(frozen=True)
class Counters:
    """What one end of a ring has done so far. See struct idc_counters in idc/core/idc_core.h."""

    doorbells: int
    suppressed: int
    sleeps: int
    wakeups: int
    spurious: int
    late: int
    masked: int
    full: int
    spins_won: int
    messages: int
    bytes: int


class Ring:
    """What all four kinds of ring end have in common. Use a subclass."""

    _kind: int
    _role: int

    def __init__(
        self,
        memory: Memory,
        control: int,
        data: int,
        size: int,
        slot_size: int,
        bell: Bell | None,
        wake_fd: int | None,
        spin: float,
    ) -> None:
        span = size * slot_size if slot_size else size
        self._pinned = [pin(memory, control, CONTROL_BYTES, _LINE)]
        self._ring = ffi.new("struct idc_ring *")
        try:
            base = self._pinned[0]
            check_range(memory, data, span, _LINE)
            if control < data + span and data < control + CONTROL_BYTES:
                raise MisuseError(f"control block at {control:#x} lies in the data at {data:#x}+{span:#x}")
            rc = lib.idc_ring_open(
                self._ring, base + control, base + data, self._kind, self._role, size, slot_size
            )
            if rc != lib.IDC_OK:
                raise MisuseError(
                    f"ring of {size} {'slots' if slot_size else 'bytes'} (slot size {slot_size}): sizes must"
                    " be powers of two from 2, slots a multiple of 64 bytes, and the memory 64-byte aligned"
                )
        except BaseException:
            ffi.release(self._pinned[0])
            raise
        self._bell = bell
        if bell is not None:
            lib.idc_ring_bell(self._ring, bell._struct.reg, bell._struct.value, bell._struct.eventfd)
        if wake_fd is not None:
            os.set_blocking(wake_fd, False)
            lib.idc_ring_wake(self._ring, wake_fd)
        self.spin = spin
        self._data_at = data
        self._memory = memory
        self._closed = False

    @property
    def spin(self) -> float:
        """Longest polling before blocking, seconds; 0 blocks at once, POLL_ONLY never blocks."""
        return self._spin_ns / 1e9

    @spin.setter
    def spin(self, seconds: float) -> None:
        self._spin_ns = int(seconds * 1e9)

    def watch(self, memory: Memory, offset: int, expected: int) -> None:
        """Treat the connection as over when the u64 at `offset` is not `expected` any more. Four at most.

        Raises:
            MisuseError: a fifth word, or one not aligned to 8 bytes.
        """
        pinned = pin(memory, offset, 8, 8, writable=False)
        if lib.idc_ring_watch(self._ring, pinned + offset, expected) != lib.IDC_OK:
            ffi.release(pinned)
            raise MisuseError("a ring watches four words at most")
        self._pinned.append(pinned)

    def observe(self, memory: Memory, offset: int) -> None:
        """From now on keep a copy of the counters there, 128 bytes, for who looks on. Raises MisuseError."""
        pinned = pin(memory, offset, RECORD_BYTES, 8)
        lib.idc_ring_observe(self._ring, pinned + offset)
        self._pinned.append(pinned)

    def show(self) -> None:
        """Bring that copy up to date: before this end's user sleeps elsewhere."""
        self._check_open()
        lib.idc_observe(self._ring)

    def reset(self) -> None:
        """Back to the start: this end's position, and the shared words that it alone writes."""
        self._check_open()
        lib.idc_ring_reset(self._ring)

    @property
    def counters(self) -> Counters:
        """A copy of the counters since the ring was opened."""
        count = self._ring.count
        return Counters(**{name: getattr(count, name) for name in Counters.__dataclass_fields__})

    @property
    def position(self) -> int:
        """Messages or bytes that this end has sent or taken since its reset."""
        self._check_open()
        return int(self._ring.pos)

    @property
    def masked(self) -> bool:
        """Whether the wake-up descriptor is masked at this moment, because the peer rings it without end."""
        self._check_open()
        return bool(self._ring.mask_state.period_ns)

    def close(self) -> None:
        """Let go of the memory; every later call raises ClosedError. Tells the peer nothing. Idempotent."""
        if not self._closed:
            self._closed = True
            self._ring = ffi.NULL
            for pinned in self._pinned:
                ffi.release(pinned)
            self._pinned.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this end of the ring is closed")

    def _fail(self, rc: int, done: int = 0) -> IdcError:
        """The exception for a negative result."""
        sending = self._role == lib.IDC_PRODUCER
        if rc == lib.IDC_AGAIN:
            return BackPressuredError("the ring is full" if sending else "the ring is empty", done)
        if rc == lib.IDC_PEER:
            return PeerGoneError("the peer closed the connection, died or started again", done)
        if rc == lib.IDC_CORRUPT:
            reason = ffi.string(lib.idc_reason_text(self._ring.reason)).decode()
            return CorruptError(reason, self._ring.bad, done)
        if rc == lib.IDC_TIMEOUT:
            return TimedOutError("no room in the ring in time" if sending else "nothing came in time", done)
        if rc == lib.IDC_TOOBIG:
            return TooBigError(
                f"message longer than a slot's {self._ring.slot_size - 8} bytes"
                if sending
                else "message longer than the buffer; it stays in the ring"
            )
        return MisuseError(
            f"{ffi.string(lib.idc_result_text(rc)).decode()}: wrong call for this ring, or a descriptor of it"
            f" (doorbell {self._ring.bell.eventfd}, wake-up {self._ring.wake_fd}) was closed"
        )


class Deadline:
    """A timeout in the core's terms: `ns` left, -1 for ever; 0 tries once, so others stay above it."""

    def __init__(self, timeout: float | None) -> None:
        self.ns = -1 if timeout is None else max(int(timeout * 1e9), 0)
        self._end = time.monotonic_ns() + self.ns if self.ns > 0 else 0

    def update(self) -> None:
        """Count the time that has passed; called between two crossings into the core."""
        if self.ns > 0:
            self.ns = max(self._end - time.monotonic_ns(), 1)


def gather(parts: Sequence[Readable]) -> tuple[Pointer, list[Pointer]]:
    """The gather list for the core, and what must stay alive while it is used."""
    keep = [ffi.from_buffer(part) for part in parts]
    vector = ffi.new("struct idc_part[]", [(ffi.cast("void *", part), len(part)) for part in keep])
    return vector, keep
