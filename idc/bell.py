"""Doorbells: how one domain wakes another, and how one is woken. Depends on idc._core, idc.words and idc.errors."""

from __future__ import annotations

import os
import select
import time
from typing import TYPE_CHECKING, Self

from idc._core import ffi, lib
from idc.errors import MisuseError
from idc.words import pin

if TYPE_CHECKING:
    from idc.words import Memory


class Bell:
    """How to wake the peer: an ivshmem doorbell register, or an eventfd. Make one with `mmio` or `eventfd`.

    A Bell keeps the register's buffer alive until `close`; it does not own an eventfd.
    """

    def __init__(self, register: Memory | None, offset: int, value: int, fd: int) -> None:
        self._buffer = None if register is None else pin(register, offset, 4, 4)
        self._struct = ffi.new("struct idc_bell *")
        self._struct.reg = (
            ffi.NULL if self._buffer is None else ffi.cast("volatile uint32_t *", self._buffer + offset)
        )
        self._struct.value = value
        self._struct.eventfd = fd

    @classmethod
    def mmio(cls, register: Memory, offset: int, value: int) -> Self:
        """A doorbell register: ringing is one 32-bit store of `value` at `offset`.

        Args:
            register: the mapped BAR 0 of an ivshmem device.
            offset: bytes; 12 for ivshmem.
            value: peer << 16 | vector.
        """
        return cls(register, offset, value, -1)

    @classmethod
    def eventfd(cls, fd: int) -> Self:
        """An eventfd of the peer. Made non-blocking: a peer that fills its counter must not stop us.

        Raises:
            OSError: fd is not open.
        """
        os.set_blocking(fd, False)
        return cls(None, 0, 0, fd)

    def ring(self) -> None:
        """Wake whoever waits at the other end. Never blocks.

        Raises:
            MisuseError: the eventfd is closed or not an eventfd.
        """
        if lib.idc_bell_ring(self._struct) != lib.IDC_OK:
            raise MisuseError(f"doorbell: cannot write to descriptor {self._struct.eventfd}; was it closed?")

    def learn(self, fd: int) -> bool:
        """Find out what a wake-up costs, for all rings of this process to judge by how long they may poll.

        Args:
            fd: the eventfd of this very process that the bell rings. It stays readable: a peer's ring is not lost.

        Returns:
            False: no ring arrived within 20 ms, and nothing was learned.
        """
        return bool(lib.idc_wake_learn(self._struct, fd) == lib.IDC_OK)

    def close(self) -> None:
        """Let go of the register's buffer. Rings that use the bell must be closed before. Idempotent."""
        self._struct.reg = ffi.NULL
        self._struct.eventfd = -1
        if self._buffer is not None:
            ffi.release(self._buffer)
            self._buffer = None


class Waker:
    """How a sleeper is woken: its own eventfd, masked while a peer rings that without end.

    A peer may ring at any rate. Wake-ups to nothing are counted against what gets done; when there are too many, the
    eventfd is looked at by a timer instead, every 4 to 16 ms, until the rings have ceased. It stays the caller's.

    Args:
        fd: eventfd; made non-blocking.
    """

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._mask = ffi.new("struct idc_mask *")
        self._poller: select.epoll | None = None
        self._hidden = False

    def wait(self, timeout: float, progress: int = 0) -> bool:
        """Wait until it was rung, take the count, and say so; False after `timeout` seconds.

        While masked, True when it is time to look. 0 seconds only takes the count.

        Args:
            timeout: seconds.
            progress: any number that changes when the sleeper got something done since the last call.

        Raises:
            MisuseError: the eventfd is closed.
        """
        rc = lib.idc_mask_sleep(self._mask, self._fd, progress, int(timeout * 1e9))
        if rc == lib.IDC_EINVAL:
            raise MisuseError(f"doorbell: cannot wait for descriptor {self._fd}; was it closed?")
        if self._poller is not None and self.masked != self._hidden:
            self._hidden = self.masked
            self._poller.modify(self._fd, 0 if self._hidden else select.EPOLLIN)
        return bool(rc > 0)

    def fileno(self) -> int:
        """Readable when it was rung, for a selector; never while masked: `patience` says when to call `wait` then."""
        if self._poller is None:
            self._poller = select.epoll()
            self._hidden = self.masked
            self._poller.register(self._fd, 0 if self._hidden else select.EPOLLIN)
        return self._poller.fileno()

    @property
    def masked(self) -> bool:
        """Whether a timer looks at it, at this moment."""
        return bool(self._mask.period_ns)

    @property
    def count(self) -> int:
        """How often it was masked."""
        return int(self._mask.masked)

    @property
    def patience(self) -> float | None:
        """Seconds until `wait` is due while masked; None while not."""
        if not self.masked:
            return None
        due = int(self._mask.at + self._mask.period_ns)
        return max(due - time.monotonic_ns(), 0) / 1e9

    def close(self) -> None:
        """Let go of the selector's descriptor. Idempotent."""
        if self._poller is not None:
            self._poller.close()
            self._poller = None
