"""A channel block as whoever looks on reads it: its sides, whether they are connected, what a ring holds.

Any member of the region may have written any of it, at any time: these are claims, and no value makes anything here
fail. Pure; depends on idc.layout alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from idc import layout

if TYPE_CHECKING:
    from collections.abc import Callable

    #: Loads the u64 at an offset, which is a multiple of 8.
    Load = Callable[[int], int]

MASK: Final = (1 << 64) - 1
#: What the state word of a side says.
STATES: Final = {0: "absent", 1: "open", 2: "closed"}


@dataclass(frozen=True)
class SideWords:
    """The words that one side of a channel alone writes; see docs/protocol.md, section 3.

    Attributes:
        member: whose side it is.
        epoch, ack, reason: see there.
        state: the word's name, or its number if it has none.
    """

    member: str
    epoch: int
    ack: int
    state: str
    reason: int


def side_words(load: Load, at: int, member: str) -> tuple[str, int, int, str, int]:
    """What a SideWords is made of, of the side whose words begin at `at`."""
    state = load(at + layout.SIDE_STATE)
    number = state & 0xFFFF_FFFF
    return (member, load(at + layout.SIDE_EPOCH), load(at + layout.SIDE_ACK), STATES.get(number, str(number)),
            state >> 32)


def connected(sides: tuple[SideWords, SideWords]) -> bool:
    """Whether both are open, and each has acknowledged the other's epoch."""
    a, b = sides
    return all(mine.state == "open" and mine.epoch != 0 and mine.ack == theirs.epoch
               for mine, theirs in ((a, b), (b, a)))


def filled(tail: int, head: int, capacity: int) -> int | None:
    """Messages or bytes in a ring; None for indexes that cannot be: they are of different moments, or lies.

    The tail of a message ring lags until its producer notifies, so its head may be a little ahead.
    """
    ahead = tail - head & MASK
    if ahead <= capacity:
        return ahead
    return 0 if head - tail & MASK <= capacity else None
