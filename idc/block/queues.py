"""The queues of a block device: one for each connection of the front end's kernel.

Depends on idc.device and idc.endpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

from idc.block import protocol
from idc.device.classes import Queues, queue_channel
from idc.endpoint.frames import Quotas
from idc.transport.address import open_port

if TYPE_CHECKING:
    from pathlib import Path

    from idc.device.driver import Device
    from idc.transport.shared import SharedPort

#: Most connections of a device.
MOST: Final = 4
#: Requests under way in one queue: what the kernel has outstanding for one connection.
REQUESTS: Final = 128
#: What the back end accepts in a queue, and the front end.
BACK: Final = Quotas(REQUESTS, 0, protocol.REQUEST.size, 0)
FRONT: Final = Quotas(0, 0, 0, 0)
#: Bytes for buffers of each queue.
ROOM: Final = 12 << 20


def of(connections: int) -> Queues:
    """Of a device with so many connections."""
    return Queues(connections, BACK, REQUESTS, ROOM)


def address(device: str, number: int) -> str:
    """Of a queue, from the address of the channel "device"."""
    return f"{device.rpartition('/')[0]}/{queue_channel(number)}"


def port(address: str) -> SharedPort:
    """At an address of a region's channel. Raises as `open_port`."""
    return cast("SharedPort", open_port(address))


def tally_path(device: Device) -> Path:
    """Where the counters of this end are."""
    return device.sockets / f"{device}.{device.role.value}.{device.peer}.json"
