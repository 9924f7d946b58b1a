"""Frames over TCP, with no shared memory at all: u32 length (little-endian), then the frame.

One side listens, the other dials; the peer is there as long as the connection stands. A newer connection replaces one
that has not been noticed to be dead. TCP says nothing of who the peer is: use it where the network is trusted, or on
loopback. Depends on idc._core, idc.errors and idc.flows.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from idc._core import ffi, lib
from idc.errors import MisuseError, PeerGoneError, ProtocolError
from idc.flows import flow_seed
from idc.transport.base import NO_MASKING, SILENT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from idc._core import Pointer
    from idc.errors import DisconnectedError
    from idc.trace.hook import EndpointTrace
    from idc.transport.base import Frame

# Looked up once: these are on the path of each frame, and Python in an emulated guest is slow.
_post, _flush, _take = lib.idc_wire_post, lib.idc_wire_flush, lib.idc_wire_take
_send, _into, _ready = lib.idc_wire_send, lib.idc_wire_into, lib.idc_wire_ready
_call, _next, _unpack = lib.idc_wire_call, lib.idc_wire_next, ffi.unpack
_OK, _AGAIN, _TIMEOUT, _INTR, _PEER = lib.IDC_OK, lib.IDC_AGAIN, lib.IDC_TIMEOUT, lib.IDC_INTR, lib.IDC_PEER
LONG: Final = lib.IDC_WIRE_LONG
HEAD: Final = lib.IDC_WIRE_HEAD
ONE: Final = lib.IDC_WIRE_ONE
#: Bytes of a frame's length.
PREFIX: Final = 4
#: Bytes of frames that are received at a time, but for the body of a long one, which comes by itself.
ROOM: Final = 1 << 13
#: Most bytes that wait for a peer that does not read, before it is taken for one that means ill.
MOST_UNSENT: Final = 1 << 26
#: Frames each way: the output queue is memory of this side's own, and the quotas bound it.
CAPACITY: Final = 1 << 17
FRAME_BYTES: Final = (1 << 24) + 64
#: Seconds between two tries to dial.
REDIAL: Final = 0.05
#: Nanoseconds for which a carrier that is closed waits for the kernel to take the rest.
CLOSING_NS: Final = 1_000_000_000
#: Seconds that a peer may leave data unacknowledged before its machine counts as dead.
DEAD_AFTER: Final = 20


def _prepare(connection: socket.socket) -> socket.socket:
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_AFTER * 1000)
    return connection


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _flows(connection: socket.socket) -> tuple[int, int]:
    """From the addresses of both ends: behind a translation of addresses they differ, and a trace joins nothing."""
    try:
        mine, theirs = (repr(address[:2]).encode() for address in (connection.getsockname(), connection.getpeername()))
    except OSError:  # broken already, as whoever uses it will find
        return 0, 0
    return flow_seed(mine + theirs), flow_seed(theirs + mine)


#: Bytes that are allocated and freed once, see TcpCarrier.
LEARNED: Final = 4 << 20
#: Frames taken at a time, at most.
BATCH: Final = 64


class TcpCarrier:
    """See `idc.transport.base.Carrier`. Frames are moved by the core: idc/transport/wire.c.

    Args:
        connection: closed with this; no time-outs of Python's apply to it any more.
        poller: in which it is registered.

    Attributes:
        wire: the core's share.
        body: of a long frame, while it comes.
        lends: bodies that the core has to send, where they lie; each with how many were lent before it.
    """

    capacity = CAPACITY
    frame_bytes = FRAME_BYTES
    near = False  # TCP does not say; what is near has shared memory to meet by
    trips = None
    rings = SILENT
    flushes = True

    def __init__(self, connection: socket.socket, poller: select.epoll) -> None:
        connection.setblocking(True)  # a read waits in the kernel; what must not wait says so in each call
        self._socket = connection
        self._poller = poller
        self.flows = _flows(connection)
        self._room = ffi.new("uint8_t[]", ROOM)
        self.wire = ffi.gc(ffi.new("struct idc_wire *", {"fd": connection.fileno(), "in": self._room, "room": ROOM,
                                                         "longest": FRAME_BYTES, "most": MOST_UNSENT}),
                           lib.idc_wire_free)
        self._chars = ffi.cast("char *", self._room)
        self._only = self._chars + PREFIX  # where a frame is that comes alone
        self._timeout, self._timeout_ns = 0.0, 0  # the last one that was asked for
        self._head = ffi.cast("char *", self.wire.head)
        self._lens = ffi.new("uint32_t[]", BATCH)
        self._posted = ffi.new("int32_t *")
        self.body = b""
        self.lends: deque[tuple[int, bytes]] = deque()
        # The C library gives free memory back to the kernel beyond a threshold that it learns from what is freed, and
        # gets it again page by page: a third of the time of a frame of 64 KiB in an emulated guest.
        bytearray(LEARNED)
        self._writing = False
        self._line_room = ffi.new("uint8_t[]", LONG), ffi.new("uint8_t[]", LONG), ffi.new("uint32_t[]", 1)
        buf, many, lens = self._line_room
        self.line: Pointer | None = ffi.new("struct idc_line *", {"wire": self.wire, "buf": buf, "many": many,
                                                                  "lens": lens})
        poller.register(connection, select.EPOLLIN)

    def post(self, frame: bytes, body: bytes = b"") -> None:
        """See there."""
        if not body:
            if (rc := _post(self.wire, frame, len(frame), frame, 0)) != _OK:
                raise self.refused(rc)
            return
        if type(body) is not bytes:
            body = bytes(body)  # its own: what is sent later must not change
        if len(body) < LONG:
            if (rc := _post(self.wire, frame, len(frame), body, len(body))) != _OK:
                raise self.refused(rc)
            return
        self.lend(body)
        if (rc := _post(self.wire, frame, len(frame), body, len(body))) != _OK:
            self.settle()
            raise self.refused(rc)
        self.lent(body)

    def send(self, frame: bytes, body: bytes = b"") -> None:
        """See there."""
        if type(body) is not bytes:
            body = bytes(body)
        if long := len(body) >= LONG:
            self.lend(body)
        rc = _send(self.wire, frame, len(frame), body, len(body))
        if long and rc == _OK:
            self.lent(body)
        if long or self.wire.unsent:
            self.settle()
        if rc != _OK:
            raise self.refused(rc)

    def traced(self, trace: EndpointTrace | None) -> bool:
        """See there."""
        del trace
        return False

    def exchange(self, frame: bytes, body: bytes, timeout: float) -> Sequence[Frame]:
        """See there."""
        if type(body) is not bytes:
            body = bytes(body)
        wire, posted, long = self.wire, self._posted, len(body) >= LONG
        if long:
            self.lend(body)
        if timeout != self._timeout:
            self._timeout, self._timeout_ns = timeout, int(timeout * 1e9)
        rc = _call(wire, frame, len(frame), body, len(body), self._lens, self._timeout_ns, posted)
        if rc >= ONE:
            posted[0] = 0
            if self._writing or long:
                self.settle()
            return (_unpack(self._only, rc - ONE),)
        if rc < 0 and not posted[0]:
            self.settle()
            raise self.refused(rc)
        if long:
            self.lent(body)
        frames = self._frames(rc) if rc > 0 else []
        if wire.want:
            self.find_room()
            if not frames and (rc := _take(wire, self._lens, 1, self._timeout_ns)) > 0:
                frames = self._frames(rc)
        posted[0] = 0
        if self.lends or self._writing or wire.unsent:
            self.settle()
        return frames

    @property
    def posted(self) -> bool:
        """See there."""
        return bool(self._posted[0])

    def lend(self, body: bytes) -> None:
        """Before a body of LONG bytes or more is sent: from here on it is kept as long as the core may need it,
        whatever interrupts this thread, and `settle` lets it go."""
        self.lends.append((self.wire.lent, body))

    def lent(self, body: bytes) -> None:
        """After that, if the core took it, and may have left some of it."""
        if not self.lends or self.lends[-1][0] + 1 != self.wire.lent:  # a signal's handler has sent another between
            self.lends.append((self.wire.lent - 1, body))

    def refused(self, rc: int) -> DisconnectedError:
        """What it means that a frame was not taken. Raises MemoryError."""
        if rc == _AGAIN:
            return ProtocolError(f"the peer does not read: {self.wire.unsent} bytes wait for it")
        if rc == _PEER:
            return self._gone()
        raise MemoryError(f"no memory for what a peer has not read: {self.wire.unsent} bytes wait for it")

    def _gone(self) -> PeerGoneError:
        code = self.wire.error
        return PeerGoneError(f"the connection broke: {os.strerror(code)}" if code else "the peer closed the connection")

    def flush(self) -> None:
        """See there. What the kernel does not take now goes out when it does, from within `take`."""
        rc = _flush(self.wire, 0)
        if rc != _OK or self._writing or self.lends:
            self.settle()

    def settle(self) -> None:
        """What the core has sent is not needed any more, and what it has not, is to be when there is room."""
        wire, lends = self.wire, self.lends
        if lends:
            if wire.returned == wire.lent:
                lends.clear()  # also what was never taken
            while lends and lends[0][0] < wire.returned:
                lends.popleft()
        writing = wire.unsent > 0 and not wire.error
        if writing != self._writing:
            self._writing = writing
            self._poller.modify(self._socket, select.EPOLLIN | (select.EPOLLOUT if writing else 0))

    def take(self, timeout: float) -> Sequence[Frame]:
        """See there."""
        if timeout != self._timeout:
            self._timeout, self._timeout_ns = timeout, int(timeout * 1e9)
        wire, ns = self.wire, self._timeout_ns
        end = 0
        while True:
            rc = _next(wire, self._lens, BATCH, ns)
            if rc >= ONE:
                if self._writing:
                    self.settle()
                return (_unpack(self._only, rc - ONE),)
            frames = self._frames(rc) if rc > 0 else []
            if wire.want:
                self.find_room()
            if self.lends or self._writing:
                self.settle()
            if frames or rc in (_AGAIN, _TIMEOUT):
                return frames
            if rc < 0 and (error := self.over(rc)) is not None:
                raise error
            if ns > 0:  # interrupted, or in the middle of a long frame
                now = time.monotonic_ns()
                end = end or now + ns
                ns = max(end - now, 0)

    def find_room(self) -> None:
        """For the body of a long frame, as the core wants it."""
        # Written to by the core, before anybody else sees it: to receive it elsewhere would be one more copy.
        self.body = bytes(self.wire.want)
        _into(self.wire, self.body)

    def frame(self, length: int) -> Frame:
        """The first of those that the core has found; `length` of a short one."""
        if not self.wire.apart:
            return _unpack(self._chars + self.wire.first, length)  # type: ignore[no-any-return]
        body, self.body = self.body, b""
        return _unpack(self._head, HEAD), body

    def _frames(self, count: int) -> list[Frame]:
        frames: list[Frame] = []
        if self.wire.apart:
            frames.append(self.frame(0))
            if count == 1:
                return frames
            count -= 1
        lens = _unpack(self._lens, count)
        whole = _unpack(self._chars + self.wire.first, sum(lens) + (count - 1) * PREFIX)
        at = 0
        for length in lens:
            frames.append(whole[at:at + length])
            at += length + PREFIX
        return frames

    def over(self, rc: int) -> DisconnectedError | None:
        """What a negative result of taking frames means, if it is the end."""
        if rc in (_AGAIN, _TIMEOUT, _INTR):
            return None
        if rc == lib.IDC_TOOBIG:
            return ProtocolError(f"a frame of {self.wire.bad} bytes announced, {FRAME_BYTES} is the limit")
        return self._gone()

    def arm(self) -> bool:
        """See there."""
        if self.wire.unsent or self._writing or self.lends:
            self.settle()
        return not _ready(self.wire)

    def close(self) -> None:
        """See there. What the kernel has not taken within a second of a peer that does not read is lost with it."""
        if self._socket.fileno() < 0:
            return
        lib.idc_wire_flush(self.wire, CLOSING_NS)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        self._writing = False
        with contextlib.suppress(OSError, ValueError):
            self._poller.unregister(self._socket)
        self._socket.close()
        wire = self.wire
        wire.fd, wire.ended = -1, _PEER  # whoever still has it must not meet another file by that number
        wire.begin = wire.end = 0  # nor what came and nobody has taken
        lib.idc_wire_free(wire)
        self.lends.clear()

    @property
    def alive(self) -> bool:
        """Whether it may still carry something."""
        return self._socket.fileno() >= 0


class StreamPort:
    """What all ends share that speak these frames over a stream socket; `_seek` is theirs."""

    regions = ()
    masking = NO_MASKING
    patience: float | None = None

    def __init__(self) -> None:
        self._poller = select.epoll()
        self._next: socket.socket | None = None
        self._carrier: TcpCarrier | None = None

    def look(self) -> bool:
        """See `idc.transport.base.Port`."""
        if self._carrier is not None and not self._carrier.alive:
            self._carrier = None
        if self._next is None:
            self._seek()
        if self._next is not None and self._carrier is not None:
            self._carrier.close()  # replaced by a newer one
            self._carrier = None
        return self._next is not None or self._carrier is not None

    def _seek(self) -> None:
        """Try to have `_next`."""
        raise NotImplementedError

    def connection(self) -> TcpCarrier | None:
        """See there."""
        if self._next is None or self._carrier is not None:
            return None
        connection, self._next = self._next, None
        self._carrier = TcpCarrier(connection, self._poller)
        return self._carrier

    def wait(self, timeout: float) -> None:
        """See there."""
        self._poller.poll(timeout)

    def fileno(self) -> int:
        """See there."""
        return self._poller.fileno()

    def close(self) -> None:
        """See there."""
        if self._poller.closed:
            return
        if self._carrier is not None:
            self._carrier.close()
        if self._next is not None:
            self._next.close()
        self._poller.close()


class ListenPort(StreamPort):
    """The end that is dialled.

    Args:
        host: address to listen on.
        port: 0 for any free one; see `address`.

    Raises:
        OSError: the address cannot be had.
    """

    def __init__(self, host: str, port: int) -> None:
        super().__init__()
        self._listener = socket.create_server((host, port), family=_family(host), backlog=4)
        self._listener.setblocking(False)
        self._poller.register(self._listener, select.EPOLLIN)

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        host, port = self._listener.getsockname()[:2]
        return host, port

    def _seek(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while True:  # the newest of those that wait
                connection, _ = self._listener.accept()
                if self._next is not None:
                    self._next.close()
                self._next = _prepare(connection)

    def close(self) -> None:
        """See there."""
        self._listener.close()
        super().close()


class DialPort(StreamPort):
    """The end that dials, again and again until somebody listens.

    Args:
        host: numeric address.
        port: 1 to 65535.
    """

    def __init__(self, host: str, port: int) -> None:
        super().__init__()
        if not 0 < port < 1 << 16:
            raise MisuseError(f"TCP port {port}: must be 1 to 65535")
        self._address = (host, port)
        self._dialling: socket.socket | None = None
        self._not_before = 0.0

    def _seek(self) -> None:
        if self._carrier is not None:
            return
        if self._dialling is None:
            if time.monotonic() < self._not_before:
                return
            self._dialling = _prepare(socket.socket(_family(self._address[0]), socket.SOCK_STREAM))
            code = self._dialling.connect_ex(self._address)
            if code not in (0, errno.EINPROGRESS):
                self._give_up()
                return
            self._poller.register(self._dialling, select.EPOLLOUT)
        poll = select.poll()
        poll.register(self._dialling, select.POLLOUT)
        if not poll.poll(0):
            return
        self._poller.unregister(self._dialling)
        if self._dialling.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or _alone(self._dialling):
            self._give_up()
            return
        self._next, self._dialling = self._dialling, None

    def _give_up(self) -> None:
        assert self._dialling is not None
        self._dialling.close()
        self._dialling = None
        self._not_before = time.monotonic() + REDIAL

    def wait(self, timeout: float) -> None:
        """See there."""
        pause = self._not_before - time.monotonic()
        if self._dialling is None and self._carrier is None and self._next is None and pause > 0:
            time.sleep(min(pause, timeout))
        else:
            self._poller.poll(timeout)

    def close(self) -> None:
        """See there."""
        if self._dialling is not None:
            self._dialling.close()
        super().close()


def _alone(connection: socket.socket) -> bool:
    """Whether it is connected to itself, as happens now and then to who dials a port of this machine that is away, and
    is given that very number for its own end; or is not connected any more."""
    try:
        return bool(connection.getsockname() == connection.getpeername())
    except OSError:
        return True


def _host_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit():
        raise MisuseError(f"address {address!r}: HOST:PORT is wanted")
    return host.strip("[]"), int(port)


def listen_port(address: str) -> ListenPort:
    """The listening end at HOST:PORT. Raises MisuseError, OSError."""
    return ListenPort(*_host_port(address))


def dial_port(address: str) -> DialPort:
    """The dialling end for HOST:PORT. Raises MisuseError."""
    return DialPort(*_host_port(address))
