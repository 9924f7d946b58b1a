"""Both ends of one ring for tests, over memory that the test can also write as a hostile peer would."""

from __future__ import annotations

import mmap
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

from idc.ring import Bell, ByteReceiver, ByteSender, MessageReceiver, MessageSender, store_u64

if TYPE_CHECKING:
    from collections.abc import Iterator

    from idc.ring import Ring

TAIL, SPACE_EVENT, HEAD, DATA_EVENT = 0, 64, 128, 192
WATCH = 1024
DATA = 4096

TxT = TypeVar("TxT", bound="Ring")
RxT = TypeVar("RxT", bound="Ring")


class Both(Generic[TxT, RxT]):
    """The two ends of one ring and the memory under them.

    Attributes:
        data_fd, space_fd: eventfds that wake the receiver and the sender.
    """

    def __init__(self, memory: mmap.mmap, tx: TxT, rx: RxT, data_fd: int, space_fd: int) -> None:
        self.memory = memory
        self.tx = tx
        self.rx = rx
        self.data_fd = data_fd
        self.space_fd = space_fd
        tx.reset()
        rx.reset()

    def poke(self, offset: int, value: int) -> None:
        store_u64(self.memory, offset, value)


@contextmanager
def _ground(size: int) -> Iterator[tuple[mmap.mmap, int, int]]:
    memory = mmap.mmap(-1, DATA + size)  # shared: a fork sees the same bytes
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
    try:
        yield memory, fds[0], fds[1]
    finally:
        for fd in fds:
            os.close(fd)
        memory.close()  # fails if a ring still holds it


@contextmanager
def message_ring(
    slots: int = 8, slot_size: int = 64, spin: float = 0.0
) -> Iterator[Both[MessageSender, MessageReceiver]]:
    with (
        _ground(slots * slot_size) as (memory, data_fd, space_fd),
        MessageSender(
            memory, 0, DATA, slots, slot_size, bell=Bell.eventfd(data_fd), wake_fd=space_fd, spin=spin
        ) as tx,
        MessageReceiver(
            memory, 0, DATA, slots, slot_size, bell=Bell.eventfd(space_fd), wake_fd=data_fd, spin=spin
        ) as rx,
    ):
        yield Both(memory, tx, rx, data_fd, space_fd)


@contextmanager
def byte_ring(size: int = 4096, spin: float = 0.0) -> Iterator[Both[ByteSender, ByteReceiver]]:
    with (
        _ground(size) as (memory, data_fd, space_fd),
        ByteSender(memory, 0, DATA, size, bell=Bell.eventfd(data_fd), wake_fd=space_fd, spin=spin) as tx,
        ByteReceiver(memory, 0, DATA, size, bell=Bell.eventfd(space_fd), wake_fd=data_fd, spin=spin) as rx,
    ):
        yield Both(memory, tx, rx, data_fd, space_fd)
