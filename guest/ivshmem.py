"""Finds an ivshmem device by the name in its region's header page and opens it as an `idc.region.Region`.

Several ivshmem devices look alike on the PCI bus (same vendor, same device, any slot), so the name decides. Register
offsets are those of QEMU's docs/specs/ivshmem-spec. May import `idc` and `guest.vfio`.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import select
import socket
import struct
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from guest.vfio import SYSFS_DEVICES, Device, DeviceBusyError, VfioError
from idc.layout import HEADER_BYTES, LayoutError, parse_header
from idc.region import Region
from idc.ring import Bell
from idc.transport.shared import Regions, SharedPort

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Iterator

VENDOR_DEVICE = ("0x1af4", "0x1110")
IV_POSITION = 8
DOORBELL = 12
LOCK = Path("/run/idc-ivshmem.lock")
_NETLINK_KOBJECT_UEVENT = 15


class RegionNotFoundError(VfioError):
    """No ivshmem device of this machine carries the region; the text lists what is there."""


class RegionUnusableError(VfioError):
    """The region was found, but speaks another protocol, or promises vectors that its device does not have."""


def addresses() -> list[str]:
    """PCI addresses of all ivshmem devices, in bus order."""
    found = []
    for device in sorted(SYSFS_DEVICES.iterdir()):
        try:
            ids = tuple((device / name).read_text().strip() for name in ("vendor", "device"))
        except OSError:  # unplugged since it was listed: it is not there, which is the answer
            continue
        if ids == VENDOR_DEVICE:
            found.append(device.name)
    return found


def open_region(name: str, timeout: float = 10.0) -> Region:
    """Open the region called `name`, waiting up to `timeout` seconds for its device to be plugged.

    Raises:
        RegionNotFoundError: no device carries it; the text says what the devices there do carry, or why one could not
            be opened. (That does not end the wait: a device that comes or goes fails in many ways, and another may be
            the right one.)
        RegionUnusableError: the region is there, and its header page is not for this library or this device.
    """
    deadline = time.monotonic() + timeout
    with _uevents() as events:
        while True:
            seen: list[str] = []
            region = _scan(name, seen)
            if region is not None:
                return region
            left = deadline - time.monotonic()
            if left <= 0:
                raise RegionNotFoundError(
                    f"no region {name!r} after {timeout:g} s; ivshmem devices here: {'; '.join(seen) or 'none'}")
            _wait_for_change(events, min(left, 1.0))


@contextmanager
def _uevents() -> Iterator[socket.socket]:
    """The kernel's own announcements of devices that come and go."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_KOBJECT_UEVENT) as events:
        events.bind((0, 1))
        yield events


def _wait_for_change(events: socket.socket, timeout: float) -> None:
    readable, _, _ = select.select([events], [], [], timeout)
    while readable:  # one plug is many events: take what is there, then look once
        try:
            events.recv(65536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return


def _scan(name: str, seen: list[str]) -> Region | None:
    # One scan at a time: opening a device to read its name makes it busy for any other scanner.
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for address in addresses():
            try:
                region = _open(address, name, seen)
            except RegionUnusableError:
                raise
            except DeviceBusyError:
                seen.append(f"{address} in use")
            except VfioError as error:
                seen.append(str(error))
            else:
                if region is not None:
                    return region
    return None


def _open(address: str, name: str, seen: list[str]) -> Region | None:
    held, region = ExitStack(), None  # what is opened here belongs to the region, if there is one in the end
    try:
        region = _open_named(address, name, seen, held)
    finally:
        if region is None:
            held.close()
    return region


def _open_named(address: str, name: str, seen: list[str], held: ExitStack) -> Region | None:
    device = Device(address)
    held.callback(device.close)
    memory = held.enter_context(device.map_bar(2))
    try:
        header = parse_header(memory[:HEADER_BYTES], len(memory))
    except LayoutError as error:
        seen.append(f"{address} without a valid header ({error})")
        return None
    if header.name != name:
        seen.append(f"{address} carries {header.name!r}")
        return None
    registers = held.enter_context(device.map_bar(0)) if device.vectors else None
    try:
        return _region(device, memory, registers, held.close)
    except LayoutError as error:
        raise RegionUnusableError(f"{address}: {error}") from error


def _region(device: Device, memory: mmap.mmap, registers: mmap.mmap | None, release: Callable[[], None]) -> Region:
    if registers is None:  # ivshmem-plain: a read-only member, which nobody rings and which rings nobody
        def no_bell(member: int, vector: int) -> Bell:
            raise VfioError(f"{device.address} is a read-only member: it has no doorbell "
                            f"(asked for member {member}, vector {vector})")
        return Region(memory, None, (), no_bell, release)
    (member,) = struct.unpack_from("<i", registers, IV_POSITION)

    def bell(peer: int, vector: int) -> Bell:
        return Bell.mmio(registers, DOORBELL, peer << 16 | vector)

    if member >= 0:
        with contextlib.closing(bell(member, 0)) as mine:
            mine.learn(device.vectors[0])
    return Region(memory, member, device.vectors, bell, release)


_regions = Regions(open_region)


def port(address: str) -> SharedPort:
    """Where an endpoint meets its peer: REGION/CHANNEL. Waits up to ten seconds for the region's device.

    Raises MisuseError, NotConnectedError, and as `open_region`.
    """
    return _regions.port(address)


def main() -> None:
    """List the regions of this machine as JSON, one object a line."""
    argparse.ArgumentParser(prog="guest.ivshmem", description=main.__doc__).parse_args()
    for address in addresses():
        seen: list[str] = []
        try:
            _open(address, "", seen)
        except VfioError as error:
            seen.append(str(error))
        print(json.dumps({"address": address, "state": "; ".join(seen)}))  # noqa: T201 - this is its output


if __name__ == "__main__":
    main()
