"""A domain's own end of tracing: logs events into a sink, which is a ring to another domain or a file.

    tracer = Tracer(sink)
    tracer.instant("cache miss", b"page 12")
    with tracer.slice("fill"):
        ...
    endpoint.trace = tracer.endpoint("echo")        # what the endpoint does is logged too

Any thread may log. Depends on idc.trace.events and idc.trace.hook.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Final, Protocol, Self

from idc.errors import MisuseError
from idc.trace import events
from idc.trace.events import HEADER, HEADER_BYTES, Kind, Type
from idc.trace.hook import EndpointTrace

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Most lanes of one tracer; the domain itself is the first.
MAX_LANES: Final = 1 << 16
#: Shortest time between two calls of a sink's `due`, ns.
DUE_NS: Final = 250_000_000
_SEQUENCE: Final = 0xFFFFFFFF


class Sink(Protocol):
    """Where encoded events go."""

    def bind(self, buffer: memoryview) -> None:
        """Where every event will lie, at the start; called once."""

    def put(self, length: int) -> bool:
        """Take one whole event of so many bytes, or nothing of it: False if it was dropped. Never raises for what the
        reader did."""

    def due(self, tracer: Tracer, now: int) -> None:
        """Called from time to time, between two events, with the clock: to compare clocks, say."""

    def has_room(self, length: int) -> bool:
        """Whether `put` would take so many bytes; lossless, waits until it would."""

    def await_room(self, length: int) -> bool:
        """Wait a little for room, whatever the mode; whether there is."""

    def dropped(self) -> None:
        """One event was dropped: for who looks on meanwhile. The reader is told among the events."""

    def close(self, tracer: Tracer) -> None:
        """Give everything away. Idempotent."""


class Tracer:
    """Encodes events, numbers them, and counts what was dropped.

    Args:
        sink: owned by the tracer.
        shift: ns that are added to the domain's monotonic clock, for tests.

    Attributes:
        sequence: events logged so far, those that were dropped included.
        dropped: how many were.
        lock: held while something is logged.
        shift: see above.
    """

    def __init__(self, sink: Sink, *, shift: int = 0) -> None:
        self.shift = shift
        self.sequence = 0
        self.dropped = 0
        self._sink = sink
        self._put = sink.put
        self._unreported = 0
        self._due = 0
        self._closed = False
        self.lock = threading.RLock()
        self._endpoints: list[EndpointTrace] = []
        self._buffer = memoryview(bytearray(events.EVENT_BYTES))
        sink.bind(self._buffer)
        self._lanes: list[bytes] = []
        self._owed_lanes: list[int] = []
        self.lane("")

    # -- what a domain logs

    def lane(self, name: str) -> int:
        """A new lane, drawn as a row of its own. Raises MisuseError when there are 65,536."""
        with self.lock:
            if len(self._lanes) >= MAX_LANES:
                raise MisuseError(f"more than {MAX_LANES} lanes in one trace")
            text = name.encode("utf-8", "replace")
            events.check_lengths(len(text), 0)
            self._lanes.append(text)
            number = len(self._lanes) - 1
            if number and not self.log(Type.INSTANT, Kind.LANE, number, text):
                self._owed_lanes.append(number)
            return number

    def endpoint(self, name: str) -> EndpointTrace:
        """What an endpoint's `trace` is set to; a lane of that name."""
        trace = EndpointTrace(self, self.lane(name))
        self._endpoints.append(trace)
        return trace

    def instant(self, name: str, data: bytes = b"", *, lane: int = 0, flow: int = 0) -> bool:
        """Something happened. Whether it was logged (False: dropped and counted).

        Raises:
            MisuseError: the name is longer than 255 bytes, or name and data together than 4,096.
        """
        return self.log(Type.INSTANT, Kind.USER, lane, name.encode("utf-8", "replace"), data, flow)

    def begin(self, name: str, data: bytes = b"", *, lane: int = 0, flow: int = 0) -> bool:
        """Something begins; ends nest within a lane. Otherwise as `instant`."""
        return self.log(Type.BEGIN, Kind.USER, lane, name.encode("utf-8", "replace"), data, flow)

    def end(self, *, lane: int = 0) -> bool:
        """What was begun last in the lane ends."""
        return self.log(Type.END, Kind.USER, lane)

    def counter(self, name: str, value: int, *, lane: int = 0) -> bool:
        """A value from now on, 64 bits signed. Raises as `instant`, and MisuseError for a value that does not fit."""
        if not -1 << 63 <= value < 1 << 63:
            raise MisuseError(f"a counter of {value}: 64 bits signed are wanted")
        return self.log(Type.COUNTER, Kind.USER, lane, name.encode("utf-8", "replace"), events.COUNTER.pack(value))

    @contextlib.contextmanager
    def slice(self, name: str, data: bytes = b"", *, lane: int = 0) -> Iterator[None]:
        """`begin` and `end` around a block."""
        self.begin(name, data, lane=lane)
        try:
            yield
        finally:
            self.end(lane=lane)

    def flush(self) -> None:
        """Give away what endpoints noted and files hold back."""
        with self.lock:
            for each in self._endpoints:
                each.drain()
            self._sink.due(self, self.clock())

    def report(self) -> None:
        """Say what was dropped, if there comes room for that in time. For a sink that logs something as it closes."""
        if self._unreported and self._sink.await_room(HEADER_BYTES):
            self._settle(0)

    def close(self) -> None:
        """Give away what is there, drops included, and end. Idempotent; what is logged later is dropped."""
        with self.lock:
            if not self._closed:
                for each in self._endpoints:
                    each.drain()
                self.report()
                self._sink.close(self)
                self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- for the library

    def clock(self) -> int:
        """The domain's monotonic clock, ns."""
        return time.monotonic_ns() + self.shift

    def log(self, type_: int, kind: int, lane: int, name: bytes = b"", data: bytes | memoryview = b"", flow: int = 0,
            detail: int = 0, value: int = 0, at: int | None = None) -> bool:
        """One event of any form. Raises MisuseError for lengths that do not fit."""
        events.check_lengths(len(name), len(data))
        length = len(name) + len(data)
        with self.lock:
            now = self.clock() if at is None else at
            buffer, end = self._buffer, HEADER_BYTES + length
            if self._unreported and not self._settle(end):
                return self._drop()
            HEADER.pack_into(buffer, 0, now, flow, self.sequence & _SEQUENCE, lane, type_, kind, length, len(name),
                             detail, value)
            buffer[HEADER_BYTES:HEADER_BYTES + len(name)] = name
            buffer[HEADER_BYTES + len(name):end] = data
            if self._closed or not self._put(end):
                return self._drop()
            self.sequence += 1
            if now >= self._due:
                self._due = now + DUE_NS
                self._sink.due(self, now)
            return True

    def _drop(self) -> bool:
        self.dropped += 1
        self._unreported += 1
        self.sequence += 1
        self._sink.dropped()
        return False

    def _settle(self, then: int) -> bool:
        """Once there is room for that and `then` bytes more: say how many were dropped, and name the lanes whose names
        were."""
        if self._closed or not self._sink.has_room(HEADER_BYTES + then):
            return False
        HEADER.pack_into(self._buffer, 0, self.clock(), 0, self.sequence & _SEQUENCE, 0, Type.INSTANT, Kind.DROPPED, 0,
                         0, 0, min(self._unreported, _SEQUENCE))
        if not self._put(HEADER_BYTES):
            return False
        self.sequence += 1
        self._unreported = 0
        while self._owed_lanes:
            number = self._owed_lanes.pop()
            if not self.log(Type.INSTANT, Kind.LANE, number, self._lanes[number]):
                self._owed_lanes.append(number)
                return False
        return True
