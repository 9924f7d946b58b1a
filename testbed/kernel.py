"""What QEMU can boot by -kernel: finds it in a build tree, and says early and plainly when a file is none.

Depends on testbed.errors and testbed.qemu_args. Formats: Documentation/arch/x86/boot.rst for bzImage; for vmlinux the
Xen ELF note PHYS32_ENTRY (PVH), without which QEMU does not know where to start it; the multiboot specification.
"""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from testbed.errors import SpecError

if TYPE_CHECKING:
    from testbed.qemu_args import VmSpec

BUILD_TREE_KERNEL = Path("arch/x86/boot/bzImage")
_HEAD_BYTES = 8192
_MULTIBOOT = struct.pack("<I", 0x1BADB002)
_PT_NOTE, _PHYS32_ENTRY = 4, 18


def resolve_files(spec: VmSpec) -> VmSpec:
    """The spec with its kernel found, and all files that it names looked at. Raises SpecError for the first mistake."""
    kernel = find_kernel(spec.kernel, f"VM {spec.name}: kernel")
    files = [("initrd", spec.initrd), ("root file system", spec.rootfs), *(("disk", disk.path) for disk in spec.disks)]
    for what, path in files:
        if path is not None:
            _check_readable(f"VM {spec.name}: {what}", path)
    return dataclasses.replace(spec, kernel=kernel)


def find_kernel(path: Path, where: str) -> Path:
    """The kernel at `path`: a bzImage, a vmlinux with a PVH entry, a multiboot file, or a build tree with a bzImage.

    `where` begins the error's text: "VM front: kernel". Raises SpecError.
    """
    if path.is_dir():
        built = path / BUILD_TREE_KERNEL
        if not built.is_file():
            tree = (path / "Kbuild").exists() or (path / "Makefile").exists()
            raise SpecError(f"{where} {path} is a directory without {BUILD_TREE_KERNEL}",
                            hint=f"make -C {path} bzImage" if tree else "give a build tree, a bzImage or a vmlinux")
        path = built
    _check_readable(where, path)
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        if head[0x202:0x206] == b"HdrS" or _MULTIBOOT in head:
            return path
        if head.startswith(b"\x7fELF"):
            if _has_pvh_entry(file, head):
                return path
            raise SpecError(f"{where} {path} is an ELF file without a PVH entry",
                            hint="build the kernel with CONFIG_PVH=y, or give its bzImage")
    raise SpecError(f"{where} {path} is neither a bzImage nor a vmlinux",
                    hint="a vmlinuz of this machine's distribution is a bzImage; file(1) tells what it is")


def _check_readable(where: str, path: Path) -> None:
    try:
        with path.open("rb"):
            return
    except OSError as error:
        raise SpecError(f"{where} {path} cannot be read: {error.strerror}") from error


def _has_pvh_entry(file: BinaryIO, head: bytes) -> bool:
    """Whether a 64-bit little-endian ELF file has the note that names its PVH entry."""
    if head[4:6] != b"\2\1" or len(head) < 64:
        return False
    (table,) = struct.unpack_from("<Q", head, 32)
    entry_bytes, count = struct.unpack_from("<HH", head, 54)
    for index in range(count):
        file.seek(table + index * entry_bytes)
        entry = file.read(56)
        if len(entry) < 56:
            return False
        kind, _, offset, _, _, size = struct.unpack_from("<IIQQQQ", entry)
        if kind == _PT_NOTE:
            file.seek(offset)
            if _has_note(file.read(min(size, 1 << 20))):
                return True
    return False


def _has_note(notes: bytes) -> bool:
    at = 0
    while at + 12 <= len(notes):
        name_bytes, value_bytes, kind = struct.unpack_from("<III", notes, at)
        if kind == _PHYS32_ENTRY and notes[at + 12 : at + 12 + name_bytes] == b"Xen\0":
            return True
        at += 12 + -(-name_bytes // 4) * 4 + -(-value_bytes // 4) * 4
    return False
