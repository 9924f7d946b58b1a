"""Overlays: a sparse file that holds what was written over a base image, and a bitmap of which clusters it holds.

    0         header, 4096 bytes: below
    4096      bitmap: a bit for each cluster, the least significant first, in whole pages
    data_at   cluster N at data_at + N * cluster bytes: what was never written is a hole

A flush writes data, then the bitmap, so the file has no bit whose data is missing, whenever its machine dies. What was
written and not flushed must still outlive the process, as in any file: the bitmap that counts is in memory of RUNTIME's
file system (tmpfs), gone with the machine. `session` tells whether it belongs to the file: it is drawn anew whenever
the file is opened without one. Depends on idc.errors.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from idc.errors import IdcError

if TYPE_CHECKING:
    from pathlib import Path

PAGE: Final = 4096
CLUSTER: Final = 64 << 10
MAGIC: Final = b"IDCOVER1"
#: magic, cluster bytes, 0, size, bitmap_at, data_at, uuid, session, base's size, base's mtime (ns), bytes of its path
HEADER: Final = struct.Struct("<8sIIQQQ16s16sQQI")
PATH_AT: Final = 128
PATH_BYTES: Final = PAGE - PATH_AT


class OverlayError(IdcError):
    """A file is no overlay, or not of this base; the text says why."""


@dataclass(frozen=True, slots=True)
class Header:
    """Of an overlay.

    Attributes:
        cluster: bytes of one, a power of two.
        size: bytes of the image.
        bitmap_at, data_at: bytes from the start of the file.
        uuid: of the overlay.
        session: of the bitmap in memory that belongs to it.
        base_size, base_mtime: of the base when the overlay was made: nobody may have written to it since.
        base: its path, then.
    """

    cluster: int
    size: int
    bitmap_at: int
    data_at: int
    uuid: bytes
    session: bytes
    base_size: int
    base_mtime: int
    base: str

    @property
    def bitmap_bytes(self) -> int:
        """In whole pages."""
        return self.data_at - self.bitmap_at

    def pack(self) -> bytes:
        """A page."""
        path = os.fsencode(self.base)
        head = HEADER.pack(MAGIC, self.cluster, 0, self.size, self.bitmap_at, self.data_at, self.uuid, self.session,
                           self.base_size, self.base_mtime, len(path))
        return (head.ljust(PATH_AT, b"\0") + path).ljust(PAGE, b"\0")

    @classmethod
    def parse(cls, page: bytes, what: str) -> Header:
        """From the first page of a file. Raises OverlayError."""
        if len(page) < PAGE or page[:8] != MAGIC:
            raise OverlayError(f"{what} is no overlay, though base= is given: without base= it is used as it is")
        _, cluster, _, size, bitmap_at, data_at, uuid, session, base_size, mtime, length = HEADER.unpack_from(page)
        clusters = -(-size // cluster) if cluster else 0
        if (cluster < PAGE or cluster & (cluster - 1) or cluster > 1 << 26 or not 0 < size < 1 << 62
                or bitmap_at != PAGE or data_at < PAGE + -(-clusters // 8) or data_at % PAGE or length > PATH_BYTES
                or data_at > 1 << 40):
            raise OverlayError(f"the header of overlay {what} is damaged")
        return cls(cluster, size, bitmap_at, data_at, uuid, session, base_size, mtime,
                   os.fsdecode(page[PATH_AT:PATH_AT + length]))


def create(path: Path, base: Path, base_fd: int) -> None:
    """An empty overlay, all of it or nothing. Raises OSError, OverlayError."""
    about, size = os.fstat(base_fd), os.lseek(base_fd, 0, os.SEEK_END)
    if not size:
        raise OverlayError(f"base image {base} is empty")
    full = os.path.realpath(base)
    if len(os.fsencode(full)) > PATH_BYTES:
        raise OverlayError(f"the path of base image {full} is longer than {PATH_BYTES} bytes")
    clusters = -(-size // CLUSTER)
    data_at = -(-(PAGE + clusters // 8 + 1) // CLUSTER) * CLUSTER
    header = Header(CLUSTER, size, PAGE, data_at, os.urandom(16), os.urandom(16), size, about.st_mtime_ns, full)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, header.data_at + size)
        os.pwrite(fd, header.pack(), 0)
        os.fsync(fd)
        os.link(fresh, path)  # not replace: two that begin at once make one
        sync_directory(path.parent)
    finally:
        os.close(fd)
        fresh.unlink()


def sync_directory(path: Path) -> None:
    """Make names in it durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def check_base(header: Header, fd: int, overlay: Path, base: Path) -> None:
    """Raise OverlayError unless the base is what the overlay was made over."""
    about, size = os.fstat(fd), os.lseek(fd, 0, os.SEEK_END)
    if size != header.base_size:
        raise OverlayError(f"overlay {overlay} was made over {header.base} of {header.base_size} bytes; {base} has "
                           f"{size}")
    if stat.S_ISREG(about.st_mode) and about.st_mtime_ns != header.base_mtime:
        raise OverlayError(f"base image {base} was written to since overlay {overlay} was made over it: what the "
                           "overlay does not hold may have changed")


def bitmap(fd: int, header: Header, runtime: Path, *, read_only: bool) -> tuple[mmap.mmap, bytes]:
    """The bitmap that counts, in memory; and which of its pages differ from the file, a byte for each.

    Raises OSError.
    """
    durable = os.pread(fd, header.bitmap_bytes, header.bitmap_at)
    pages, live = header.bitmap_bytes // PAGE, _open_live(header, runtime)
    if live is None:
        live = mmap.mmap(-1, header.bitmap_bytes) if read_only else _fresh_live(fd, header, runtime)
        live[:] = durable
    dirty = bytes(live[n * PAGE:(n + 1) * PAGE] != durable[n * PAGE:(n + 1) * PAGE] for n in range(pages))
    return live, dirty


def _place(header: Header, runtime: Path) -> Path:
    return runtime / f"overlay-{header.uuid.hex()}-{header.session.hex()}"


def _open_live(header: Header, runtime: Path) -> mmap.mmap | None:
    try:
        fd = os.open(_place(header, runtime), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return mmap.mmap(fd, header.bitmap_bytes) if os.fstat(fd).st_size == header.bitmap_bytes else None
    finally:
        os.close(fd)


def _fresh_live(fd: int, header: Header, runtime: Path) -> mmap.mmap:
    """Of a new session, which the file says before anything is written."""
    header = replace(header, session=os.urandom(16))
    runtime.mkdir(parents=True, exist_ok=True)
    for stale in runtime.glob(f"overlay-{header.uuid.hex()}-*"):
        stale.unlink()
    place = _place(header, runtime)
    made = os.open(place.with_suffix(".new"), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.truncate(made, header.bitmap_bytes)
        live = mmap.mmap(made, header.bitmap_bytes)
        live[:] = os.pread(fd, header.bitmap_bytes, header.bitmap_at)
    finally:
        os.close(made)
    os.pwrite(fd, header.pack(), 0)
    os.fdatasync(fd)
    place.with_suffix(".new").replace(place)
    return live
