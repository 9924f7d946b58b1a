"""One connection of the kernel's nbd: a socket, nbd.c, and the queue whose thread moves its requests.

Depends on idc._core and idc.pump.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from typing import TYPE_CHECKING, Final

from idc._core import ffi, lib
from idc.block import queues
from idc.endpoint import Result
from idc.layout import PAGE
from idc.pump import Queue

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc._core import Pointer
    from idc.endpoint import Completion, IncomingTransaction
    from idc.pump import Place
    from idc.transport.shared import SharedPort

#: Bytes of a socket's buffer: a whole large reply, so that it is sent by one call.
SOCKET_BYTES: Final = 4 << 20
SO_SNDBUFFORCE: Final = 32


def settle() -> None:
    """Make this process one that the kernel can wait for when it is short of memory: locked, and an I/O flusher.

    What the kernel writes back to make room may be for a disk that this process serves. Raises OSError.
    """
    if (error := lib.idc_nbd_settle()) != 0:
        raise OSError(error, f"the process that serves a block device cannot be locked in memory: {os.strerror(error)}")


class Connection:
    """See the module's text.

    Args:
        name: for messages.
        address: of the queue's channel.
        place: its buffers; closed with this.
        longest: bytes of a request at most.
        told, poll: see `Queue`.

    Attributes:
        queue: its thread; another one after `restart`.
    """

    def __init__(self, name: str, address: str, place: Place, longest: int, told: Callable[[], None],
                 poll: float = 0.0) -> None:
        self._name, self._address, self._told, self._place, self._poll = name, address, told, place, poll
        self._sockets: list[socket.socket] = []  # the last one, and one before that a thread may still poll
        self._kick = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        pages = place.mine_bytes // PAGE
        self._used = ffi.new("uint8_t[]", pages)
        self._core = ffi.new("struct idc_nbd *", {
            "kick_fd": self._kick, "memory": place.base, "part_at": place.mine, "part_pages": pages, "longest": longest,
            "used": self._used})
        self._restarting = False
        self._open = True
        self.queue = self._queue(queues.port(address))

    def _queue(self, port: SharedPort) -> Queue:
        queue = Queue(self._name, _Shape(self._core, self._let_go), depth=queues.REQUESTS, accepts=queues.FRONT,
                      told=self._told, poll=self._poll)
        queue.start(port)
        return queue

    def restart(self) -> None:
        """End the queue's connection; what it had is sent again by the next, which begins at once."""
        port = queues.port(self._address)  # first, so that the region stays mapped
        self._restarting = True
        self.queue.stop()
        self._restarting = False
        self.queue = self._queue(port)

    def _let_go(self) -> None:
        """No thread uses the region now."""
        if not self._restarting:
            self._place.close()

    def go(self) -> None:
        """Send what waits, and what comes from now on."""
        lib.idc_nbd_go(self._core)

    def fail(self, error: int) -> bool:
        """Answer what waits, and what has come, with an errno; only while there is no connection. Whether any was."""
        return bool(lib.idc_nbd_fail(self._core, error))

    def oldest(self, now: float) -> float:
        """Age of the oldest request that is not answered, seconds."""
        since = int(lib.idc_nbd_oldest(self._core))
        return now - since / 1e9 if since else 0.0

    @property
    def fd(self) -> int:
        """Of the socket; -1: there is none."""
        return int(self._core.fd)

    @property
    def socket_end(self) -> int:
        """Why the socket is of no more use: enum idc_nbd_end."""
        return int(self._core.end)

    def fresh_socket(self) -> socket.socket:
        """A new socket for the kernel, of which this has the other end; the caller's."""
        kernels, own = socket.socketpair()
        for end in (kernels, own):
            with contextlib.suppress(OSError):  # more than net.core allows is for root
                end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SOCKET_BYTES)
        own.setblocking(False)
        lib.idc_nbd_open(self._core, own.fileno())
        self._retire()
        self._sockets.append(own)
        return kernels

    def close_socket(self) -> None:
        """The kernel sees the end of the connection."""
        lib.idc_nbd_open(self._core, -1)
        self._retire()

    def _retire(self) -> None:
        """End the last socket; its number stays taken until the next one ends, for a thread may be in a call on it."""
        for old in self._sockets[:-1]:
            old.close()
        del self._sockets[:-1]
        for last in self._sockets:
            with contextlib.suppress(OSError):
                last.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End: the queue is stopped, the socket closed. Idempotent."""
        if self._open:
            self._open = False
            self.queue.stop()
            lib.idc_nbd_stop(self._core)
            for each in self._sockets:
                each.close()
            os.close(self._kick)

    def counters(self) -> dict[str, object]:
        """What it has moved, and how its queue slept."""
        core = self._core
        moved = {name: int(getattr(core, name)) for name in ("requests", "errors", "replayed", "bytes_in", "bytes_out")}
        return {**moved, **self.queue.told_of()}

    def __str__(self) -> str:
        core = self._core
        return (f"{core.requests} requests, {core.errors} errors, {core.replayed} sent again, {core.bytes_in} bytes "
                f"from the kernel, {core.bytes_out} to it")


class _Shape:
    """See `idc.pump.queue.Shape`: what goes by the queue is moved by nbd.c.

    Args:
        core: a struct idc_nbd.
        let_go: called once no thread uses the region.
    """

    handler = ffi.NULL

    def __init__(self, core: Pointer, let_go: Callable[[], None]) -> None:
        self._core = core
        self.close = let_go

    def attach(self, pump: Pointer) -> None:
        """See `Shape`."""
        if (error := lib.idc_nbd_start(self._core, pump)) != 0:
            raise OSError(error, os.strerror(error))

    def begin(self, pump: Pointer) -> None:
        """See `Shape`."""
        lib.idc_nbd_up(self._core, 1)

    def completed(self, cookie: int, completion: Completion) -> None:
        """See `Shape`: C takes those whose outcome is known."""
        known = completion.result in (Result.OK, Result.ERROR)
        error = errno.EIO if completion.result is Result.ERROR else completion.error
        lib.idc_nbd_complete(self._core, cookie, known, error)

    def end(self) -> None:
        """See `Shape`: requests wait."""
        lib.idc_nbd_up(self._core, 0)

    def judge(self, transaction: IncomingTransaction) -> str:
        """See `Shape`."""
        return "a request, of which the front end of a block device takes none"
