"""What the tests of regions share: waiting for what the server does, and looking for what it may have left."""

from __future__ import annotations

import os
import struct
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from host.region import Region, RegionService, RegionSpec
from idc.layout import ChannelSpec, Kind, Rights, split_member_word

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from host.ivshmem.client import Peer

DEADLINE = 20.0
PAIR = {"front": Rights.RW, "back": Rights.RW}
CHANNEL = ChannelSpec("data", Kind.BYTE, "front", "back", 4096)


def link(name: str = "link", size: int = 1 << 20, **more: Rights) -> RegionSpec:
    """A region of two writers with one channel, so with three vectors; `more` are further members."""
    return RegionSpec(name, size, PAIR | more, [CHANNEL])


@contextmanager
def short_directory() -> Iterator[Path]:
    """A directory whose path leaves room for socket names; pytest's own are too long."""
    with tempfile.TemporaryDirectory(prefix="idc") as name:
        yield Path(name)


def settle(service: RegionService) -> None:
    """Return when the server has done all that follows from the connections made so far.

    It serves one event after the other, so its answer to this question comes after them.
    """
    service.members("link")


@contextmanager
def running(send_timeout: float | None = None) -> Iterator[RegionService]:
    """A service whose processes and sockets must be gone afterwards."""
    with short_directory() as directory:
        with RegionService(directory, send_timeout=send_timeout) as service:
            holder = service.holder_pid
            yield service
            server = service.server_pid
        assert not alive(holder)
        assert not alive(server)
        assert {p.name for p in (directory / "ivshmem").iterdir() if p.suffix != ".log"} <= {"registry"}


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(what: str, condition: Callable[[], bool]) -> None:
    """Wait for what another process does and nothing here can tell of."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE:g} s: {what}"
        time.sleep(0.005)


def word(peer: Peer, member: int) -> tuple[int, bool]:
    """(incarnation, present) of a member as a peer sees it in the header page."""
    (value,) = struct.unpack_from("<Q", peer.memory, 512 + 64 * member)
    return split_member_word(value)


def wait_word(peer: Peer, member: int, expected: tuple[int, bool]) -> None:
    """Wait by doorbell until a member's live word says that: the host rings vector 0 after it changed one."""
    deadline = time.monotonic() + DEADLINE
    while word(peer, member) != expected:
        left = deadline - time.monotonic()
        assert left > 0, f"member {member} is {word(peer, member)} instead of {expected}"
        assert peer.wait(0, left), "the word did not change, and nobody rang"


def descriptors(pid: int) -> int:
    """How many files a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def memory_word(region: Region, offset: int) -> int:
    """A u32 of the region, read through the host's own descriptor."""
    fd = region.open_memory()
    try:
        (value,) = struct.unpack("<I", os.pread(fd, 4, offset))
    finally:
        os.close(fd)
    return int(value)
