"""The channels of a block device beside "device": one for each connection of the front end's kernel. No policy.

Depends on idc.layout, idc.endpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from idc._core import ffi
from idc.block import protocol
from idc.endpoint import frames
from idc.endpoint.frames import Quotas
from idc.errors import NotConnectedError
from idc.layout import SLOT_HEADER_BYTES, ChannelSpec, Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from idc._core import Pointer
    from idc.layout import Part
    from idc.region import Region

#: Most connections of a device.
MOST: Final = 4
#: Requests under way in one queue: what the kernel has outstanding for one connection.
REQUESTS: Final = 128
#: What the back end accepts in a queue, and the front end.
BACK: Final = Quotas(REQUESTS, 0, protocol.REQUEST.size, 0)
FRONT: Final = Quotas(0, 0, 0, 0)
#: Bytes of a slot: a request takes the first cache line of it; the longest is a BYE with its reason.
SLOT: Final = -(-(SLOT_HEADER_BYTES + frames.HEADER_BYTES + frames.REASON_BYTES) // 64) * 64
SLOTS: Final = 256


def names(count: int) -> list[str]:
    """Of the channels of so many queues."""
    return [f"queue-{n}" for n in range(count)]


def channels(front: str, back: str) -> Sequence[ChannelSpec]:
    """All that a device may use."""
    return [ChannelSpec(name, Kind.MESSAGE, front, back, 1 << (SLOTS * SLOT - 1).bit_length(), SLOT)
            for name in names(MOST)]


def address(device: str, queue: str) -> str:
    """Of a queue, from the address of the channel "device"."""
    return f"{device.rpartition('/')[0]}/{queue}"


def front_part(region: Region, *, own: bool) -> Part:
    """The part of the region that the front end allocates from: this member's own, or its peer's.

    Raises NotConnectedError if the region has none.
    """
    here = region.member
    for member in region.header.members:
        if (member.id == here) is own:
            for part in region.header.parts_of(member.id):
                return part
    raise NotConnectedError(f"region {region.header.name!r} has no room for buffers")


def memory(region: Region) -> Pointer:
    """Where the region is mapped: valid until it is closed, and no reason for it to stay open."""
    view = ffi.from_buffer("uint8_t *", region.memory)
    try:
        return ffi.cast("uint8_t *", int(ffi.cast("uintptr_t", view)))
    finally:
        ffi.release(view)
