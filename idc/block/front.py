"""The front end of a block device: /dev/nbdN of this machine, each connection of it a queue to the back end.

nbd.c moves requests and payload; here is what is decided about them:

    both ends have met     the geometry is asked for; the kernel is given sockets, or new ones in place of dead ones
    a queue is lost        requests wait
    all have met again     nothing of before is under way at the back end; what was not answered is sent once more
    `timeout` is over      requests fail with EIO, until the ends have met again

Depends on idc.block, idc.device, idc.endpoint.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from typing import TYPE_CHECKING, Final

from idc._core import lib
from idc.block import queues
from idc.block.connection import Connection, settle
from idc.block.netlink import Disk, Flag, Kernel, NbdError
from idc.block.protocol import Can, Geometry, Op, Request
from idc.device.driver import FrontDriver
from idc.device.queued import poll_seconds
from idc.device.tally import Tally
from idc.endpoint import Completion, Endpoint, Result
from idc.errors import IdcError, ProtocolError
from idc.layout import PAGE
from idc.pump import places

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from idc.device.driver import Device

#: Seconds that the kernel waits for new sockets beyond `timeout`: the drivers of a domain may have to start again.
GRACE: Final = 30
#: Seconds between two tries to give the kernel new sockets, which it takes once it has seen the old ones' end.
AGAIN: Final = 0.1
#: Bytes of a request of the kernel at most.
LONGEST: Final = 1 << 20
SECTOR: Final = 512

log = logging.getLogger("idc.block")


class BlockError(IdcError):
    """The device cannot be shown to this machine; the text says why."""


class BlockFront(FrontDriver):
    """See the module's text. Raises NbdError where there is no nbd driver."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self._timeout = float(device.options["timeout"])
        self._geometry: Geometry | None = None  # of this connection
        self._disk: Disk | None = None
        self._shown: Geometry | None = None
        self._connections: list[Connection] = []
        self._met: list[int] = []  # how often each queue had connected when requests began to go by it
        self._homeless: list[Connection] = []  # whose socket the kernel is to be given
        self._next_try = 0.0
        self._lost_at: float | None = time.monotonic()
        self._trouble: Exception | None = None
        self._tally = Tally(queues.tally_path(device), self._counters)
        self._kernel = self.kernel()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    # -- life

    def kernel(self) -> Kernel:
        """The nbd driver of this machine."""
        return Kernel()

    def settle(self) -> None:
        """See `idc.block.connection.settle`."""
        settle()

    def open(self, address: str) -> None:
        """See `Driver`."""
        super().open(address)
        self.settle()  # threads inherit it
        count = int(self.device.options["connections"])
        port = queues.port(address)
        try:
            for number, place in enumerate(places(port.region, count)):
                self._connections.append(Connection(f"{self.device} queue {number}", queues.address(address, number),
                                                    place, LONGEST, self._ring, poll_seconds(self.device)))
        finally:
            port.close()

    def _ring(self) -> None:
        os.eventfd_write(self._bell, 1)

    def close(self) -> None:
        """See `Driver`. Detached, the disk goes; only unloaded, it stays and waits for whoever serves it next."""
        if self.gone and self._disk is not None:
            self._kernel.disconnect(self._disk.index)
        self._end()
        super().close()

    def drop(self) -> None:
        """See `Driver`."""
        self._end()
        super().drop()
        self._tally.remove()
        self._kernel.close()
        os.close(self._bell)

    def _end(self) -> None:
        while self._connections:
            connection = self._connections.pop()
            log.info("%s: %s", self.device, connection)
            connection.close()

    @property
    def connected(self) -> bool:
        """See `Driver`: the kernel shows the disk, and its requests go through."""
        return self._lost_at is None

    @property
    def reason(self) -> str:
        """See `Driver`."""
        return next((c.queue.reason for c in self._connections if c.queue.reason), super().reason)

    def fds(self) -> Sequence[int]:
        """See `Driver`."""
        failing = self._connections if self._failing else ()
        return (self._bell, *(c.fd for c in failing if c.fd >= 0 and c.socket_end == lib.IDC_NBD_STANDS))

    def _counters(self) -> dict[str, object]:
        return {"queues": [connection.counters() for connection in self._connections]}

    @property
    def _failing(self) -> bool:
        return self._lost_at is not None and time.monotonic() - self._lost_at > self._timeout

    # -- work

    def connect(self, endpoint: Endpoint) -> None:
        """See `Client`: the ends have met, so ask what the image is like."""
        endpoint.submit_transaction(Request(Op.GEOMETRY).pack(), self._told)

    def disconnect(self, endpoint: Endpoint, done: Callable[[], None]) -> None:
        """See `Client`."""
        self._geometry = None
        done()

    def _told(self, completion: Completion) -> None:
        if completion.result is not Result.OK:
            return
        if completion.error:
            self._trouble = BlockError(f"the back end does not tell the geometry: {os.strerror(completion.error)}")
            return
        try:
            self._geometry = Geometry.parse(completion.status)
        except ProtocolError as error:
            self._trouble = error

    def work(self) -> bool:
        """See `Driver`. Raises NbdError, BlockError."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        for error in (self._trouble, *(connection.queue.error for connection in self._connections)):
            if error is not None:
                raise error
        busy, now = False, time.monotonic()
        if self._lost_at is None:
            self._look_for_loss(now)
        elif self._geometry is not None and self._connections and self._all_connected() and now >= self._next_try:
            busy = self._meet(self._geometry, now)
        elif self._failing:
            for connection in self._connections:
                busy |= connection.fail(errno.EIO)
        self._look_at_sockets(now)
        self._tally.look()
        return busy

    def _all_connected(self) -> bool:
        return all(connection.queue.connected for connection in self._connections)

    def _look_for_loss(self, now: float) -> None:
        if (self._geometry is None or not self._all_connected()
                or self._met != [connection.queue.connections for connection in self._connections]):
            self._lost_at = now  # each queue makes its own requests wait
            return
        if any(connection.oldest(now) > self._timeout for connection in self._connections):
            log.warning("%s: the back end has left a request unanswered for %g s", self.device, self._timeout)
            self._lost_at = now - self._timeout
            for connection in self._connections:
                connection.restart()  # so that the back end, if it goes on, is done with these before it takes others

    def _meet(self, geometry: Geometry, now: float) -> bool:
        if self._disk is None:
            self._show(geometry)
        elif self._shown != geometry:
            raise BlockError(f"the image behind {self._disk.path} is another one than before, or of another size "
                             f"({geometry.size} bytes now): detach the device and attach it anew")
        if self._homeless:
            self._rehouse(now)
            return False
        self._lost_at = None
        self._met = [connection.queue.connections for connection in self._connections]
        for connection in self._connections:
            connection.go()
        return True

    def _show(self, geometry: Geometry) -> None:
        """Make the disk, or take the one over that former drivers of the same device have left."""
        disk = self._describe(geometry)
        there = self._kernel.identifier(disk.index)
        if there is not None and there != disk.identifier:
            if not there.startswith("idc/"):
                raise BlockError(f"{disk.path} is in use by another program: attach with another number, or disconnect "
                                 f"it (nbd-client -d {disk.path})")
            log.warning("%s: %s was left by %s", self.device, disk.path, there)
            self._kernel.disconnect(disk.index)
            there = None
        if there is None:
            fresh = [connection.fresh_socket() for connection in self._connections]
            try:
                self._kernel.connect(disk, [kernels.fileno() for kernels in fresh])
            finally:
                for kernels in fresh:
                    kernels.close()
        else:
            self._homeless = list(self._connections)
        self._disk, self._shown = disk, geometry
        log.info("%s: %s, %d bytes", self.device, disk.path, disk.size)

    def _describe(self, geometry: Geometry) -> Disk:
        block = max(SECTOR, geometry.minimum)
        if block > PAGE:
            raise BlockError(f"the image takes blocks of {geometry.minimum} bytes only, this kernel's nbd {PAGE} at "
                             "most")
        if geometry.size % block:
            raise BlockError(f"the image has {geometry.size} bytes, no multiple of {block}, which a disk of Linux must "
                             f"be: make it {geometry.size // block * block + block} (truncate -s)")
        flags = Flag.HAS_FLAGS | Flag.SEND_FLUSH | Flag.SEND_FUA | Flag.CAN_MULTI_CONN
        for can, flag in ((Can.READ_ONLY, Flag.READ_ONLY), (Can.TRIM, Flag.SEND_TRIM), (Can.ROTATES, Flag.ROTATIONAL)):
            if can in geometry.can:
                flags |= flag
        alone = len(self._connections) == 1
        wait = int(-(-self._timeout // 1)) + GRACE
        return Disk(int(self.device.number), f"idc/{self.device.here}/{self.device}/{geometry.image.hex()}",
                    geometry.size, block, flags, 0 if alone else wait, wait, min(LONGEST, geometry.longest))

    def _look_at_sockets(self, now: float) -> None:
        for connection in self._connections:
            end = connection.socket_end
            if end == lib.IDC_NBD_STANDS or connection in self._homeless or self._disk is None:
                continue
            if end == lib.IDC_NBD_DISCONNECTED:
                raise BlockError(f"{self._disk.path} was disconnected by another program")
            log.warning("%s: the kernel %s; it is given a new one", self.device, "has closed a socket"
                        if end == lib.IDC_NBD_CLOSED else "sends what is no request by a socket")
            self._homeless.append(connection)
        if self._homeless and self._disk is not None and now >= self._next_try and self._lost_at is None:
            self._rehouse(now)

    def _rehouse(self, now: float) -> None:
        """Give the kernel new sockets, one by one."""
        assert self._disk is not None
        while self._homeless:
            connection = self._homeless[0]
            kernels = connection.fresh_socket()
            try:
                self._kernel.reconfigure(self._disk, [kernels.fileno()])
            except NbdError as error:
                connection.close_socket()
                if error.number != errno.ENOSPC:
                    raise
                self._next_try = now + AGAIN  # it has not seen the end of the old one yet
                return
            finally:
                kernels.close()
            self._homeless.pop(0)


__all__ = ["BlockError", "BlockFront"]
