"""Private copy on write over pages that are another's: read in place, copied page by page at the first write.

Done here because the kernel cannot: what a VFIO device maps is shared and has no struct pages, so MAP_PRIVATE is
refused. Depends on idc.errors and this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from idc._core import ffi
from idc.buffers.local import BufferType, CopyCounter, LocalBuffer, MappedType, check_range
from idc.buffers.memory import copy_memory, window
from idc.errors import BackPressuredError, MisuseError
from idc.layout import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from idc.words import Memory


#: Not cleared, which would touch it all: nothing of it is read before it was written.
_new = ffi.new_allocator(should_clear_after_alloc=False)


class CowView:
    """A buffer that can be written though its pages cannot, or must not.

    What is read of a page is what the owner has in it at the moment, until the page is first written here: from then
    on it is a private copy, which the owner's later writes do not reach. Not safe to write from two threads at once.

    Memory for all private copies is set aside here, so that no write finds that there is none; where it is much, the
    kernel gives it pages as they are written.

    Args:
        source: mapped memory, possibly read-only.
        counter: counts the bytes of shared pages that are copied before they are written. What a write replaces in
            full is not copied first.

    Raises:
        MisuseError: the source is not mapped here.
        BackPressuredError: no room for the private copies.
    """

    def __init__(self, source: LocalBuffer, counter: CopyCounter | None = None) -> None:
        if not isinstance(source.type, MappedType):
            raise MisuseError(f"{source.type.name} are not mapped here: copy them")
        self.source = source
        self.counter = CopyCounter() if counter is None else counter
        self._type = source.type
        self._first = source.offset_in_page  # where in the first page the source begins
        span = self._first + source.length
        self._written = bytearray(-(-span // PAGE))  # for each page of the source: 1 if it has a private copy
        try:
            self._own = ffi.buffer(_new("uint8_t[]", max(span, 1)))  # private copies, each at its page's place
        except MemoryError:
            raise BackPressuredError(f"no memory to share {source.length} bytes copy on write: try again later, or "
                                     "fewer") from None

    @property
    def private_pages(self) -> int:
        """Pages that were written, and so have a private copy."""
        return self._written.count(1)

    def buffer(self) -> LocalBuffer:
        """All of it, as a buffer to copy from and to."""
        return LocalBuffer(COPY_ON_WRITE, self, 0, self.source.length)

    def pieces(self, offset: int, length: int) -> Iterator[memoryview]:
        """Read-only views, in order, of the range's bytes: no copy. A later write may leave a view behind.

        Raises:
            MisuseError: the range is not in the source.
        """
        check_range("the view", self.source.length, offset, length)
        memory, start = self._type.where(self.source)
        end, written = offset + length, self._written
        while offset < end:
            page = (self._first + offset) // PAGE
            mine = written[page]
            last = written.find(1 - mine, page)  # the first page that is not like this one
            until = end if last < 0 else min(last * PAGE - self._first, end)
            if mine:
                yield _readonly(self._own, self._first + offset, until - offset)
            else:
                yield _readonly(memory, start + offset, until - offset)
            offset = until

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes, into private pages only. Raises MisuseError if the range is not in the source."""
        length = data.nbytes
        check_range("the view", self.source.length, offset, length)
        if not length:
            return
        begin, end = self._first + offset, self._first + offset + length
        first, last = begin // PAGE, (end - 1) // PAGE
        for page in {first, last}:  # those between are replaced in full
            if not self._written[page]:
                self._fetch(page, begin, end)
        copy_memory(data, 0, self._own, begin, length)
        self._written[first:last + 1] = b"\1" * (last + 1 - first)

    def _fetch(self, page: int, begin: int, end: int) -> None:
        """Copy the part of a page that the source covers, unless a write from `begin` to `end` replaces all of it."""
        low = max(page * PAGE, self._first)
        high = min((page + 1) * PAGE, self._first + self.source.length)
        if begin <= low and high <= end:
            return
        memory, start = self._type.where(self.source)
        copy_memory(memory, start + low - self._first, self._own, low, high - low)
        self.counter.copied += high - low


class CopyOnWrite(BufferType):
    """Buffers over a CowView, which is the base."""

    name = "copy-on-write pages"

    def extent(self, base: CowView) -> int:
        """Bytes of the source."""
        return base.source.length

    def skew(self, base: CowView) -> int:
        """That of the source."""
        return base.source.offset_in_page

    def copy_to(self, source: LocalBuffer, memory: memoryview) -> None:
        """One copy, from shared and private pages."""
        done = 0
        for piece in source.base.pieces(source.offset, source.length):
            copy_memory(piece, 0, memory, done, len(piece))
            done += len(piece)

    def copy_from(self, memory: memoryview, target: LocalBuffer) -> None:
        """One copy, and one of each page written in part for the first time, which the view's counter counts."""
        target.base.write(target.offset, memory)


COPY_ON_WRITE = CopyOnWrite()


def _readonly(memory: Memory, offset: int, length: int) -> memoryview:
    with window(memory, offset, length) as view:
        return view.toreadonly()[:]
