"""Takes a look at running testbeds, again and again, without disturbing them: `Collector.look`.

Their supervisors are asked what there is; processor time and memory come from /proc, and what the members of regions
wrote from the regions themselves, mapped read-only. A testbed that does not answer costs its own rows, not those of
others. Depends on testbed.control, testbed.registry and testbed.live.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self

from testbed import registry
from testbed.control import Control, one_line
from testbed.errors import TestbedError
from testbed.live import proc
from testbed.live.memory import ChannelNow, read_channel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from testbed.live.proc import Cpu, Memory
    from testbed.registry import Entry

#: Seconds that a supervisor has to answer.
PATIENCE: Final = 5.0
#: Seconds that the first look waits for the list of devices, which goes by way of the registry.
DEVICES_FIRST: Final = 3.0
#: Seconds between two counts of a process's pages: it takes the kernel some milliseconds.
MEMORY_EVERY: Final = 3.0


@dataclass(frozen=True)
class ProcessNow:
    """A process: its name, id, state in words, and what the kernel says of it; None where there is none any more."""

    name: str
    state: str
    pid: int | None
    cpu: Cpu | None
    memory: Memory | None


@dataclass(frozen=True)
class RegionNow:
    """A region.

    Attributes:
        told: by the host: members, size, faults; see `testbed.live.describe`.
        allocated: bytes of memory that it takes; None where its memory cannot be had.
        channels: what the members wrote.
    """

    name: str
    told: dict[str, Any]
    allocated: int | None
    channels: tuple[ChannelNow, ...]


@dataclass(frozen=True)
class BedNow:
    """A testbed at one moment.

    Attributes:
        at: seconds, of a clock that never goes back.
        accel: under which its VMs run.
        trouble: why something of it is not known; empty if all is.
        devices: as the registry has them; see `testbed.devices.shown`.
        devices_at: when they were asked for; None: never answered, or there is no registry.
    """

    name: str
    at: float
    accel: str = ""
    trouble: str = ""
    vms: tuple[ProcessNow, ...] = ()
    processes: tuple[ProcessNow, ...] = ()
    regions: tuple[RegionNow, ...] = ()
    devices: tuple[dict[str, Any], ...] = ()
    devices_at: float | None = None


@dataclass
class _Mapped:
    """A region's memory, and how much of it there is."""

    uuid: str
    fd: int
    memory: mmap.mmap
    words: memoryview = field(init=False)

    def __post_init__(self) -> None:
        self.words = memoryview(self.memory).cast("Q")

    def close(self) -> None:
        self.words.release()
        self.memory.close()
        os.close(self.fd)


