"""Copies between buffers of any two types, and counts what was copied; moves; shares. The strategy is chosen here.

Depends on idc.errors and this package.
"""

from __future__ import annotations

import enum
import threading
from typing import TYPE_CHECKING

from idc.buffers.cow import COPY_ON_WRITE, CowView
from idc.buffers.files import FILE_RANGE
from idc.buffers.hidden import HIDDEN_PAGES, copy_hidden
from idc.buffers.local import BufferType, CopyCounter, LocalBuffer, MappedType
from idc.buffers.memory import PROCESS_MEMORY, copy_memory, process_memory_like, window
from idc.buffers.pool import REGION_PAGES, hand_over
from idc.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable

    #: Copies all of a source to a target of its length; returns bytes copied, each counted as often as it was.
    PairCopy = Callable[[LocalBuffer, LocalBuffer], int]
    #: Moves all of a source to a target of its length without copying, or returns False with nothing done.
    PairMove = Callable[[LocalBuffer, LocalBuffer], bool]

#: Bytes that a copy between two types that know nothing of each other takes at a time.
BOUNCE = 128 << 10


class Strategy(enum.Enum):
    """How memory gets from one holder to another."""

    COPY = "copy"
    MAP = "map"
    HANDOVER = "handover"


class Registry:
    """The buffer types that are known, and how bytes get from each to each.

    Copies may run in several threads; those through the bounce buffer, of which there is one, wait for each other.
    Source and target have the same length and do not overlap: refused where it can be seen (the same base, memory or
    file), undefined where it cannot (a file and a mapping of it). A copy that fails leaves the target undefined.

    Args:
        force: take this strategy wherever there is a choice, for measurements; a call that cannot is refused, it
            never does otherwise quietly. COPY holds for `move` and `share`, HANDOVER for `move`, MAP for `share`.
        bounce: bytes of the bounce buffer, which is allocated now, so that no copy fails for want of it.
    """

    def __init__(self, force: Strategy | None = None, bounce: int = BOUNCE) -> None:
        if bounce < 1:
            raise MisuseError(f"a bounce buffer of {bounce} bytes holds nothing")
        self.force = force
        self._types: set[BufferType] = set()
        self._copies: dict[tuple[BufferType, BufferType], PairCopy] = {}
        self._moves: dict[tuple[BufferType, BufferType], PairMove] = {}
        self._bounce = memoryview(bytearray(bounce))
        self._bouncing = threading.RLock()
        self._busy = False

    def register(self, kind: BufferType) -> None:
        """Make a type known. Raises MisuseError if it is already."""
        if kind in self._types:
            raise MisuseError(f"the type {kind.name} is registered already")
        self._types.add(kind)

    def register_copy(self, source: BufferType, target: BufferType, copy: PairCopy) -> None:
        """A faster copy for this ordered pair of types, instead of the generic one. The last one registered counts."""
        self._copies[self._known(source), self._known(target)] = copy

    def register_move(self, source: BufferType, target: BufferType, move: PairMove) -> None:
        """A move for this ordered pair of types that need not copy. The last one registered counts."""
        self._moves[self._known(source), self._known(target)] = move

    def copy(self, source: LocalBuffer, target: LocalBuffer, counter: CopyCounter | None = None) -> int:
        """Copy all of one buffer to another; both hold the same afterwards.

        Returns:
            Bytes copied: the length if each byte was copied once, twice that through the bounce buffer.

        Raises:
            MisuseError: lengths differ, the two overlap, or one is of an unknown type or no longer valid.
            HiddenError: a buffer is of hidden pages and the other can take no copy of them.
            FileRangeError: a file failed.
        """
        length = source.length
        faster = self._copies.get((source.type, target.type))
        if faster is None or length != target.length or source.type is target.type:
            self._check(source, target)
        if not length:
            return 0
        if faster is not None:  # the common case, so in few steps: in an emulated guest they cost more than a page
            copied = faster(source, target)
            if counter is not None:
                counter.copied += copied
            return copied
        counter = CopyCounter() if counter is None else counter
        before = counter.copied
        if isinstance(source.type, MappedType):
            with window(*source.type.where(source), source.length) as view, view.toreadonly() as reading:
                target.type.copy_from(reading, target)
            counter.copied += source.length
        elif isinstance(target.type, MappedType):
            with window(*target.type.where(target), target.length) as view:
                if view.readonly:
                    raise MisuseError("the memory to copy to is read-only")
                source.type.copy_to(source, view)
            counter.copied += source.length
        else:
            self._by_bounce(source, target, counter)
        return counter.copied - before

    def move(self, source: LocalBuffer, target: LocalBuffer, counter: CopyCounter | None = None) -> int:
        """Get all of one buffer into another; what the source holds afterwards is undefined.

        Returns:
            Bytes copied: 0 if the pages were handed over.

        Raises:
            MisuseError: as `copy`; or hand-over is forced and not possible between these two.
        """
        counter = CopyCounter() if counter is None else counter
        self._check(source, target)
        if not source.length:
            return 0
        hand = self._moves.get((source.type, target.type))
        if self.force is not Strategy.COPY and hand and hand(source, target):
            counter.handed += source.length
            return 0
        if self.force is Strategy.HANDOVER:
            raise MisuseError(f"hand-over is forced, but {source.length} bytes of {source.type.name} cannot be handed "
                              f"over to these {target.type.name}: both must be whole allocations of one pool, at one "
                              "offset in the page, with one reference")
        return self.copy(source, target, counter)

    def share(self, source: LocalBuffer, counter: CopyCounter | None = None) -> LocalBuffer:
        """A buffer that starts with the source's bytes and can be written, while the source stays as it is.

        Mapped pages are shared, with private copy on write, and follow the owner's writes until then; what is not
        mapped is copied to process memory, at the same offset in the page. Of pages that are counted, hold a reference
        for as long as the shared buffer is used. `counter` also counts what is copied on write later.

        Raises:
            MisuseError: mapping is forced and the source is not mapped; or as `copy`.
        """
        counter = CopyCounter() if counter is None else counter
        self._known(source.type)
        if self.force is Strategy.MAP or (self.force is not Strategy.COPY and isinstance(source.type, MappedType)):
            shared = CowView(source, counter).buffer()
            counter.mapped += source.length
            return shared
        target = process_memory_like(source)
        self.copy(source, target, counter)
        return target

    def _by_bounce(self, source: LocalBuffer, target: LocalBuffer, counter: CopyCounter) -> None:
        with self._bouncing:
            if self._busy:
                raise MisuseError("a type's copy called a generic copy, which it is part of itself")
            self._busy = True
            try:
                for at in range(0, source.length, len(self._bounce)):
                    count = min(len(self._bounce), source.length - at)
                    source.type.copy_to(source.slice(at, count), self._bounce[:count])
                    counter.copied += count
                    target.type.copy_from(self._bounce[:count].toreadonly(), target.slice(at, count))
                    counter.copied += count
            finally:
                self._busy = False

    def _check(self, source: LocalBuffer, target: LocalBuffer) -> None:
        self._known(source.type)
        self._known(target.type)
        if source.length != target.length:
            raise MisuseError(f"{source.length} bytes do not go into {target.length}: slice one to the other's length")
        if source.type is target.type and source.type.overlaps(source, target):
            raise MisuseError(f"source and target overlap in the same {source.type.name}")

    def _known(self, kind: BufferType) -> BufferType:
        if kind not in self._types:
            raise MisuseError(f"the type {kind.name} is not registered here")
        return kind


