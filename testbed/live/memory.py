"""What the members of a region have written into a channel block, read from outside. Pure: memory in, numbers out.

Where each word is follows from the layout that the host made. What is in it any member of the region may have written,
at any time: so these are claims, and no value makes anything here fail. Depends on idc.layout and idc.blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from idc import blocks, layout
from idc.blocks import SideWords

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class SideNow(SideWords):
    """One side of a channel, and what it shows beside.

    Attributes:
        samples, total_ns: transactions of this side that were timed, and the sum of their times.
        dropped: what it had to drop.
        buckets: of the times, see `idc.layout.FIRST_TRIP_BIT`.
    """

    samples: int
    total_ns: int
    dropped: int
    buckets: tuple[int, ...]


@dataclass(frozen=True)
class RingNow:
    """One direction: indexes, and what each end has counted, by the names of `idc.layout.RING_RECORD`."""

    producer: str
    consumer: str
    tail: int
    head: int
    capacity: int
    sent: dict[str, int]
    taken: dict[str, int]

    @property
    def filled(self) -> int | None:
        """See `idc.blocks.filled`."""
        return blocks.filled(self.tail, self.head, self.capacity)


@dataclass(frozen=True)
class ChannelNow:
    """A channel."""

    name: str
    kind: str
    sides: tuple[SideNow, SideNow]
    rings: tuple[RingNow, RingNow]

    @property
    def connected(self) -> bool:
        """See `idc.blocks.connected`."""
        return blocks.connected(self.sides)


def read_channel(words: Sequence[int], channel: dict[str, Any]) -> ChannelNow:
    """A channel as it is now.

    Args:
        words: the region as u64 words, each read by one load: a memoryview cast to "Q".
        channel: name, kind, members a and b, offset and capacity, as `testbed.live.describe` tells them.
    """
    at, a, b, capacity = int(channel["offset"]), str(channel["a"]), str(channel["b"]), int(channel["capacity"])
    return ChannelNow(
        str(channel["name"]), str(channel["kind"]),
        (_side(words, at + layout.SIDE_A, at + layout.RECORD_A, a), _side(words, at + layout.SIDE_B,
                                                                         at + layout.RECORD_B, b)),
        (_ring(words, at + layout.RING_AB, at + layout.RECORD_AB, a, b, capacity),
         _ring(words, at + layout.RING_BA, at + layout.RECORD_BA, b, a, capacity)))


def _side(words: Sequence[int], at: int, record: int, member: str) -> SideNow:
    first = record // 8
    samples, total, dropped = (words[first + n] for n in range(len(layout.SIDE_RECORD)))
    start = first + len(layout.SIDE_RECORD)
    return SideNow(*blocks.side_words(lambda offset: words[offset // 8], at, member), samples, total, dropped,
                   tuple(words[start + n] for n in range(layout.TRIP_BUCKETS)))


def _ring(words: Sequence[int], at: int, record: int, producer: str, consumer: str, capacity: int) -> RingNow:
    tail, head = words[(at + layout.RING_TAIL) // 8], words[(at + layout.RING_HEAD) // 8]
    return RingNow(producer, consumer, tail, head, capacity, _counts(words, record),
                   _counts(words, record + layout.RING_RECORD_BYTES))


def _counts(words: Sequence[int], record: int) -> dict[str, int]:
    return {name: words[record // 8 + n] for n, name in enumerate(layout.RING_RECORD)}
