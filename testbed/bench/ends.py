"""The two ends of a measurement: a worker in a VM or in a host process each, told what to do at the same time.

Depends on `testbed.bed`, `testbed.vm`, `host.region` and `idc.measure.worker`, whose commands these are.
"""

from __future__ import annotations

import json
import queue
import statistics
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from host.region import RegionSpec
from idc.layout import ChannelSpec, Kind, Rights
from idc.measure.calls import CALLS, PUMP
from idc.measure.worker import BARE, unpack_samples
from testbed.bench.errors import BenchFailed
from testbed.template_build import cpu_seconds

if TYPE_CHECKING:
    from array import array

    from host.region import Region
    from testbed.run import Run
    from testbed.vm import Vm

MIB = 1 << 20
#: Bytes of the region, of its byte channel and of the bare area, which are the same so that limits are fair.
REGION_BYTES, RING_BYTES = 16 * MIB, 2 * MIB
#: Message channels by the size of the messages they are for: slot bytes, and how many slots.
SLOTS = {64: ("small", 128, 64), 4096: ("page", 4160, 64)}
BULK = "bulk"
#: Slot bytes and slots of the channels that endpoints use.
CALL_SLOT, CALL_SLOTS = 256, 256
ROOT = Path(__file__).resolve().parents[2]
#: How many commands that do nothing are tried, to know what they take.
EMPTY_COMMANDS = 5
#: Seconds until a worker must be there; and for one command, more than the worker's own limit.
START_SECONDS, ANSWER_SECONDS = 60.0, 90.0


def channels(near: str, far: str) -> tuple[ChannelSpec, ...]:
    """What a region for measuring holds."""
    rings = [ChannelSpec(name, Kind.MESSAGE, near, far, slot * count, slot) for name, slot, count in SLOTS.values()]
    rings += [ChannelSpec(name, Kind.MESSAGE, near, far, CALL_SLOT * CALL_SLOTS, CALL_SLOT) for name in (CALLS, PUMP)]
    return (*rings, ChannelSpec(BULK, Kind.BYTE, near, far, RING_BYTES),
            ChannelSpec(BARE, Kind.BYTE, near, far, RING_BYTES))


def region_spec(near: str, far: str) -> RegionSpec:
    """A region between two members, for measuring."""
    return RegionSpec(f"bench-{near}-{far}", REGION_BYTES, {near: Rights.RW, far: Rights.RW}, channels(near, far))


class End:
    """One worker. Subclasses say how lines reach it.

    Attributes:
        name: the member's.
        pid: the process whose processor time the host counts: QEMU's, or the worker's own.
        facts: what the worker said of itself.
    """

    name: str
    pid: int

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}

    def tell(self, command: dict[str, Any]) -> None:
        """Send a command, not waiting for its answer."""
        raise NotImplementedError

    def hear(self, timeout: float = ANSWER_SECONDS) -> dict[str, Any]:
        """Its answer. Raises BenchFailed: it failed, the worker ended, or said nothing in `timeout` seconds."""
        line = self._line(timeout)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchFailed(f"{self.name}: {answer['error']}")
        found: dict[str, Any] = answer["ok"]
        return found

    def ask(self, **command: Any) -> dict[str, Any]:  # noqa: ANN401 - whatever the worker takes
        """Both."""
        self.tell(command)
        return self.hear()

    def _line(self, timeout: float) -> str:
        raise NotImplementedError

    def close(self) -> None:
        """End the worker."""
        raise NotImplementedError

    def cpu(self) -> float:
        """Processor seconds so far, as the host counts them."""
        return cpu_seconds(self.pid)


class VmEnd(End):
    """A worker in a VM."""

    def __init__(self, vm: Vm, region: str) -> None:
        super().__init__()
        self.vm = vm
        self.name = vm.name
        self.pid = vm.pid
        self._process = vm.spawn(["python3", "-m", "guest.measure", "--region", region], stdin=True)

    def tell(self, command: dict[str, Any]) -> None:
        """See `End`."""
        self._process.write(json.dumps(command).encode() + b"\n", timeout=ANSWER_SECONDS)

    def _line(self, timeout: float) -> str:
        try:
            line = next(self._process.lines(timeout), None)
        except TimeoutError:
            raise BenchFailed(f"{self.name}: the measuring program said nothing for {timeout:g} s") from None
        if line is None:
            words = self._process.wait(10).err.strip().splitlines()
            raise BenchFailed(f"{self.name}: the measuring program ended: {words[-1] if words else 'without a word'}")
        return line

    def close(self) -> None:
        """See `End`."""
        if self.vm.alive:
            self._process.kill()


