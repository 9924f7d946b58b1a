"""The front end of a block device: /dev/nbdN of this machine, each connection of it a queue to the back end.

nbd.c moves requests and payload; here is what is decided about them:

    both ends have met     the geometry is asked for; the kernel is given sockets, or new ones in place of dead ones
    a queue is lost        all are parted, so that nothing of before is still under way at the back end; requests wait
    all have met again     what had been sent and not answered is sent once more, then all that waits
    `timeout` is over      requests fail with EIO, until the ends have met again

Depends on idc.block, idc.device, idc.endpoint.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import time
from typing import TYPE_CHECKING, Final, cast

from idc._core import ffi, lib
from idc.block import queues
from idc.block.netlink import Disk, Flag, Kernel, NbdError
from idc.block.protocol import Can, Geometry, Op, Request
from idc.device.driver import FrontDriver
from idc.endpoint import Client, Completion, Endpoint, Result, State
from idc.endpoint.engine import Engine
from idc.errors import IdcError, ProtocolError
from idc.layout import PAGE
from idc.transport.address import open_port

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from idc.device.driver import Device
    from idc.transport.shared import SharedPort

#: Bytes of a socket's buffer: a whole large reply, so that it is sent by one call.
SOCKET_BYTES: Final = 4 << 20
#: Seconds that the kernel waits for new sockets beyond `timeout`: the drivers of a domain may have to start again.
GRACE: Final = 30
#: Seconds between two tries to give the kernel new sockets, which it takes once it has seen the old ones' end.
AGAIN: Final = 0.1
#: Bytes of a request of the kernel at most.
LONGEST: Final = 1 << 20
SECTOR: Final = 512
SO_SNDBUFFORCE: Final = 32

log = logging.getLogger("idc.block")


class BlockError(IdcError):
    """The device cannot be shown to this machine; the text says why."""


class Queue(Client):
    """One connection of the kernel and the endpoint that its requests go by.

    Args:
        address: of the channel.
        part_at, part_bytes: of the region: buffers are allocated from there, by this queue alone.

    Attributes:
        core: a struct idc_nbd.
        endpoint: to the back end.
    """

    def __init__(self, address: str, part_at: int, part_bytes: int) -> None:
        self.connected = False
        self._engine = Engine(queues.REQUESTS, queues.FRONT, messages=0)
        self._socket: socket.socket | None = None
        pages = part_bytes // PAGE
        self._used = ffi.new("uint8_t[]", pages)
        self.core = ffi.new("struct idc_nbd *", {"fd": -1, "part_at": part_at, "part_pages": pages, "longest": LONGEST,
                                                 "used": self._used})
        lib.idc_nbd_start(self.core)
        port = open_port(address)
        try:
            self.core.memory = queues.memory(port.regions[0])
            self.endpoint = self._engine.endpoint(cast("SharedPort", port), self)
        except BaseException:
            port.close()
            raise

    def connect(self, endpoint: Endpoint) -> None:
        """See `Client`."""
        self.connected = True

    def disconnect(self, endpoint: Endpoint, done: Callable[[], None]) -> None:
        """See `Client`."""
        self.connected = False
        self.core.engine = ffi.NULL
        done()

    def go(self) -> None:
        """Send what waits, and what is still to come."""
        self.core.failing = 0
        self.core.engine = self._engine.core

    def work(self) -> bool:
        """Move what can be moved. Whether anything was."""
        done = self._engine.poll(0.0)
        for cookie, completion in done:
            known = completion.result in (Result.OK, Result.ERROR)
            error = errno.EIO if completion.result is Result.ERROR else completion.error
            lib.idc_nbd_complete(self.core, cookie, known, error)
        moved = lib.idc_nbd_work(self.core)
        self._engine.notify()
        return bool(done) or moved > 0

    def fail(self) -> None:
        """Answer what waits, and what comes from now on, with EIO."""
        self.core.failing = errno.EIO
        lib.idc_nbd_fail(self.core, errno.EIO)

    def fresh_socket(self) -> socket.socket:
        """A new socket for the kernel, of which this queue has the other end; the caller's."""
        kernels, own = socket.socketpair()
        for end in (kernels, own):
            with contextlib.suppress(OSError):  # more than net.core allows is for root
                end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SOCKET_BYTES)
        own.setblocking(False)
        self.close_socket()
        self._socket = own
        lib.idc_nbd_open(self.core, own.fileno())
        return kernels

    def close_socket(self) -> None:
        """The kernel sees the end of the connection."""
        self.core.fd = -1
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __str__(self) -> str:
        core = self.core
        return (f"{core.requests} requests, {core.errors} errors, {core.replayed} sent again, {core.bytes_in} bytes "
                f"from the kernel, {core.bytes_out} to it")


