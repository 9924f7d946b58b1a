"""What a side of a channel shows to observers beside the counters of its rings: how long transactions take, and drops.

A copy in the channel block (docs/protocol.md, section 3.1) for who maps the region and looks on, as `testbed top` does.
No peer reads it. Depends on idc._core, idc.layout and idc.words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from idc._core import ffi, lib
from idc.layout import SIDE_RECORD_BYTES
from idc.words import pin

if TYPE_CHECKING:
    from idc._core import Pointer
    from idc.words import Memory


class Trips:
    """The record of one side, of one connection.

    Args:
        memory: of the region; writable.
        offset: of the record's 256 bytes, a multiple of 8.

    Attributes:
        struct: for the core.
    """

    def __init__(self, memory: Memory, offset: int) -> None:
        self._pinned: Pointer | None = pin(memory, offset, SIDE_RECORD_BYTES, 8)
        self.struct: Pointer = ffi.new("struct idc_trips *")
        lib.idc_trips_observe(self.struct, self._pinned + offset)

    def took(self, ns: int) -> None:
        """A transaction of this side took so long, from its submission to its answer."""
        lib.idc_trip(self.struct, max(ns, 0))

    def dropped(self, count: int) -> None:
        """So many things were dropped at this side."""
        lib.idc_dropped(self.struct, count)

    def close(self) -> None:
        """Let go of the memory: what is noted from now on stays private. Idempotent."""
        if self._pinned is not None:
            self.struct.observed = ffi.NULL
            ffi.release(self._pinned)
            self._pinned = None
