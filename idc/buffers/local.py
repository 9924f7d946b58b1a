"""A reference to a local buffer: its type, a base that only the type understands, an offset and a length.

Depends on idc.errors and idc.layout. What the types are, and how bytes get from one to another, is told elsewhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from idc.errors import MisuseError
from idc.layout import PAGE

if TYPE_CHECKING:
    from idc.words import Memory


@dataclass(slots=True)
class CopyCounter:
    """What copies, moves and shares did; given to each call by who wants to know.

    Attributes:
        copied: bytes copied, a byte that was copied twice counted twice.
        handed: bytes that changed hands with their pages, not copied.
        mapped: bytes that were shared in place, not copied.
    """

    copied: int = 0
    handed: int = 0
    mapped: int = 0


class Shape(Protocol):
    """What another buffer can be made like: a local one, or a remote one."""

    @property
    def length(self) -> int:
        """Bytes."""

    @property
    def offset_in_page(self) -> int:
        """Where in its page the first byte lies."""


class BufferType(ABC):
    """What a provider of buffers brings: how to reach plain memory and back. One object for each type.

    Both copies move all of the buffer, whose length equals that of the memory, or raise.
    """

    #: For error messages.
    name: str

    @abstractmethod
    def extent(self, base: Any) -> int:  # noqa: ANN401 - each type has its own
        """Bytes behind a base. Raises MisuseError if there is nothing behind it any more."""

    def skew(self, base: Any) -> int:  # noqa: ANN401
        """Offset in its page of a base's first byte."""
        del base
        return 0

    def retain(self, base: Any) -> None:  # noqa: ANN401
        """One more user of what is behind a base, where that is counted: it neither moves nor goes meanwhile.

        Raises MisuseError if there is nothing behind it any more.
        """
        self.extent(base)

    def release(self, base: Any) -> None:  # noqa: ANN401
        """One user less."""
        del base

    @abstractmethod
    def copy_to(self, source: LocalBuffer, memory: memoryview) -> None:
        """Copy out of a buffer of this type."""

    @abstractmethod
    def copy_from(self, memory: memoryview, target: LocalBuffer) -> None:
        """Copy into a buffer of this type."""

    def overlaps(self, one: LocalBuffer, other: LocalBuffer) -> bool:
        """Whether two buffers of this type have bytes in common."""
        return one.base is other.base and one.meets(other)


class MappedType(BufferType):
    """A type whose buffers are memory that this process maps: any other type copies to and from it at once."""

    @abstractmethod
    def where(self, buffer: LocalBuffer) -> tuple[Memory, int]:
        """The memory that holds the buffer, and where in it the buffer starts."""


@dataclass(frozen=True, slots=True, eq=False)
class LocalBuffer:
    """A range of bytes, of whatever type. Passing it on needs no look into it.

    Attributes:
        type: who understands the base.
        base: what the type makes of it: memory, pages of a pool, a file.
        offset: of the first byte from the base, bytes.
        length: bytes.

    Raises:
        MisuseError: the range is negative, or ends beyond what the base has.
    """

    type: BufferType
    base: Any
    offset: int
    length: int

    def __post_init__(self) -> None:
        extent = self.type.extent(self.base)
        if self.offset < 0 or self.length < 0 or self.offset + self.length > extent:
            check_range(f"the {self.type.name}", extent, self.offset, self.length)

    def __len__(self) -> int:
        return self.length

    @property
    def offset_in_page(self) -> int:
        """Where in its page the first byte lies, 0 to 4095."""
        return (self.type.skew(self.base) + self.offset) % PAGE

    @property
    def page_aligned(self) -> bool:
        """Whether it starts and ends at page boundaries, so that its pages hold nothing else."""
        return self.offset_in_page == 0 and self.length % PAGE == 0

    def slice(self, offset: int, length: int) -> LocalBuffer:
        """`length` bytes from `offset` of this buffer. Raises MisuseError if they are not all in it."""
        check_range("the buffer", self.length, offset, length)
        return replace(self, offset=self.offset + offset, length=length)

    def meets(self, other: LocalBuffer) -> bool:
        """Whether the ranges have bytes in common, given that the base is the same."""
        return max(self.offset, other.offset) < min(self.offset + self.length, other.offset + other.length)


def check_range(what: str, extent: int, offset: int, length: int) -> None:
    """Raise MisuseError unless `length` bytes from `offset` lie inside `extent` bytes."""
    # Python's numbers do not wrap: an offset near 2**64 from a peer is just too big here.
    if offset < 0 or length < 0 or offset + length > extent:
        raise MisuseError(f"{length} bytes at {offset} are no range of {what}, which has {extent} bytes")
