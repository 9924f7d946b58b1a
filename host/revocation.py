"""What takes a region away from a member: the fresh region's header, the copy, the hole, and who maps what is dead.

Steps of `host.region.RegionService.abandon`, without its processes. Depends on idc.layout and host.errors.
docs/isolation.md says what each revocation is worth.
"""

from __future__ import annotations

import dataclasses
import enum
import errno
import itertools
import mmap
import os
import re
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from host.errors import RegionError
from idc.layout import HEADER_BYTES, RegionHeader

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from host.region import Region

#: Dead mappings that a domain may hold; each costs a VM one region port, and up to the region's size of memory. Two
#: of a VM's four ports, so that its control link and a link to somebody always have one.
DEAD_CAP: Final = 2
#: What the entry of a member that was taken out begins with; its id follows. No member can have such a name.
GONE: Final = "revoked."
_PIECE: Final = 1 << 20  # bytes in memory at a time


class Worth(enum.Enum):
    """What a revocation is worth, weakest first."""

    SOFT = "soft"
    """The owner and the host refuse references; the mapping remains. `Registration.unregister` does it."""
    ABANDONED = "abandoned"
    """The others have moved to a fresh region; the mapping remains, dead: nobody reads or writes it but its holders."""
    HARD = "hard"
    """No mapping: the device was unplugged, with the guest's consent, or its VM has ended."""


@dataclass(frozen=True, slots=True)
class Revocation:
    """What was done.

    Attributes:
        region: name of the region that the member lost.
        member: who lost it.
        held: what that is worth.
        fresh: what the remaining members use from now on; None after a hard revocation, which leaves them theirs.
        holders: members that still mapped the dead memory when this was made; the others' programs have to let go.
        refusals: why the stronger revocations that were asked for did not hold, in order.
    """

    region: str
    member: str
    held: Worth
    fresh: Region | None = None
    holders: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()


def successor(header: RegionHeader, member: str, taken: Collection[str]) -> RegionHeader:
    """The header of the region that takes this one's place, without `member`. Raises RegionError.

    Ids, channels, parts and all offsets stay, so that what is copied keeps its meaning; the entry of who was taken out
    stays as well, under a name that nobody can have. Name, uuid and session are new: nothing that named the old region
    names this one.

    Args:
        header: of the old region, from who served it, not from its memory.
        member: who is taken out.
        taken: names that the new region cannot have.
    """
    if member not in [entry.name for entry in header.members] or member.startswith(GONE):
        there = ", ".join(entry.name for entry in header.members if not entry.name.startswith(GONE))
        raise RegionError(f"region {header.name!r} has no member {member!r} (members: {there})")
    members = tuple(dataclasses.replace(entry, name=f"{GONE}{entry.id}") if entry.name == member else entry
                    for entry in header.members)
    base = re.sub(r"\.[0-9]+$", "", header.name)
    name = next(name for n in itertools.count(1) if (name := f"{base}.{n}") not in taken and name != header.name)
    return dataclasses.replace(header, name=name, members=members, uuid=uuid4(), session=secrets.randbits(64))


def check_ranges(header: RegionHeader, ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(offset, length) of what is to be copied, in bytes. Raises RegionError for one outside of what is to be had."""
    checked = list(ranges)
    for offset, length in checked:
        if length < 0 or not HEADER_BYTES <= offset <= offset + length <= header.size:
            raise RegionError(f"region {header.name!r}: bytes {offset} to {offset + length} cannot be kept, only "
                              f"within {HEADER_BYTES} to {header.size}: the header page is made anew")
    return checked


def copy_live(old: int, new: int, ranges: Sequence[tuple[int, int]]) -> None:
    """Copy (offset, length) ranges between two memfds; holes stay holes. Raises OSError."""
    for offset, length in ranges:
        at, end = offset, offset + length
        while at < end:
            try:
                at = os.lseek(old, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break  # only a hole is left
            stop = min(end, os.lseek(old, at, os.SEEK_HOLE), at + _PIECE)
            if stop > at:
                at += os.pwrite(new, os.pread(old, stop - at, at), at)


def punch(memory: int) -> None:
    """Give all pages of a memfd back: every mapping of it, wherever, reads zeros from now on. Raises OSError.

    MADV_REMOVE is FALLOC_FL_PUNCH_HOLE for a file of shared memory (madvise(2)). The size is sealed, and stays.
    """
    with mmap.mmap(memory, 0) as mapping:
        mapping.madvise(mmap.MADV_REMOVE)


class Dead:
    """Which domain still maps which abandoned regions. Not thread-safe.

    Args:
        cap: how many each may hold.
    """

    def __init__(self, cap: int = DEAD_CAP) -> None:
        self.cap = cap
        self._held: dict[str, list[str]] = {}

    def check(self, domains: Iterable[str]) -> None:
        """Raise RegionError if one of them holds as many as it may."""
        for domain in domains:
            if len(self.of(domain)) >= self.cap:
                raise RegionError(f"{domain} holds {self.cap} dead mappings already ({', '.join(self.of(domain))}), "
                                  "which is the cap: let it unplug one, or end it")

    def add(self, region: str, domains: Iterable[str]) -> None:
        """They map a region that was abandoned."""
        for domain in domains:
            self._held.setdefault(domain, []).append(region)

    def released(self, region: str, domain: str) -> None:
        """The domain does not map it any more. Nothing happens if it did not."""
        held = [name for name in self._held.pop(domain, []) if name != region]
        if held:
            self._held[domain] = held

    def of(self, domain: str) -> tuple[str, ...]:
        """Names of the abandoned regions that a domain maps."""
        return tuple(self._held.get(domain, ()))

    def holders(self, region: str) -> tuple[str, ...]:
        """Domains that map an abandoned region, sorted."""
        return tuple(sorted(domain for domain, names in self._held.items() if region in names))

    @property
    def regions(self) -> frozenset[str]:
        """Names of all abandoned regions that somebody maps."""
        return frozenset(itertools.chain.from_iterable(self._held.values()))

    @property
    def domains(self) -> dict[str, tuple[str, ...]]:
        """All of it, by domain."""
        return {domain: tuple(names) for domain, names in self._held.items()}
