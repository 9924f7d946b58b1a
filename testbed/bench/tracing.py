"""Round trips without the hook, with it and tracing off, and on: in blocks, in turn, in the same processes.

    python3 -m testbed.bench.tracing near|far SEED BLOCKS COUNT CPU TRACE SERVICE...     is one end

The build without the hook is made from the same sources, less the statements that ask whether there is a trace. Each
variant runs a copy of its own of those modules and of the loop, on a channel of its own; which channel, and the order
in each turn, are drawn anew. Turns give pairs, and those an interval. Depends on idc.trace, host.region and
`testbed.bench.subjects`.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import types
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from host.region import RegionService, RegionSpec
from idc.layout import ChannelSpec, Kind, Rights
from idc.trace import open_tracer
from idc.transport.address import open_port
from testbed.bench.errors import BenchFailed
from testbed.bench.places import places_for_each
from testbed.bench.subjects import Key, Taken

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.run import Run

ROOT = Path(__file__).resolve().parents[2]
VARIANTS: Final = ("without", "off", "on")
SIZE: Final = 64
#: Round trips of one block, and seconds that one takes about: a turn is one block of each variant.
COUNT: Final = 200
LIMIT_SECONDS: Final = 120.0
TRACE_RING: Final = 1 << 20
COPIED: Final = ("idc.endpoint.session", "idc.endpoint.endpoint", "idc.endpoint.blocking",
                 "testbed.bench.tracing_loops")
HOOKS: Final = ("self.trace is not None", "self._trace is not None")
#: Student's t for 95 % of both sides, where there are many turns.
_T: Final = 1.97


class _Strip(ast.NodeTransformer):
    """Imports the variant's own copies; without the hook, leaves out what asks for it."""

    def __init__(self, variant: str) -> None:
        self._variant = variant
        self.stripped = 0

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        """See there."""
        if node.module in COPIED:
            node.module = f"{node.module}__{self._variant}"
        return node

    def visit_If(self, node: ast.If) -> ast.AST | None:
        """See there."""
        self.generic_visit(node)
        if self._variant == "without" and ast.unparse(node.test) in HOOKS:
            self.stripped += 1
            return None
        return node


def build(variant: str) -> types.ModuleType:
    """The loops of a variant, on copies of all that has the hook; the statements left out are at its `STRIPPED`."""
    module, stripped = types.ModuleType(""), 0
    for name in COPIED:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        strip = _Strip(variant)
        tree = ast.fix_missing_locations(strip.visit(ast.parse(Path(spec.origin).read_text())))
        stripped += strip.stripped
        module = types.ModuleType(f"{name}__{variant}")
        sys.modules[module.__name__] = module
        exec(compile(tree, spec.origin, "exec"), module.__dict__)  # noqa: S102 - our own source
    module.__dict__["STRIPPED"] = stripped
    return module


