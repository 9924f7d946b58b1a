"""Which testbeds of this user run, by name: a file in each run's directory, and a control socket that answers.

May depend on the standard library, `testbed.run` and `testbed.errors`. The directory belongs to the run, so whoever
clears up after it clears this up as well; a supervisor that is gone refuses connections, and so is not listed.
"""

from __future__ import annotations

import json
import os
import re
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.errors import TestbedError, nearest
from testbed.run import default_base, locked

if TYPE_CHECKING:
    from collections.abc import Sequence

FILE = "testbed.json"
SOCKET = "control.sock"
CONNECT_SECONDS = 5.0
_VM = re.compile(r"([a-z0-9-]+/)?[a-z0-9-]+")


class NoSuchTestbed(TestbedError):
    """No testbed, or no VM of one, answers to that name; the message says which there are."""


class NameTaken(TestbedError):
    """A testbed of that name runs already."""


@dataclass(frozen=True)
class Entry:
    """A testbed: its name, its run's directory, the supervisor's process id, when it began (Unix time), its VMs."""

    name: str
    directory: str
    pid: int
    started: float
    vms: tuple[str, ...]

    @property
    def socket(self) -> Path:
        """Where the supervisor listens."""
        return Path(self.directory, SOCKET)


def connect(path: Path) -> socket.socket:
    """A connection to a supervisor. Raises OSError when there is none."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.settimeout(CONNECT_SECONDS)
        sock.connect(str(path))
        sock.settimeout(None)
    except BaseException:
        sock.close()
        raise
    return sock


def _answers(path: Path) -> bool:
    try:
        connect(path).close()
    except TimeoutError:
        return True  # its queue is full: it lives, and is slow
    except OSError:
        return False
    return True


def running(base: Path | None = None) -> list[Entry]:
    """All testbeds that run, oldest first."""
    entries = []
    for file in (base or default_base()).glob(f"*/{FILE}"):
        try:
            data = json.loads(file.read_text())
        except FileNotFoundError:
            continue  # its run ended meanwhile
        entry = Entry(**{**data, "vms": tuple(data["vms"])})
        if _answers(entry.socket):
            entries.append(entry)
    return sorted(entries, key=lambda entry: entry.started)


def register(entry: Entry) -> None:
    """Make a testbed known whose socket listens already. Raises NameTaken."""
    directory = Path(entry.directory)
    with locked(directory.parent):
        check_free(entry.name, directory.parent)
        temporary = directory / f".{FILE}.{os.getpid()}"
        temporary.write_text(json.dumps(asdict(entry)))
        temporary.rename(directory / FILE)


def check_free(name: str, base: Path | None = None) -> None:
    """Raise NameTaken if a testbed of that name runs."""
    for other in running(base):
        if other.name == name:
            raise NameTaken(f"a testbed {name!r} runs already (process {other.pid}, {other.directory})",
                            hint=f"testbed down {name}, or choose another with --name")


def find(name: str = "", base: Path | None = None) -> Entry:
    """The testbed of that name; without one, the only one that runs. Raises NoSuchTestbed."""
    entries = running(base)
    names = [entry.name for entry in entries]
    if name:
        for entry in entries:
            if entry.name == name:
                return entry
        raise NoSuchTestbed(f"no testbed {name!r} runs{nearest(name, names, every=True)}", hint="testbed ps")
    if len(entries) == 1:
        return entries[0]
    if not entries:
        raise NoSuchTestbed("no testbed runs", hint="testbed up")
    raise NoSuchTestbed(f"several testbeds run: {', '.join(names)}", hint="say which")


def find_vm(text: str, base: Path | None = None) -> tuple[Entry, str]:
    """The testbed and the VM that "VM" or "TESTBED/VM" stands for. Raises NoSuchTestbed."""
    bed, slash, vm = text.rpartition("/")
    entries = [find(bed, base)] if slash else running(base)
    if not entries:
        find("", base)
    having = [entry for entry in entries if vm in entry.vms]
    if len(having) == 1:
        return having[0], vm
    if having:
        raise NoSuchTestbed(f"several testbeds have a VM {vm!r}", hint=_either(having, vm))
    known = [name for entry in entries for name in entry.vms]
    raise NoSuchTestbed(f"no VM {vm!r} in {', '.join(entry.name for entry in entries)}{nearest(vm, known, every=True)}",
                        hint="testbed ps")


def find_pair(a: str, b: str, base: Path | None = None) -> tuple[Entry, str, str] | None:
    """The testbed where two VMs run, and their names there; None if neither runs. Raises NoSuchTestbed."""
    if not _VM.fullmatch(a) or not _VM.fullmatch(b):
        return None  # no name of a VM: whoever boots it says so
    if "/" not in a + b:
        entries = running(base)
        both = [entry for entry in entries if {a, b} <= set(entry.vms)]
        if len(both) == 1:
            return both[0], a, b
        if both:
            raise NoSuchTestbed(f"several testbeds have VMs {a!r} and {b!r}",
                                hint="write " + " or ".join(f"{entry.name}/{a}" for entry in both))
        if not any({a, b} & set(entry.vms) for entry in entries):
            return None
    (one, first), (other, second) = find_vm(a, base), find_vm(b, base)
    if one != other:
        raise NoSuchTestbed(f"{a!r} runs in testbed {one.name!r} and {b!r} in {other.name!r}; they share nothing")
    return one, first, second


def _either(entries: Sequence[Entry], vm: str) -> str:
    return "write " + " or ".join(f"{entry.name}/{vm}" for entry in entries)
