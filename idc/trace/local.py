"""A ring between a program and the drivers of its domain, by which the program's events reach a trace device.

    drivers   Inlet: makes the memory, sealed, and two eventfds; gives them to a program over its connection
    program   Outlet: maps it; from then on an event costs about what it costs in a region, and the drivers pass it on

    offset 0      control words of a byte ring, as in docs/protocol.md
    offset 2048   u64: 0 while the drivers take events, else why they do not (`Over`)
    offset 4096   the ring's bytes

Who dies shows by the connection. Depends on idc.bytestream, idc.bell and idc.trace.ring.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import mmap
import os
import socket
import struct
import time
from typing import TYPE_CHECKING, Final

from idc._core import ffi
from idc.bytestream import ByteReceiver, ByteSender
from idc.errors import BackPressuredError, DisconnectedError, PeerGoneError, ProtocolError, TimedOutError
from idc.ring import Bell
from idc.trace.ring import SenderSink
from idc.words import store_u64

if TYPE_CHECKING:
    from pathlib import Path

    from idc.trace.tracer import Tracer

_OVER_AT: Final = 2048
_DATA_AT: Final = 4096
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
#: What a program is told with the three descriptors (memory, data, space): magic, ring bytes, lossless.
_GREETING: Final = struct.Struct("<8sIB")
_MAGIC: Final = b"IDCTRL01"
#: Pause before the next look for a device that is not there, seconds.
_REDIAL: Final = 0.05


class Over(enum.IntEnum):
    """Why the drivers take no more events of a program."""

    DETACHED = 1
    BROKE_RULES = 2
    NO_ROOM = 3


_WORDS: Final[dict[int, str]] = {
    Over.DETACHED: "the trace device is detached", Over.BROKE_RULES: "this program broke the rules",
    Over.NO_ROOM: "the other domain has no room for more"}


class Inlet:
    """The drivers' end of one program's ring.

    Args:
        connection: of the program; closed with this object.
        size: bytes of the ring, a power of two.
        lossless: what the program is to do when it is full.

    Attributes:
        event: readable when half a ring is there, once `arm` has said True.
    Raises:
        OSError: no memory or descriptors, or the program is gone.
    """

    def __init__(self, connection: socket.socket, size: int, *, lossless: bool) -> None:
        self._connection = connection
        memory = os.memfd_create("idc-trace", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        fds = [memory]
        try:
            os.ftruncate(memory, _DATA_AT + size)
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)  # else the program could take the pages from under us
            fds += [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
            self._memory = mmap.mmap(memory, _DATA_AT + size)
            socket.send_fds(connection, [_GREETING.pack(_MAGIC, size, lossless)], fds)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        os.close(memory)
        self.event, self._space = fds[1:]
        self._bell = Bell.eventfd(self._space)
        self._receiver = ByteReceiver(self._memory, 0, _DATA_AT, size, bell=self._bell, wake_fd=self.event, spin=0.0)
        self._half = size // 2
        self._closed = False

    def fileno(self) -> int:
        """The connection: readable when the program is gone."""
        return self._connection.fileno()

    @property
    def left(self) -> bool:
        """Whether the program is gone; what it logged is still there."""
        try:
            return not self._connection.recv(1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def take(self, most: int) -> bytes:
        """What is there, without waiting."""
        piece = bytearray(most)
        try:
            return bytes(memoryview(piece)[:self._receiver.read_into(piece, 1, timeout=0)])
        except BackPressuredError:
            return b""
        except DisconnectedError as error:  # the program wrote over the ring's words
            return bytes(memoryview(piece)[:error.done])

    def arm(self) -> bool:
        """Ask for a wake-up once half a ring is there. False if it is."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.event)
        return self._receiver.arm(self._half)

    def end(self, over: Over) -> None:
        """Take no more, from now on; what is there can still be taken."""
        store_u64(self._memory, _OVER_AT, over)
        self._bell.ring()  # who waits for room learns of it

    def close(self) -> None:
        """Let go of it. Idempotent."""
        if not self._closed:
            self._closed = True
            self._receiver.close()
            self._bell.close()
            self._memory.close()
            os.close(self.event)
            os.close(self._space)
            self._connection.close()


class Outlet(SenderSink):
    """A program's end: a sink for a Tracer. Whether it waits while the ring is full, the device says.

    Args:
        path: the device's socket.
        timeout: seconds for the drivers to take this program; None waits for ever.

    Raises:
        TimedOutError: there is no such device, it is not connected, or has as many programs as it takes.
        ProtocolError: what answers is no trace device.
        OSError: it may not be used.
    """

    def __init__(self, path: Path, timeout: float | None) -> None:
        self._connection, size, lossless, fds = _connect(path, timeout)
        try:
            self._memory = mmap.mmap(fds[0], _DATA_AT + size)
        except BaseException:
            _close(self._connection, fds)
            raise
        os.close(fds[0])
        self._fds = fds[1:]
        self._bell = Bell.eventfd(fds[1])
        sender = ByteSender(self._memory, 0, _DATA_AT, size, bell=self._bell, wake_fd=fds[2])
        sender.reset()
        sender.watch(self._memory, _OVER_AT, 0)
        super().__init__(sender, lossless=lossless)
        self._state = memoryview(self._memory)[_OVER_AT:_OVER_AT + 8].cast("Q")
        self._closed = False

    def put(self, length: int) -> bool:
        """See `Sink`. The ring itself looks whether anybody is there only when it is full."""
        if self._state[0]:
            self._over("")
            return False
        return super().put(length)

    def due(self, tracer: Tracer, now: int) -> None:
        """See `Sink`. The drivers compare clocks for all programs: they have the same one."""

    def close(self, tracer: Tracer) -> None:
        """See `Sink`. The drivers pass on what is in the ring."""
        if not self._closed:
            self._closed = True
            self._over("closed")
            self._state.release()
            self._sender.close()
            self._bell.close()
            self._buffer = ffi.NULL
            self._memory.close()
            _close(self._connection, self._fds)

    def _look(self) -> None:
        """While it waits for room: whether anybody is there who makes some. Raises PeerGoneError."""
        try:
            if self._connection.recv(1, socket.MSG_DONTWAIT):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        raise PeerGoneError("the drivers of this domain are gone")

    def _over(self, reason: str) -> None:
        super()._over(_WORDS.get(self._state[0], reason))


def _connect(path: Path, timeout: float | None) -> tuple[socket.socket, int, bool, list[int]]:
    """Connection, bytes of the ring, whether it is lossless, descriptors: memory, data, space."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    fds: list[int] = []
    try:
        deadline = None if timeout is None else time.monotonic() + timeout
        while connection.connect_ex(str(path)) in (errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN):
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(_REDIAL)
        connection.settimeout(None if deadline is None else max(deadline - time.monotonic(), _REDIAL))
        greeting, fds, _, _ = socket.recv_fds(connection, _GREETING.size, 3)
        if not greeting:
            raise ConnectionResetError
        magic, size, lossless = _GREETING.unpack(greeting)
        if magic != _MAGIC or len(fds) != 3:
            raise ProtocolError(f"{path}: what answers there is no trace device")
        connection.settimeout(None)
    except (ConnectionError, TimeoutError) as error:
        _close(connection, fds)
        raise TimedOutError(f"{path}: no trace device takes this program"
                            + ("" if timeout is None else f" within {timeout:g} s")) from error
    except struct.error as error:
        _close(connection, fds)
        raise ProtocolError(f"{path}: what answers there is no trace device") from error
    except BaseException:
        _close(connection, fds)
        raise
    return connection, size, bool(lossless), fds


def _close(connection: socket.socket, fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
    connection.close()
