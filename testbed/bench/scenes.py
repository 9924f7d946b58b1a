"""Where the cost of tracing is measured: two processes, or two VMs; a link between them, and a trace of each that is
recorded on this machine. Depends on idc.measure.traced, host.region and `testbed.bed`.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from host.region import RegionService, RegionSpec
from idc.layout import ChannelSpec, Kind, Rights
from idc.measure.traced import CHANNELS
from testbed.bench.places import places_for_each

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from host.region import Region
    from testbed.bed import Testbed
    from testbed.calls import Process
    from testbed.run import Run

ROOT = Path(__file__).resolve().parents[2]
#: Transactions of one block, of processes and of VMs, whose time wanders more and is much longer: a turn must be short.
#: Multiples of those outstanding.
COUNT: Final = 192
VM_COUNT: Final = 48
TRACE_RING: Final = 1 << 20


class Ended(Protocol):
    """A program that was started."""

    def result(self, timeout: float) -> tuple[int, str, str]:
        """Exit code, standard output and what it said last; raises TimeoutError when it does not end in so many
        seconds."""


@dataclass
class Scene:
    """Two domains, a link with a channel for each variant, and a trace of each that is recorded here.

    Attributes:
        addresses: of the ends, by role: the trace, and the link.
        cache: a directory at the ends for what they compile, or "-".
        count: transactions of a block.
        cpus: that the ends are to run on, by role; -1 leaves it to them.
        start: begins `python3` with such arguments at a role.
    """

    addresses: dict[str, list[str]]
    cpus: dict[str, int]
    cache: str
    count: int
    start: Callable[[str, list[str]], Ended]


class Stage(Protocol):
    """Where it is measured."""

    def scene(self) -> contextlib.AbstractContextManager[Scene]:
        """For one take; what was started is ended with it."""


@dataclass
class _Local:
    """A process of this machine."""

    process: subprocess.Popen[bytes]
    log: Path

    def result(self, timeout: float) -> tuple[int, str, str]:
        """See `Ended`."""
        try:
            output, _ = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        words = self.log.read_text("utf-8", "replace").strip().splitlines()
        return self.process.returncode, output.decode(), words[-1] if words else "without a word"


def _spawn(run: Run, stack: contextlib.ExitStack, name: str, argv: list[str]) -> _Local:
    log = run.path(f"tracing-{name}.log")
    with log.open("wb") as errors:
        process = run.popen([sys.executable, *argv], stdout=subprocess.PIPE, stderr=errors, cwd=ROOT)

    def end() -> None:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()

    stack.callback(end)
    return _Local(process, log)


def _record(run: Run, stack: contextlib.ExitStack, trace: Region, role: str, directory: Path) -> None:
    where = f"member:{trace.socket('sink')}/trace"
    _spawn(run, stack, f"recorder-{role}", ["-m", "idc.trace.record", where, "--domain", role, "--here", "sink",
                                            "--directory", str(directory)])


def _link(name: str, near: str, far: str) -> RegionSpec:
    channels = [ChannelSpec(channel, Kind.MESSAGE, near, far, 256 * 512, 512) for channel in CHANNELS]
    return RegionSpec(name, 1 << 20, {near: Rights.RW, far: Rights.RW}, channels)


def _trace(name: str, member: str) -> RegionSpec:
    return RegionSpec(name, 4 << 20, {member: Rights.RW, "sink": Rights.RW},
                      [ChannelSpec("trace", Kind.BYTE, member, "sink", TRACE_RING)])


@dataclass
class Processes:
    """Two processes of a run."""

    run: Run

    @contextlib.contextmanager
    def scene(self) -> Iterator[Scene]:
        """See `Stage`."""
        with contextlib.ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="idc")))
            service = stack.enter_context(RegionService(directory, self.run.env))
            link = service.create(_link("link", "near", "far"))
            addresses = {}
            for role in ("far", "near"):
                trace = service.create(_trace(f"t{role}", role))
                _record(self.run, stack, trace, role, directory / "traces")
                addresses[role] = [f"member:{trace.socket(role)}/trace", f"member:{link.socket(role)}"]
            cpus = dict(zip(("near", "far"), (-1 if cpu is None else cpu for cpu in places_for_each()), strict=True))
            yield Scene(addresses, cpus, "-", COUNT, lambda role, argv: _spawn(self.run, stack, role, argv))


@dataclass
class _InVm:
    """A program of a VM."""

    process: Process

    def result(self, timeout: float) -> tuple[int, str, str]:
        """See `Ended`."""
        done = self.process.wait(timeout)
        words = done.err.strip().splitlines()
        return done.exit_code, done.out, words[-1] if words else "without a word"


@dataclass
class Machines:
    """Two VMs of a testbed, near and far. The regions are plugged once, and go with the testbed."""

    bed: Testbed
    vms: tuple[str, str]
    _traces: dict[str, Region] = field(default_factory=dict)

    @contextlib.contextmanager
    def scene(self) -> Iterator[Scene]:
        """See `Stage`."""
        near, far = self.vms
        if not self._traces:
            self.bed.region(_link("traced", near, far))
            self._traces |= {vm: self.bed.region(_trace(f"trace-{vm}", vm)) for vm in self.vms}
        with contextlib.ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="idc")))
            roles = {"near": near, "far": far}
            for vm in self.vms:
                _record(self.bed.run, stack, self._traces[vm], vm, directory)

            def start(role: str, argv: list[str]) -> Ended:
                process = self.bed.vms[roles[role]].spawn(["python3", *argv])
                stack.callback(process.kill)
                return _InVm(process)

            addresses = {role: [f"ivshmem:{self._traces[vm].name}/trace", "ivshmem:traced"]
                         for role, vm in roles.items()}
            yield Scene(addresses, {"near": -1, "far": -1}, "/run/idc-traced", VM_COUNT, start)
