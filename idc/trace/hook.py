"""What an endpoint tells of itself while it is traced: states, transactions, doorbells.

An endpoint's `trace` is None or one of these. On the path of a transaction a moment is only noted, in `append`; it
becomes an event once the peer was woken, while the endpoint would wait for it anyway. A flow joins what both ends log
of one submission: both derive it from what identifies the connection at either end (`Carrier.flows`), the tag and the
frame's kind; no frame says more for it. Depends on idc.trace.events.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from idc.trace.events import NAME_BYTES, Kind, Type

if TYPE_CHECKING:
    from idc.trace.tracer import Tracer
    from idc.transport.base import Carrier

_MASK: Final = (1 << 64) - 1
#: Odd, and its multiples lie far apart: tags of one connection never meet, those of two only by chance.
_STEP: Final = 0x9E3779B97F4A7C15
#: A request about a remote buffer, whichever: its answer does not say, and all of them share their tags.
ASK: Final = 13
_MESSAGE, _DONE, _REQUEST, _REPLY, _FIRST_ASK = 2, 3, 4, 5, 7
#: What a moment is: a frame is about to be posted, or was received.
POSTED, RECEIVED = 0, 1
Moment = tuple[int, int, int, int]
_BEGIN, _END = int(Type.BEGIN), int(Type.END)
#: (what, frame's kind) of a moment to (type, kind, frame's kind of what was submitted, whose flow: 0 own, 1 peer's).
_MEANS: Final[dict[tuple[int, int], tuple[int, int, int, int]]] = {
    **{(POSTED, kind): (_BEGIN, int(Kind.SUBMIT), kind if kind < _FIRST_ASK else ASK, 0)
       for kind in (_MESSAGE, _REQUEST, *range(_FIRST_ASK, ASK))},
    **{(RECEIVED, kind): (_BEGIN, int(Kind.HANDLE), kind if kind < _FIRST_ASK else ASK, 1)
       for kind in (_MESSAGE, _REQUEST, *range(_FIRST_ASK, ASK))},
    **{(POSTED, answer): (_END, int(Kind.ANSWER), kind, 1)
       for answer, kind in ((_DONE, _MESSAGE), (_REPLY, _REQUEST), (ASK, ASK))},
    **{(RECEIVED, answer): (_END, int(Kind.COMPLETE), kind, 0)
       for answer, kind in ((_DONE, _MESSAGE), (_REPLY, _REQUEST), (ASK, ASK))},
}


class EndpointTrace:
    """One endpoint's lane. Made by `Tracer.endpoint`.

    Attributes:
        append: notes a moment: (time by the monotonic clock in ns, POSTED or RECEIVED, frame's kind, tag).
    """

    def __init__(self, tracer: Tracer, lane: int) -> None:
        self._tracer = tracer
        self._lane = lane
        self._flows = (0, 0)
        self._rung = 0
        self._state = ""
        self._moments: list[Moment] = []
        self.append = self._moments.append

    def connected(self, carrier: Carrier) -> None:
        """A connection begins: what its flows are derived from."""
        self.drain()
        self._flows = carrier.flows
        self._rung = carrier.doorbells

    def state(self, name: str, reason: str) -> None:
        """The endpoint's state is this, and its last connection ended for that reason."""
        self.drain()
        before, self._state = self._state, name
        if name == before:
            return
        kind, data = Kind.CONNECT if name == "connected" else Kind.STATE, b""
        if before == "connected":
            kind, data = Kind.DISCONNECT, reason.encode("utf-8", "replace")[:NAME_BYTES]
        self._tracer.log(Type.INSTANT, kind, self._lane, name.encode(), data)

    def flushed(self, carrier: Carrier) -> None:
        """The peer was woken for what was posted: the time to make events of moments, and of a doorbell if it rang."""
        self.drain()
        rung = carrier.doorbells
        if rung != self._rung:
            count, self._rung = rung - self._rung, rung
            self._tracer.log(Type.INSTANT, Kind.DOORBELL, self._lane, value=count & 0xFFFFFFFF)

    def drain(self) -> None:
        """Make events of the moments noted so far."""
        if not self._moments:
            return
        with self._tracer.lock:  # a tracer that is closed drains too, in whatever thread
            moments = self._moments[:]
            del self._moments[:len(moments)]
            made = []
            for time, what, frame, tag in moments:
                if (means := _MEANS.get((what, frame))) is not None:  # else it is for the endpoint to refuse
                    type_, kind, detail, whose = means
                    flow = (self._flows[whose] + (detail << 32 | tag) * _STEP) & _MASK or 1
                    made.append((time, flow, type_, kind, detail, tag))
            self._tracer.batch(self._lane, made)
