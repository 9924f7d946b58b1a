"""What the tests of buffers share: a buffer of each type with known bytes in it, and a look at what it holds."""

from __future__ import annotations

import mmap
import os
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from idc.buffers import (
    BufferType,
    CowView,
    LocalBuffer,
    MemfdStore,
    PagePool,
    Registry,
    file_range,
    process_memory,
    standard_registry,
)
from idc.layout import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Bytes of each kind of memory in a Bench.
ROOM = 64 * PAGE
KINDS = ["process", "region", "hidden", "file", "cow", "foreign", "other"]
#: What generic copies go through the bounce buffer between: neither end is mapped, no pair is registered.
UNMAPPED = {"file", "cow", "foreign", "other"}


class Foreign(BufferType):
    """A type that a provider outside the library may bring: the base is a list of byte values."""

    def __init__(self, name: str) -> None:
        self.name = name

    def extent(self, base: list[int]) -> int:
        return len(base)

    def copy_to(self, source: LocalBuffer, memory: memoryview) -> None:
        assert len(memory) == source.length
        memory[:] = bytes(source.base[source.offset : source.offset + source.length])

    def copy_from(self, memory: memoryview, target: LocalBuffer) -> None:
        assert len(memory) == target.length
        target.base[target.offset : target.offset + target.length] = list(memory)


class Bench:
    """A registry, and buffers of every kind to copy between."""

    def __init__(self, stack: ExitStack, **options: Any) -> None:
        self.registry: Registry = standard_registry(**options)
        self.foreign = {name: Foreign(name) for name in ("foreign", "other")}
        for kind in self.foreign.values():
            self.registry.register(kind)
        self.region = stack.enter_context(mmap.mmap(-1, 2 * ROOM))
        self.pool = PagePool(self.region, ROOM, ROOM)
        self.store = stack.enter_context(MemfdStore(ROOM))
        self._stack = stack

    def file(self) -> int:
        fd = os.memfd_create("file")
        self._stack.callback(os.close, fd)
        return fd

    def make(self, kind: str, data: bytes, skew: int) -> LocalBuffer:
        """A buffer of that kind, `skew` bytes into a page, that holds the data."""
        around = bytes(skew) + data
        if kind == "region":
            buffer = self.pool.allocate(len(data), skew)
            self.pool.view(buffer)[:] = data
        elif kind == "hidden":
            buffer = self.store.allocate(len(data), skew)
            staged = self.make("region", data, skew)
            self.registry.copy(staged, buffer)
            self.pool.release(staged)
        elif kind == "file":
            fd = self.file()
            os.pwrite(fd, around, 0)
            buffer = file_range(fd, skew, len(data))
        else:
            base = process_memory(around if kind == "cow" else bytearray(around))
            if kind in self.foreign:
                base = LocalBuffer(self.foreign[kind], list(around), 0, len(around))
            if kind == "cow":
                base = CowView(base).buffer()
            buffer = base.slice(skew, len(data))
        return buffer

    def look(self, buffer: LocalBuffer) -> bytes:
        """What a buffer of any kind holds."""
        if buffer.type.name == "hidden pages":
            staged = self.pool.allocate_like(buffer)
            self.registry.copy(buffer, staged)
            found = bytes(self.pool.view(staged))
            self.pool.release(staged)
            return found
        plain = bytearray(buffer.length)
        self.registry.copy(buffer, process_memory(plain))
        return bytes(plain)


@contextmanager
def bench(**options: Any) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(stack, **options)
