"""Archives written from memory: tar for what is laid over the root, cpio (newc) for the initramfs. No I/O, no clock.

cpio is written here because the host need not have it, and because an ordinary user cannot make the device node that
/dev/console is in any file system; an archive can hold one. Format: Documentation/driver-api/early-userspace.
"""

from __future__ import annotations

import io
import stat
import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True)
class Entry:
    """A file, directory, link or device node, owned by root.

    `mode` holds type and permissions as in st_mode; `data` a file's bytes or a link's target; `device` (major, minor).
    """

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(path: str, permissions: int = 0o755) -> Entry:
    """A directory."""
    return Entry(path, stat.S_IFDIR | permissions)


def file(path: str, data: bytes, permissions: int | None = None) -> Entry:
    """A file; without `permissions` executable if it starts with #! or is an ELF program."""
    if permissions is None:
        permissions = 0o755 if data.startswith((b"#!", b"\x7fELF")) else 0o644
    return Entry(path, stat.S_IFREG | permissions, data)


def link(path: str, target: str) -> Entry:
    """A symbolic link."""
    return Entry(path, stat.S_IFLNK | 0o777, target.encode())


def with_parents(entries: Iterable[Entry]) -> list[Entry]:
    """The entries, each after the directories it lies in."""
    done: dict[str, Entry] = {}
    for entry in entries:
        parts = entry.path.split("/")
        for depth in range(1, len(parts)):
            parent = "/".join(parts[:depth])
            done.setdefault(parent, directory(parent))
        done[entry.path] = entry
    return list(done.values())


def make_cpio(entries: Iterable[Entry]) -> bytes:
    """An initramfs in newc format, uncompressed: unpacking is the slowest thing an emulated processor can do."""
    out = bytearray()

    def add(number: int, entry: Entry) -> None:
        name = entry.path.encode() + b"\0"
        links = 2 if stat.S_ISDIR(entry.mode) else 1
        fields = (number, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
        out.extend(b"070701" + b"".join(b"%08x" % field for field in fields) + name)
        out.extend(bytes(-len(out) % 4) + entry.data)
        out.extend(bytes(-len(out) % 4))

    for number, entry in enumerate(with_parents(entries), start=1):
        add(number, entry)
    add(0, Entry("TRAILER!!!", 0))
    return bytes(out)


def make_tar(entries: Iterable[Entry]) -> bytes:
    """The entries as a tar archive with no times, so that the same inputs give the same bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for entry in entries:
            info = tarfile.TarInfo(entry.path)
            info.mode = stat.S_IMODE(entry.mode)
            if stat.S_ISDIR(entry.mode):
                info.type = tarfile.DIRTYPE
            elif stat.S_ISLNK(entry.mode):
                info.type, info.linkname = tarfile.SYMTYPE, entry.data.decode()
            elif stat.S_ISREG(entry.mode):
                info.size = len(entry.data)
            else:
                raise ValueError(f"{entry.path}: a root file system gets its device nodes from the kernel")
            archive.addfile(info, io.BytesIO(entry.data) if stat.S_ISREG(entry.mode) else None)
    return out.getvalue()
