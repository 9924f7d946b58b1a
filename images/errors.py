"""What building an image can fail with. Standard library only.

    ImageError               anything that ends a build, as one sentence with what to try
    +-- ProgramError         a program failed: replayable command, tail of its log, the log's path
    +-- MissingProgramError  a program is not installed: which package brings it
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

#: Receives one line of progress, without a newline.
Progress = Callable[[str], None]

_TAIL_LINES = 15
#: Ordinary users often lack these in PATH, and mkfs.erofs, chroot and depmod live there.
SEARCH_PATH = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"

_PACKAGES = {
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "mkfs.erofs": "erofs-utils",
    "mmdebstrap": "mmdebstrap",
    "newuidmap": "uidmap",
    "setpriv": "util-linux",
}

ROOM = "free some space: the build needs 1.5 GB in its cache directory and in /tmp, and 500 MB of memory"
#: What a log says, and what to do about it. The first that matches is quoted.
_HINTS = (
    ("no entry in /etc/sub", "as root, once: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER"),
    ("unshare() failed", "user or mount namespaces are refused here: try "
     "sysctl kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0, or run as root "
     "with CAP_SYS_ADMIN"),
    ("No space left on device", ROOM),
    ("Temporary failure resolving", "the package mirror's name does not resolve; check the network"),
    ("Unable to fetch some archives", "the package lists are out of date or the mirror is away; try "
     "testbed image build --refresh"),
    ("NO_PUBKEY", "the archive's key is not known here; install debian-archive-keyring"),
)


class ImageError(Exception):
    """An image cannot be built or found; the text says why and what to try."""


class MissingProgramError(ImageError):
    """A program is not installed."""

    def __init__(self, program: str) -> None:
        package = _PACKAGES.get(program, program)
        super().__init__(f"{program} is not installed; try: apt-get install {package}")


class ProgramError(ImageError):
    """A program ended with an error.

    Attributes: `command` (as it can be pasted into a shell), `status` (exit code, negative for a signal), `log`.
    """

    def __init__(self, what: str, command: str, status: int, log: Path, since: int = 0) -> None:
        """`since`: where in the log the program's own output begins, bytes."""
        self.command, self.status, self.log = command, status, log
        lines = log.read_bytes()[since:].decode(errors="replace").splitlines()
        text = "\n".join(lines)
        end = f"by signal {signal.Signals(-status).name}" if status < 0 else f"with exit code {status}"
        # A command with a script in it is long, and stands whole in the log.
        first, *more = command.splitlines()
        shown = f"{first} ... (whole in the log)" if more else first
        parts = [f"{what} failed: it ended {end}", f"  command: {shown}", f"  log: {log}"]
        parts += [f"  | {line}" for line in lines[-_TAIL_LINES:]]
        parts += [f"  try: {hint}" for pattern, hint in _HINTS if pattern in text][:1]
        super().__init__("\n".join(parts))


def find_program(name: str) -> str:
    """Absolute path of a program. Raises MissingProgramError with the package that brings it."""
    found = shutil.which(name, path=SEARCH_PATH)
    if found is None:
        raise MissingProgramError(name)
    return found
