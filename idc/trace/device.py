"""The device class "trace": programs of the front end's domain log, the back end writes it to its file system.

    program ─▶ its own ring ─▶ front end ══ WRITE transactions ══▶ back end ─▶ a file for each program

A program opens it by `open_tracer("unix:/run/idc/trace-0")`. Its ring is between it and the drivers, so that an event
costs about what it costs in a region, whatever the connection does, and what was logged outlives the program. The front
end compares the clocks of the two domains. Depends on idc.trace and idc.device.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from idc.device import BackDriver, Device, DeviceClass, FrontDriver, Option
from idc.domain import Service
from idc.endpoint import Completion, Endpoint, IncomingTransaction, Quotas, Result
from idc.errors import MisuseError, ProtocolError
from idc.trace import events, relay
from idc.trace.events import SYNC, Kind, TraceEvent, Type
from idc.trace.local import Inlet
from idc.trace.relay import Ask, Fault, Op
from idc.trace.store import DIRECTORY, MOST_BYTES, FullError, StoreWriter
from idc.trace.streams import Program, Stream
from idc.transport.unix import listen

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

#: Programs that log at a time; more wait.
PROGRAMS: Final = 16
#: Streams that a back end has open: of those, and some of which it does not know yet that their front end died.
STREAMS: Final = 64
#: Comparisons of the clocks when the ends meet, and at the end; seconds between others while programs log.
FIRST, LAST = 8, 4
EVERY: Final = 1.0
#: Seconds that the front end has, when it is closed, to have all written.
FAREWELL: Final = 10.0
#: Seconds after which a stream is over of which a new connection has said nothing: its front end has died.
FORGET: Final = 30.0

log = logging.getLogger("idc.trace")


class TraceFront(FrontDriver):
    """Takes in what programs log, and passes it on. Raises OSError if its socket cannot be had."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self._lossless = bool(device.options["lossless"])
        self._ring = 1 << int(device.options["ring_kib"]).bit_length() + 9  # the power of two that is no more
        self._path = device.sockets / str(device)
        self._wake = os.eventfd(1, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            self._listener = listen(self._path, PROGRAMS)
        except BaseException:
            os.close(self._wake)
            raise
        self._clocks = Stream()
        self._sequence = 0
        self._programs: list[Program] = []
        self._ending: float | None = None
        self._closed = False
        self._ping_at = 0.0
        self._pings = 0
        self._pinging = False

    # -- the driver

    def fds(self) -> Sequence[int]:
        """See `Driver`."""
        found = []
        if self._taking:
            found.append(self._listener.fileno())
        for program in self._programs:
            found += [program.inlet.event] if program.over else [program.inlet.event, program.inlet.fileno()]
            if not program.inlet.arm():
                found.append(self._wake)  # which is always readable: there is something to do now
        return found

    def work(self) -> bool:
        """See `Driver`."""
        busy = self._accept()
        busy |= self._compare()
        for stream in (*self._programs, self._clocks):
            busy |= stream.fill()
            if self.connected and self.endpoint is not None:
                busy |= stream.send(self.endpoint.submit_transaction)
        for program in tuple(self._programs):
            if program.done:
                if program.refused:
                    log.warning("%s: a program's trace ends: %s", self.device, program.refused)
                program.close()
                self._programs.remove(program)
                busy = True
        if self._programs:
            self._programs.append(self._programs.pop(0))  # each is the first in turn
        if not self._closed and self._ending is not None and (self._over or time.monotonic() >= self._ending):
            self._closed = busy = True
            self._say_lost()
            super().close()
        return busy

    def connect(self, endpoint: Endpoint) -> None:
        """See `Client`."""
        self._pings, self._pinging = max(self._pings, FIRST), False

    def disconnect(self, endpoint: Endpoint, done: Callable[[], None]) -> None:
        """See `Client`. Nothing is forgotten that was not answered."""
        for stream in (*self._programs, self._clocks):
            stream.parted()
        done()

    def close(self) -> None:
        """See `Driver`. All that programs have logged goes to the other side first."""
        if self._ending is None:
            self._ending = time.monotonic() + FAREWELL
            self._listener.close()
            for program in self._programs:
                program.end("the device was detached")
            self._pings = LAST if self.connected else 0

    def drop(self) -> None:
        """See `Driver`."""
        super().drop()
        self._say_lost()
        for program in self._programs:
            program.end("the drivers were ended")
            program.close()
        self._programs.clear()
        self._listener.close()
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1
        with contextlib.suppress(OSError):
            self._path.unlink()

    # -- within

    @property
    def _taking(self) -> bool:
        return self.connected and self._ending is None and len(self._programs) < PROGRAMS

    @property
    def _over(self) -> bool:
        """Whether the other side has all of it, or will never have it."""
        return not self._programs and self._clocks.done

    def _say_lost(self) -> None:
        lost = sum(program.held for program in self._programs)
        if lost:
            log.warning("%s: %d bytes of events were not written, for the other side was away", self.device, lost)

    def _accept(self) -> bool:
        busy = False
        while self._taking:
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionError):
                break
            busy = True
            try:
                self._programs.append(Program(Inlet(connection, self._ring, lossless=self._lossless)))
            except OSError as error:
                connection.close()
                log.warning("%s: a program could not be taken: %s", self.device, error)
        return busy

    # -- clocks: one comparison at a time

    def _compare(self) -> bool:
        if not self.connected or self.endpoint is None or self._pinging:
            return False
        now = time.monotonic()
        if not self._pings:
            if self._ending is not None and not self._programs:
                self._clocks.over = "the device was detached"
            if self._ending is not None or not self._programs or now < self._ping_at:
                return False
            self._pings = 1
        self._ping_at = now + EVERY
        sent = time.monotonic_ns()

        def done(completion: Completion) -> None:
            received = time.monotonic_ns()
            self._pinging = False
            if completion.result is Result.OK and not completion.error:
                self._pings -= 1
                self._note(sent, received, completion.status)

        if self.endpoint.submit_transaction(Ask(Op.PING).pack(), done) is not Result.OK:
            return False
        self._pinging = True
        return True

    def _note(self, sent: int, received: int, status: bytes) -> None:
        if len(status) != relay.TIMES.size:
            return
        came, left = relay.TIMES.unpack(status)
        event = TraceEvent(received, 0, self._sequence & 0xFFFFFFFF, 0, Type.INSTANT, Kind.SYNC, b"",
                           SYNC.pack(sent, received, came, left), 0, 0)
        self._sequence += 1
        self._clocks.put(events.encode(event))


