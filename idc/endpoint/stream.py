"""The socket-like face: bytes in order, with connect, listen, send, receive, flush. Built on messages.

    with Stream(port) as stream:
        stream.send(b"...")
        stream.flush()                  # returns once the other side has received all of it
        stream.receive(100)             # b"" when the connection is over
        stream.receive_into(buffer)     # 0 when it is: with a buffer of one's own, for much at a time

Either side may be called first; there is no difference between dialling and listening once the port is made, so
`connect` and `listen` are one call. A message is completed when its bytes have been received, so a reader that stops
holds the writer back. Depends on idc.endpoint.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Self

from idc._core import ffi, lib
from idc.endpoint.blocking import NAP
from idc.endpoint.endpoint import Client, Endpoint, Resources
from idc.endpoint.lane import Lane, lane_of
from idc.endpoint.lifecycle import State
from idc.endpoint.results import Completion, Result
from idc.errors import ClosedError, MisuseError, PeerGoneError, TimedOutError
from idc.transport.tcp import LONG

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc._core import Pointer
    from idc.endpoint.session import IncomingMessage
    from idc.transport.base import Port

_from_buffer, _unpack, _read, _send = ffi.from_buffer, ffi.unpack, lib.idc_lane_read, lib.idc_lane_send
_AGAIN, _TOOBIG = lib.IDC_AGAIN, lib.IDC_TOOBIG


class _Reader(Client):
    """Queues what comes in; the end of the connection is the end of the stream."""

    def __init__(self) -> None:
        self.queue: deque[bytes] = deque()
        self.messages: deque[IncomingMessage] = deque()  # those of the queue that no lane holds
        self.ended = False

    def message(self, endpoint: Endpoint, message: IncomingMessage) -> None:
        self.queue.append(message.body)
        self.messages.append(message)

    def disconnect(self, endpoint: Endpoint, done: Callable[[], None]) -> None:
        self.ended = True  # a stream does not come back: `done` is left to destroy


class Stream:
    """One byte stream each way, over one connection.

    Args:
        port: where the peer is met; closed with this object.
        resources: made before, or default ones; the peer's parameter_bytes is the most sent in one message.
    """

    def __init__(self, port: Port, resources: Resources | None = None) -> None:
        self._reader = _Reader()
        self._endpoint = Endpoint(port, self._reader, resources or Resources())
        self._lane: Lane | None = None
        self._core: Pointer | None = None  # the lane's
        self._queue = self._reader.queue
        self._connected = False
        self._at = 0
        self._lost: Completion | None = None
        self._closed = False

    def connect(self, timeout: float | None = None) -> None:
        """Wait for the other side. Raises TimedOutError."""
        self._until(lambda: self._endpoint.state is State.CONNECTED, timeout, "the other side did not come")
        if not self._connected:
            self._connected = True
            self._lane = lane_of(self._endpoint, self._reader.messages, self._queue)
            self._core = None if self._lane is None else self._lane.core

    listen = connect

    def send(self, data: bytes, *, timeout: float | None = None) -> None:
        """Send all of the bytes; returns when they are under way.

        Raises:
            TimedOutError: the other side did not take them in time; how many went is unknown, so close.
            PeerGoneError: the connection is over.
        """
        if (core := self._core) is not None and type(data) is bytes and data:
            lane: Lane = self._lane  # type: ignore[assignment]
            if len(data) >= LONG:
                if len(data) <= lane.longest and lane.send(data):
                    return
            else:
                rc = _send(core, data, len(data))
                if rc == 0 or (rc not in (_AGAIN, _TOOBIG) and lane.sent(rc, data)):
                    return
        self.connect(timeout)
        most = self._endpoint.peer_quotas.parameter_bytes
        view = memoryview(data)
        for at in range(0, len(view), most):
            piece = data if type(data) is bytes and len(data) <= most else bytes(view[at:at + most])
            while not self._submit(piece):
                before = self._outstanding
                self._until(lambda before=before: self._outstanding < before, timeout,  # type: ignore[misc]
                            "the other side does not receive")

    def _submit(self, piece: bytes) -> bool:
        """Whether it went; not, where as much is outstanding as may be."""
        if self._lane is not None:
            if self._lane.send(piece):
                return True
            result = Result.BACK_PRESSURED if self._endpoint.state is State.CONNECTED else Result.NOT_CONNECTED
        else:
            result = self._endpoint.submit_message(piece, self._sent)
        if result not in (Result.OK, Result.BACK_PRESSURED):
            raise PeerGoneError(self._endpoint.reason or "the connection is over")
        return result is Result.OK

    @property
    def _outstanding(self) -> int:
        return self._endpoint.outstanding if self._lane is None else self._lane.outstanding

    def flush(self, *, timeout: float | None = None) -> None:
        """Wait until the other side has received everything sent so far. Raises as `send`."""
        lane = self._lane
        self._until(lambda: self._outstanding == 0 or (lane is not None and self._reader.ended), timeout,
                    "the other side does not receive")
        if lane is not None and lane.outstanding:
            raise PeerGoneError(f"not all that was sent was received: {self._endpoint.reason}")
        if self._lost is not None:
            raise PeerGoneError(f"not all that was sent was received: {self._lost.reason}")

    def receive(self, most: int, *, timeout: float | None = None) -> bytes:
        """The next bytes, at least one and at most `most`; b"" once the connection is over. Raises TimedOutError."""
        if not self._connected and self._endpoint.state is State.CONNECTED:
            self.connect()
        lane = self._lane
        since = 0.0 if timeout is None else time.monotonic()
        if lane is not None and not self._queue and most > 0:
            if timeout != lane.timeout:
                lane.within(timeout)
            came = lane.read(most)
            if came is not None:
                return came
        return self._receive(most, timeout, since)

    def _receive(self, most: int, timeout: float | None, since: float) -> bytes:
        reader, queue = self._reader, self._queue
        while not queue or not queue[0]:
            if queue:
                self._done()  # no byte is in it, and none is the end
            elif reader.ended:
                return b""
            else:
                self._until(lambda: bool(queue) or reader.ended, timeout, "nothing was sent", since)
        body = queue[0]
        piece = body[self._at:self._at + most]
        self._at += len(piece)
        if self._at >= len(body):
            self._at = 0
            self._done()
        return piece

    def _done(self) -> None:
        self._queue.popleft()
        if self._lane is not None:
            self._lane.done()
        else:
            self._reader.messages.popleft().complete()
            if not self._queue:  # what is here already, will be received: one notice for all of it
                self._endpoint.notify()

    def receive_into(self, buffer: bytearray | memoryview, most: int = 0, *, timeout: float | None = None) -> int:
        """The next bytes, to the beginning of a buffer: what a reader that has one saves memory and copies by.

        Args:
            buffer: writable, contiguous.
            most: bytes to take at most, and the buffer holds; 0: its length.
            timeout: as for `receive`.

        Returns:
            How many came, at least one; 0 once the connection is over.

        Raises:
            TimedOutError: nothing was sent in time.
            MisuseError: the buffer is shorter than `most`, or has no byte.
            BufferError: it cannot be written to.
        """
        memory = _from_buffer(buffer, require_writable=True)
        size = len(memory)
        if not most:
            most = size
        if not 0 < most <= size:
            raise MisuseError(f"{most} bytes into a buffer of {size}: there must be room, for one at least")
        lane, core = self._lane, self._core
        since = 0.0 if timeout is None else time.monotonic()
        if lane is not None and core is not None and not self._queue:
            if timeout != lane.timeout:
                lane.within(timeout)
            core.got = 0
            try:
                got = _read(core, memory, most, 0, lane.ns)
            except BaseException:
                lane.cut(_unpack(memory, core.got))
                raise
            if got > 0:
                return got  # type: ignore[no-any-return]
            lane.missed(got)
        elif not self._connected and self._endpoint.state is State.CONNECTED:
            self.connect()
        piece = self._receive(most, timeout, since)
        memory[0:len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        """End the connection. What was not flushed may be lost. Idempotent."""
        self._closed = True
        self._endpoint.abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sent(self, completion: Completion) -> None:
        if completion.result is not Result.OK:
            self._lost = completion

    def _until(self, condition: Callable[[], bool], timeout: float | None, what: str,
               since: float | None = None) -> None:
        deadline = None if timeout is None else (time.monotonic() if since is None else since) + timeout
        late = False
        while not condition():
            if self._closed:
                raise ClosedError("this stream is closed")
            if self._reader.ended:
                raise PeerGoneError(self._endpoint.reason or "the connection is over")
            left = NAP if deadline is None else min(NAP, deadline - time.monotonic())
            if late:
                raise TimedOutError(f"{what} within {timeout:g} s")
            if left <= 0:  # one look at what is here, though nobody waits for it any more
                left, late = 0.0, True
            if self._lane is None:
                self._endpoint.pump(left)
            elif (body := self._lane.take(left)) is not None:
                self._reader.queue.append(body)
