"""The regions that this domain maps: an owner finds the region of its pages there, a holder the pages of a lease.

Depends on idc.region, idc.buffers and idc.errors. No I/O.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from idc.buffers.local import LocalBuffer
from idc.buffers.memory import PROCESS_MEMORY
from idc.buffers.pool import REGION_PAGES
from idc.errors import MisuseError, ProtocolError

if TYPE_CHECKING:
    from uuid import UUID

    from idc.region import Region
    from idc.remote.resolution import Lease


class Regions:
    """Regions by uuid. Add those whose pages are registered here, and those whose leases are to be used directly."""

    def __init__(self, *regions: Region) -> None:
        self._known: dict[UUID, Region] = {}
        for region in regions:
            self.add(region)

    def add(self, region: Region) -> None:
        """Make a mapped region known; it stays mapped until `discard`."""
        self._known[region.header.uuid] = region

    def discard(self, region: Region) -> None:
        """Forget it: leases in it are of no more use, ask for none. Idempotent."""
        self._known.pop(region.header.uuid, None)

    def get(self, region: UUID) -> Region | None:
        """The region, if it is mapped here."""
        return self._known.get(region)

    def place(self, buffer: LocalBuffer) -> tuple[Region, int] | None:
        """Which region a buffer is pages of, and where in it; None if it is of none that is known."""
        if buffer.type is not REGION_PAGES:
            return None
        memory, offset = REGION_PAGES.where(buffer)
        for region in self._known.values():
            if region.memory is memory:
                return region, offset
        return None

    def reach(self, lease: Lease) -> LocalBuffer | None:
        """The leased bytes as they are mapped here; None if the region is not.

        Raises:
            ProtocolError: the range is not all in one other member's part, so no honest owner leases it.
        """
        region = self._known.get(lease.region)
        if region is None:
            return None
        for part in region.header.parts:
            if part.offset <= lease.offset and lease.offset + lease.length <= part.offset + part.length:
                if part.owner == region.member:
                    break
                try:
                    return LocalBuffer(PROCESS_MEMORY, region.memory, lease.offset, lease.length)
                except MisuseError:  # closed, and not discarded
                    return None
        raise ProtocolError(f"a lease of {lease.length} bytes at {lease.offset} of region {region.header.name!r}: not "
                            "all in another member's part")


def writable(region: Region) -> bool:
    """Whether this member may write there: the hypervisor says so, hard."""
    return region.member is not None
