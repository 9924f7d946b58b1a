"""Images as a back end serves them: opened, locked and checked here; requests are carried out by image.c.

An image is a file or a block device, or an overlay over a base (`idc.block.overlay`). Depends on idc._core and
idc.block.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from idc._core import ffi, lib
from idc.block import overlay
from idc.block.lease import RUNTIME, Lease
from idc.block.protocol import Can, Geometry, Op, Request
from idc.errors import IdcError

if TYPE_CHECKING:
    import mmap

    from idc._core import Pointer

#: Bytes of one READ or WRITE at most.
LONGEST: Final = 2 << 20


class ImageError(IdcError):
    """An image cannot be used; the text says which, why, and what to do."""


@dataclass(frozen=True, slots=True)
class Spec:
    """Which image, and how.

    Attributes:
        path: of the image, or of the overlay if there is a base.
        base: of the image that the overlay lies over; None: there is none.
        read_only: nothing is written.
        shared: others may use it too, and all of them say so.
    """

    path: Path
    base: Path | None = None
    read_only: bool = False
    shared: bool = False


class Image:
    """An open image.

    Args:
        spec: which.
        device: who uses it: the same text after each restart.
        runtime: see `idc.block.lease.RUNTIME`.

    Attributes:
        core: for `idc_image_handle`.
        geometry: what the other side is told.

    Raises:
        ImageError, InUseError, OverlayError: in one line what is wrong with it.
    """

    def __init__(self, spec: Spec, device: str, runtime: Path = RUNTIME) -> None:
        self.spec = spec
        self._held = contextlib.ExitStack()
        self._live: mmap.mmap | None = None
        try:
            self._open(spec, device, runtime)
        except OSError as error:
            self.close()
            raise ImageError(f"image {error.filename or spec.path}: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    def _open(self, spec: Spec, device: str, runtime: Path) -> None:
        if not spec.path.is_absolute():
            raise ImageError(f"image {str(spec.path)!r} is no absolute path: give image=/..., as the back end's domain "
                             "sees it")
        if spec.base is not None and spec.shared:
            raise ImageError(f"overlay {spec.path} cannot be shared: give each device an overlay of its own")
        base = -1
        if spec.base is not None:
            base = self._file(spec.base, os.O_RDONLY)
            Lease(base, spec.base, device, exclusive=False, runtime=runtime)
            with contextlib.suppress(FileExistsError):
                if not spec.path.exists() and not spec.read_only:
                    overlay.create(spec.path, spec.base, base)
        fd = self._file(spec.path, os.O_RDONLY if spec.read_only else os.O_RDWR)
        about = os.fstat(fd)
        lease = Lease(fd, spec.path, device, exclusive=not (spec.shared or spec.read_only), runtime=runtime)
        self._held.callback(lease.release)
        self._fields = {"fd": fd, "base": base, "read_only": spec.read_only, "longest": LONGEST,
                        "is_device": stat.S_ISBLK(about.st_mode)}
        size = os.lseek(fd, 0, os.SEEK_END)
        if spec.base is not None:
            size = self._overlay(spec, fd, base, runtime)
        if size == 0:
            raise ImageError(f"image {spec.path} is empty: make it as large as the disk shall be (truncate -s)")
        self._fields["size"] = size
        self.core = ffi.new("struct idc_image *", self._fields)
        if (error := lib.idc_image_start(self.core)) != 0:
            raise OSError(error, os.strerror(error), str(spec.path))
        self._held.callback(lib.idc_image_stop, self.core)
        minimum, preferred = _blocks(fd, about)
        can = Can(0)
        if spec.read_only:
            can |= Can.READ_ONLY
        elif _can_trim(fd, about):
            can |= Can.TRIM
        if _rotates(about):
            can |= Can.ROTATES
        name = f"{os.path.realpath(spec.path)}\0{size}"
        self.geometry = Geometry(size, can, preferred, minimum, LONGEST, hashlib.sha256(name.encode()).digest()[:16])

    def _file(self, path: Path, flags: int) -> int:
        fd = os.open(path, flags | os.O_CLOEXEC)
        self._held.callback(os.close, fd)
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise ImageError(f"image {path} is neither a file nor a block device")
        return fd

    def _overlay(self, spec: Spec, fd: int, base: int, runtime: Path) -> int:
        assert spec.base is not None
        header = overlay.Header.parse(os.pread(fd, overlay.PAGE, 0), str(spec.path))
        overlay.check_base(header, base, spec.path, spec.base)
        if os.fstat(fd).st_size < header.data_at + header.size:
            raise ImageError(f"overlay {spec.path} was cut: it has {os.fstat(fd).st_size} bytes, "
                             f"{header.data_at + header.size} are expected")
        live, dirty = overlay.bitmap(fd, header, runtime, read_only=spec.read_only)
        self._live = live
        self._held.callback(live.close)
        words, flags = ffi.from_buffer("uint64_t[]", live, require_writable=True), ffi.new("uint8_t[]", dirty)
        self._held.callback(ffi.release, words)
        self._fields |= {"base_size": header.base_size, "bitmap_at": header.bitmap_at, "data_at": header.data_at,
                         "cluster_bits": header.cluster.bit_length() - 1, "live": words, "dirty": flags,
                         "bitmap_pages": header.bitmap_bytes // overlay.PAGE}
        return header.size

    def attach(self, memory: Pointer, part_at: int, part_bytes: int) -> None:
        """Where READ and WRITE may go: the region's memory, which must stay until `detach`, and a part of it."""
        self.core.part_at, self.core.part_bytes = part_at, part_bytes
        self.core.memory = memory

    def detach(self) -> None:
        """The memory is going; nobody carries out a request now."""
        self.core.memory = ffi.NULL

    def do(self, parameters: bytes) -> int:
        """Carry out a request, as it was received: 0 or an errno."""
        if len(parameters) != ffi.sizeof("struct idc_block_request"):
            return errno.EINVAL
        return int(lib.idc_image_do(self.core, ffi.from_buffer("struct idc_block_request *", parameters)))

    def request(self, op: Op, offset: int = 0, length: int = 0, buffer: int = 0, *, fua: bool = False) -> int:
        """The same, in words."""
        return self.do(Request(op, offset, length, buffer, fua).pack())

    def check(self) -> str:
        """Look whether it is as it was; in one line what is wrong with it, or nothing."""
        lib.idc_image_check(self.core)
        if self.core.shrank:
            return (f"image {self.spec.path} has shrunk under use: what lay beyond its end is lost, and nothing more "
                    "is written to it; restore it, then attach it anew")
        if self.core.failed:
            return (f"image {self.spec.path}: a flush failed ({os.strerror(self.core.failed)}), so that nobody knows "
                    "what is on the disk; nothing more is written to it until it is attached anew")
        return ""

    @property
    def last_error(self) -> int:
        """errno of the last request that could not be carried out; 0: there was none."""
        return int(self.core.error)

    @property
    def counters(self) -> dict[str, int]:
        """What was done so far; `copied` counts bytes copied between image and region."""
        names = ("requests", "refused", "broken", "read_bytes", "written_bytes", "flushes", "copied", "copied_up")
        return {name: int(getattr(self.core, name)) for name in names}

    def close(self) -> None:
        """Let go of it; what was not flushed is in the kernel's hands. Idempotent."""
        self._held.close()


def _blocks(fd: int, about: os.stat_result) -> tuple[int, int]:
    """(minimum, preferred) bytes of a request."""
    if stat.S_ISBLK(about.st_mode):
        block = int(_queue(about, "logical_block_size") or 512)
        return block, max(block, int(_queue(about, "physical_block_size") or block))
    preferred = os.fstatvfs(fd).f_bsize
    return 1, preferred if preferred & (preferred - 1) == 0 and 0 < preferred <= 1 << 20 else 4096


def _queue(about: os.stat_result, name: str) -> str:
    with contextlib.suppress(OSError):
        place = Path(f"/sys/dev/block/{os.major(about.st_rdev)}:{os.minor(about.st_rdev)}")
        queue = place / "queue" if (place / "queue").exists() else place.resolve().parent / "queue"
        return (queue / name).read_text().strip()
    return ""


def _rotates(about: os.stat_result) -> bool:
    return stat.S_ISBLK(about.st_mode) and _queue(about, "rotational") == "1"


def _can_trim(fd: int, about: os.stat_result) -> bool:
    if stat.S_ISBLK(about.st_mode):
        return int(_queue(about, "discard_max_bytes") or 0) > 0
    return int(lib.idc_image_can_punch(fd)) == 0