class TraceBack(BackDriver):
    """Writes streams into files, one for each. Raises MisuseError for a directory that is none."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self._directory = Path(str(device.options["directory"]))
        if not self._directory.is_absolute():
            raise MisuseError(f"option directory: {str(self._directory)!r} does not begin with /")
        self._most = int(device.options["most_mib"]) << 20
        self._stores: dict[int, StoreWriter] = {}
        self._heard: set[int] = set()
        self._forget_at = 0.0
        self._closed = False
        self._ending: float | None = None

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        """See `Client`."""
        came = time.monotonic_ns()
        try:
            ask = relay.parse(transaction.parameters)
            if ask.op is Op.PING:
                transaction.complete(relay.TIMES.pack(came, time.monotonic_ns()))
            elif ask.op is Op.OPEN:
                transaction.complete(relay.pack_written(self._open(ask.stream)))
            else:
                self._write(ask)
                transaction.complete()
        except ProtocolError as error:
            transaction.complete(str(error).encode()[:relay.STATUS_BYTES], Fault.BROKE_RULES)
        except (FullError, OSError) as error:
            transaction.complete(str(error).encode()[:relay.STATUS_BYTES], Fault.NO_ROOM)

    def connect(self, endpoint: Endpoint) -> None:
        """See `Client`."""
        self._heard.clear()
        self._forget_at = time.monotonic() + FORGET

    def work(self) -> bool:
        """See `Driver`."""
        now = time.monotonic()
        if self._ending is not None and not self._closed and (not self.connected or now >= self._ending):
            self._closed = True
            for stream in tuple(self._stores):
                self._end(stream, "the device was detached")
            super().close()
            return True
        if not self.connected or not self._forget_at or now < self._forget_at:
            return False
        self._forget_at = 0.0
        for stream in self._stores.keys() - self._heard:
            self._end(stream, "its domain's drivers died")
        return True

    def close(self) -> None:
        """See `Driver`. Once the front end has given away all that it has, and is gone."""
        if not self.gone:
            super().close()
        elif self._ending is None:
            self._ending = time.monotonic() + FAREWELL + 1.0

    def drop(self) -> None:
        """See `Driver`. Who comes after goes on with the files."""
        super().drop()
        while self._stores:
            self._stores.popitem()[1].leave()

    def _open(self, stream: int) -> int:
        store = self._stores.get(stream)
        if store is None:
            if len(self._stores) >= STREAMS:
                raise FullError(f"{STREAMS} streams are open, which is the most")
            where = (self._directory, self.device.peer, self.device.here)
            store = (StoreWriter.resume(*where, stream, most_bytes=self._most)
                     or StoreWriter(*where, most_bytes=self._most, writer=stream))
            self._stores[stream] = store
        self._heard.add(stream)
        return store.length

    def _write(self, ask: Ask) -> None:
        store = self._stores.get(ask.stream)
        if ask.op is Op.CLOSE:
            if store is not None:
                self._end(ask.stream, ask.data.decode("utf-8", "replace"))
            return
        if store is None or ask.at != store.length:
            raise ProtocolError(f"a WRITE at {ask.at} of a stream " + (
                "that was not opened" if store is None else f"that has {store.length} bytes"))
        try:
            store.append(ask.data)
        except (FullError, OSError) as error:
            self._end(ask.stream, f"no room: {error}")
            raise

    def _end(self, stream: int, reason: str) -> None:
        try:
            self._stores.pop(stream).close(reason)
        except OSError as error:
            log.warning("%s: a trace could not be finished: %s", self.device, error.strerror)


class Trace(DeviceClass):
    """What programs of the front end's domain log, into files of the back end's"""

    name = "trace"
    service = Service("trace", Quotas(31, 0, relay.PARAMETER_BYTES, relay.STATUS_BYTES), 31)
    options: ClassVar[Mapping[str, Option]] = {
        "lossless": Option(False, "a program waits while its ring is full, instead of dropping and counting"),
        "ring_kib": Option(1024, "KiB of each program's ring, of which the power of two counts", least=32, most=65536),
        "directory": Option(DIRECTORY, "where the back end's domain has the files"),
        "most_mib": Option(MOST_BYTES >> 20, "MiB that all files of the front end's domain may take", least=1,
                           most=1 << 20),
    }
    front = TraceFront
    back = TraceBack
