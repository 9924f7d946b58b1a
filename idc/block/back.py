"""The back end of a block device: an image, and a queue of requests for each of the front end's connections.

The endpoint "device" says the geometry; each "queue-N" carries requests, which image.c answers. Depends on idc.block,
idc.device, idc.endpoint.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from idc._core import ffi, lib
from idc.block import queues
from idc.block.image import Image, Spec
from idc.block.lease import RUNTIME
from idc.block.protocol import REQUEST, Op
from idc.device.driver import BackDriver
from idc.device.queued import poll_seconds
from idc.device.tally import Tally
from idc.pump import Queue, places

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import ClassVar

    from idc._core import Pointer
    from idc.device.driver import Device
    from idc.endpoint import Completion, Endpoint, IncomingTransaction
    from idc.pump import Place

#: Seconds between two looks whether the image is as it was.
LOOK: Final = 1.0

log = logging.getLogger("idc.block")


class _Shape:
    """See `idc.pump.queue.Shape`: requests are carried out by image.c.

    Args:
        core: a struct idc_image.
        place: of the queue; closed with this.
    """

    handler = ffi.addressof(lib, "idc_image_handle")

    def __init__(self, core: Pointer, place: Place) -> None:
        self._core = core
        self.close = place.close

    def attach(self, pump: Pointer) -> None:
        """See `Shape`."""
        pump.context = self._core

    def begin(self, pump: Pointer) -> None:
        """See `Shape`."""

    def completed(self, cookie: int, completion: Completion) -> None:
        """See `Shape`: a back end asks nothing."""

    def end(self) -> None:
        """See `Shape`."""

    def judge(self, transaction: IncomingTransaction) -> str:
        """See `Shape`."""
        return f"a request of {len(transaction.parameters)} bytes, {REQUEST.size} are expected"


class BlockBack(BackDriver):
    """See the module's text. Raises ImageError, InUseError, OverlayError if the image is not to be had."""

    runtime: ClassVar[Path] = RUNTIME

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        options = device.options
        base = str(options["base"])
        spec = Spec(Path(str(options["image"])), Path(base) if base else None, bool(options["read_only"]),
                    bool(options["shared"]))
        self._queues: list[Queue] = []
        self._looked = 0.0
        self._said = ""
        self._broken = 0
        self.image = Image(spec, f"{device} of {device.peer}", self.runtime)
        self._tally = Tally(queues.tally_path(device), self._counters)
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def open(self, address: str) -> None:
        """See `Driver`."""
        super().open(address)
        port, count = queues.port(address), int(self.device.options["connections"])
        try:
            for number, place in enumerate(places(port.region, count)):
                if not number:
                    self.image.attach(place.base, place.theirs, place.theirs_bytes)
                queue = Queue(f"{self.device} queue {number}", _Shape(self.image.core, place), depth=0,
                              accepts=queues.BACK, told=self._ring, poll=poll_seconds(self.device))
                self._queues.append(queue)
                queue.start(queues.port(queues.address(address, number)))
        finally:
            port.close()

    def _ring(self) -> None:
        os.eventfd_write(self._bell, 1)

    def fds(self) -> Sequence[int]:
        """See `Driver`."""
        return (self._bell,)

    def close(self) -> None:
        """See `Driver`."""
        self._end()
        super().close()

    def drop(self) -> None:
        """See `Driver`."""
        self._end()
        super().drop()
        self._tally.remove()
        self.image.close()
        os.close(self._bell)

    def _end(self) -> None:
        while self._queues:
            self._queues.pop().stop()
        self.image.detach()

    def _counters(self) -> dict[str, object]:
        return {"image": self.image.counters, "queues": [queue.told_of() for queue in self._queues]}

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        """See `Client`."""
        if transaction.parameters[:1] == bytes([Op.GEOMETRY]):
            transaction.complete(self.image.geometry.pack())
        else:
            transaction.complete(error=errno.EINVAL)

    def disconnect(self, endpoint: Endpoint, done: Callable[[], None]) -> None:
        """See `Client`."""
        log.info("%s: %s", self.device, self.image.counters)
        done()

    def work(self) -> bool:
        """See `Driver`."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        for queue in self._queues:
            if queue.error is not None:
                raise queue.error
        self._tally.look()
        now = time.monotonic()
        if now - self._looked >= LOOK:
            self._looked = now
            wrong = self.image.check()
            if wrong and wrong != self._said:
                log.error("%s: %s", self.device, wrong)
            self._said = wrong
            broken = self.image.counters["broken"]
            if broken != self._broken:
                log.error("%s: image %s: %s (%d requests)", self.device, self.image.spec.path,
                          os.strerror(self.image.last_error), broken - self._broken)
                self._broken = broken
        return False
