"""What several tests share: two members of one region inside this process, with eventfds for doorbells."""

from __future__ import annotations

import mmap
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from idc.layout import ChannelSpec, Kind, RegionHeader, Rights, member_word, pack_header
from idc.region import Region
from idc.ring import Bell, store_u64

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CHANNELS = (
    ChannelSpec("notes", Kind.MESSAGE, "front", "back", 16 * 1024, 1024),
    ChannelSpec("bulk", Kind.BYTE, "front", "back", 64 << 10),
)


class LocalRegion:
    """A region without a server: this process owns the memfd and all eventfds, and plays the host."""

    def __init__(self, channels: Sequence[ChannelSpec] = CHANNELS, size: int = 1 << 20) -> None:
        self.header = RegionHeader.plan("local", size, {"front": Rights.RW, "back": Rights.RW}, channels)
        self.memfd = os.memfd_create("local")
        os.ftruncate(self.memfd, size)
        os.pwrite(self.memfd, pack_header(self.header), 0)
        self.events = [[os.eventfd(0, os.EFD_NONBLOCK) for _ in range(self.header.vectors)] for _ in range(2)]
        for member in range(2):
            self.present(member, 1)

    def present(self, member: int, incarnation: int, *, present: bool = True) -> None:
        """Stamp a member's live word and ring the other, as the server does."""
        with mmap.mmap(self.memfd, 4096) as page:
            store_u64(page, self.header.members[member].word_offset, member_word(incarnation, present=present))
        for event in self.events[1 - member]:
            os.eventfd_write(event, 1)

    def join(self, member: int) -> Region:
        """Map the region as one of its two members."""
        memory = mmap.mmap(self.memfd, self.header.size)
        return Region(memory, member, self.events[member],
                      lambda peer, vector: Bell.eventfd(self.events[peer][vector]), lambda: None)

    def close(self) -> None:
        for fd in [self.memfd, *self.events[0], *self.events[1]]:
            os.close(fd)


@contextmanager
def local_region(channels: Sequence[ChannelSpec] = CHANNELS, size: int = 1 << 20) -> Iterator[LocalRegion]:
    region = LocalRegion(channels, size)
    try:
        yield region
    finally:
        region.close()
