"""Messages in the core, over a carrier whose frames the core moves: see idc/endpoint/lane.h. For `idc.endpoint.stream`.

From its making to the end of the connection the endpoint is pumped only for what the lane leaves to it: the frames of
messages are the lane's. Depends on idc._core, idc.endpoint.endpoint and idc.transport.tcp.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from idc._core import ffi, lib
from idc.endpoint.blocking import NAP
from idc.endpoint.lifecycle import State
from idc.transport.tcp import LONG, TcpCarrier

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Sequence

    from idc.endpoint.endpoint import Endpoint
    from idc.endpoint.session import IncomingMessage
    from idc.errors import DisconnectedError

_send, _take, _done, _read = lib.idc_lane_send, lib.idc_lane_take, lib.idc_lane_done, lib.idc_lane_read
NULL, HEAD = ffi.NULL, lib.IDC_WIRE_HEAD
_OK, _AGAIN, _WANT = lib.IDC_OK, lib.IDC_AGAIN, lib.IDC_LANE_WANT
_MESSAGE, _OTHER = lib.IDC_LANE_MESSAGE, lib.IDC_LANE_OTHER
_ALL, _KEEP, _ELSE = lib.IDC_LANE_ALL, lib.IDC_LANE_KEEP, lib.IDC_LANE_ELSE
_TIMEOUT, _unpack = lib.IDC_TIMEOUT, ffi.unpack


def lane_of(endpoint: Endpoint, messages: deque[IncomingMessage], queue: deque[bytes]) -> Lane | None:
    """One for an endpoint that is connected; None where its frames are not the core's to move.

    Args:
        endpoint: the stream's.
        messages: what came before, and with the peer's greeting, not completed yet, in order: emptied, for the lane
            completes them.
        queue: their bodies, and of all that `Lane.take` gives: what is nobody's as a signal raises goes there.
    """
    carrier = endpoint._carrier
    if type(carrier) is not TcpCarrier or endpoint.state is not State.CONNECTED:
        return None
    if endpoint._inbox:
        endpoint.pump(0.0)
    session = endpoint._session
    usual = endpoint.trace is None and endpoint._party is None and endpoint.outstanding == 0
    if session is None or not usual or session.held != len(messages):
        return None
    lane = Lane(endpoint, carrier, [message._tag for message in messages], queue)
    session.held_elsewhere(())
    messages.clear()
    endpoint._hold()
    endpoint._core = None  # what comes is the lane's to read, also while the endpoint has a frame of it
    return lane


class Lane:
    """Messages each way, in order.

    Attributes:
        longest: bytes that the peer accepts in one.
        core: its C side.
        timeout, ns: see `within`.
    """

    def __init__(self, endpoint: Endpoint, carrier: TcpCarrier, held: Sequence[int], queue: deque[bytes]) -> None:
        mine, peer, own = endpoint.quotas, endpoint.peer_quotas, endpoint._resources.messages.count
        self.longest = peer.parameter_bytes
        self._endpoint = endpoint
        self._carrier = carrier
        self._wire = carrier.wire
        self._chars = carrier._chars
        self._most = min(own, peer.messages)
        self._tags = ffi.new("uint32_t[]", max(self._most, 1))
        self._held = ffi.new("uint32_t[]", max(mine.messages, 1))
        self.core = ffi.new("struct idc_lane *", {
            "wire": carrier.wire, "tags": self._tags, "held": self._held, "base": own, "most": self._most,
            "most_bytes": self.longest, "longest": mine.parameter_bytes, "quota": mine.messages, "holds": len(held)})
        self._held[0:len(held)] = held
        self._parts: list[bytes] = []
        self._queue = queue
        self._cut = False  # the first of the queue is a piece of what is read in place, and completed by the core
        self.within(None)

    @property
    def outstanding(self) -> int:
        """Messages that the peer has not completed."""
        return int(self.core.outstanding)

    def send(self, body: bytes) -> bool:
        """Send one, of `longest` bytes at most; False if no more may be outstanding, or the connection is over."""
        if self.core.outstanding >= self._most:
            return False
        if len(body) >= LONG:
            self._carrier.lend(body)
        return self.sent(_send(self.core, body, len(body)), body)

    def sent(self, rc: int, body: bytes) -> bool:
        """What a result of `idc_lane_send` asks for: as `send`. A long body was lent."""
        carrier = self._carrier
        if rc > 0 and len(body) >= LONG:
            carrier.lent(body)
        if rc or carrier.lends:
            carrier.settle()
        if rc >= 0:
            return True
        if rc != _AGAIN or self.core.outstanding < self._most:
            self._fail(carrier.refused(rc))
        return False

    def within(self, timeout: float | None) -> None:
        """How long `read` and `idc_lane_read` wait from now on: so long, but not longer than signals can."""
        self.timeout = timeout
        self.ns = int((NAP if timeout is None else min(timeout, NAP)) * 1e9)

    def read(self, most: int) -> bytes | None:
        """The next bytes, `most` at most, of one message, if they come in time and nothing else before.

        Nothing that `take` has given may be uncompleted. What is read to its end here, is completed.
        """
        core, ns = self.core, self.ns
        left = core.left
        if not left:
            since = None if self.timeout is None else time.monotonic_ns()
            rc = _read(core, NULL, 0, 0, ns)
            if rc:
                self.missed(rc)
                return None
            left = core.left
            if since is not None:
                ns = max(ns - (time.monotonic_ns() - since), 0)
        if left > most:
            left = most
        # Written to by the core, before anybody else sees it: to receive it elsewhere would be one more copy.
        body = bytes(left)
        core.got = 0
        try:
            rc = _read(core, body, left, _ALL, ns)
        except BaseException:
            self.cut(body[:core.got])
            raise
        if rc <= 0:
            self.missed(rc)
            return None
        return body if rc == left else body[:rc]

    def cut(self, piece: bytes) -> None:
        """`idc_lane_read` has read it, and a signal raised before anybody was told: whoever reads next gets it."""
        if piece:
            self._cut = True
            self._queue.append(piece)

    def missed(self, rc: int) -> None:
        """Nothing was read: if that is for `take` to see to, it does next. Raises MemoryError."""
        if self.core.owed:
            self._fail(self._carrier.refused(rc))
        elif rc != _ELSE and (error := self._carrier.over(rc)) is not None:
            self._fail(error)

    def _rest(self, ns: int) -> bytes | None:
        """The rest of a message that was read in part, once all of it is here: what is kept is completed as one."""
        core = self.core
        if left := core.left:
            body = bytes(left)
            core.got = 0
            try:
                rc = _read(core, body, left, _ALL | _KEEP, ns)
            finally:
                if core.got:
                    self._parts.append(body[:core.got])
            if rc <= 0:
                self.missed(rc)
            if core.left:
                return None
        whole = b"".join(self._parts)
        self._parts = []
        core.kept = 0
        return whole

    def take(self, timeout: float) -> bytes | None:
        """The next message, or the rest of one that was read in part, if it comes within `timeout` seconds and nothing
        else does before. To be completed."""
        carrier, wire, lane, ns = self._carrier, self._wire, self.core, int(timeout * 1e9)
        if self._endpoint._inbox:  # left there as a signal raised
            self._endpoint.pump(0.0)
            return None
        rc = _take(lane, NULL, ns)
        if rc == _ELSE:
            return self._rest(ns)
        while rc == _WANT:
            # Written to by the core, before anybody else sees it: to receive it elsewhere would be one more copy.
            carrier.body = body = bytes(wire.want)
            rc = _take(lane, body, ns)
        if carrier.lends:
            carrier.settle()
        if rc == _MESSAGE:
            body = carrier.body if wire.apart else _unpack(self._chars + wire.first, lane.len)[HEAD:]
            lane.found, carrier.body = 0, b""  # once there is nothing to interrupt
            return body
        if rc == _OTHER:
            endpoint = self._endpoint
            if endpoint._session is not None:  # for it to judge by: it has not seen them
                endpoint._session.held_elsewhere(
                    lane.held[(lane.first + i) % lane.quota] for i in range(lane.holds))
            head = _unpack(ffi.cast("char *", wire.head), HEAD) if wire.apart else b""
            frame = (head, carrier.body) if wire.apart else _unpack(self._chars + wire.first, lane.len)
            lane.found, carrier.body = 0, b""
            endpoint._inbox.append(frame)
            endpoint.pump(0.0)
        elif rc < 0 and (error := carrier.over(rc)) is not None:
            self._fail(error)
        return None

    def done(self) -> None:
        """Complete the oldest message, whose body was the first of the queue. A connection that is over, `take` finds;
        a peer that does not read ends it."""
        if self._cut:
            self._cut = False
            return
        if (rc := _done(self.core)) not in (_OK, lib.IDC_PEER):
            self._fail(self._carrier.refused(rc))

    def _fail(self, error: DisconnectedError) -> None:
        if self._endpoint.state is State.CONNECTED:
            self._endpoint._broken = error
            self._endpoint.pump(0.0)  # which draws the consequences
