"""Buffers in memory that this process maps: process memory, and the one way that bytes are copied there.

Depends on idc._core, idc.words and idc.buffers.local.
"""

from __future__ import annotations

import mmap
from contextlib import contextmanager
from typing import TYPE_CHECKING

from idc import words
from idc._core import ffi, lib
from idc.buffers.local import LocalBuffer, MappedType, check_range
from idc.errors import MisuseError
from idc.layout import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from idc.buffers.local import Shape
    from idc.words import Memory, Readable


# Looked up once: a copy of 4 KiB takes less time than they would.
_from_buffer, _copy_apart, _BYTES = ffi.from_buffer, lib.idc_copy_apart, ffi.typeof("uint8_t[]")
#: Memory whose length is its number of bytes.
_PLAIN = frozenset((bytearray, mmap.mmap))


class ProcessMemory(MappedType):
    """Memory of this process, base and all: a bytearray, a memoryview (of bytes too, to read), a mapping.

    The memory may go away or shrink between two uses: each use pins it and checks again.
    """

    name = "process memory"

    def extent(self, base: Memory) -> int:
        """Bytes of the memory now."""
        try:
            if type(base) in _PLAIN:
                return len(base)
            with memoryview(base) as view:
                if not view.c_contiguous:
                    raise MisuseError("process memory must be contiguous: pass slices with a step of 1")
                return view.nbytes
        except ValueError as error:
            raise MisuseError(f"the process memory is closed: {error}") from error

    def skew(self, base: Memory) -> int:
        """From the address: memory of the heap starts anywhere."""
        if not self.extent(base):
            return 0
        with words.pin(base, 0, 0, 1, writable=False) as start:
            return int(ffi.cast("uintptr_t", start)) % PAGE

    def where(self, buffer: LocalBuffer) -> tuple[Memory, int]:
        """The base, as it is. Raises MisuseError if it has become too short, or is closed."""
        base = buffer.base
        if buffer.offset + buffer.length > (extent := self.extent(base)):
            check_range(self.name, extent, buffer.offset, buffer.length)
        return base, buffer.offset

    def copy_to(self, source: LocalBuffer, memory: memoryview) -> None:
        """One copy."""
        copy_memory(*self.where(source), memory, 0, source.length)

    def copy_from(self, memory: memoryview, target: LocalBuffer) -> None:
        """One copy."""
        copy_memory(memory, 0, *self.where(target), target.length)


PROCESS_MEMORY = ProcessMemory()


def process_memory(memory: Readable) -> LocalBuffer:
    """All of some memory as a buffer. What cannot be written (bytes) can be a source only."""
    base = memoryview(memory) if isinstance(memory, bytes) else memory
    return LocalBuffer(PROCESS_MEMORY, base, 0, PROCESS_MEMORY.extent(base))


def process_memory_like(other: Shape) -> LocalBuffer:
    """Fresh memory of the same length and the same offset in its page as another buffer."""
    skew = other.offset_in_page
    return LocalBuffer(PROCESS_MEMORY, mmap.mmap(-1, skew + max(other.length, 1)), skew, other.length)


def copy_memory(source: Memory, source_at: int, target: Memory, target_at: int, length: int) -> None:
    """Copy between mapped memory by the core's measured routine. The interpreter is free meanwhile.

    Raises:
        MisuseError: a range lies outside, the target is read-only, or the two overlap.
    """
    # Pinned first, then measured: what is checked is what is copied. Let go by hand, which takes half as long as two
    # contexts.
    first = second = None
    try:
        first = _from_buffer(_BYTES, source)
        second = _from_buffer(_BYTES, target, True)
        if source_at < 0 or source_at + length > len(first):
            words.check_range(source, source_at, length, 1)
        if target_at < 0 or target_at + length > len(second):
            words.check_range(target, target_at, length, 1)
        if _copy_apart(second + target_at, first + source_at, length):
            raise MisuseError(f"the source and the target of {length} bytes overlap")
    except BufferError as error:
        raise MisuseError(f"the memory to copy to is read-only: {error}") from error
    except ValueError as error:
        if isinstance(error, MisuseError):
            raise
        raise MisuseError(f"the memory is closed: {error}") from error
    finally:
        first = second = None


@contextmanager
def window(memory: Memory, offset: int, length: int) -> Iterator[memoryview]:
    """A view of `length` bytes at `offset`, for calls that take one. Raises MisuseError if they lie outside."""
    words.check_range(memory, offset, length, 1)
    with memoryview(memory) as view, view.cast("B") as plain, plain[offset:offset + length] as part:
        yield part
