"""The cache directory: where things lie, the lock that keeps two builds apart, publishing, pruning.

    images/NAME-HASH/      finished images      stages/KIND-KEY[/|.tar]  parts they are made of
    debs/, apt/            downloaded packages and package lists
    tmp/                   what is being made; anything in it while nobody holds the lock is rubbish
    lock, logs/

Nothing is ever written under its final name: it is made in tmp/ and renamed. May import images.errors.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from images.errors import ImageError, Progress

if TYPE_CHECKING:
    from collections.abc import Iterator


def default_directory() -> Path:
    """$IDC_TESTBED_CACHE, else $XDG_CACHE_HOME/idc-testbed, else ~/.cache/idc-testbed."""
    if own := os.environ.get("IDC_TESTBED_CACHE"):
        return Path(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "idc-testbed"


@dataclass(frozen=True)
class Cache:
    """Paths below one cache directory."""

    root: Path

    @property
    def images(self) -> Path:
        """Finished images."""
        return self.root / "images"

    @property
    def stages(self) -> Path:
        """Finished parts."""
        return self.root / "stages"

    @property
    def debs(self) -> Path:
        """Downloaded packages; also what a resumed build starts from."""
        return self.root / "debs"

    @property
    def apt(self) -> Path:
        """State of our own apt: lists, sources."""
        return self.root / "apt"

    @property
    def tmp(self) -> Path:
        """Unfinished work."""
        return self.root / "tmp"

    @property
    def logs(self) -> Path:
        """One log for each stage, of its last run."""
        return self.root / "logs"

    def stage(self, kind: str, key: str, suffix: str = "") -> Path:
        """Where the finished part of this kind and key is or will be."""
        return self.stages / f"{kind}-{key}{suffix}"

    @contextmanager
    def locked(self, progress: Progress) -> Iterator[int]:
        """Hold the cache alone; waits for another build and says so. Clears what a killed build left.

        Gives the lock's descriptor, for the programs of the build to inherit: the kernel drops the lock with its last
        holder, so a killed build blocks nobody, but not before the last program it started has stopped writing.
        """
        try:
            for path in (self.images, self.stages, self.debs / "partial", self.apt, self.logs):
                path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ImageError(f"the cache directory {self.root} cannot be used: {error.strerror} "
                             f"({error.filename}); set IDC_TESTBED_CACHE to one that can") from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress("another image build is running; waiting for it")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._clear_tmp()
            yield descriptor
        finally:
            os.close(descriptor)

    def _clear_tmp(self) -> None:
        if self.tmp.exists():
            shutil.rmtree(self.tmp)
        self.tmp.mkdir()

    def require_room(self, needed: int) -> None:
        """Raise ImageError unless `needed` bytes are free, those of packages that are here already not counted again.

        Looked at beforehand because a full disk is not told by everybody: `apt-get update` waits for ever then.
        """
        missing = needed - (size_of(self.debs) if self.debs.exists() else 0)
        free = shutil.disk_usage(self.root).free
        if free < missing:
            raise ImageError(f"no room for an image in the cache directory {self.root}: {missing >> 20} MiB needed, "
                             f"{free >> 20} MiB free; try testbed image prune, or set IDC_TESTBED_CACHE to a directory "
                             "with more room")

    def publish(self, made: Path, final: Path) -> None:
        """Give finished work its final name, in one step."""
        os.rename(made, final)


def size_of(path: Path) -> int:
    """Bytes on disk of a file or tree; hard links count once within the tree."""
    seen: dict[tuple[int, int], int] = {}
    for item in [path, *path.rglob("*")] if path.is_dir() else [path]:
        status = item.lstat()
        seen[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(seen.values())


def touch(path: Path) -> None:
    """Note that this was used now: pruning keeps what was used last."""
    try:
        os.utime(path)
    except PermissionError:  # a cache shared read-only with other users still serves them
        return


def choose_stale(used: dict[str, float], *, keep: int) -> list[str]:
    """Names to remove, oldest first: all but the `keep` used last (seconds)."""
    newest = sorted(used, key=lambda name: (used[name], name), reverse=True)
    return newest[keep:][::-1]