class HostEnd(End):
    """A worker as a process of this machine.

    Args:
        run: what it belongs to.
        region: that it joins.
        name: of the member.
        cpu: the only one that it may run on.
        network: descriptor of a network namespace to be in, and the address to have there.
    """

    def __init__(self, run: Run, region: Region, name: str, *, cpu: int | None = None,
                 network: tuple[int, str] | None = None) -> None:
        super().__init__()
        self.name = name
        self._log = run.path(f"{region.name}.{name}.log")
        argv = [sys.executable, "-m", "host.measure", str(region.socket(name))]
        argv += [] if cpu is None else ["--cpu", str(cpu)]
        fds: tuple[int, ...] = ()
        if network is not None:
            argv = [sys.executable, "-m", "testbed.bench.inside", str(network[0]), network[1], *argv]
            fds = (network[0],)
        with self._log.open("wb") as log:
            self._process = run.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, pass_fds=fds,
                                      cwd=ROOT)
        self.pid = self._process.pid
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        assert self._process.stdout is not None
        # A pipe's read has no time-out of its own.
        threading.Thread(target=_read_lines, args=(self._process.stdout, self._lines), daemon=True).start()

    def tell(self, command: dict[str, Any]) -> None:
        """See `End`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise BenchFailed(self._ended()) from None

    def _line(self, timeout: float) -> str:
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise BenchFailed(f"{self.name}: the measuring process said nothing for {timeout:g} s") from None
        if not line:
            raise BenchFailed(self._ended())
        return line.decode()

    def _ended(self) -> str:
        words = self._log.read_text("utf-8", "replace").strip().splitlines()
        return f"{self.name}: the measuring process ended: {words[-1] if words else 'without a word'}"

    def close(self) -> None:
        """See `End`."""
        assert self._process.stdin is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()


def _read_lines(pipe: IO[bytes], lines: queue.SimpleQueue[bytes]) -> None:
    """Until the end, which is an empty line."""
    with pipe:
        for line in pipe:
            lines.put(line)
    lines.put(b"")


@dataclass(frozen=True)
class Ran:
    """What both ends answered to one command, and what it cost.

    Attributes:
        near: answer of the end that keeps the time.
        far: answer of the other.
        cpu: processor seconds by place; see `Row.cpu`. Of the host's what a command that does nothing takes is left
            out: in an emulated VM that is as much as some thousand messages.
    """

    near: dict[str, Any]
    far: dict[str, Any]
    cpu: dict[str, float]


class Pair:
    """Two ends of one region, attached to its channels. `domains` is what their rows say."""

    def __init__(self, domains: str, near: End, far: End) -> None:
        self.domains = domains
        self.near = near
        self.far = far
        self._met: set[str] = set()
        self._empty: dict[str, float] = {}
        for end in (near, far):
            end.tell({"do": "hello"})
        for end in (near, far):
            end.facts = end.hear(START_SECONDS)
        for channel in (*(name for name, _, _ in SLOTS.values()), BULK):
            self.run({"do": "attach", "channel": channel}, {"do": "attach", "channel": channel})
        empty = [self.run({"do": "drain"}, {"do": "drain"}).cpu for _ in range(EMPTY_COMMANDS)]
        self._empty = {place: statistics.median(cpu[place] for cpu in empty) for place in ("host_near", "host_far")}

    @property
    def clock_ns(self) -> float:
        """What a reading of the clock costs at the end that keeps the time."""
        return float(self.near.facts["clock_ns"])

    def meet(self, name: str, **where: str) -> None:
        """Connect endpoints of that name at both ends, if that was not done before; see the worker's "meet"."""
        if name not in self._met:
            command = {"do": "meet", "name": name, **where}
            self.run(command | {"role": "near"}, command | {"role": "far"})
            self._met.add(name)

    def run(self, near: dict[str, Any], far: dict[str, Any] | None) -> Ran:
        """Both commands at the same time; far first, since near keeps the time. None: near's alone.

        Raises BenchFailed with what the ends said.
        """
        before = self.near.cpu(), self.far.cpu()
        if far is not None:
            self.far.tell(far)
        self.near.tell(near)
        mine = self._hear_near(far is not None)
        yours = {} if far is None else self.far.hear()
        host = {"host_near": self.near.cpu() - before[0], "host_far": self.far.cpu() - before[1]}
        host = {place: max(seconds - self._empty.get(place, 0.0), 0.0) for place, seconds in host.items()}
        return Ran(mine, yours, {"near": mine.get("cpu", 0.0), "far": yours.get("cpu", 0.0)} | host)

    def _hear_near(self, both: bool) -> dict[str, Any]:
        try:
            return self.near.hear()
        except BenchFailed as error:
            if not both:
                raise
            try:
                self.far.hear(5.0)
            except BenchFailed as other:
                raise BenchFailed(f"{error.message}; {other.message}") from error
            raise

    def samples(self) -> array[int]:
        """Of near's last loop, ns."""
        return unpack_samples(self.near.ask(do="samples"))
