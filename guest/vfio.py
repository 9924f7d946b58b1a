"""A PCI device through VFIO: BARs mapped into this process, MSI-X vectors as eventfds. No kernel module of ours.

Constants and structures are those of `linux/vfio.h`. Needs root, an IOMMU (kernel arguments `intel_iommu=on`) and
the vfio-pci module. May import the standard library only.
"""

from __future__ import annotations

import array
import errno
import fcntl
import mmap
import os
import struct
from pathlib import Path

SYSFS_DEVICES = Path("/sys/bus/pci/devices")

_SET_IOMMU = 0x3B66
_GROUP_GET_STATUS = 0x3B67
_GROUP_SET_CONTAINER = 0x3B68
_GROUP_GET_DEVICE_FD = 0x3B6A
_DEVICE_GET_REGION_INFO = 0x3B6C
_DEVICE_GET_IRQ_INFO = 0x3B6D
_DEVICE_SET_IRQS = 0x3B6E

_TYPE1_IOMMU = 1
_GROUP_VIABLE = 1
_CONFIG_REGION = 7
_MSIX_IRQ = 2
_IRQ_SET_DATA_EVENTFD_TRIGGER = (1 << 2) | (1 << 5)
_REGION_WRITE = 1 << 1
_REGION_MMAP = 1 << 2

_PCI_COMMAND = 4
_PCI_COMMAND_MEMORY_AND_MASTER = 0x6


class VfioError(Exception):
    """A device cannot be opened or used; the text says which one, why, and what to do."""


class DeviceBusyError(VfioError):
    """Another process of this machine has the device open: a VFIO group has one owner at a time."""


def bind(address: str) -> None:
    """Give the device at a PCI address such as `0000:01:00.0` to vfio-pci. Idempotent."""
    device = SYSFS_DEVICES / address
    driver = device / "driver"
    if driver.exists():
        if driver.resolve().name == "vfio-pci":
            return
        raise VfioError(f"{address} belongs to the driver {driver.resolve().name}; unbind it first")
    try:
        (device / "driver_override").write_text("vfio-pci")
        Path("/sys/bus/pci/drivers_probe").write_text(address)
    except FileNotFoundError as error:
        raise VfioError(f"no PCI device {address}") from error
    if not driver.exists():
        raise VfioError(f"vfio-pci did not take {address}; is the module loaded and the IOMMU on? (dmesg)")


class Device:
    """An open device.

    Attributes:
        address: PCI address.
        vectors: one eventfd for each MSI-X vector (none for a device without interrupts), non-blocking.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.vectors: tuple[int, ...] = ()
        self._fds: list[int] = []
        try:
            self._open()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise VfioError(f"cannot open {address} through VFIO: {error}") from error
            raise

    def _open(self) -> None:
        bind(self.address)
        link = SYSFS_DEVICES / self.address / "iommu_group"
        if not link.exists():
            raise VfioError(f"{self.address} is in no IOMMU group: boot with intel_iommu=on and an IOMMU device")
        group = link.resolve().name
        container = self._keep(os.open("/dev/vfio/vfio", os.O_RDWR | os.O_CLOEXEC))
        try:
            group_fd = self._keep(os.open(f"/dev/vfio/{group}", os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise DeviceBusyError(f"{self.address} (VFIO group {group}) is open elsewhere") from error
            raise VfioError(f"cannot open VFIO group {group} of {self.address}: {error.strerror}") from error
        status = bytearray(struct.pack("<II", 8, 0))
        fcntl.ioctl(group_fd, _GROUP_GET_STATUS, status)
        if not struct.unpack("<II", status)[1] & _GROUP_VIABLE:
            raise VfioError(f"group {group} of {self.address} is not viable: not all its devices are with vfio-pci")
        fcntl.ioctl(group_fd, _GROUP_SET_CONTAINER, struct.pack("<i", container))
        fcntl.ioctl(container, _SET_IOMMU, _TYPE1_IOMMU)
        name = bytearray(self.address.encode() + b"\0")
        self._device = self._keep(fcntl.ioctl(group_fd, _GROUP_GET_DEVICE_FD, name))
        os.set_inheritable(self._device, False)
        self._enable()
        self._arm_vectors()

    def _keep(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def _region(self, index: int) -> tuple[int, int, int]:
        """Flags, size and file offset of a region (a BAR or the configuration space)."""
        info = bytearray(struct.pack("<IIIIQQ", 32, 0, index, 0, 0, 0))
        fcntl.ioctl(self._device, _DEVICE_GET_REGION_INFO, info)
        _, flags, _, _, size, offset = struct.unpack("<IIIIQQ", info)
        return flags, size, offset

    def _enable(self) -> None:
        """Turn on memory decoding, and bus mastering, without which no MSI-X message leaves the device."""
        _, _, offset = self._region(_CONFIG_REGION)
        (command,) = struct.unpack("<H", os.pread(self._device, 2, offset + _PCI_COMMAND))
        os.pwrite(self._device, struct.pack("<H", command | _PCI_COMMAND_MEMORY_AND_MASTER), offset + _PCI_COMMAND)

    def _arm_vectors(self) -> None:
        info = bytearray(struct.pack("<IIII", 16, 0, _MSIX_IRQ, 0))
        fcntl.ioctl(self._device, _DEVICE_GET_IRQ_INFO, info)
        count = struct.unpack("<IIII", info)[3]
        if count == 0:
            return
        self.vectors = tuple(self._keep(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)) for _ in range(count))
        header = struct.pack("<IIIII", 20 + 4 * count, _IRQ_SET_DATA_EVENTFD_TRIGGER, _MSIX_IRQ, 0, count)
        fcntl.ioctl(self._device, _DEVICE_SET_IRQS, bytearray(header + array.array("i", self.vectors).tobytes()))

    def map_bar(self, index: int) -> mmap.mmap:
        """Map a BAR; read-only when the device says it cannot be written.

        The mapping outlives the `Device`'s own file descriptors, so it is the caller's to close.
        Raises VfioError.
        """
        try:
            flags, size, offset = self._region(index)
            if size == 0 or not flags & _REGION_MMAP:
                raise VfioError(f"BAR {index} of {self.address} cannot be mapped (size {size}, flags {flags:#x})")
            access = mmap.PROT_READ | (mmap.PROT_WRITE if flags & _REGION_WRITE else 0)
            return mmap.mmap(self._device, size, mmap.MAP_SHARED, access, offset=offset)
        except OSError as error:
            raise VfioError(f"cannot map BAR {index} of {self.address}: {error}") from error

    def close(self) -> None:
        """Give the device back. Idempotent."""
        while self._fds:
            os.close(self._fds.pop())
        self.vectors = ()