class Collector:
    """Looks at testbeds. A context manager; leaving it lets go of everything.

    Args:
        names: of those to look at; none: all that run.
        running: finds those that run.
    """

    def __init__(self, names: Sequence[str] = (), running: Callable[[], list[Entry]] = registry.running) -> None:
        self._names = tuple(names)
        self._running = running
        self._beds: dict[str, _Bed] = {}

    def look(self) -> list[BedNow]:
        """All that run now, by name. Never fails for what one of them does."""
        entries = {entry.name: entry for entry in self._running() if not self._names or entry.name in self._names}
        for name, bed in tuple(self._beds.items()):
            if entries.get(name) != bed.entry:
                self._beds.pop(name).close()
        for name, entry in entries.items():
            self._beds.setdefault(name, _Bed(entry))
        return [self._beds[name].look() for name in sorted(entries)]

    def close(self) -> None:
        """Let go."""
        while self._beds:
            self._beds.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Bed:
    """One testbed, and what is kept of it between two looks."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self._link: Control | None = None
        self._mapped: dict[str, _Mapped] = {}
        self._pages: dict[int, tuple[float, Memory | None]] = {}
        self._devices = _Devices(entry)

    def look(self) -> BedNow:
        now = time.monotonic()
        try:
            told = self._ask()
        except (TestbedError, OSError) as error:
            self._hang_up()
            why = "does not answer" if isinstance(error, TimeoutError) else (
                one_line(error) if isinstance(error, TestbedError) else str(error))
            return BedNow(self.entry.name, now, trouble=why)
        if told["devices"]:
            self._devices.look()
        vms = [self._process(vm["name"], vm["state"], vm["pid"], now) for vm in told["vms"]]
        processes = [self._process("supervisor", "running", self.entry.pid, now)]
        processes += [self._process(name, "running", pid, now) for name, pid in told["processes"].items()]
        regions = [self._region(region) for region in told["regions"]]
        self._forget({region["name"] for region in told["regions"]},
                     {process.pid for process in (*vms, *processes)})
        trouble = "; ".join(filter(None, (told["trouble"], self._devices.trouble)))
        return BedNow(self.entry.name, now, told["accel"], trouble, tuple(vms), tuple(processes), tuple(regions),
                      tuple(self._devices.known), self._devices.at)

    def _ask(self) -> dict[str, Any]:
        if self._link is None:
            self._link = Control(self.entry)
            self._link.sock.settimeout(PATIENCE)
        return self._link.call("look")

    def _process(self, name: str, state: str, pid: int | None, now: float) -> ProcessNow:
        if pid is None or (cpu := proc.cpu(pid)) is None:
            return ProcessNow(name, "ended" if state == "running" else state, None, None, None)
        before = self._pages.get(pid)
        if before is None or now - before[0] >= MEMORY_EVERY:
            before = self._pages[pid] = now, proc.memory(pid)
        return ProcessNow(name, state, pid, cpu, before[1])

    def _region(self, told: dict[str, Any]) -> RegionNow:
        mapped = self._map(told)
        if mapped is None:
            return RegionNow(told["name"], told, None, ())
        channels = tuple(read_channel(mapped.words, channel) for channel in told["channels"])
        return RegionNow(told["name"], told, os.fstat(mapped.fd).st_blocks * 512, channels)

    def _map(self, told: Mapping[str, Any]) -> _Mapped | None:
        """Its memory; None if it was dropped meanwhile."""
        name, before = told["name"], self._mapped.get(told["name"])
        if before is not None and before.uuid == told["uuid"]:
            return before
        if before is not None:
            self._mapped.pop(name).close()
        assert self._link is not None
        try:
            _, (fd,) = self._link.call_fds("memory", {"region": name})
        except TestbedError:
            return None
        try:
            memory = mmap.mmap(fd, told["size"], prot=mmap.PROT_READ)
        except (OSError, ValueError):  # of another size: it is another region by now
            os.close(fd)
            return None
        self._mapped[name] = _Mapped(told["uuid"], fd, memory)
        return self._mapped[name]

    def _forget(self, regions: set[str], pids: set[int | None]) -> None:
        for name in self._mapped.keys() - regions:
            self._mapped.pop(name).close()
        for pid in self._pages.keys() - pids:
            del self._pages[pid]

    def _hang_up(self) -> None:
        """An answer that came too late would be taken for that to the next question."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def close(self) -> None:
        self._hang_up()
        self._devices.close()
        while self._mapped:
            self._mapped.popitem()[1].close()


class _Devices:
    """The list of devices, asked for on a link of its own: an attach that is under way holds up the answer."""

    def __init__(self, entry: Entry) -> None:
        self.known: list[dict[str, Any]] = []
        self.at: float | None = None
        self.trouble = ""
        self._entry = entry
        self._link: Control | None = None
        self._asked = 0.0
        self._waits = False

    def look(self) -> None:
        """Take the answer that is there, and ask again. Waits for the first one only."""
        patience = 0.0
        try:
            if self._link is None:
                self._link, self._waits = Control(self._entry), False
                patience = DEVICES_FIRST if self.at is None else 0.0
            if not self._waits:
                self._link.post({"op": "devices"})
                self._asked, self._waits = time.monotonic(), True
            self._take(patience)
        except (TestbedError, OSError) as error:
            self.close()
            self.trouble = f"devices: {one_line(error) if isinstance(error, TestbedError) else error}"

    def _take(self, timeout: float) -> None:
        assert self._link is not None
        ready, _, _ = select.select([self._link.sock], [], [], timeout)
        if ready:
            self.known = self._link.await_reply()[0]["devices"]
            self.at, self.trouble, self._waits = self._asked, "", False
        elif (waited := time.monotonic() - self._asked) > PATIENCE:
            self.trouble = f"devices: no answer for {waited:.0f} s"

    def close(self) -> None:
        """Hang up."""
        if self._link is not None:
            with contextlib.suppress(OSError):
                self._link.close()
            self._link = None
