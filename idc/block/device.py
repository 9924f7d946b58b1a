"""The device class `block`. Depends on idc.block and idc.device."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from idc.block import protocol, queues
from idc.block.back import BlockBack
from idc.block.front import BlockFront
from idc.device.classes import DeviceClass
from idc.device.options import Option
from idc.device.queued import POLL
from idc.domain import Service
from idc.endpoint.frames import Quotas

if TYPE_CHECKING:
    from collections.abc import Mapping

    from idc.device.classes import Queues
    from idc.device.driver import BackDriver, FrontDriver
    from idc.device.options import Value


class Block(DeviceClass):
    """A block device: /dev/nbdN in the front end's domain, an image or block device in the back end's."""

    name = "block"
    options: ClassVar[Mapping[str, Option]] = {
        "image": Option("", "file or block device in the back end's domain: an absolute path"),
        "base": Option("", "image that `image` lies over, copy on write; then `image` is made if it is not there"),
        "read_only": Option(False, "nothing is written"),
        "shared": Option(False, "other devices may use the image too, if all say so"),
        "connections": Option(1, "of the front end's kernel; see docs/block.md before you take more", 1, queues.MOST),
        "timeout": Option(30.0, "seconds without a back end until requests fail with EIO", 1, 86400),
        "poll": POLL,
    }
    service = Service("block", Quotas(4, 0, protocol.REQUEST.size, protocol.GEOMETRY.size), 4)
    front: ClassVar[type[FrontDriver]] = BlockFront
    back: ClassVar[type[BackDriver]] = BlockBack

    @classmethod
    def queues(cls, options: Mapping[str, Value]) -> Queues:
        """See `DeviceClass`."""
        return queues.of(int(options["connections"]))