class BlockFront(FrontDriver):
    """See the module's text. Raises NbdError where there is no nbd driver."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self._timeout = float(device.options["timeout"])
        self._geometry: Geometry | None = None  # of this connection
        self._disk: Disk | None = None
        self._shown: Geometry | None = None
        self._queues: list[Queue] = []
        self._homeless: list[Queue] = []  # whose socket the kernel is to be given
        self._next_try = 0.0
        self._lost_at: float | None = time.monotonic()
        self._kernel = self.kernel()
        self._epoll = select.epoll()
        self._registered: dict[int, tuple[int, int]] = {}
        self.trouble: Exception | None = None

    # -- life

    def kernel(self) -> Kernel:
        """The nbd driver of this machine."""
        return Kernel()

    def settle(self) -> None:
        """Make this process one that the kernel can wait for when it is short of memory. Raises OSError."""
        if (error := lib.idc_nbd_settle()) != 0:
            raise OSError(error, "the process that serves a block device cannot be locked in memory")

    def open(self, address: str) -> None:
        """See `Driver`."""
        super().open(address)
        self.settle()
        count = int(self.device.options["connections"])
        port = open_port(address)
        try:
            part = queues.front_part(port.regions[0], own=True)
        finally:
            port.close()
        share = part.length // count // PAGE * PAGE
        for number, name in enumerate(queues.names(count)):
            self._queues.append(Queue(queues.address(address, name), part.offset + number * share, share))

    def close(self) -> None:
        """See `Driver`. Detached, the disk goes; only unloaded, it stays and waits for whoever serves it next."""
        if self.gone and self._disk is not None:
            self._kernel.disconnect(self._disk.index)
        super().close()
        for queue in self._queues:
            queue.endpoint.destroy()

    def drop(self) -> None:
        """See `Driver`."""
        with contextlib.ExitStack() as held:
            held.callback(self._kernel.close)
            held.callback(self._epoll.close)
            held.callback(super().drop)
            for queue in self._queues:
                log.info("%s: %s", self.device, queue)
                held.callback(queue.endpoint.abandon)
                held.callback(queue.close_socket)

    @property
    def opened(self) -> bool:
        """See `Driver`."""
        return super().opened or any(queue.endpoint.state is not State.DESTROYED for queue in self._queues)

    @property
    def connected(self) -> bool:
        """See `Driver`: the kernel shows the disk, and its requests go through."""
        return self._lost_at is None

    def endpoints(self) -> Sequence[Endpoint]:
        """See `Driver`."""
        return (*super().endpoints(), *(queue.endpoint for queue in self._queues))

    def fds(self) -> Sequence[int]:
        """See `Driver`."""
        for queue in self._queues:
            self._register(queue)
        return (self._epoll.fileno(),)

    def _register(self, queue: Queue) -> None:
        """What the socket is polled for."""
        key, fd, events = id(queue), int(queue.core.fd), int(lib.idc_nbd_wants(queue.core))
        before = self._registered.get(key)
        if before == (fd, events):
            return
        if before is not None and before[0] != fd and before[0] >= 0:
            with contextlib.suppress(OSError, ValueError):  # closed, so it is out already
                self._epoll.unregister(before[0])
        if fd >= 0:
            try:
                self._epoll.modify(fd, events)
            except FileNotFoundError:
                self._epoll.register(fd, events)
        self._registered[key] = (fd, events)

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
            self.trouble = BlockError(f"the back end does not tell the geometry: {os.strerror(completion.error)}")
            return
        try:
            self._geometry = Geometry.parse(completion.status)
        except ProtocolError as error:
            self.trouble = error

    def work(self) -> bool:
        """See `Driver`. Raises NbdError, BlockError."""
        if self.trouble is not None:
            raise self.trouble
        busy = False
        for queue in self._queues:
            busy |= queue.work()
        met = self._geometry is not None and all(queue.connected for queue in self._queues)
        now = time.monotonic()
        if self._lost_at is None:
            if not met:
                self._part("a queue was lost", now)
                busy = True
            else:
                self._look_for_stuck(now)
        elif met and self._queues and now >= self._next_try:
            assert self._geometry is not None
            busy |= self._meet(self._geometry, now)
        elif now - self._lost_at > self._timeout:
            for queue in self._queues:
                busy |= queue.core.waiting != 0
                queue.fail()
        self._look_at_sockets(now)
        return busy

    def _part(self, why: str, since: float) -> None:
        """Requests wait from now on, and nothing of before goes on at the back end once the queues have met again."""
        self._lost_at = since
        for queue in self._queues:
            queue.core.engine = ffi.NULL
            queue.endpoint.disconnect(why)

    def _look_for_stuck(self, now: float) -> None:
        limit = int((now - self._timeout) * 1e9)
        for queue in self._queues:
            oldest = int(lib.idc_nbd_oldest(queue.core))
            if oldest and oldest < limit:
                log.warning("%s: the back end has left a request unanswered for %g s", self.device, self._timeout)
                self._part("requests are not answered", now - self._timeout)
                return

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
        for queue in self._queues:
            queue.go()
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
            fresh = [queue.fresh_socket() for queue in self._queues]
            try:
                self._kernel.connect(disk, [kernels.fileno() for kernels in fresh])
            finally:
                for kernels in fresh:
                    kernels.close()
        else:
            self._homeless = list(self._queues)
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
        alone = len(self._queues) == 1
        wait = int(-(-self._timeout // 1)) + GRACE
        return Disk(int(self.device.number), f"idc/{self.device.here}/{self.device}/{geometry.image.hex()}",
                    geometry.size, block, flags, 0 if alone else wait, wait, min(LONGEST, geometry.longest))

    def _look_at_sockets(self, now: float) -> None:
        for queue in self._queues:
            end = queue.core.end
            if end == lib.IDC_NBD_STANDS or queue in self._homeless or self._disk is None:
                continue
            if end == lib.IDC_NBD_DISCONNECTED:
                raise BlockError(f"{self._disk.path} was disconnected by another program")
            log.warning("%s: the kernel %s; it is given a new one", self.device, "has closed a socket"
                        if end == lib.IDC_NBD_CLOSED else "sends what is no request by a socket")
            self._homeless.append(queue)
        if self._homeless and self._disk is not None and now >= self._next_try and self._lost_at is None:
            self._rehouse(now)

    def _rehouse(self, now: float) -> None:
        """Give the kernel new sockets, one by one."""
        assert self._disk is not None
        while self._homeless:
            queue = self._homeless[0]
            kernels = queue.fresh_socket()
            try:
                self._kernel.reconfigure(self._disk, [kernels.fileno()])
            except NbdError as error:
                queue.close_socket()
                if error.number != errno.ENOSPC:
                    raise
                self._next_try = now + AGAIN  # it has not seen the end of the old one yet
                return
            finally:
                kernels.close()
            self._homeless.pop(0)


__all__ = ["BlockError", "BlockFront", "Queue"]
