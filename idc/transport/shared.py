"""Frames over a message channel of a shared region: between VMs, or host processes, that are members of it.

A frame is one message of the ring; its slot count and slot size bound what the endpoints' quotas may be. The peer is
there when the host says so in its live word; a connection is one pair of epochs. Depends on idc.channel and below.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from idc import layout
from idc._core import ffi, lib
from idc.bell import Waker
from idc.channel import RECHECK, MessageChannel
from idc.errors import DisconnectedError, MisuseError, ProtocolError, TooBigError
from idc.ring import DEFAULT_SPIN, load_u64
from idc.transport.base import Masking

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from idc.region import Region
    from idc.trace.hook import EndpointTrace

#: Seconds for which a closed side waits for the peer to notice before it opens again: opening wipes what is unread.
LINGER = 0.1
#: Bytes of a slot that hold no frame: the ring's own word.
SLOT_HEADER = 8
#: Frames taken at a time, at most.
BATCH = 64
#: What a full ring means.
FULL = "the peer does not take what it has asked for: the ring is full"
#: From here on up it was more than one frame that came, see idc_line_next.
SEVERAL = 1 << 32
_call, _post, _send, _unpack = lib.idc_line_call, lib.idc_line_post, lib.idc_line_send, ffi.unpack
_next, _notify = lib.idc_line_next, lib.idc_line_notify
_AGAIN, _TIMEOUT, _INTR, _DUE = lib.IDC_AGAIN, lib.IDC_TIMEOUT, lib.IDC_INTR, lib.IDC_DUE
_OTHER = lib.IDC_OTHER
_new = ffi.new_allocator(should_clear_after_alloc=False)  # large, and seldom used beyond its beginning


class SharedCarrier:
    """See `idc.transport.base.Carrier`.

    Attributes:
        channel: that it goes over, for who moves frames of it in the core (`idc.endpoint.engine`).
    """

    near = True
    flushes = False

    def __init__(self, channel: MessageChannel) -> None:
        self.capacity = channel.entry.slots
        self.frame_bytes = channel.sender.max_message
        self.flows = channel.flows
        self.trips = channel.trips
        self.channel = channel
        self.flush: Callable[[], None] = channel.sender.flush
        self._sender, self._receiver = channel.sender, channel.receiver
        self._tx, self._rx = channel.sender._ring, channel.receiver._ring
        most = min(BATCH, self.capacity)
        self._room = ffi.new("char[]", self.frame_bytes)
        self._status = self._room + lib.IDC_HEAD
        self._many = _new("char[]", most * self.frame_bytes)
        self._lens = ffi.new("uint32_t[]", most)
        # Before a trace has heard of the connection nothing may be noted, so what came with HELLO is left for later.
        self.line = self._line = ffi.new("struct idc_line *", {
            "tx": self._tx, "rx": self._rx, "buf": self._room, "cap": self.frame_bytes, "many": self._many,
            "many_cap": most * self.frame_bytes, "lens": self._lens, "most": most})
        self._timeout, self._timeout_ns = 0.0, 0  # the last one that was asked for
        self._trace: EndpointTrace | None = None
        # A part of the ring's own memory, which lives as long as that is held.
        self.rings = self._tx.count
        self.closed = False
        self.closed_at = 0.0
        self._masked = 0

    def post(self, frame: bytes, body: bytes = b"") -> None:
        """See there. A full ring is the peer's fault: honest quotas leave room for every frame."""
        if body:
            frame = frame + body
        if self.closed or _post(self._line, frame, len(frame)) < 0:
            self._refused(frame)

    def _refused(self, frame: bytes) -> None:
        if self._trace is not None and not self.closed:
            self._trace.drain()  # there was no room for the moment
            if _post(self._line, frame, len(frame)) >= 0:
                return
        if not self._sender.post(frame):  # which says why, if it is not the peer's fault
            raise ProtocolError(FULL)

    def send(self, frame: bytes, body: bytes = b"") -> None:
        """See there."""
        if body:
            frame = frame + body
        if self.closed or (rc := _send(self._line, frame, len(frame))) < 0:
            self._refused(frame)
            with contextlib.suppress(DisconnectedError):
                self.flush()
        elif rc > 0 and self._trace is not None:
            self._trace.drain()

    def exchange(self, frame: bytes, body: bytes, timeout: float) -> bytes | Sequence[bytes]:
        """See there."""
        if self.closed:
            self._sender.flush()  # which says so
        if type(body) is not bytes:
            body = bytes(body)
        line = self._line
        if timeout != self._timeout:
            self._timeout, self._timeout_ns = timeout, max(int(timeout * 1e9), 0)  # less is for ever, to the core
        rc = _call(line, frame, body, len(body), self._timeout_ns)
        if rc >= 0:
            return _unpack(self._status, rc)  # type: ignore[no-any-return]
        if rc == _OTHER:
            frame = _unpack(self._room, line.len)
            taken = not line.other  # by a signal's handler
            line.posted = line.other = 0
            return () if taken else (frame,)
        if rc == _DUE:
            if (trace := self._trace) is not None:
                trace.drain()
            return self.exchange(frame, body, timeout)
        if rc == _AGAIN and not line.posted:
            raise ProtocolError(FULL)
        if rc == lib.IDC_EINVAL or not line.posted:
            raise self._sender._fail(rc)
        line.posted = 0
        return ()

    @property
    def posted(self) -> bool:
        """See there."""
        return bool(self._line.posted)

    def traced(self, trace: EndpointTrace | None) -> bool:
        """See there: the core does."""
        self._trace = trace
        if trace is None:
            self._line.log = ffi.NULL
            self.flush = self._sender.flush
        else:
            self._line.log = trace.log
            self.flush = self._flush_traced
        return True

    def _flush_traced(self) -> None:
        if self.closed:
            self._sender.flush()  # which says so
        if (rc := _notify(self._line)) == _DUE and self._trace is not None:
            self._trace.drain()
        elif rc not in (lib.IDC_OK, _DUE):
            raise self._sender._fail(rc)

    def take(self, timeout: float) -> Sequence[bytes]:
        """See there. The first frame of all comes alone. A signal that is handled meanwhile has it wait anew."""
        if self.closed:
            self._sender.flush()  # which says so
        if timeout != self._timeout:
            self._timeout, self._timeout_ns = timeout, max(int(timeout * 1e9), 0)  # less is for ever, to the core
        rc = _next(self._line, self._timeout_ns)
        if 0 <= rc < SEVERAL:
            return (_unpack(self._many, rc),)
        return self._taken(rc, timeout)

    def _taken(self, rc: int, timeout: float) -> Sequence[bytes]:
        """Several, or none."""
        end = time.monotonic() + timeout
        while rc < 0:
            if rc in (_AGAIN, _TIMEOUT):
                return ()
            if rc not in (_INTR, _DUE):
                error = self._receiver._fail(rc)
                raise ProtocolError(str(error)) if isinstance(error, TooBigError) else error
            if self._trace is not None:
                self._trace.drain()
            rc = _next(self._line, int(max(end - time.monotonic(), 0.0) * 1e9))
        lens = _unpack(self._lens, (rc >> 32) + 1)
        whole, at, frames = _unpack(self._many, sum(lens)), 0, []
        for length in lens:
            frames.append(whole[at:at + length])
            at += length
        return frames

    def spin(self, seconds: float) -> None:
        """How long it polls before it sleeps, from now on."""
        self._sender.spin = self._receiver.spin = seconds
        self._line.spin_ns = self._receiver._spin_ns

    def arm(self) -> bool:
        """See there."""
        self.channel.show()
        return self.channel.receiver.arm()

    def close(self) -> None:
        """See there."""
        if not self.closed:
            self._masked = self.masking.times
            self.closed, self.closed_at = True, time.monotonic()
            self.channel.close()

    @property
    def position(self) -> int:
        """Frames taken so far, by whatever way."""
        return 0 if self.closed else self.channel.receiver.position

    @property
    def masking(self) -> Masking:
        """What `take` did about a peer that rings without end."""
        if self.closed:
            return Masking(self._masked, False)
        receiver = self.channel.receiver
        return Masking(receiver.counters.masked, receiver.masked)

    @property
    def unread(self) -> bool:
        """Whether the peer has not noticed the end yet, and may still be reading what was posted before."""
        return self.channel.peer_stays


