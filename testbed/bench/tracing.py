"""Transactions without the hook, with it and tracing off, and on: in blocks, in turn, in the same two domains.

The ends are idc.measure.traced, which says how the build without the hook is made. A turn is one block of each variant;
turns give pairs, and those an interval. Both domains log to a recorder of this machine. Depends on idc.measure.traced,
`testbed.bench.scenes` and `testbed.bench.subjects`.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from idc.measure.traced import SIZE, VARIANTS
from testbed.bench.errors import BenchFailed
from testbed.bench.subjects import Key, Taken

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.bench.scenes import Ended, Stage

#: Turns that show how many fit, and the fewest of a take.
FIRST_TURNS: Final = 8
LEAST_TURNS: Final = 10
#: Of one take; the first in a VM compiles for a minute.
LIMIT_SECONDS: Final = 240.0
#: Student's t for 95 % of both sides, where there are many turns.
_T: Final = 1.97


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
    """(mean, least, most) of the middle nine tenths, without the ends in any case, with 95 % confidence; each a part of
    one. At least 10 changes."""
    cut = max(len(changes) // 20, 1)
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
