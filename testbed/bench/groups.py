"""Measures subjects in turn, A B A B, and makes rows of what was taken.

What is compared is in one group: all its subjects get their takes in the same turns, so that the machine's drift hits
each of them. Of two versions that are compared, each take has its like of the other version next to it
(`testbed.bench.baton`). Depends on `testbed.bench.subjects` and `testbed.bench.histogram`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from testbed.bench.baton import ALONE, Baton
from testbed.bench.errors import BenchFailed
from testbed.bench.histogram import Histogram
from testbed.bench.rows import Row
from testbed.bench.subjects import Key, Subject, Taken, scout

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from testbed.bench.ends import Pair
    from testbed.bench.subjects import CopyLoop


T = TypeVar("T")


@dataclass(frozen=True)
class Pace:
    """How long to measure.

    Attributes:
        rounds: turns.
        seconds: of one take.
        scout_seconds: of one try of each way to copy.
        kept: how many of those ways go on into the turns.
        quick: whether this is the quick run.
    """

    rounds: int
    seconds: float
    scout_seconds: float
    kept: int
    quick: bool


QUICK = Pace(2, 0.08, 0.005, 1, quick=True)
#: Rather more takes than longer ones, for the same reason as below: on a shared machine a cache line goes to and fro in
#: 0.14 or 0.55 us, and changes between the two within tenths of a second.
FULL = Pace(9, 0.07, 0.02, 2, quick=False)
#: Of each turn of a comparison. Many short takes, since a neighbour on the same core comes and goes within tenths of a
#: second: of two versions in turn, the median of 12 pairs of 40 ms varies by 1 to 2 % from turn to turn where two pairs
#: of 80 ms do by 5 % (round trips of Python, on a shared machine on which each version alone varies by 20 to 30 %).
IN_TURN = Pace(12, 0.04, 0.005, 1, quick=True)


#: Processor seconds of all takes of a row below which nothing is said of them: what a take has beside its loop varies
#: by some ms.
LEAST_CPU = 0.05


@dataclass
class Group:
    """Subjects measured in turn between the ends of one pair.

    Attributes:
        title: for the reader who waits.
        pair: the ends; None only for boots.
        subjects: in the order of their turns.
        during: a context that is entered while they are measured: a load, for one.
        rivals: ways to one row each that take long: each is measured once, the best of them takes turns.
        scout: ways to copy, for one row each, of which there are too many: all are tried shortly, the best take turns.
    """

    title: str
    pair: Pair
    subjects: list[Subject]
    during: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    rivals: list[list[Subject]] = field(default_factory=list)
    scout: list[list[CopyLoop]] = field(default_factory=list)


@dataclass
class Found:
    """A row, with the histogram that its percentiles are of; None for a value."""

    row: Row
    histogram: Histogram | None


def measure(group: Group, pace: Pace, baton: Baton = ALONE) -> list[Found]:
    """All turns of one group. Raises BenchFailed, with the row's name, when a subject fails."""
    if group.during is not contextlib.nullcontext:
        baton = ALONE  # a load of this one's own must not run beside the other's takes: all takes are one slot
    with group.during():
        subjects, tried = list(group.subjects), {}
        for rivals in group.rivals:
            best, tried[rivals[0].key] = _try_once(rivals, group.pair, pace)
            subjects.append(best)
        limits: list[Subject] = []
        for ways in group.scout:
            kept, tried[ways[0].key] = scout(group.pair, ways, pace.scout_seconds, pace.kept)
            limits += kept
        subjects = [*limits, *subjects]  # so that the last of them and the first subject are neighbours in every round
        warm = {id(subject): _named(subject, group.pair, subject.prepare, pace.seconds) for subject in subjects}
        _same_samples(subjects)
        baton.next()
        takes: dict[int, list[Taken]] = {id(subject): [] for subject in subjects}
        for _ in range(pace.rounds):
            for subject in subjects:
                takes[id(subject)].append(_named(subject, group.pair, subject.take, pace.seconds))
                baton.next()
    found = []
    for variants in _by_key(subjects).values():
        rows = [_row(subject, takes[id(subject)], group.pair, warm[id(subject)],
                     counted=group.during is contextlib.nullcontext) for subject in variants]  # fmt: skip
        found.append(_best(rows, tried.get(variants[0].key, {})))
    return found


