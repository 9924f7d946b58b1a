"""Processor time and memory of a process, as the kernel counts them. Depends on the standard library alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cpu:
    """Seconds of processor time, and what tells this process from a later one of the same number."""

    seconds: float
    started: int


@dataclass(frozen=True)
class Memory:
    """Bytes of a process's pages (smaps_rollup).

    Attributes:
        private: of pages that it alone maps.
        shared: of pages that others map too: regions, the template that its VM was cloned from, programs.
        proportional: private ones, and of each shared page the part that falls to it (PSS).
        swap: swapped out.
    """

    private: int
    shared: int
    proportional: int
    swap: int


def cpu(pid: int) -> Cpu | None:
    """None if there is no such process (any more)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # a name may hold blanks and brackets
    if fields[0] == "Z":
        return None
    return Cpu((int(fields[11]) + int(fields[12])) / _TICKS, int(fields[19]))


def memory(pid: int) -> Memory | None:
    """None if there is no such process, or it may not be looked into. Takes the kernel some ms for a large one."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return None
    kib = {}
    for line in text.splitlines()[1:]:
        name, _, rest = line.partition(":")
        kib[name] = int(rest.split()[0])

    def total(*names: str) -> int:
        return sum(kib.get(name, 0) for name in names) << 10

    return Memory(total("Private_Clean", "Private_Dirty", "Private_Hugetlb"),
                  total("Shared_Clean", "Shared_Dirty", "Shared_Hugetlb"), total("Pss"), total("Swap"))
