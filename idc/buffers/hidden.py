"""Hidden pages: the application holds buffers that it passes on and cannot read.

Depends on idc.errors and this package. Who holds the bytes is a HiddenStore: a broker in another domain, or, in this
process, a MemfdStore.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, Self

from idc.buffers.files import FILE_RANGE, file_range
from idc.buffers.local import BufferType, LocalBuffer, Shape
from idc.buffers.memory import window
from idc.buffers.pool import REGION_PAGES, Run, RunPool, check_live
from idc.errors import FileRangeError, HiddenError, MisuseError
from idc.layout import PAGE

_ZEROS = memoryview(bytes(PAGE))


class HiddenStore(Protocol):
    """Holds the bytes of hidden pages, and copies them where the application cannot."""

    def extent(self, handle: Any) -> int:  # noqa: ANN401 - the store's own
        """Bytes behind a handle. Raises MisuseError if there is nothing behind it any more."""

    def copy(self, source: LocalBuffer, target: LocalBuffer) -> int:
        """Copy all of one buffer to another of the same length; returns bytes copied, each as often as it was.

        One at least is of hidden pages of this store, the other as well or of region pages. Raises IdcError.
        """


@dataclass(frozen=True, slots=True, eq=False)
class Hidden:
    """The base of hidden pages: starts at a page boundary, and means something to the store only."""

    store: HiddenStore
    handle: Any


class HiddenPages(BufferType):
    """Pages that are not mapped here. Buffers can be sliced, registered and passed on."""

    name = "hidden pages"

    def extent(self, base: Hidden) -> int:
        """As the store says."""
        return base.store.extent(base.handle)

    def copy_to(self, source: LocalBuffer, memory: memoryview) -> NoReturn:
        """Refuse with HiddenError."""
        del memory
        raise HiddenError(f"the {source.length} bytes are of hidden pages, which are not mapped here: pass the buffer "
                          "on, or copy it to hidden or region pages")

    def copy_from(self, memory: memoryview, target: LocalBuffer) -> NoReturn:
        """Refuse with HiddenError."""
        self.copy_to(target, memory)

    def overlaps(self, one: LocalBuffer, other: LocalBuffer) -> bool:
        """By handle: two bases may name one."""
        first, second = one.base, other.base
        return first.store is second.store and first.handle == second.handle and one.meets(other)


HIDDEN_PAGES = HiddenPages()


def copy_hidden(source: LocalBuffer, target: LocalBuffer) -> int:
    """Let the store that holds the source, else the one that holds the target, copy."""
    hidden: Hidden = (source if source.type is HIDDEN_PAGES else target).base
    return hidden.store.copy(source, target)


class MemfdStore:
    """Hidden pages in a memfd of this process that nothing ever maps: the kernel copies, so each byte once.

    Not hidden from who looks for it: the descriptor is this process's own. It stands in for a broker, whose memory is
    out of reach, where there is none.

    Args:
        length: bytes, whole pages; taken at once, so that no later copy fails for want of them.

    Raises:
        MisuseError: not whole pages.
        FileRangeError: no memory.
    """

    def __init__(self, length: int) -> None:
        self._pool = RunPool(length, self._wipe)
        self._fd = os.memfd_create("idc-hidden", os.MFD_CLOEXEC)
        try:
            if length:
                os.posix_fallocate(self._fd, 0, length)
        except OSError as error:
            self.close()
            raise FileRangeError(error.errno or errno.ENOMEM, f"no {length} bytes for hidden pages: "
                                 f"{error.strerror}") from error

    def close(self) -> None:
        """Give the memory back. Idempotent; buffers are of no use afterwards."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def free_pages(self) -> int:
        """Pages that nobody holds."""
        return self._pool.free_pages

    def allocate(self, length: int, offset_in_page: int = 0) -> LocalBuffer:
        """`length` zero bytes, the first at `offset_in_page`. Raises as `RunPool.take` does."""
        run = self._pool.take(length, offset_in_page)
        return LocalBuffer(HIDDEN_PAGES, Hidden(self, run), offset_in_page, length)

    def allocate_like(self, other: Shape) -> LocalBuffer:
        """As many bytes as another buffer has, at the same offset in their page."""
        return self.allocate(other.length, other.offset_in_page)

    def retain(self, buffer: LocalBuffer) -> None:
        """One more reference. Raises MisuseError if released already, or of another store."""
        self._pool.keep(self._run(buffer))

    def release(self, buffer: LocalBuffer) -> None:
        """One reference less; the last one wipes the pages and gives them back. Raises MisuseError as `retain` does."""
        self._pool.give(self._run(buffer))

    def extent(self, handle: Run) -> int:
        """All of the run's pages."""
        check_live(handle)
        return handle.pages * PAGE

    def copy(self, source: LocalBuffer, target: LocalBuffer) -> int:
        """Once, by the kernel. See HiddenStore; raises HiddenError for what is neither hidden nor region pages."""
        if source.type is HIDDEN_PAGES and target.type is HIDDEN_PAGES:
            self._between(self._place(source), self._place(target), source.length)
        elif source.type is HIDDEN_PAGES and target.type is REGION_PAGES:
            with window(*REGION_PAGES.where(target), target.length) as view:
                FILE_RANGE.copy_to(file_range(self._fd, self._place(source), source.length), view)
        elif source.type is REGION_PAGES and target.type is HIDDEN_PAGES:
            with window(*REGION_PAGES.where(source), source.length) as view:
                FILE_RANGE.copy_from(view, file_range(self._fd, self._place(target), target.length))
        else:
            raise HiddenError(f"hidden pages are copied to and from hidden and region pages only, not from "
                              f"{source.type.name} to {target.type.name}")
        return source.length

    def _between(self, source: int, target: int, length: int) -> None:
        done = 0
        while done < length:
            try:
                count = os.copy_file_range(self._fd, self._fd, length - done, source + done, target + done)
            except OSError as error:
                raise FileRangeError(error.errno or errno.EIO, f"cannot copy {length} bytes between hidden pages: "
                                     f"{error.strerror} after {done}", done) from error
            if not count:
                raise FileRangeError(errno.EIO, f"cannot copy {length} bytes between hidden pages: the copy ended "
                                     f"after {done}", done)
            done += count

    def _wipe(self, run: Run) -> None:
        # what was hidden must not reach the next holder
        for page in range(run.pages):
            FILE_RANGE.copy_from(_ZEROS, file_range(self._fd, run.start + page * PAGE, PAGE))

    def _place(self, buffer: LocalBuffer) -> int:
        run = self._run(buffer)
        check_live(run)
        return run.start + buffer.offset

    def _run(self, buffer: LocalBuffer) -> Run:
        if buffer.type is not HIDDEN_PAGES or buffer.base.store is not self:
            raise MisuseError(f"the buffer ({buffer.type.name}) is not of this store of hidden pages")
        if self._fd < 0:
            raise MisuseError("the store of hidden pages is closed")
        run: Run = buffer.base.handle
        return run
