"""What the members of a region have written into a channel block, read from outside. Pure: memory in, numbers out.

Where each word is follows from the layout that the host made. What is in it any member of the region may have written,
at any time: so these are claims, and no value makes anything here fail. Depends on idc.layout alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from idc import layout

if TYPE_CHECKING:
    from collections.abc import Sequence

_MASK = (1 << 64) - 1
_STATES = {0: "absent", 1: "open", 2: "closed"}


@dataclass(frozen=True)
class SideNow:
    """One side of a channel.

    Attributes:
        member: whose it is.
        epoch, ack, state, reason: see docs/protocol.md, section 3.
        samples, total_ns: transactions of this side that were timed, and the sum of their times.
        dropped: what it had to drop.
        buckets: of the times, see `idc.layout.FIRST_TRIP_BIT`.
    """

    member: str
    epoch: int
    ack: int
    state: str
    reason: int
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
        """Messages or bytes in it; None for indexes that cannot be: they are of different moments, or lies.

        The tail of a message ring lags until its producer notifies, so its head may be a little ahead.
        """
        filled = self.tail - self.head & _MASK
        if filled <= self.capacity:
            return filled
        return 0 if self.head - self.tail & _MASK <= self.capacity else None


@dataclass(frozen=True)
class ChannelNow:
    """A channel: connected if both sides are open, and each has acknowledged the other's epoch."""

    name: str
    kind: str
    sides: tuple[SideNow, SideNow]
    rings: tuple[RingNow, RingNow]

    @property
    def connected(self) -> bool:
        """See above."""
        a, b = self.sides
        return all(mine.state == "open" and mine.epoch != 0 and mine.ack == theirs.epoch
                   for mine, theirs in ((a, b), (b, a)))


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
    state = words[(at + layout.SIDE_STATE) // 8]
    first = record // 8
    samples, total, dropped = (words[first + n] for n in range(len(layout.SIDE_RECORD)))
    start = first + len(layout.SIDE_RECORD)
    return SideNow(member, words[(at + layout.SIDE_EPOCH) // 8], words[(at + layout.SIDE_ACK) // 8],
                   _STATES.get(state & 0xFFFF_FFFF, "unknown"), state >> 32, samples, total, dropped,
                   tuple(words[start + n] for n in range(layout.TRIP_BUCKETS)))


def _ring(words: Sequence[int], at: int, record: int, producer: str, consumer: str, capacity: int) -> RingNow:
    tail, head = words[(at + layout.RING_TAIL) // 8], words[(at + layout.RING_HEAD) // 8]
    return RingNow(producer, consumer, tail, head, capacity, _counts(words, record),
                   _counts(words, record + layout.RING_RECORD_BYTES))


def _counts(words: Sequence[int], record: int) -> dict[str, int]:
    return {name: words[record // 8 + n] for n, name in enumerate(layout.RING_RECORD)}
