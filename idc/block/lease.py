"""Who uses an image: a lock on the file, and a note of whose it is, so that a former back end can be ended for good.

    flock(2) on the file   exclusive for one that writes, shared for those that only read or say `shared`
    a note in RUNTIME      device, process and when that began: only while the lock is held does it mean anything

The kernel drops the lock with the process. One that hangs keeps it; if it served the same device, it is a former
incarnation of it and is killed: then it can write no more, and the lock is free. Linux only. Depends on idc.errors.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import select
import signal
import time
from pathlib import Path
from typing import Final

from idc.errors import IdcError

#: Where notes are, and what of an overlay must outlive its process: gone with the machine, and only then.
RUNTIME: Final = Path("/run/idc/block")
#: Seconds for a former back end to be gone once it was killed.
PATIENCE: Final = 5.0

log = logging.getLogger("idc.block")


class InUseError(IdcError):
    """Somebody else uses the image."""


class Lease:
    """The right to use an open file, as long as this is held.

    Args:
        fd: of the file.
        path: of the file, for messages.
        device: who takes it: the same text after each restart.
        exclusive: nobody else has it meanwhile.
        runtime: directory of the notes.

    Raises:
        InUseError: others have it; says who.
    """

    def __init__(self, fd: int, path: Path, device: str, *, exclusive: bool, runtime: Path = RUNTIME) -> None:
        about = os.fstat(fd)
        self._note = runtime / f"lease-{about.st_dev:x}-{about.st_ino:x}"
        self._fd = fd
        self._exclusive = exclusive
        self._inode = about.st_ino
        mode = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        if not self._lock(mode):
            holder = self._holder()
            if holder is not None and holder[0] == device and holder[1] != os.getpid():
                _end(holder[1], f"{path}: process {holder[1]} was the back end of {device} before")
            if not self._lock(mode):
                who = "another program" if holder is None else f"device {holder[0]} (process {holder[1]})"
                raise InUseError(f"image {path} is locked by {who}: detach that, or attach both with shared=true")
        if exclusive:
            runtime.mkdir(parents=True, exist_ok=True)
            fresh = self._note.with_suffix(f".{os.getpid()}")
            fresh.write_text(json.dumps([device, os.getpid(), _began(os.getpid())]))
            fresh.replace(self._note)

    def release(self) -> None:
        """Others may use it, once the file is closed."""
        if self._exclusive:
            self._note.unlink(missing_ok=True)

    def _holder(self) -> tuple[str, int] | None:
        """(device, process) of who wrote the note, if that process has the lock."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            device, process, began = json.loads(self._note.read_text())
            locks = [line.split()[1:] for line in Path("/proc/locks").read_text().splitlines()]
            if _began(process) == began and any(
                    words[0] == "FLOCK" and words[3] == str(process) and words[4].split(":")[2] == str(self._inode)
                    for words in locks if len(words) > 4):
                return str(device), int(process)
        return None

    def _lock(self, mode: int) -> bool:
        try:
            fcntl.flock(self._fd, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _began(process: int) -> str:
    """When a process began: with its number, it is the only one."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]


def _end(process: int, why: str) -> None:
    """Kill a process and see it gone."""
    log.warning("%s: killing it", why)
    try:
        fd = os.pidfd_open(process)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        poller.poll(max(0.0, deadline - time.monotonic()) * 1000)
    except ProcessLookupError:
        return
    finally:
        os.close(fd)
