"""Doorbells: how one domain wakes another. Depends on idc._core, idc.words and idc.errors."""

from __future__ import annotations

import os
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

    def close(self) -> None:
        """Let go of the register's buffer. Rings that use the bell must be closed before. Idempotent."""
        self._struct.reg = ffi.NULL
        self._struct.eventfd = -1
        if self._buffer is not None:
            ffi.release(self._buffer)
            self._buffer = None
