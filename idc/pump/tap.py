"""The shape of a network device's queue: packets of a TAP interface, in C (idc/pump/tap.c).

Any descriptor will do that gives and takes one packet a call behind a `struct virtio_net_hdr` of 10 bytes: tests use
socket pairs. Depends on idc._core and idc.pump.place.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from idc._core import ffi, lib
from idc.endpoint import Quotas
from idc.errors import MisuseError
from idc.layout import PAGE

if TYPE_CHECKING:
    from idc._core import Pointer
    from idc.endpoint import Completion, IncomingTransaction
    from idc.pump.place import Place

#: Bytes of a vnet header.
VNET_BYTES: Final = 10
#: Bytes of one buffer: the longest packet, whole pages.
BUFFER_BYTES: Final = -(-lib.IDC_TAP_LONGEST // PAGE) * PAGE
#: Longest packet that goes in its request, and takes no buffer: acknowledgements, pings.
INLINE_BYTES: Final = 208
#: Packets under way in each direction.
DEPTH: Final = 64
#: What each side of a queue accepts.
QUOTAS: Final = Quotas(DEPTH, 0, lib.IDC_TAP_PACKET + INLINE_BYTES, 0)


@dataclass(frozen=True)
class Packets:
    """What a queue has moved and dropped: see struct idc_tap_counters in idc/pump/tap.h."""

    sent: int
    sent_bytes: int
    sent_gso: int
    received: int
    received_bytes: int
    received_gso: int
    sent_longest: int
    received_longest: int
    refused: int
    stale: int
    stalls: int


class Tap:
    """See `idc.pump.queue.Shape`.

    Args:
        fd: of the interface, or of one queue of it; non-blocking. The caller's.
        place: its buffers; closed with this.
        depth: buffers at most.

    Raises:
        MisuseError: there is no room for two buffers.
    """

    handler = ffi.addressof(lib, "idc_tap_handle")

    def __init__(self, fd: int, place: Place, depth: int = DEPTH) -> None:
        count = min(place.mine_bytes // BUFFER_BYTES, depth)
        if count < 2:
            raise MisuseError(f"{place.mine_bytes} bytes for the buffers of a queue: 2 of {BUFFER_BYTES} at least")
        self._place = place
        self._next = ffi.new("uint32_t[]", count)
        self._tap = ffi.new("struct idc_tap *", {
            "fd": fd, "count": count, "stride": BUFFER_BYTES, "region": place.base, "region_bytes": place.size,
            "mine": place.mine, "theirs": place.theirs, "theirs_bytes": place.theirs_bytes, "next": self._next,
            "inline_bytes": INLINE_BYTES})

    def attach(self, pump: Pointer) -> None:
        """See `Shape`."""
        lib.idc_tap_attach(self._tap, pump)

    def begin(self, pump: Pointer) -> None:
        """See `Shape`. What the interface had queued before is dropped, and counted."""
        rc = lib.idc_tap_begin(self._tap, pump)
        if rc < 0:
            raise OSError(-rc, f"interface: {os.strerror(-rc)}")

    def completed(self, cookie: int, completion: Completion) -> None:
        """See `Shape`. A packet whose outcome is unknown is lost, as packets are."""

    def end(self) -> None:
        """See `Shape`."""

    def judge(self, transaction: IncomingTransaction) -> str:
        """See `Shape`."""
        parameters = transaction.parameters
        fault = lib.idc_tap_judge(self._tap, ffi.from_buffer(parameters), len(parameters))
        if fault == lib.IDC_TAP_FINE:  # there is no room for the answer: that is what its completion finds
            transaction.complete()
            return ""
        return f"a packet with {ffi.string(lib.idc_tap_reason(fault)).decode()}"

    @property
    def packets(self) -> Packets:
        """A copy of the counters."""
        return Packets(**{name: int(getattr(self._tap.count_of, name)) for name in Packets.__dataclass_fields__})

    @property
    def refused_with(self) -> int:
        """errno of the last packet that the kernel refused; 0: there was none."""
        return int(self._tap.refused_with)

    def close(self) -> None:
        """See `Shape`."""
        self._place.close()