class SharedPort:
    """See `idc.transport.base.Port`.

    Args:
        region: mapped by this member.
        channel: a message channel of it, of which this member is an end.
        spin: seconds to poll before sleeping; see `idc.ring`.
        release: called once when the port is closed; by default the region is closed.

    Attributes:
        channel: its name.
        peer: name of the member at the other end.

    Raises:
        NotConnectedError: the region has no such channel for this member.
    """

    def __init__(self, region: Region, channel: str, *, spin: float = DEFAULT_SPIN,
                 release: Callable[[], None] | None = None) -> None:
        self.regions = (region,)
        self._region = region
        self._spin = spin
        self._release = region.close if release is None else release
        self._channel: MessageChannel | None = None
        self._current: SharedCarrier | None = None
        entry = MessageChannel.entry_of(region, channel)
        peer = entry.member_b if region.member == entry.member_a else entry.member_a
        self.channel = channel
        self.peer = region.header.members[peer].name
        self._presence = region.header.members[peer].word_offset
        self._waker = Waker(region.events[entry.data_vector])
        self._masked = 0
        self.frame_bytes = entry.slot_size - SLOT_HEADER
        self._closed = False

    @property
    def region(self) -> Region:
        """Where it meets its peer; closed with the last of the ports that share it."""
        return self._region

    @property
    def spin(self) -> float:
        """Seconds to poll before sleeping, of this connection and of those to come."""
        return self._spin

    @spin.setter
    def spin(self, seconds: float) -> None:
        self._spin = seconds
        if self._current is not None and not self._current.closed:
            self._current.spin(seconds)

    def look(self) -> bool:
        """See there. Opens this side, so that the other one sees it.

        A process that is killed while its VM lives leaves its side open: it counts as there, and does not connect.
        """
        present = layout.split_member_word(load_u64(self._region.memory, self._presence))[1]
        if self._current is not None and not self._current.closed:
            return present
        if self._channel is not None and not self._channel.intact:
            self._channel.close()  # another wrote over this side's words: as they are, they connect to nobody
            self._channel = None
        if self._channel is None:
            last = self._current
            if last is not None and last.unread and time.monotonic() < last.closed_at + LINGER:
                return False
            self._channel = MessageChannel.begin(self._region, self.channel)
        return present and self._channel.peer_open

    def connection(self) -> SharedCarrier | None:
        """See there."""
        if self._channel is None or not self._channel.advance():
            return None
        channel, self._channel = self._channel, None
        if self._current is not None:
            self._masked += self._current.masking.times
        self._current = SharedCarrier(channel)
        self._current.spin(self._spin)
        return self._current

    def wait(self, timeout: float) -> None:
        """See there. Looks again after RECHECK seconds: a doorbell rung before the vectors were armed is lost."""
        self._waker.wait(min(timeout, RECHECK), 0 if self._current is None else self._current.position)

    def fileno(self) -> int:
        """See there."""
        return self._waker.fileno()

    @property
    def masking(self) -> Masking:
        """See there."""
        count, now = self._waker.count + self._masked, self._waker.masked
        if self._current is not None:
            count, now = count + self._current.masking.times, now or self._current.masking.now
        return Masking(count, now)

    @property
    def patience(self) -> float | None:
        """See there."""
        return self._waker.patience

    def close(self) -> None:
        """See there."""
        if self._closed:
            return
        self._closed = True
        for channel in (self._channel, self._current):
            if channel is not None:
                channel.close()
        self._waker.close()
        self._release()


class Regions:
    """Regions that several ports of this process share: a member joins its region once, whatever it does in there.

    Args:
        join: opens the region of that name.
    """

    def __init__(self, join: Callable[[str], Region]) -> None:
        self._join = join
        self._open: dict[str, tuple[Region, int]] = {}

    def port(self, address: str) -> SharedPort:
        """A port for REGION/CHANNEL. Raises MisuseError for another form, NotConnectedError, and what `join` raises."""
        name, slash, channel = address.rpartition("/")
        if not slash or not name or not channel:
            raise MisuseError(f"address {address!r} of a channel: REGION/CHANNEL is wanted")
        region, users = self._open.get(name) or (self._join(name), 0)
        self._open[name] = region, users + 1
        try:
            return SharedPort(region, channel, release=lambda: self._release(name))
        except BaseException:
            self._release(name)
            raise

    def _release(self, name: str) -> None:
        region, users = self._open[name]
        if users > 1:
            self._open[name] = region, users - 1
        else:
            del self._open[name]
            region.close()
