"""Where the buffers of a queue lie: each end allocates from its own part of the region, a piece of it for each queue.

Which buffers are free is in the private memory of whoever owns them; the peer is given offset and length, and holds
both against the owner's part. Depends on idc.words and idc.errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from idc._core import ffi
from idc.errors import NotConnectedError
from idc.layout import PAGE
from idc.words import pin

if TYPE_CHECKING:
    from idc._core import Pointer
    from idc.region import Region


class Place:
    """A queue's buffers in a region, pinned until `close`.

    Args:
        region: mapped, writable.
        mine: offset and bytes of this queue's piece of this end's part.
        theirs: offset and bytes of the other end's part, in which all of its buffers lie.

    Attributes:
        base: pointer to the region's first byte.
        size: bytes of the region.
    """

    def __init__(self, region: Region, mine: tuple[int, int], theirs: tuple[int, int]) -> None:
        self.base: Pointer = pin(region.memory, 0, len(region.memory), PAGE)
        self.size = len(region.memory)
        self.mine, self.mine_bytes = mine
        self.theirs, self.theirs_bytes = theirs
        self._closed = False

    def close(self) -> None:
        """Let go of the region. Idempotent."""
        if not self._closed:
            self._closed = True
            ffi.release(self.base)


def places(region: Region, count: int) -> list[Place]:
    """One for each of `count` queues between the region's two members; this end's part is shared out evenly.

    Raises NotConnectedError if the region is not one of two members with a part each.
    """
    member = region.member
    parts = {part.owner: part for part in region.header.parts}
    others = [owner for owner in parts if owner != member]
    if member not in parts or len(others) != 1:
        raise NotConnectedError(f"region {region.header.name!r} has no part for each of two members")
    mine, theirs = parts[member], parts[others[0]]
    piece = mine.length // count // PAGE * PAGE
    return [Place(region, (mine.offset + index * piece, piece), (theirs.offset, theirs.length))
            for index in range(count)]
