"""The back end of a block device: an image, and a queue of requests for each of the front end's connections.

The endpoint "device" says the geometry; each "queue-N" carries requests, which image.c answers. Depends on idc.block,
idc.device, idc.endpoint.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from idc._core import ffi, lib
from idc.block import queues
from idc.block.image import Image, Spec
from idc.block.lease import RUNTIME
from idc.block.protocol import Op
from idc.device.driver import BackDriver
from idc.endpoint import Client, Endpoint, State
from idc.endpoint.engine import Engine
from idc.transport.address import open_port

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import ClassVar

    from idc.device.driver import Device
    from idc.endpoint import IncomingTransaction
    from idc.region import Region
    from idc.transport.shared import SharedPort

#: Seconds between two looks whether the image is as it was.
LOOK: Final = 1.0

log = logging.getLogger("idc.block")


class _Queue(Client):
    """The client of a queue's endpoint: of what the core leaves to Python."""

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        """See `Client`: no request that the core knows."""
        transaction.complete(error=errno.EINVAL)


class BlockBack(BackDriver):
    """See the module's text. Raises ImageError, InUseError, OverlayError if the image is not to be had."""

    runtime: ClassVar[Path] = RUNTIME

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        options = device.options
        base = str(options["base"])
        spec = Spec(Path(str(options["image"])), Path(base) if base else None, bool(options["read_only"]),
                    bool(options["shared"]))
        self._queues: list[Endpoint] = []
        self._looked = 0.0
        self._said = ""
        self.image = Image(spec, f"{device} of {device.peer}", self.runtime)

    def open(self, address: str) -> None:
        """See `Driver`."""
        super().open(address)
        for name in queues.names(int(self.device.options["connections"])):
            port = open_port(queues.address(address, name))
            try:
                if not self._queues:
                    self._attach(port.regions[0])
                engine = Engine(0, queues.BACK, handler=ffi.addressof(lib, "idc_image_handle"),
                                context=self.image.core, messages=0)
                self._queues.append(engine.endpoint(cast("SharedPort", port), _Queue()))
            except BaseException:
                port.close()
                raise

    def _attach(self, region: Region) -> None:
        """The front end's part of the region is where READ and WRITE may go."""
        front = queues.front_part(region, own=False)
        self.image.attach(queues.memory(region), front.offset, front.length)

    def close(self) -> None:
        """See `Driver`."""
        super().close()
        for endpoint in self._queues:
            endpoint.destroy()

    def drop(self) -> None:
        """See `Driver`."""
        self.image.detach()
        with contextlib.ExitStack() as held:
            held.callback(self.image.close)
            held.callback(super().drop)
            for endpoint in self._queues:
                held.callback(endpoint.abandon)

    @property
    def opened(self) -> bool:
        """See `Driver`."""
        return super().opened or any(endpoint.state is not State.DESTROYED for endpoint in self._queues)

    def endpoints(self) -> Sequence[Endpoint]:
        """See `Driver`."""
        return (*super().endpoints(), *self._queues)

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
        now = time.monotonic()
        if now - self._looked >= LOOK:
            self._looked = now
            wrong = self.image.check()
            if wrong and wrong != self._said:
                log.error("%s: %s", self.device, wrong)
            self._said = wrong
        return False
