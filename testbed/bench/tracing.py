"""Transactions without the hook, with it and tracing off, and on: in blocks, in turn, in the same two domains.

The ends are idc.measure.traced, which says how the build without the hook is made. A turn is one block of each variant;
turns give pairs, and those an interval. Both domains log to a recorder of this machine. Depends on idc.measure.traced,
host.region and `testbed.bench.subjects`.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from host.region import RegionService, RegionSpec
from idc.layout import ChannelSpec, Kind, Rights
from idc.measure.traced import CHANNELS, SIZE, VARIANTS
from testbed.bench.errors import BenchFailed
from testbed.bench.places import places_for_each
from testbed.bench.subjects import Key, Taken

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
#: Turns that show how many fit, and the fewest of a take.
FIRST_TURNS: Final = 8
LEAST_TURNS: Final = 10
#: Of one take; the first in a VM compiles for a minute.
LIMIT_SECONDS: Final = 240.0
TRACE_RING: Final = 1 << 20
#: Student's t for 95 % of both sides, where there are many turns.
_T: Final = 1.97


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


@dataclass(frozen=True)
class Work:
    """What is done in each block.

    Attributes:
        api: "python" (endpoints in Python) or "core" (an Engine, whose handler is C).
        outstanding: transactions under way at a time.
    """

    api: str
    outstanding: int = 1


#: The Python endpoints' round trips; the core's; the core's with many under way.
WORKS: Final = (Work("python"), Work("core"), Work("core", 16))


class Measurement:
    """What the subjects share: one take of the first measures for all.

    Args:
        stage: where.
        seconds: of one take.
        work: what is done.

    Attributes:
        work: see above.
        samples: of the last take, by variant, ns.
        changes: of all takes, by variant: each turn's median as a part of that without the hook, less 1.
        sums: of all samples of all takes, by variant, ns.
    """

    def __init__(self, stage: Stage, seconds: float, work: Work = WORKS[0]) -> None:
        self.work = work
        self._stage = stage
        self._seconds = seconds
        self._blocks = FIRST_TURNS
        self.samples: dict[str, array[int]] = {}
        self.changes: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        self.sums: dict[str, int] = dict.fromkeys(VARIANTS, 0)

    def prepare(self) -> int:
        """Find out how many turns fit."""
        found = self._both(self._blocks)
        turn = sum(sum(block) for blocks in found.values() for block in blocks) * self.work.outstanding / self._blocks
        warm, self._blocks = self._blocks, max(int(self._seconds * 1e9 / turn), LEAST_TURNS)
        return warm * len(found[VARIANTS[0]][0]) * self.work.outstanding * len(VARIANTS)

    def take(self) -> None:
        """Measure all variants."""
        found = self._both(self._blocks)
        for variant, blocks in found.items():
            self.samples[variant] = array("Q", [sample for block in blocks for sample in block])
            for base, block in zip(found["without"], blocks, strict=True):
                self.changes[variant].append(statistics.median(block) / statistics.median(base) - 1)
                self.sums[variant] += sum(block)

    def _both(self, blocks: int) -> dict[str, list[list[int]]]:
        seed = random.SystemRandom().randrange(1 << 30)
        with self._stage.scene() as scene:
            far, near = (scene.start(role, ["-m", "idc.measure.traced", role, self.work.api, str(self.work.outstanding),
                                            str(seed), str(blocks), str(scene.count), str(scene.cpus[role]),
                                            scene.cache, *scene.addresses[role]]) for role in ("far", "near"))
            try:
                code, output, words = near.result(LIMIT_SECONDS)
                if code == 0:
                    code, _, words = far.result(LIMIT_SECONDS)
            except TimeoutError:
                raise BenchFailed(f"traced transactions did not finish in {LIMIT_SECONDS:g} s{_said(far)}") from None
        if code != 0:
            raise BenchFailed(f"a traced end ended with {code}: {words}")
        found: dict[str, Any] = json.loads(output)
        if found.pop("dropped"):
            raise BenchFailed("the tracer dropped events: it did not do all the work that is measured")
        return found


def _said(end: Ended) -> str:
    """What the other end may have died of."""
    try:
        code, _, words = end.result(1.0)
    except TimeoutError:
        return ""
    return f": the other end ended with {code}: {words}"


def interval(changes: list[float]) -> tuple[float, float, float]:
    """(mean, least, most) of the middle nine tenths, with 95 % confidence; each a part of one."""
    cut = len(changes) // 20
    kept = sorted(changes)[cut:len(changes) - cut]
    mean = statistics.fmean(kept)
    # Winsorised deviation: what a trimmed mean's error is estimated by.
    held = [min(max(change, kept[0]), kept[-1]) for change in changes]
    error = statistics.stdev(held) / (len(kept) / len(changes) * math.sqrt(len(changes)))
    return mean, mean - _T * error, mean + _T * error


class _Row:
    """What all rows of a measurement have; see `Subject`."""

    unit = "ns"
    name = "trace"

    def __init__(self, measurement: Measurement, variant: str) -> None:
        work = measurement.work
        self.key = Key(self.name, "ivshmem", variant, work.api, SIZE, self.unit,
                       outstanding=None if work.outstanding == 1 else work.outstanding)
        self.variant = ""
        self.note = ""
        self.per = 1
        self._measurement = measurement

    def prepare(self, seconds: float) -> int:
        """See `Subject`."""
        del seconds
        return 0


class Transactions(_Row):
    """One variant: ns of a transaction, of many under way the mean of those sent together."""

    def __init__(self, measurement: Measurement, variant: str) -> None:
        super().__init__(measurement, variant)
        self.note = "no hook in the endpoint" if variant == "without" else f"tracing {variant}"

    def prepare(self, seconds: float) -> int:
        """See `Subject`."""
        del seconds
        return self._measurement.prepare() if self.key.mode == VARIANTS[0] else 0

    def take(self, seconds: float) -> Taken:
        """See `Subject`."""
        del seconds
        if self.key.mode == VARIANTS[0]:
            self._measurement.take()
        return Taken(samples=self._measurement.samples[self.key.mode or ""])


class Change(_Row):
    """What a variant costs more than without the hook: %, of the turns so far."""

    name, unit = "trace-cost", "%"

    def take(self, seconds: float) -> Taken:
        """See `Subject`: the value is that of all turns so far, as is the note's interval."""
        del seconds
        mode = self.key.mode or ""
        changes, sums = self._measurement.changes[mode], self._measurement.sums
        mean, least, most = (100 * each for each in interval(changes))
        self.note = (f"{mean:+.2f} %, 95 % interval {least:+.2f} to {most:+.2f} % of p50 over {len(changes)} turns; "
                     f"all the time together {100 * (sums[mode] / sums[VARIANTS[0]] - 1):+.1f} %")
        return Taken(value=mean)


class Bound(_Row):
    """The end of that interval which is farther from none at all: %."""

    name, unit = "trace-bound", "%"

    def take(self, seconds: float) -> Taken:
        """See `Subject`: of all turns so far."""
        del seconds
        _, least, most = interval(self._measurement.changes[self.key.mode or ""])
        return Taken(value=100 * max(least, most, key=abs))


def subjects(measurement: Measurement) -> Iterator[Transactions | Change | Bound]:
    """All rows; the first measures."""
    for variant in VARIANTS:
        yield Transactions(measurement, variant)
    for row in (Change, Bound):
        for variant in VARIANTS[1:]:
            yield row(measurement, variant)
