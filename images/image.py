"""Finished images: what one is, listing, showing, pruning. May import images.cache."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from images.cache import Cache, choose_stale, default_directory, size_of
from images.errors import ImageError, Progress

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MANIFEST = "manifest.json"

#: What this kernel and this init need to boot, fast, and to show why when they do not. Without loglevel=4 `quiet`
#: would hide warnings such as a hung task; panic=-1 ends QEMU (-no-reboot) at once instead of leaving it spinning.
#: cryptomgr.notests: the kernel's own tests of its ciphers cost an emulated processor up to half a second.
KERNEL_ARGUMENTS = (
    "console=ttyS0", "quiet", "loglevel=4", "panic=-1", "oops=panic", "intel_iommu=on", "iommu=pt",
    "cryptomgr.notests",
)  # fmt: skip


@dataclass(frozen=True)
class Image:
    """A kernel and a root file system, ready to boot.

    Attributes:
        name: of the ImageSpec it was made from.
        hash: of every input; part of the name of every file.
        directory: all of its files lie here.
        kernel: for QEMU's -kernel.
        initrd: for -initrd: mounts `rootfs` from /dev/vda under an overlay.
        rootfs: erofs, read-only; attach as the first virtio-blk disk. Any number of VMs may share it.
        kernel_deb: the linux-image package the kernel came from, as downloaded.
        kernel_arguments: for -append; add idc.name=, idc.ip= as wanted.
        manifest: what is inside: packages with versions, modules, kernel release, sizes, seconds each part took.
    """

    name: str
    hash: str
    directory: Path
    kernel: Path
    initrd: Path
    rootfs: Path
    kernel_deb: Path
    kernel_arguments: tuple[str, ...]
    manifest: dict[str, Any]

    @property
    def label(self) -> str:
        """NAME-HASH, as `testbed image show` takes it."""
        return f"{self.name}-{self.hash}"


def read_image(directory: Path) -> Image:
    """The image in a directory of the cache. Raises ImageError if it is damaged."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        files = {key: directory / manifest["files"][key] for key in ("kernel", "initrd", "rootfs", "kernel_deb")}
        for key, path in files.items():
            size = path.stat().st_size
            if size != manifest["bytes"][key]:
                raise ValueError(f"{path.name} has {size} bytes, it was written with {manifest['bytes'][key]}")
        return Image(name=manifest["name"], hash=manifest["hash"], directory=directory, manifest=manifest,
                     kernel_arguments=tuple(manifest["kernel_arguments"]), **files)
    except (OSError, ValueError, KeyError) as error:
        raise ImageError(f"the image in {directory} is damaged ({error}); try: rm -r {directory}, "
                         "then testbed image build") from error


def list_images(cache: Path | None = None) -> list[Image]:
    """All finished images, the one used last first."""
    found = Cache(cache or default_directory()).images.glob(f"*/{MANIFEST}")
    return [read_image(path.parent) for path in sorted(found, key=lambda path: -path.stat().st_mtime)]


def show(label: str = "", cache: Path | None = None) -> Image:
    """The image whose NAME-HASH, or hash, starts with `label`; by default the one used last. Raises ImageError."""
    images = list_images(cache)
    matching = [image for image in images if image.label.startswith(label) or image.hash.startswith(label)]
    if not matching:
        have = ", ".join(image.label for image in images) or "none"
        raise ImageError(f"no image matches {label!r} (there are: {have}); try: testbed image build")
    if label and len(matching) > 1:
        raise ImageError(f"{label!r} matches {', '.join(image.label for image in matching)}")
    return matching[0]


def prune(*, keep: int = 1, everything: bool = False, cache: Path | None = None,
          progress: Progress = lambda _: None) -> tuple[list[Path], int]:
    """Remove all images but the `keep` used last, and parts and packages that none of those was made from.

    `everything` empties the cache. Waits for a running build. Running VMs keep the files they have open.
    Returns the removed paths and how many bytes that freed.
    """
    store = Cache(cache or default_directory())
    with store.locked(progress):
        used = {path.parent.name: path.stat().st_mtime for path in store.images.glob(f"*/{MANIFEST}")}
        stale = choose_stale(used, keep=0 if everything else keep)
        kept = [read_image(store.images / name) for name in used if name not in stale]
        removed = [store.images / name for name in stale]
        removed += [path for path in store.images.iterdir() if path.name not in used]
        removed += _unneeded_parts(store, kept)
        if everything:
            removed += [store.debs, store.apt, store.logs]
        freed = 0
        for path in removed:
            freed += size_of(path)
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    return removed, freed


def _unneeded_parts(store: Cache, kept: Sequence[Image]) -> list[Path]:
    needed = {part for image in kept for part in image.manifest["parts"]}
    return [path for path in store.stages.iterdir() if path.name not in needed]
