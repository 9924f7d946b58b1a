"""Pages of a region as buffers: each member allocates from its own part, and counts who uses what.

Depends on idc.words, idc.layout, idc.errors and this package. All that the allocator knows is in private memory: a
peer that writes over the whole region spoils bytes, never the pool.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from idc import words
from idc.buffers.local import LocalBuffer, MappedType
from idc.buffers.memory import copy_memory
from idc.errors import BackPressuredError, MisuseError, TooBigError
from idc.layout import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc.buffers.local import Shape
    from idc.region import Region
    from idc.words import Memory


@dataclass(slots=True, eq=False)
class Run:
    """An allocation: whole pages side by side.

    Attributes:
        pool: who counts its references.
        start: offset of the first page from the start of what the pool allocates from; a hand-over changes it.
        pages: how many.
        skew: offset of the first byte asked for in the first page.
        length: bytes asked for.
        references: 0 once it has been given back.
    """

    pool: RunPool
    start: int
    pages: int
    skew: int
    length: int
    references: int = 1


class RunPool:
    """Allocates runs of pages first fit and counts references. What the pages are is the business of its users.

    Safe to use from several threads.

    Args:
        length: bytes to allocate from, whole pages.
        scrub: called with a run whose last reference goes, before its pages are free for others; if it raises, the
            reference stays.
    """

    def __init__(self, length: int, scrub: Callable[[Run], None] | None = None) -> None:
        if length < 0 or length % PAGE:
            raise MisuseError(f"a pool of {length} bytes is not whole pages of {PAGE}")
        self.length = length
        self._free: list[tuple[int, int]] = [(0, length // PAGE)] if length else []  # (page, pages) in order
        self._scrub = scrub
        self._away = bytearray(length // PAGE)  # 1 for each page that was handed to a peer
        self._lock = threading.Lock()

    @property
    def free_pages(self) -> int:
        """Pages that nobody holds; not always side by side."""
        with self._lock:
            return sum(pages for _, pages in self._free)

    def take(self, length: int, offset_in_page: int = 0) -> Run:
        """A run with room for `length` bytes from `offset_in_page` of its first page on, with one reference.

        Raises:
            BackPressuredError: no such run is free now.
            TooBigError: the whole pool would not hold it.
            MisuseError: fewer than 1 byte, or an offset that is not 0 to 4095.
        """
        if length < 1 or not 0 <= offset_in_page < PAGE:
            raise MisuseError(f"cannot allocate {length} bytes at {offset_in_page} in a page: from 1 byte, at 0 to "
                              f"{PAGE - 1}")
        pages = -(-(offset_in_page + length) // PAGE)
        if pages * PAGE > self.length:
            raise TooBigError(f"{length} bytes take {pages} pages, the pool has {self.length // PAGE} in all")
        with self._lock:
            for index, (page, count) in enumerate(self._free):
                if count >= pages:
                    self._free[index:index + 1] = [(page + pages, count - pages)] if count > pages else []
                    return Run(self, page * PAGE, pages, offset_in_page, length)
            free = sum(count for _, count in self._free)
            raise BackPressuredError(f"no {pages} pages side by side are free ({free} of {self.length // PAGE} are "
                                     "free in all): release some, then try again")

    def keep(self, run: Run) -> None:
        """One more reference. Raises MisuseError if the run was given back, or is another pool's."""
        with self._lock:
            self._check(run)
            run.references += 1

    def give(self, run: Run) -> None:
        """One reference less; the last one frees the pages. Raises MisuseError as `keep` does."""
        with self._lock:
            self._check(run)
            if run.references == 1 and self._scrub:
                self._scrub(run)
            run.references -= 1
            if run.references:
                return
            page, pages = run.start // PAGE, run.pages
            index = bisect_left(self._free, (page, 0))
            if index < len(self._free) and self._free[index][0] == page + pages:
                pages += self._free.pop(index)[1]
            if index and sum(self._free[index - 1]) == page:
                page, before = self._free.pop(index - 1)
                pages, index = pages + before, index - 1
            self._free.insert(index, (page, pages))

    def exchange(self, one: Run, other: Run) -> bool:
        """Swap the pages of two runs of one size; False, and nothing done, if either has a second holder.

        A second reference may stand for someone who was told where the pages are, as a peer is by a registration.
        """
        with self._lock:
            self._check(one)
            self._check(other)
            if one is other or one.pages != other.pages or one.references > 1 or other.references > 1:
                return False
            one.start, other.start = other.start, one.start
            return True

    def surrender(self, run: Run) -> int:
        """Give the pages of a run away, to whoever they are handed to: the run is over, and the pages are not free.

        Returns:
            Offset of the first page from the start of what the pool allocates from.

        Raises:
            MisuseError: the run was given back, is another pool's, or has a second holder.
        """
        with self._lock:
            self._check(run)
            if run.references != 1:
                raise MisuseError(f"the run of {run.length} bytes has {run.references} holders: pages that are handed "
                                  "over must have one")
            run.references = 0
            page = run.start // PAGE
            self._away[page:page + run.pages] = b"\1" * run.pages
            return run.start

    def adopt(self, start: int, length: int, offset_in_page: int = 0) -> Run:
        """A run on pages that a peer hands over: pages of this range that are not with this pool at the moment.

        Raises:
            MisuseError: they do not start at a page, lie outside, or some of them are here already: what a peer says
                never makes two holders of one page here.
        """
        page, rest = divmod(start, PAGE)
        pages = -(-(offset_in_page + length) // PAGE)
        if rest or start < 0 or length < 1 or not 0 <= offset_in_page < PAGE or start + pages * PAGE > self.length:
            raise MisuseError(f"{length} bytes at {start} are no whole pages of this pool, which has {self.length}")
        with self._lock:
            if self._away.count(1, page, page + pages) != pages:
                raise MisuseError(f"of the {pages} pages at {start} some were not handed over: they are here")
            self._away[page:page + pages] = bytes(pages)
            return Run(self, start, pages, offset_in_page, length)

    def _check(self, run: Run) -> None:
        if run.pool is not self:
            raise MisuseError("the buffer is of another pool")
        check_live(run)


def check_live(run: Run) -> None:
    """Raise MisuseError if the run was given back."""
    if not run.references:
        raise MisuseError(f"the buffer of {run.length} bytes was released already: its pages may be someone else's")


class RegionPages(MappedType):
    """Pages of a region that this process maps, from a PagePool; the base is the Run."""

    name = "region pages"

    def extent(self, base: Run) -> int:
        """All of the run's pages."""
        if not base.references:
            check_live(base)
        return base.pages * PAGE

    def retain(self, base: Run) -> None:
        """One more reference to the whole run."""
        base.pool.keep(base)

    def release(self, base: Run) -> None:
        """One reference less; the last one gives the pages back."""
        base.pool.give(base)

    def where(self, buffer: LocalBuffer) -> tuple[Memory, int]:
        """Place in the region. Raises MisuseError once released, or once the region is closed."""
        run: Run = buffer.base
        if not run.references:
            check_live(run)
        pool: PagePool = run.pool  # type: ignore[assignment] # of this type; to say so by a call takes longer than the rest
        try:
            len(pool.memory)
        except ValueError as error:
            raise MisuseError(f"the region is closed: {error}") from error
        return pool.memory, pool.offset + run.start + buffer.offset

    def copy_to(self, source: LocalBuffer, memory: memoryview) -> None:
        """One copy."""
        copy_memory(*self.where(source), memory, 0, source.length)

    def copy_from(self, memory: memoryview, target: LocalBuffer) -> None:
        """One copy."""
        copy_memory(memory, 0, *self.where(target), target.length)


REGION_PAGES = RegionPages()


#: Ranges in a peer's part that are remembered, at most.
KNOWN = 256


class PeerPart:
    """A peer's part of the region: nothing is allocated here, but what the peer says is in it can be used in place.

    Args:
        memory: the region as mapped here.
        offset, length: of the part, bytes.

    Raises:
        MisuseError: as `PagePool`.
    """

    def __init__(self, memory: Memory, offset: int, length: int) -> None:
        self._pool = PagePool(memory, offset, length, away=True)
        self._known: dict[tuple[int, int], tuple[int, int, int]] = {}  # checked; a peer comes back to its pages

    def at(self, offset: int, length: int) -> LocalBuffer:
        """`length` bytes at `offset` in the region, wherever in a page they start: the peer's to keep unchanged (soft).

        Raises:
            MisuseError: they are not all in the part.
        """
        pool = self._pool
        if (known := self._known.get((offset, length))) is None:
            skew = offset % PAGE
            start = offset - skew - pool.offset
            if start < 0 or length < 1 or start + skew + length > pool.length:
                raise MisuseError(f"{length} bytes at {offset:#x} are not in the peer's part")
            if len(self._known) >= KNOWN:
                self._known.clear()
            known = self._known[offset, length] = start, -(-(skew + length) // PAGE), skew
        start, pages, skew = known
        return LocalBuffer(REGION_PAGES, Run(pool, start, pages, skew, length), skew, length)  # its user's own


class PagePool(RunPool):
    """The pages of one member's part of a region (`idc.layout.Part`), handed out as buffers.

    Args:
        memory: the region as mapped here.
        offset: of the part in it, bytes, at a page boundary.
        length: of the part, bytes, whole pages.
        away: all of its pages are with a peer to begin with: the part is the peer's, which hands pages over.

    Raises:
        MisuseError: the part is not whole pages, or not in the memory.
    """

    def __init__(self, memory: Memory, offset: int, length: int, *, away: bool = False) -> None:
        super().__init__(length)
        words.check_range(memory, offset, length, PAGE)
        if away:
            self._free.clear()
            self._away[:] = b"\1" * len(self._away)
        self.memory = memory
        self.offset = offset

    @classmethod
    def of(cls, region: Region) -> Self:
        """This member's own part of a region. Raises MisuseError if it has none: it may only read, or all is rings."""
        for part in region.header.parts:
            if part.owner == region.member:
                return cls(region.memory, part.offset, part.length)
        raise MisuseError(f"this member has no part of region {region.header.name!r} to allocate from")

    def allocate(self, length: int, offset_in_page: int = 0) -> LocalBuffer:
        """`length` bytes with one reference, the first at `offset_in_page`. They hold what was there before.

        Raises as `RunPool.take` does.
        """
        return LocalBuffer(REGION_PAGES, self.take(length, offset_in_page), offset_in_page, length)

    def allocate_like(self, other: Shape) -> LocalBuffer:
        """As many bytes as another buffer has, at the same offset in their page, so that pages can be handed on."""
        return self.allocate(other.length, other.offset_in_page)

    def retain(self, buffer: LocalBuffer) -> None:
        """One more reference to the whole allocation that the buffer is of.

        Raises:
            MisuseError: it was released already, or is not of this pool.
        """
        self.keep(self._run(buffer))

    def release(self, buffer: LocalBuffer) -> None:
        """One reference less; the last one gives the pages back. Raises MisuseError as `retain` does."""
        self.give(self._run(buffer))

    def hand_away(self, buffer: LocalBuffer) -> int:
        """Hand the pages of a whole allocation to a peer; where they lie in the region. The buffer is of no use then.

        An agreement: the peer can reach the pages before, and this member afterwards (soft). Raises as `surrender`.
        """
        return self.offset + self.surrender(self._run(buffer))

    def take_over(self, at: int, length: int, offset_in_page: int = 0) -> LocalBuffer:
        """`length` bytes on pages at `at` in the region, which a peer has handed over. Raises as `adopt`."""
        return LocalBuffer(REGION_PAGES, self.adopt(at - self.offset, length, offset_in_page), offset_in_page, length)

    def pages(self, buffer: LocalBuffer) -> range:
        """Offsets in the region of the pages that the buffer touches, until a hand-over; who holds a reference of its
        own prevents one.
        """
        self._run(buffer)
        _, start = REGION_PAGES.where(buffer)
        return range(start - start % PAGE, start + buffer.length, PAGE)

    def view(self, buffer: LocalBuffer) -> memoryview:
        """The buffer's bytes themselves; stale once the buffer is released or its pages are handed over."""
        self._run(buffer)
        memory, start = REGION_PAGES.where(buffer)
        return memoryview(memory).cast("B")[start:start + buffer.length]

    def _run(self, buffer: LocalBuffer) -> Run:
        if buffer.type is not REGION_PAGES or buffer.base.pool is not self:
            raise MisuseError(f"the buffer ({buffer.type.name}) is not of this pool")
        run: Run = buffer.base
        return run


def hand_over(source: LocalBuffer, target: LocalBuffer) -> bool:
    """Move between two buffers of one pool by swapping their pages; False if these two must be copied.

    Both must be all of their allocations, at one offset in the page, with no second reference.
    """
    one, other = source.base, target.base
    whole = all((b.offset, b.length) == (b.base.skew, b.base.length) for b in (source, target))
    if one.pool is not other.pool or not whole or source.offset != target.offset:
        return False
    pool: RunPool = one.pool
    return pool.exchange(one, other)
