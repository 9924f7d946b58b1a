"""Frames over TCP, with no shared memory at all: u32 length (little-endian), then the frame.

One side listens, the other dials; the peer is there as long as the connection stands. A newer connection replaces one
that has not been noticed to be dead. TCP says nothing of who the peer is: use it where the network is trusted, or on
loopback. Depends on the standard library, idc.errors and idc.flows.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
import time
from typing import TYPE_CHECKING, Final

from idc.errors import MisuseError, PeerGoneError, ProtocolError
from idc.flows import flow_seed
from idc.transport.base import NO_MASKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_LENGTH: Final = struct.Struct("<I")
#: Bytes asked of the kernel at a time.
CHUNK: Final = 1 << 18
#: Such pieces taken in one call, at most: a peer that sends without end must not keep us in here.
CHUNKS: Final = 4
#: Pieces of memory given to the kernel at a time; it takes 1024 (IOV_MAX).
PIECES: Final = 512
#: Most bytes that wait for a peer that does not read, before it is taken for one that means ill.
MOST_UNSENT: Final = 1 << 26
#: Frames each way: the output queue is memory of this side's own, and the quotas bound it.
CAPACITY: Final = 1 << 17
FRAME_BYTES: Final = (1 << 24) + 64
#: Seconds between two tries to dial.
REDIAL: Final = 0.05
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


class TcpCarrier:
    """See `idc.transport.base.Carrier`."""

    capacity = CAPACITY
    frame_bytes = FRAME_BYTES
    near = False  # TCP does not say; what is near has shared memory to meet by
    doorbells = 0
    trips = None

    def __init__(self, connection: socket.socket, poller: select.epoll) -> None:
        self._socket = connection
        self._poller = poller
        self.flows = _flows(connection)
        self._out: list[bytes | memoryview] = []
        self._unsent = 0
        self._in = bytearray()
        # The C library gives free memory back to the kernel beyond a threshold that it learns from what is freed, and
        # gets it again page by page: a third of the time of a frame of 64 KiB in an emulated guest.
        bytearray(LEARNED)
        self._chunk = memoryview(bytearray(CHUNK))
        self._gone: PeerGoneError | None = None
        self._writing = False
        self._more = True  # the last read did not find the end of what was there
        poller.register(connection, select.EPOLLIN)

    def post(self, frame: bytes, body: bytes = b"") -> None:
        """See there."""
        if self._gone is not None:
            raise self._gone
        length = len(frame) + len(body)
        if self._unsent + length > MOST_UNSENT:
            raise ProtocolError(f"the peer does not read: {self._unsent} bytes wait for it")
        self._out.append(_LENGTH.pack(length) + frame)
        if body:
            self._out.append(bytes(body))  # its own, if it is bytes already: what is sent later must not change
        self._unsent += _LENGTH.size + length

    def flush(self) -> None:
        """See there. What the kernel does not take now goes out when it does, from within `take`."""
        while self._out and self._gone is None:
            try:
                sent = self._socket.sendmsg(self._out[:PIECES])
            except BlockingIOError:
                break
            except OSError as error:
                # what had arrived before is still to be delivered: `take` reports the end after that
                self._gone = PeerGoneError(f"the connection broke: {error.strerror}")
                return
            self._forget(sent)
        writing = bool(self._out)
        if writing != self._writing:
            self._writing = writing
            self._poller.modify(self._socket, select.EPOLLIN | (select.EPOLLOUT if writing else 0))

    def _forget(self, sent: int) -> None:
        """So many of the bytes to send are with the kernel."""
        self._unsent -= sent
        if not self._unsent:
            self._out.clear()
            return
        whole = 0
        while sent >= len(self._out[whole]):
            sent -= len(self._out[whole])
            whole += 1
        del self._out[:whole]
        if sent:
            self._out[0] = memoryview(self._out[0])[sent:]

    def take(self, timeout: float) -> Sequence[bytes]:
        """See there."""
        if self._out:
            self.flush()
        if timeout > 0 and not self._more and self._gone is None:  # else a read that finds nothing, before each sleep
            self._poller.poll(timeout)
            if self._out:
                self.flush()
        frames = self._receive()
        if not frames and self._gone is not None:
            raise self._gone
        return frames

    def _receive(self) -> list[bytes]:
        frames: list[bytes] = []
        self._more = True
        for _ in range(CHUNKS):
            try:
                got = self._socket.recv_into(self._chunk)
            except BlockingIOError:
                self._more = False
                break
            except OSError as error:
                self._gone = PeerGoneError(f"the connection broke: {error.strerror}")
                break
            if not got:
                self._gone = PeerGoneError("the peer closed the connection")
                break
            if self._in:  # the rest of a frame whose beginning came before
                self._in += self._chunk[:got]
                with memoryview(self._in) as view:
                    used = self._split(view, frames)
                del self._in[:used]
            else:
                used = self._split(self._chunk[:got], frames)
                self._in += self._chunk[used:got]
            if got < CHUNK:
                self._more = False
                break
        return frames

    def _split(self, view: memoryview, frames: list[bytes]) -> int:
        """Add the whole frames to a list; how many bytes they take."""
        at, there = 0, len(view)
        while there - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(view, at)
            if length > FRAME_BYTES:
                raise ProtocolError(f"a frame of {length} bytes announced, {FRAME_BYTES} is the limit")
            if there - at - _LENGTH.size < length:
                break
            at += _LENGTH.size
            frames.append(bytes(view[at:at + length]))
            at += length
        return at

    def arm(self) -> bool:
        """See there."""
        return self._gone is None

    def close(self) -> None:
        """See there. What the kernel has not taken within a second of a peer that does not read is lost with it."""
        if self._socket.fileno() < 0:
            return
        with contextlib.suppress(OSError):
            if self._out and self._gone is None:
                self._socket.settimeout(1.0)
                self._socket.sendall(b"".join(self._out))
            self._socket.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError, ValueError):
            self._poller.unregister(self._socket)
        self._socket.close()

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
