"""What an endpoint tells of itself while it is traced: states, transactions, doorbells.

An endpoint's `trace` is None or one of these. On the path of a transaction a moment is only noted, by `note`; many
moments become one event, once the peer was woken or nothing came. What they mean is worked out by who reads it. A flow
joins what both ends log of one submission: both derive it from what identifies the connection at either end
(`Carrier.flows`, in the CONNECT event), the tag and the frame's kind; no frame says more for it.
Depends on idc._core and idc.trace.events.
"""

from __future__ import annotations

import struct
from array import array
from time import monotonic_ns
from typing import TYPE_CHECKING, Final

from idc._core import ffi, lib
from idc.trace.events import FLOWS, NAME_BYTES, Kind, Type

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from idc._core import Pointer
    from idc.trace.events import TraceEvent
    from idc.trace.tracer import Tracer
    from idc.transport.base import Carrier, Rings

_MASK: Final = (1 << 64) - 1
#: Odd, and its multiples lie far apart: tags of one connection never meet, those of two only by chance.
_STEP: Final = 0x9E3779B97F4A7C15
#: A request about a remote buffer, whichever: its answer does not say, and all of them share their tags.
ASK: Final = 13
_MESSAGE, _DONE, _REQUEST, _REPLY, _FIRST_ASK = 2, 3, 4, 5, 7
#: Added to the kind of a frame that was received; one about to be posted has the kind alone.
POSTED, RECEIVED = 0, 64
#: Instead of a kind: the peer was rung, in the place of the tag how many times.
RUNG: Final = 128
#: One in the payload: time, ns; kind of the frame and the above; tag.
MOMENT: Final = struct.Struct("<QQQ")
#: Moments of one event, of which the payload has room for 170, and for how long they may come together, ns.
MANY: Final = 160
LONG: Final = 10_000_000
#: Moments that an endpoint's core can hold: a frame more than these would wait for them to be logged.
ROOM: Final = 256
_BEGIN, _END = int(Type.BEGIN), int(Type.END)
#: Kind of a moment to (type, kind, frame's kind of what was submitted, whose flow: 0 own, 1 peer's).
_MEANS: Final[dict[int, tuple[int, int, int, int]]] = {
    **{POSTED + kind: (_BEGIN, int(Kind.SUBMIT), kind if kind < _FIRST_ASK else ASK, 0)
       for kind in (_MESSAGE, _REQUEST, *range(_FIRST_ASK, ASK))},
    **{RECEIVED + kind: (_BEGIN, int(Kind.HANDLE), kind if kind < _FIRST_ASK else ASK, 1)
       for kind in (_MESSAGE, _REQUEST, *range(_FIRST_ASK, ASK))},
    **{POSTED + answer: (_END, int(Kind.ANSWER), kind, 1)
       for answer, kind in ((_DONE, _MESSAGE), (_REPLY, _REQUEST), (ASK, ASK))},
    **{RECEIVED + answer: (_END, int(Kind.COMPLETE), kind, 0)
       for answer, kind in ((_DONE, _MESSAGE), (_REPLY, _REQUEST), (ASK, ASK))},
}


def expand(event: TraceEvent, flows: tuple[int, int]) -> Iterator[TraceEvent]:
    """The events that a MOMENTS event stands for; what is no moment in it is left out."""
    whole = len(event.data) - len(event.data) % MOMENT.size
    for time, noted, tag in MOMENT.iter_unpack(event.data[:whole]):
        if (means := _MEANS.get(noted)) is not None:
            type_, kind, frame, whose = means
            flow = (flows[whose] + (frame << 32 | tag) * _STEP) & _MASK or 1
            yield event._replace(time=time, flow=flow, type=type_, kind=kind, name=b"", data=b"", detail=frame,
                                 value=tag & 0xFFFFFFFF)
        elif noted == RUNG:
            yield event._replace(time=time, flow=0, type=int(Type.INSTANT), kind=int(Kind.DOORBELL), name=b"", data=b"",
                                 value=tag & 0xFFFFFFFF)


