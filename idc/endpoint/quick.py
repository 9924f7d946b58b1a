"""Usual transactions in one call of the core each: what that leaves behind when it was not so usual.

What may go this way is decided by the endpoint; whoever looks at the session, or changes it, first takes back what the
core holds (`Session.settle`, `Slots.unquicken`). Depends on idc._core.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from idc._core import ffi, lib

if TYPE_CHECKING:
    from collections import deque

    from idc._core import Pointer
    from idc.endpoint.frames import Quotas
    from idc.observed import Trips
    from idc.transport.base import Frame

#: Results of the core after which there is nothing to take, and nothing else to say.
NOTHING: Final = frozenset((lib.IDC_AGAIN, lib.IDC_TIMEOUT))
INTERRUPTED: Final = lib.IDC_INTR
#: Seconds that a transaction waits for its answer in the core; then the other threads of its `Caller` have their turn.
PATIENCE: Final = 0.1


def prepare(line: Pointer, accepts: Quotas, peer: Quotas, trips: Trips | None) -> None:
    """Tell the core what both sides accept, and where it notes how long transactions take."""
    line.parameter_bytes, line.status_bytes = accepts.parameter_bytes, accepts.status_bytes
    line.peer_parameter_bytes, line.peer_status_bytes = peer.parameter_bytes, peer.status_bytes
    line.trips = ffi.NULL if trips is None else trips.struct
    line.patience_ns = int(PATIENCE * 1e9)
    line.holds = line.posted = line.other = line.got = 0


def bodies(line: Pointer) -> tuple[Pointer, Pointer]:
    """Where the parameters of a request are, and the status of an answer."""
    return ffi.cast("char *", line.many) + lib.IDC_HEAD, ffi.cast("char *", line.buf) + lib.IDC_HEAD


def give_back(line: Pointer, inbox: deque[Frame]) -> None:
    """Take what the core has received for the session, in order: what it found, or a request that nobody was told of.

    Whatever interrupts this, a frame is in one place: from the look at the line to `extend` no signal is handled.
    """
    frames: list[bytes] = []
    if line.holds or line.got:
        lens = ffi.unpack(line.lens, line.got or 1)
        whole, at = ffi.unpack(ffi.cast("char *", line.many), sum(lens)), 0
        for length in lens:
            frames.append(whole[at:at + length])
            at += length
    if line.other:
        frames.append(ffi.unpack(ffi.cast("char *", line.buf), line.len))
    if line.holds or line.got or line.other:  # unless a signal's handler took them meanwhile
        line.holds = line.got = line.other = 0
        inbox.extend(frames)
