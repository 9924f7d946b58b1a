"""`python3 -m guest.give REGION|ADDRESS DRIVER`: hands a region's ivshmem device to a driver, such as a user's own.

Several ivshmem devices look alike on the bus; the name in the region's header page says which one is meant. Prints its
PCI address; with that, `python3 -m guest.give ADDRESS vfio-pci` gives it back. May import `idc` and `guest`.
"""

from __future__ import annotations

import argparse
import fcntl
import sys
from pathlib import Path

from guest.ivshmem import LOCK, RegionNotFoundError, addresses
from guest.vfio import SYSFS_DEVICES, Device, DeviceBusyError, VfioError
from idc.layout import HEADER_BYTES, LayoutError, parse_header

_DRIVERS = Path("/sys/bus/pci/drivers")
_PROBE = Path("/sys/bus/pci/drivers_probe")


def give(region: str, driver: str) -> str:
    """Bind the device of `region` (a name, or a PCI address such as 0000:01:00.0) to the loaded `driver`.

    Returns its PCI address. VFIO must not have it open; a device of another driver goes by its address only.

    Raises:
        RegionNotFoundError: no device here carries it; the text says what there is.
        VfioError: there is no such driver, or it did not take the device (then nobody has it).
    """
    if not (_DRIVERS / driver).exists():
        raise VfioError(f"no driver {driver!r} here: insmod it first; the name is that in its struct pci_driver")
    with LOCK.open("w") as lock:  # nobody looks for regions meanwhile
        fcntl.flock(lock, fcntl.LOCK_EX)
        seen: list[str] = []
        for address in addresses():
            if region == address or _carries(address, region, seen):
                _bind(address, driver)
                return address
    raise RegionNotFoundError(f"no region {region!r} to give away; ivshmem devices here: {'; '.join(seen) or 'none'}")


def _carries(address: str, region: str, seen: list[str]) -> bool:
    """Whether the device has the region's header page, as far as VFIO can look; `seen` is told what it has instead."""
    driver = SYSFS_DEVICES / address / "driver"
    if driver.exists() and driver.resolve().name != "vfio-pci":
        # Its memory is not ours to map: on x86 that fails when the other driver has it mapped with another cache type.
        seen.append(f"{address} belongs to the driver {driver.resolve().name}")
        return False
    try:
        device = Device(address)
    except DeviceBusyError:
        seen.append(f"{address} in use")
        return False
    try:
        with device.map_bar(2) as memory:
            name = parse_header(memory[:HEADER_BYTES], len(memory)).name
        seen.append(f"{address} carries {name!r}")
        return name == region
    except LayoutError as error:
        seen.append(f"{address} without a valid header ({error})")
        return False
    finally:
        device.close()


def _bind(address: str, driver: str) -> None:
    device = SYSFS_DEVICES / address
    if (device / "driver").exists():
        (device / "driver" / "unbind").write_text(address)
    (device / "driver_override").write_text(driver)
    _PROBE.write_text(address)
    if not (device / "driver").exists():
        raise VfioError(f"{driver} did not take {address}: its probe function failed (dmesg says why)")


def main() -> None:
    """Command line: see the module's text."""
    parser = argparse.ArgumentParser(prog="guest.give", description="hand a region's device to a driver")
    parser.add_argument("region", help="name of the region, or PCI address of the device")
    parser.add_argument("driver")
    options = parser.parse_args()
    try:
        print(give(options.region, options.driver))  # noqa: T201 - this is its output
    except (VfioError, OSError) as error:
        sys.exit(f"guest.give: {error}")


if __name__ == "__main__":
    main()