class Measurement:
    """What the subjects share: one take of the first measures for all.

    Args:
        run: what the processes belong to.
        seconds: of one take.

    Attributes:
        samples: of the last take, by variant, ns.
        changes: of all takes, by variant: each turn's median as a part of that without the hook, less 1.
        sums: of all round trips of all takes, by variant, ns.
    """

    def __init__(self, run: Run, seconds: float) -> None:
        self._run = run
        self._seconds = seconds
        self._blocks = 8
        self.samples: dict[str, array[int]] = {}
        self.changes: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        self.sums: dict[str, int] = dict.fromkeys(VARIANTS, 0)

    def prepare(self) -> int:
        """Find out how many turns fit."""
        found = self._both(self._blocks)
        turn = sum(sum(block) for blocks in found.values() for block in blocks) / self._blocks
        warm, self._blocks = self._blocks, max(int(self._seconds * 1e9 / turn), 10)
        return warm * COUNT * len(VARIANTS)

    def take(self) -> None:
        """Measure all variants."""
        found = self._both(self._blocks)
        for variant, blocks in found.items():
            self.samples[variant] = array("Q", [sample for block in blocks for sample in block])
            for base, block in zip(found["without"], blocks, strict=True):
                self.changes[variant].append(statistics.median(block) / statistics.median(base) - 1)
                self.sums[variant] += sum(block)

    def _both(self, blocks: int) -> dict[str, list[list[int]]]:
        near_cpu, far_cpu = places_for_each()
        seed = random.SystemRandom().randrange(1 << 30)
        log = self._run.path("tracing.log")
        with contextlib.ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="idc")))
            service = stack.enter_context(RegionService(directory, self._run.env))
            channels = [ChannelSpec(f"c{n}", Kind.MESSAGE, "near", "far", 128 * 512, 512) for n in range(len(VARIANTS))]
            link = service.create(RegionSpec("link", 1 << 20, {"near": Rights.RW, "far": Rights.RW}, channels))
            errors = stack.enter_context(log.open("wb"))

            def start(*argv: str, output: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
                process = self._run.popen([sys.executable, *argv], stdout=output, stderr=errors, cwd=ROOT)
                stack.callback(_end, process)
                return process

            ends = []
            for role, cpu in (("far", far_cpu), ("near", near_cpu)):
                spec = RegionSpec(f"t{role}", 4 << 20, {role: Rights.RW, "sink": Rights.RW},
                                  [ChannelSpec("trace", Kind.BYTE, role, "sink", TRACE_RING)])
                trace = service.create(spec)
                start("-m", "idc.trace.record", f"member:{trace.socket('sink')}/trace", "--domain", role, "--here",
                      "sink", "--directory", str(directory / "traces"))
                where = [f"member:{trace.socket(role)}/trace",
                         *(f"member:{link.socket(role)}/{channel.name}" for channel in channels)]
                ends.append(start("-m", "testbed.bench.tracing", role, str(seed), str(blocks), str(COUNT),
                                  str(-1 if cpu is None else cpu), *where, output=subprocess.PIPE))
            try:
                output, _ = ends[1].communicate(timeout=LIMIT_SECONDS)
                code = ends[1].returncode or ends[0].wait(LIMIT_SECONDS)
            except subprocess.TimeoutExpired:
                raise BenchFailed(f"traced round trips did not finish in {LIMIT_SECONDS:g} s") from None
        if code != 0:
            words = log.read_text("utf-8", "replace").strip().splitlines()
            raise BenchFailed(f"a traced end ended with {code}: {words[-1] if words else 'without a word'}")
        found: dict[str, Any] = json.loads(output)
        if found.pop("dropped"):
            raise BenchFailed("the tracer dropped events: it did not do all the work that is measured")
        return found


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def interval(changes: list[float]) -> tuple[float, float, float]:
    """(mean, least, most) of the middle nine tenths, with 95 % confidence; each a part of one."""
    cut = len(changes) // 20
    kept = sorted(changes)[cut:len(changes) - cut]
    mean = statistics.fmean(kept)
    # Winsorised deviation: what a trimmed mean's error is estimated by.
    held = [min(max(change, kept[0]), kept[-1]) for change in changes]
    error = statistics.stdev(held) / (len(kept) / len(changes) * math.sqrt(len(changes)))
    return mean, mean - _T * error, mean + _T * error


class RoundTrips:
    """One variant."""

    def __init__(self, measurement: Measurement, variant: str) -> None:
        self.key = Key("trace", "ivshmem", variant, "python", SIZE, "ns")
        self.variant = ""
        self.note = "no hook in the endpoint" if variant == "without" else f"tracing {variant}"
        self.per = 1
        self._measurement = measurement

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


class Change:
    """What a variant costs more than without the hook: %, of the turns so far."""

    def __init__(self, measurement: Measurement, variant: str) -> None:
        self.key = Key("trace-cost", "ivshmem", variant, "python", SIZE, "%")
        self.variant = ""
        self.note = ""
        self.per = 1
        self._measurement = measurement

    def prepare(self, seconds: float) -> int:
        """See `Subject`."""
        del seconds
        return 0

    def take(self, seconds: float) -> Taken:
        """See `Subject`: the value is this take's, the note's interval that of all takes."""
        del seconds
        mode = self.key.mode or ""
        changes, sums = self._measurement.changes[mode], self._measurement.sums
        mean, least, most = (100 * each for each in interval(changes))
        self.note = (f"{mean:+.2f} %, 95 % interval {least:+.2f} to {most:+.2f} % of p50 over {len(changes)} turns; "
                     f"all the time together {100 * (sums[mode] / sums[VARIANTS[0]] - 1):+.1f} %")
        return Taken(value=mean)


def subjects(measurement: Measurement) -> Iterator[RoundTrips | Change]:
    """All rows; the first measures."""
    for variant in VARIANTS:
        yield RoundTrips(measurement, variant)
    for variant in VARIANTS[1:]:
        yield Change(measurement, variant)


# -- one end, in a process of its own


def main() -> None:
    """One end: see the top of the file."""
    role, seed, blocks, count, cpu, trace, *services = sys.argv[1:]
    if int(cpu) >= 0:
        os.sched_setaffinity(0, {int(cpu)})
    chance = random.Random(int(seed))
    chance.shuffle(services)
    ends: dict[str, Any] = {}
    # Lossless: nothing is dropped, so all the work is done.
    with open_tracer(trace, lossless=True, timeout=20) as tracer:
        for variant, service in zip(VARIANTS, services, strict=True):
            loops = build(variant)
            assert (loops.STRIPPED > 0) == (variant == "without")
            make = loops.Near if role == "near" else loops.Far
            ends[variant] = make(open_port(service), tracer if variant == "on" else None)
        found: dict[str, list[list[int]]] = {variant: [] for variant in VARIANTS}
        order = list(VARIANTS)
        for number in range(int(blocks) + 1):
            chance.shuffle(order)
            for variant in order:
                if role == "near":
                    samples = ends[variant].block(int(count) if number else 1000, bytes(SIZE))
                    if number:  # the first turn warms up
                        found[variant].append(samples)
                else:
                    ends[variant].block(int(count) if number else 1000)
    if role == "near":
        sys.stdout.write(json.dumps({**found, "dropped": tracer.dropped}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
