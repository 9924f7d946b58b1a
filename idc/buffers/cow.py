"""Private copy on write over pages that are another's: read in place, copied page by page at the first write.

Done here because the kernel cannot: what a VFIO device maps is shared and has no struct pages, so MAP_PRIVATE is
refused. Depends on idc.errors and this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from idc.buffers.local import BufferType, CopyCounter, LocalBuffer, MappedType, check_range
from idc.buffers.memory import copy_memory, window
from idc.errors import MisuseError
from idc.layout import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from idc.words import Memory


class CowView:
    """A buffer that can be written though its pages cannot, or must not.

    What is read of a page is what the owner has in it at the moment, until the page is first written here: from then
    on it is a private copy, which the owner's later writes do not reach. Not safe to write from two threads at once.

    Args:
        source: mapped memory, possibly read-only.
        counter: counts the bytes of shared pages that are copied before they are written. What a write replaces in
            full is not copied first.

    Raises:
        MisuseError: the source is not mapped here.
    """

    def __init__(self, source: LocalBuffer, counter: CopyCounter | None = None) -> None:
        if not isinstance(source.type, MappedType):
            raise MisuseError(f"{source.type.name} are not mapped here: copy them")
        self.source = source
        self.counter = CopyCounter() if counter is None else counter
        self._type = source.type
        self._first = source.offset_in_page  # where in the first page the source begins
        self._private: dict[int, bytearray] = {}  # page of the source: the part of it that the source covers

    @property
    def private_pages(self) -> int:
        """Pages that were written, and so have a private copy."""
        return len(self._private)

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
        shared = (offset, 0)  # shared pages side by side are one piece
        for page, at, count in self._split(offset, length):
            own = self._private.get(page)
            if own is None:
                shared = (shared[0], shared[1] + count)
                continue
            if shared[1]:
                yield _readonly(memory, start + shared[0], shared[1])
            yield memoryview(own).toreadonly()[at:at + count]
            shared = (shared[0] + shared[1] + count, 0)
        if shared[1]:
            yield _readonly(memory, start + shared[0], shared[1])

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes, into private pages only. Raises MisuseError if the range is not in the source."""
        check_range("the view", self.source.length, offset, data.nbytes)
        done = 0
        for page, at, count in self._split(offset, data.nbytes):
            own = self._private.get(page)
            if own is None:
                own = self._fetch(page, whole=count)
            copy_memory(data, done, own, at, count)
            self._private[page] = own
            done += count

    def _fetch(self, page: int, whole: int) -> bytearray:
        """A private copy of the part of a page that the source covers; blank if `whole` bytes are all of it."""
        begin = max(page * PAGE - self._first, 0)
        end = min((page + 1) * PAGE - self._first, self.source.length)
        own = bytearray(end - begin)
        if whole < len(own):
            memory, start = self._type.where(self.source)
            copy_memory(memory, start + begin, own, 0, len(own))
            self.counter.copied += len(own)
        return own

    def _split(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(page, offset in what is kept of it, bytes) of a range."""
        end = offset + length
        while offset < end:
            page, inside = divmod(self._first + offset, PAGE)
            count = min(PAGE - inside, end - offset)
            yield page, inside if page else inside - self._first, count
            offset += count


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
