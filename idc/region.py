"""A mapped region as one of its members sees it: memory, identity, doorbells out and in.

The same object whether the member is a virtual machine (`guest.ivshmem`) or a host process
(`host.ivshmem.client`); everything above (channels, transfer) is written against it.
"""

from __future__ import annotations

import contextlib
import os
import select
from typing import TYPE_CHECKING, Self

from idc.errors import MisuseError
from idc.layout import HEADER_BYTES, LayoutError, RegionHeader, parse_header

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Sequence

    from idc.buffers.pool import PagePool
    from idc.ring import Bell

    BellMaker = Callable[[int, int], Bell]

#: The version of docs/protocol.md that this library speaks.
PROTOCOL = 1


class Region:
    """A region mapped by one member.

    Attributes:
        memory: the whole region. A writer's mapping is writable, a read-only member's is not.
        header: the header page, copied once and checked. Presence words change later: read them live.
        member: this member's id, as the host assigned it; None for a read-only member, which has no doorbells.
        events: one eventfd for each vector of this member, in order; empty for a read-only member.

    Args:
        memory: mapping, which this object owns and closes.
        member: own id.
        events: own eventfds.
        bell: makes the doorbell for (peer id, vector).
        release: called once by `close`, after the mapping is gone, to give back what stands behind it.
        header: where it is known from who made the region; by default the page is parsed.

    Raises:
        LayoutError: the header page is not valid, speaks a protocol that this library does not, or names vectors that
            this member does not have.
    """

    def __init__(self, memory: mmap.mmap, member: int | None, events: Sequence[int], bell: BellMaker,
                 release: Callable[[], None], header: RegionHeader | None = None) -> None:
        self.memory = memory
        self.header: RegionHeader = parse_header(memory[:HEADER_BYTES], len(memory)) if header is None else header
        if not self.header.protocol_min <= PROTOCOL <= self.header.protocol_max:
            raise LayoutError(f"region {self.header.name!r} speaks protocol {self.header.protocol_min} to "
                              f"{self.header.protocol_max}, this library speaks {PROTOCOL}")
        if member is not None and len(events) < self.header.vectors:
            # a page that another member wrote over must not lead beyond the vectors that are there
            raise LayoutError(f"region {self.header.name!r} promises {self.header.vectors} vectors to each member, "
                              f"here are {len(events)}")
        self.member = member
        self.events = tuple(events)
        self._bell = bell
        self._release = release
        self._closed = False
        self._pools: tuple[PagePool, ...] | None = None

    @property
    def pools(self) -> tuple[PagePool, ...]:
        """A pool over each part of the region that this member owns, in the order of the header's table."""
        if self._pools is None:
            # Late: a plain peer needs no compiled core.
            from idc.buffers.pool import PagePool

            parts = () if self.member is None else self.header.parts_of(self.member)
            self._pools = tuple(PagePool(self.memory, part.offset, part.length) for part in parts)
        return self._pools

    @property
    def pool(self) -> PagePool:
        """The first of `pools`. Raises MisuseError if this member owns no part."""
        if not self.pools:
            raise MisuseError(f"member {self.member} owns no part of region {self.header.name!r}: give it one when the "
                              "region is made (parts)")
        return self.pools[0]

    def bell(self, member: int, vector: int) -> Bell:
        """The doorbell of another member: ringing it wakes whoever waits on that member's `vector`."""
        return self._bell(member, vector)

    def close(self) -> None:
        """Unmap and release. Idempotent.

        Raises:
            MisuseError: a ring, channel, bell or view still uses the mapping; close that, then call again.
        """
        if self._closed:
            return
        try:
            self.memory.close()
            self._release()
        except BufferError as error:
            raise MisuseError(f"region {self.header.name!r} is closed while a ring, channel, bell or view of it is "
                              "open") from error
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def wait_event(fd: int, timeout: float) -> bool:
    """Wait until an eventfd is signalled and take its count; False after `timeout` seconds without one."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    if not poller.poll(timeout * 1000):
        return False
    with contextlib.suppress(BlockingIOError):  # another waiter on the same vector was faster
        os.eventfd_read(fd)
    return True