class EndpointTrace:
    """One endpoint's lane. Made by `Tracer.endpoint`.

    Attributes:
        note: notes a moment: (time by the monotonic clock in ns, POSTED or RECEIVED plus the frame's kind, tag).
    """

    def __init__(self, tracer: Tracer, lane: int) -> None:
        self._tracer = tracer
        self._lane = lane
        self._flows = (0, 0)
        self._carrier: Carrier | None = None
        self._rings: Rings | None = None
        self._rung = 0
        self._state = ""
        self._moments: list[int] = []
        self._log = ffi.NULL
        self._log_memory = ffi.NULL
        self.note: Callable[[tuple[int, int, int]], None] = self._moments.extend

    @property
    def log(self) -> Pointer:
        """A `struct idc_log` (idc/endpoint/transact.h), for who notes moments in the core; `drain` logs them."""
        if self._log == ffi.NULL:
            self._log_memory = ffi.new("uint64_t[]", 3 * ROOM)
            self._log = ffi.new("struct idc_log *", {"moments": self._log_memory, "room": ROOM})
        return self._log

    def connected(self, carrier: Carrier) -> None:
        """A connection begins: what its flows are derived from."""
        self.drain()
        self._flows = carrier.flows
        self._carrier, self._rings = carrier, carrier.rings  # these are a part of that, and live as long
        self._rung = self._rings.doorbells

    def state(self, name: str, reason: str) -> None:
        """The endpoint's state is this, and its last connection ended for that reason."""
        self.drain()
        before, self._state = self._state, name
        if name == before:
            return
        kind, data = Kind.STATE, b""
        if name == "connected":
            kind, data = Kind.CONNECT, FLOWS.pack(*self._flows)
        elif before == "connected":
            kind, data = Kind.DISCONNECT, reason.encode("utf-8", "replace")[:NAME_BYTES]
        self._tracer.log(Type.INSTANT, kind, self._lane, name.encode(), data)

    def flushed(self) -> None:
        """The peer was woken for what was posted: a time to log moments, and a doorbell if it rang."""
        moments = self._moments
        if len(moments) >= 3 * MANY or (moments and moments[-3] - moments[0] > LONG):
            self.drain()
        if (rings := self._rings) is not None and (rung := rings.doorbells) != self._rung:
            moments.extend((monotonic_ns(), RUNG, rung - self._rung))
            self._rung = rung

    def add(self, moments: memoryview) -> None:
        """Log moments that the core has noted, which are as in the payload."""
        with self._tracer.lock:
            self.drain()  # those before
            self._add(moments)

    def _add(self, moments: memoryview) -> None:
        if (shift := self._tracer.shift) != 0:
            moments = memoryview(b"".join(MOMENT.pack(time + shift, kind, tag) for time, kind, tag in
                                          MOMENT.iter_unpack(moments)))
        for at in range(0, len(moments), MANY * MOMENT.size):
            self._tracer.log(Type.INSTANT, Kind.MOMENTS, self._lane, b"", moments[at:at + MANY * MOMENT.size])

    def _drain_log(self) -> None:
        """What the core has noted, also while it goes on: whoever uses the endpoint may be in another thread."""
        log = self._log
        with self._tracer.lock:
            taken, noted = log.taken, lib.idc_load64(ffi.addressof(log, "noted"))
            whole = memoryview(ffi.buffer(self._log_memory))
            while taken < noted:
                at = taken % ROOM
                count = min(noted - taken, ROOM - at, MANY)
                run = bytes(whole[at * MOMENT.size:(at + count) * MOMENT.size])
                taken += count
                lib.idc_store64(ffi.addressof(log, "taken"), taken)  # first: who is interrupted logs nothing twice
                self._add(memoryview(run))

    def drain(self) -> None:
        """Log the moments noted so far."""
        if self._log != ffi.NULL:
            self._drain_log()
        if not self._moments:
            return
        with self._tracer.lock:  # a tracer that is closed drains too, in whatever thread
            moments = self._moments[:]
            del self._moments[:len(moments)]
            if (shift := self._tracer.shift) != 0:
                moments[::3] = [time + shift for time in moments[::3]]
            for at in range(0, len(moments), 3 * MANY):
                some = moments[at:at + 3 * MANY]
                self._tracer.log(Type.INSTANT, Kind.MOMENTS, self._lane, b"", bytes(array("Q", some)))
