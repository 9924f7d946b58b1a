"""Ranges of files as buffers: bytes go straight between the file and mapped memory.

Depends on idc.errors and this package.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from idc.buffers.local import BufferType, LocalBuffer
from idc.errors import FileRangeError, MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable

#: Files end where off_t does: a range may lie beyond the file's end, to be written.
_LAST = (1 << 63) - 1


class FileRange(BufferType):
    """Bytes of an open file; the base is the descriptor, which its owner keeps open meanwhile."""

    name = "file range"

    def extent(self, base: int) -> int:
        """As far as a file can reach."""
        if base < 0:
            raise MisuseError(f"{base} is no file descriptor")
        return _LAST

    def overlaps(self, one: LocalBuffer, other: LocalBuffer) -> bool:
        """Of one file, whatever descriptors it is reached by."""
        return one.meets(other) and _identity(one) == _identity(other)

    def copy_to(self, source: LocalBuffer, memory: memoryview) -> None:
        """Read. Raises FileRangeError if the file fails, or ends before the range does."""
        _move(lambda part, at: os.preadv(source.base, [part], at), source, memory, "read", errno.ENODATA)

    def copy_from(self, memory: memoryview, target: LocalBuffer) -> None:
        """Write. Raises FileRangeError, `errno` ENOSPC if there is no room; what `done` counts is written."""
        _move(lambda part, at: os.pwrite(target.base, part, at), target, memory, "write", errno.EIO)


FILE_RANGE = FileRange()


def file_range(fd: int, offset: int, length: int) -> LocalBuffer:
    """`length` bytes of an open file from `offset` on. Raises MisuseError for a negative or overflowing range."""
    return LocalBuffer(FILE_RANGE, fd, offset, length)


def _move(call: Callable[[memoryview, int], int], buffer: LocalBuffer, memory: memoryview, verb: str,
              ended: int) -> None:
    """Repeat a call that moves part of the rest of the memory until all of it is moved.

    Args:
        call: takes the rest and its offset in the file, returns the bytes it moved.
        buffer: the range; the base is the descriptor.
        memory: as long as the range.
        verb: what is done, for the error.
        ended: errno of a call that moves nothing.

    Raises:
        FileRangeError: the call failed, or moved nothing.
    """
    done = 0
    while done < buffer.length:
        try:
            count = call(memory[done:], buffer.offset + done)
        except OSError as error:
            raise _failed(error.errno or errno.EIO, verb, buffer, done) from error
        if not count:
            raise _failed(ended, verb, buffer, done)
        done += count


def _failed(number: int, verb: str, buffer: LocalBuffer, done: int) -> FileRangeError:
    return FileRangeError(number, f"cannot {verb} {buffer.length} bytes at {buffer.offset} of file descriptor "
                                  f"{buffer.base}: {os.strerror(number)} after {done}", done)


def _identity(buffer: LocalBuffer) -> tuple[int, int]:
    try:
        status = os.fstat(buffer.base)
    except OSError as error:
        raise _failed(error.errno or errno.EIO, "look at", buffer, 0) from error
    return status.st_dev, status.st_ino