def standard_registry(force: Strategy | None = None, bounce: int = BOUNCE) -> Registry:
    """A registry that knows all the types that ship, and the faster ways between them."""
    registry = Registry(force, bounce)
    mapped: tuple[MappedType, ...] = (PROCESS_MEMORY, REGION_PAGES)
    types: tuple[BufferType, ...] = (*mapped, HIDDEN_PAGES, FILE_RANGE, COPY_ON_WRITE)
    for kind in types:
        registry.register(kind)
    for one in mapped:
        for other in mapped:
            registry.register_copy(one, other, _copy_mapped)
    for source, target in ((HIDDEN_PAGES, HIDDEN_PAGES), (HIDDEN_PAGES, REGION_PAGES), (REGION_PAGES, HIDDEN_PAGES)):
        registry.register_copy(source, target, copy_hidden)
    registry.register_move(REGION_PAGES, REGION_PAGES, hand_over)
    return registry


def _copy_mapped(source: LocalBuffer, target: LocalBuffer) -> int:
    # Registered for mapped types only; to ask an abstract class, or say so by a call, would take as long as the rest.
    memory, at = source.type.where(source)  # type: ignore[attr-defined]
    into, there = target.type.where(target)  # type: ignore[attr-defined]
    copy_memory(memory, at, into, there, source.length)
    return source.length