def _try_once(rivals: list[Subject], pair: Pair, pace: Pace) -> tuple[Subject, dict[str, float]]:
    """The best of several, by one take each, and what each did."""
    if len(rivals) == 1:
        return rivals[0], {}
    figures: dict[str, float] = {}
    for subject in rivals:
        _named(subject, pair, subject.prepare, pace.seconds)
        taken = _named(subject, pair, subject.take, pace.seconds)
        figures[subject.variant] = taken.value or float(statistics.median_low(taken.samples or [0]))
    choose = min if rivals[0].key.unit == "ns" else max
    return choose(rivals, key=lambda subject: figures[subject.variant]), figures


def _named(subject: Subject, pair: Pair, call: Callable[[float], T], seconds: float) -> T:
    try:
        return call(seconds)
    except BenchFailed as error:
        key = subject.key
        words = (key.name, key.path, pair.domains, key.mode, key.api, key.strategy, f"{key.size} bytes",
                 subject.variant)
        raise BenchFailed(f"{' '.join(word for word in words if word)}: {error.message}") from error


def _by_key(subjects: list[Subject]) -> dict[Key, list[Subject]]:
    found: dict[Key, list[Subject]] = defaultdict(list)
    for subject in subjects:
        found[subject.key].append(subject)
    return found


def _same_samples(subjects: list[Subject]) -> None:
    """Where the clock is too slow for single round trips, all of the group that need it share the same mean."""
    per = max((subject.per for subject in subjects), default=1)
    for subject in subjects:
        if subject.per > 1:
            subject.per = per


def _cost(takes: list[Taken]) -> dict[str, float]:
    """Processor seconds for one unit, by place: of all takes together, for single ones are short. Empty: too few."""
    host, own = sum(taken.host_units for taken in takes), sum(taken.own_units for taken in takes)
    used = {place: sum(taken.used[place] for taken in takes) for place in takes[0].used}
    if not host or used["host_near"] + used["host_far"] < LEAST_CPU:
        return {}
    return {place: seconds / (host if place.startswith("host") else own) for place, seconds in used.items()}


def _row(subject: Subject, takes: list[Taken], pair: Pair, prepared: int, *, counted: bool) -> Found:
    key = subject.key
    cost = _cost(takes) if counted else {}  # of a load of our own the VMs' processor time is not this row's
    row = Row(
        name=key.name, path=key.path, domains=pair.domains, mode=key.mode, api=key.api, size=key.size, unit=key.unit,
        samples=len(takes), variant=subject.variant, note=subject.note,
        cpu_s=cost["host_near"] + cost["host_far"] if cost else None, cpu=cost,
        warmup=prepared + sum(taken.warmup for taken in takes), late=sum(taken.late for taken in takes),
        offered=next((taken.offered for taken in takes if taken.offered), None), outstanding=key.outstanding,
        strategy=key.strategy, route=key.route, touched=key.touched,
    )  # fmt: skip
    sampled = [taken.samples for taken in takes if taken.samples is not None]
    if not sampled:
        values = tuple(taken.value for taken in takes if taken.value is not None)
        return Found(dataclasses.replace(row, value=statistics.median(values), rounds=values), None)
    histogram = Histogram()
    for samples in sampled:
        histogram.record(samples)
    at = histogram.percentiles()
    rounds = tuple(float(statistics.median_low(samples)) for samples in sampled)
    return Found(dataclasses.replace(row, samples=histogram.count, p50=at.p50, p90=at.p90, p99=at.p99, p999=at.p999,
                                     max=at.max, rounds=rounds, per=subject.per, clock_ns=pair.clock_ns), histogram)


def _best(found: list[Found], tried: dict[str, float]) -> Found:
    """The best variant, which names the others."""
    if found[0].row.unit == "ns":
        best = min(found, key=lambda each: each.row.figure)
    else:
        best = max(found, key=lambda each: each.row.figure)
    figures = tried | {each.row.variant: each.row.figure for each in found if each.row.variant}
    if len(figures) < 2:
        return best
    return Found(dataclasses.replace(best.row, variants=figures), best.histogram)
