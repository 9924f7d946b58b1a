"""How a guest finds its region among devices that look alike, some of them broken: the device itself is made up."""

from __future__ import annotations

import mmap
import os
import struct
from typing import TYPE_CHECKING

import pytest

from guest import ivshmem
from guest.vfio import Device, DeviceBusyError, VfioError
from idc.layout import HEADER_BYTES, RegionHeader, Rights, pack_header

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SIZE = 1 << 16


class FakeDevice:
    """Stands in for `guest.vfio.Device`: BAR 2 is a memfd, BAR 0 a page of zeros with the member's id."""

    def __init__(self, address: str, page: bytes, vectors: int, opened: list[FakeDevice]) -> None:
        self.address, self.closed = address, False
        self.vectors = tuple(os.eventfd(0, os.EFD_NONBLOCK) for _ in range(vectors))
        self._page = page
        self.maps: list[mmap.mmap] = []
        opened.append(self)

    def map_bar(self, index: int) -> mmap.mmap:
        memory = mmap.mmap(-1, SIZE if index == 2 else 4096)
        if index == 2:
            memory[:HEADER_BYTES] = self._page.ljust(HEADER_BYTES, b"\0")
        else:
            struct.pack_into("<i", memory, ivshmem.IV_POSITION, 1)
        self.maps.append(memory)
        return memory

    def close(self) -> None:
        assert not self.closed
        self.closed = True
        for fd in self.vectors:
            os.close(fd)


def page(name: str) -> bytes:
    return pack_header(RegionHeader.plan(name, SIZE, {"a": Rights.RW, "b": Rights.RW}, vectors=3))


@pytest.fixture
def opened() -> Iterator[list[FakeDevice]]:
    """Every device that was opened; each must be closed, and each map of it, in the end."""
    devices: list[FakeDevice] = []
    yield devices
    assert all(device.closed and all(memory.closed for memory in device.maps) for device in devices)


@pytest.fixture
def plug(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, opened: list[FakeDevice]) -> Callable[..., None]:
    def plug(*slots: tuple[bytes, int] | Exception) -> None:
        def open_device(address: str) -> FakeDevice:
            slot = slots[int(address)]
            if isinstance(slot, Exception):
                raise slot
            return FakeDevice(address, *slot, opened)

        monkeypatch.setattr(ivshmem, "addresses", lambda: [str(n) for n in range(len(slots))])
        monkeypatch.setattr(ivshmem, "Device", open_device)
        monkeypatch.setattr(ivshmem, "LOCK", tmp_path / "lock")

    return plug


def test_the_name_decides_and_broken_neighbours_do_not_matter(plug: Callable[..., None]) -> None:
    plug(DeviceBusyError("x"), VfioError("cannot open 1"), (b"", 3), (page("other"), 3), (page("mine"), 3))
    with ivshmem.open_region("mine", timeout=0) as region:
        assert (region.header.name, region.member, len(region.events)) == ("mine", 1, 3)


def test_what_is_there_is_said_when_the_region_is_not(plug: Callable[..., None]) -> None:
    plug(DeviceBusyError("x"), VfioError("cannot open 1 through VFIO"), (b"", 3), (page("other"), 3))
    with pytest.raises(ivshmem.RegionNotFoundError, match="no region 'mine'") as caught:
        ivshmem.open_region("mine", timeout=0)
    for said in ("0 in use", "cannot open 1 through VFIO", "2 without a valid header", "3 carries 'other'"):
        assert said in str(caught.value)


def test_a_page_that_another_member_wrote_over_is_one_clear_error(plug: Callable[..., None]) -> None:
    plug((page("mine"), 2))
    with pytest.raises(ivshmem.RegionUnusableError, match="promises 3 vectors to each member, here are 2"):
        ivshmem.open_region("mine", timeout=0)


def test_a_device_without_vectors_is_a_read_only_member(plug: Callable[..., None]) -> None:
    plug((page("mine"), 0))
    with ivshmem.open_region("mine", timeout=0) as region:
        assert (region.member, region.events) == (None, ())
        with pytest.raises(VfioError, match="read-only member"):
            region.bell(0, 0)


def test_a_device_unplugged_while_it_is_listed_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, vendor in (("0000:00:01.0", "0x1af4"), ("0000:00:02.0", "0x8086"), ("0000:00:03.0", None)):
        (tmp_path / name).mkdir()
        if vendor is not None:
            (tmp_path / name / "vendor").write_text(vendor + "\n")
            (tmp_path / name / "device").write_text("0x1110\n")
    monkeypatch.setattr(ivshmem, "SYSFS_DEVICES", tmp_path)
    assert ivshmem.addresses() == ["0000:00:01.0"]


def test_a_device_that_cannot_be_opened_is_one_kind_of_error() -> None:
    with pytest.raises(VfioError, match=r"ffff:ff:1f\.7"):
        Device("ffff:ff:1f.7")
