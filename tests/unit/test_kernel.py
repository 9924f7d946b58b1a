"""What counts as a kernel, and what is said of the rest."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from testbed.errors import SpecError
from testbed.kernel import BUILD_TREE_KERNEL, find_kernel, resolve_files
from testbed.qemu_args import Disk, VmSpec

if TYPE_CHECKING:
    from pathlib import Path

BZIMAGE = bytes(0x202) + b"HdrS" + bytes(100)


def note(name: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<III", len(name), len(value), kind) + name.ljust(-(-len(name) // 4) * 4, b"\0") + value


def elf(notes: bytes, *, bits: int = 2) -> bytes:
    """An ELF file of two segments, the second of which is the notes'."""
    header = b"\x7fELF" + bytes([bits, 1, 1]).ljust(12, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    at = 64 + 2 * 56 + 40
    segments = struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, 0, 0, 0)
    segments += struct.pack("<IIQQQQQQ", 4, 4, at, 0, 0, len(notes), len(notes), 4)
    return header + segments + bytes(40) + notes


GNU, PVH = note(b"GNU\0", 3, b"12345678"), note(b"Xen\0", 18, b"\0\0\0\1")
OTHER_XEN = note(b"Xen\0", 6, b"linux\0\0\0")


MULTIBOOT = b"x" + struct.pack("<I", 0x1BADB002)


@pytest.mark.parametrize("content", [BZIMAGE, elf(PVH), elf(GNU + OTHER_XEN + PVH), MULTIBOOT],
                         ids=["bzImage", "pvh", "pvh behind others", "multiboot"])
def test_what_boots_is_taken(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "kernel").write_bytes(content)
    assert find_kernel(tmp_path / "kernel", "VM own: kernel") == tmp_path / "kernel"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "neither a bzImage nor a vmlinux"),
        (b"#!/bin/sh", "neither a bzImage nor a vmlinux"),
        (elf(GNU), "without a PVH entry"),
        (elf(GNU + OTHER_XEN), "without a PVH entry"),
        (elf(PVH)[:-8], "without a PVH entry"),
        (elf(PVH)[:100], "without a PVH entry"),
        (elf(PVH, bits=1), "without a PVH entry"),
        (b"\x7fELF", "without a PVH entry"),
    ],
)
def test_what_does_not_boot_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "kernel").write_bytes(content)
    with pytest.raises(SpecError, match=rf"VM own: kernel .*/kernel .*{words}"):
        find_kernel(tmp_path / "kernel", "VM own: kernel")


def test_a_build_tree_stands_for_its_bzimage(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"directory without arch/x86/boot/bzImage\nhint: give a build tree"):
        find_kernel(tmp_path, "VM own: kernel")
    (tmp_path / "Kbuild").touch()
    with pytest.raises(SpecError, match=f"hint: make -C {tmp_path} bzImage"):
        find_kernel(tmp_path, "VM own: kernel")
    built = tmp_path / BUILD_TREE_KERNEL
    built.parent.mkdir(parents=True)
    built.write_bytes(BZIMAGE)
    assert find_kernel(tmp_path, "VM own: kernel") == built


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    kernel, gone = tmp_path / "kernel", tmp_path / "gone"
    kernel.write_bytes(BZIMAGE)
    for what, spec in (
        ("kernel", VmSpec("own", gone)),
        ("initrd", VmSpec("own", kernel, initrd=gone)),
        ("root file system", VmSpec("own", kernel, rootfs=gone)),
        ("disk", VmSpec("own", kernel, disks=(Disk(gone),))),
    ):
        with pytest.raises(SpecError, match=f"VM own: {what} {gone} cannot be read: No such file"):
            resolve_files(spec)
    assert resolve_files(VmSpec("own", kernel)).kernel == kernel
