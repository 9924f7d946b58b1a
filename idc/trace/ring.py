"""Events into a byte channel of a shared region; the other side of it is idc.trace.record.

Lossless, the writer waits while the ring is full, as long as the connection stands: a back end that stands still holds
the domain up. Lossy, what does not fit is dropped and counted. When the connection is over everything is dropped, in
both modes, and `reason` says why; tracing never fails what is traced.

The clocks of both sides are compared over the same channel: a PING among the events, its answer the other way, and a
SYNC among the events with the four times of it. Depends on idc.channel and idc.trace.events.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from idc._core import ffi, lib
from idc.errors import BackPressuredError, DisconnectedError, MisuseError, TimedOutError
from idc.trace import events
from idc.trace.events import PONG, Kind, Type

if TYPE_CHECKING:
    from idc.bytestream import ByteSender
    from idc.channel import ByteChannel
    from idc.trace.tracer import Tracer

#: Least bytes of a ring: a few of the longest events.
LEAST_RING: Final = 32 << 10
#: Comparisons of the clocks at the start and at the end, and each time the tracer is due.
FIRST, LAST, EACH = 8, 4, 1
#: Seconds for which an answer is awaited; one that comes later is worth less.
PATIENCE: Final = 0.005
#: Seconds that `close` gives the other side to make room for the last count of drops.
LAST_WORDS: Final = 1.0
#: After so many pings without an answer in time, only every 16th is awaited.
PATIENT: Final = 3
#: Pings whose answers may still come.
OUTSTANDING: Final = 16


class SenderSink:
    """Events into a byte ring, whoever takes them out. See `idc.trace.tracer.Sink`; `due` and `close` are its users'.

    Args:
        sender: end of a ring that is connected.
        lossless: see the top of the file.

    Attributes:
        reason: why the connection is over; empty while it stands.

    Raises:
        MisuseError: the ring is too small for the longest event.
    """

    def __init__(self, sender: ByteSender, *, lossless: bool) -> None:
        if sender.size < LEAST_RING:
            raise MisuseError(f"a trace ring of {sender.size} bytes: {LEAST_RING} at least")
        self.reason = ""
        self._sender = sender
        self._lossless = lossless
        self._room = 0
        self._raw = sender._ring
        self._vector = ffi.new("struct idc_part[1]")
        self._length = 0
        self._done = ffi.new("uint64_t *")
        self._buffer = ffi.NULL

    def bind(self, buffer: memoryview) -> None:
        """See there."""
        self._buffer = ffi.from_buffer(buffer)
        self._vector[0].base = ffi.cast("void *", self._buffer)

    def put(self, length: int) -> bool:
        """See there."""
        if length > self._room and not self._find_room(length):
            return False
        if length != self._length:
            self._vector[0].len = self._length = length
        # All of it goes at once: there is room, which only this side takes.
        if (rc := lib.idc_bytes_write(self._raw, self._vector, 1, 0, 0, self._done)) != 0:
            self._over(str(self._sender._fail(rc)))
            return False
        self._room -= length
        return True

    def has_room(self, length: int) -> bool:
        """See there."""
        return length <= self._room or self._find_room(length)

    def _find_room(self, length: int) -> bool:
        """Whether there is room; lossless, waits for it. Never while the connection is over."""
        if self.reason:
            return False
        try:
            self._room = self._sender.available()
            while self._room < length and self._lossless:
                try:
                    self._sender.reserve(self._sender.size // 4, timeout=1.0).release()
                except TimedOutError:
                    self._look()
                finally:
                    self._room = self._sender.available()
        except DisconnectedError as error:
            self._over(str(error))
        return self._room >= length

    def _look(self) -> None:
        """Waiting for room, from time to time: raise DisconnectedError if there is a sign that none will come."""

    def dropped(self) -> None:
        """See `Sink`."""

    def _over(self, reason: str) -> None:
        self.reason = self.reason or reason
        self._room = 0

    def await_room(self, length: int, timeout: float = LAST_WORDS) -> bool:
        """Wait for room in either mode, up to `timeout` seconds."""
        if not self.reason and self._room < length:
            try:
                self._sender.reserve(length, timeout=timeout).release()
                self._room = self._sender.available()
            except TimedOutError:
                return False
            except DisconnectedError as error:
                self._over(str(error))
        return self._room >= length


class RingSink(SenderSink):
    """Into a channel of a shared region.

    Args:
        channel: connected; closed with the sink.
        lossless: see the top of the file.

    Raises:
        MisuseError: the ring is too small for the longest event.
    """

    def __init__(self, channel: ByteChannel, *, lossless: bool) -> None:
        super().__init__(channel.sender, lossless=lossless)
        self._channel = channel
        self._answers = bytearray()
        self._sent: dict[int, int] = {}
        self._pings = 0
        self._missed = 0
        self._synced = False

    def dropped(self) -> None:
        """See `Sink`: `testbed top` shows it beside the channel."""
        self._channel.trips.dropped(1)

    def due(self, tracer: Tracer, now: int) -> None:
        """See there: compares the clocks."""
        del now
        if self.reason:
            return
        if not self._synced:
            self._synced = True
            self.synchronise(tracer, FIRST)
        else:
            self.synchronise(tracer, EACH)

    def synchronise(self, tracer: Tracer, count: int) -> None:
        """Compare the clocks so many times; see PATIENCE for how long that takes at most."""
        for _ in range(count):
            if self.reason:
                return
            self._pings += 1
            if len(self._sent) >= OUTSTANDING:
                del self._sent[min(self._sent)]
            self._sent[self._pings & 0xFFFFFFFF] = sent = tracer.clock()
            if not tracer.log(Type.INSTANT, Kind.PING, 0, value=self._pings & 0xFFFFFFFF, at=sent):
                return
            try:
                self._channel.ring_peer()  # who records sleeps until there is more to write than this
                wait = self._missed < PATIENT or self._pings % 16 == 0
                self._missed = 0 if self._answered(tracer, PATIENCE if wait else 0.0) else self._missed + 1
            except DisconnectedError as error:
                self._over(str(error))

    def _answered(self, tracer: Tracer, patience: float) -> bool:
        """Take the answers that are there, and wait for that to the last ping. Whether it came."""
        piece = bytearray(16 * PONG.size)
        try:
            count = self._channel.receiver.read_into(piece, PONG.size, timeout=patience)
        except (TimedOutError, BackPressuredError) as error:
            count = error.done
        received = tracer.clock()
        self._answers += piece[:count]
        last = False
        while len(self._answers) >= PONG.size:
            number, came, left = PONG.unpack_from(self._answers)
            del self._answers[:PONG.size]
            sent = self._sent.pop(number, None)
            if sent is not None:  # else nobody asked: whoever records means ill, or it is very late
                last = last or number == self._pings & 0xFFFFFFFF
                tracer.log(Type.INSTANT, Kind.SYNC, 0, data=events.SYNC.pack(sent, received, came, left))
        return last

    def close(self, tracer: Tracer) -> None:
        """See there. Lossy, it waits up to LAST_WORDS seconds for room to say what was dropped."""
        if self._buffer == ffi.NULL:
            return
        if not self.reason:
            self.synchronise(tracer, LAST)
            tracer.report()  # of those as well
        self._over("closed")
        self._channel.close()
        self._buffer = ffi.NULL
