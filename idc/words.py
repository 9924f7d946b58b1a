"""Words and pointers in shared memory: bounds and alignment checked, loads that acquire, stores that release.

Depends on idc._core and idc.errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from idc._core import ffi, lib
from idc.errors import MisuseError

if TYPE_CHECKING:
    import mmap

    from idc._core import Pointer

    #: Memory to map rings onto: a shared mapping, or in tests any bytes.
    Memory: TypeAlias = mmap.mmap | memoryview | bytearray
    #: What can be sent.
    Readable: TypeAlias = bytes | bytearray | memoryview | mmap.mmap


def check_range(memory: Memory, offset: int, length: int, align: int) -> None:
    """Raise MisuseError unless `length` bytes at `offset` lie inside the memory, aligned to `align`."""
    with memoryview(memory) as view:
        nbytes = view.nbytes
    if offset < 0 or offset + length > nbytes:
        raise MisuseError(f"{length} bytes at {offset:#x} lie outside the {nbytes} bytes of memory")
    if offset % align:
        raise MisuseError(f"offset {offset:#x} is not a multiple of {align}")


def pin(memory: Memory, offset: int, length: int, align: int, *, writable: bool = True) -> Pointer:
    """A pointer to the memory's start, which keeps it alive until released; checked as `check_range` does."""
    check_range(memory, offset, length, align)
    return ffi.from_buffer("uint8_t[]", memory, require_writable=writable)


def load_u64(memory: Memory, offset: int) -> int:
    """The u64 at `offset`, aligned to 8 bytes, by one acquire load. Read-only memory will do."""
    with pin(memory, offset, 8, 8, writable=False) as base:
        return int(lib.idc_load64(base + offset))


def store_u64(memory: Memory, offset: int, value: int) -> None:
    """Store a u64 at `offset`, aligned to 8 bytes, by one release store."""
    with pin(memory, offset, 8, 8) as base:
        lib.idc_store64(base + offset, value)


def load_u32(memory: Memory, offset: int) -> int:
    """The u32 at `offset`, aligned to 4 bytes, by one acquire load. Read-only memory will do."""
    with pin(memory, offset, 4, 4, writable=False) as base:
        return int(lib.idc_load32(base + offset))


def store_u32(memory: Memory, offset: int, value: int) -> None:
    """Store a u32 at `offset`, aligned to 4 bytes, by one release store."""
    with pin(memory, offset, 4, 4) as base:
        lib.idc_store32(base + offset, value)


def fence() -> None:
    """Order every earlier load and store before every later one."""
    lib.idc_fence()
