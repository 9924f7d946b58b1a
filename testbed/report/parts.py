"""What a report is made of, and how two rows are compared. Pure; depends on `testbed.bench`."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from testbed.bench import words

if TYPE_CHECKING:
    from collections.abc import Mapping

    from testbed.bench.histogram import Histogram
    from testbed.bench.rows import Result, Row
    from testbed.report.figures import Figure


@dataclass(frozen=True)
class Run:
    """What is drawn: a run, its number, and the histograms of its rows by their place in it."""

    number: int
    result: Result
    histograms: Mapping[int, Histogram]

    def rows(self, domains: str) -> list[Row]:
        """Of one place."""
        return [row for row in self.result.results if row.domains == domains]

    def histogram(self, row: Row) -> Histogram | None:
        """Of one row."""
        for place, each in enumerate(self.result.results):
            if each is row:
                return self.histograms.get(place)
        return None

    def stamp(self, domains: str) -> str:
        """On every figure: a picture that is passed on must not lose it."""
        accel = self.result.accel.upper()
        where = f"no VM (run: {accel})" if domains == "process" else accel
        if self.result.accel == "none":
            where = "no VM"
        return f"{where} · run {self.number}" + (" · quick" if self.result.quick else "")


@dataclass(frozen=True)
class Section:
    """Figures under one heading. `missing` says what was not measured, and how it is."""

    id: str
    title: str
    lead: str
    figures: list[Figure]
    missing: str = ""


@dataclass(frozen=True)
class Tile:
    """One number to begin with. `against` is what it is compared with, in words."""

    what: str
    figure: str
    against: str


@dataclass(frozen=True)
class Place:
    """All that was measured at one place."""

    id: str
    title: str
    tiles: list[Tile]
    sections: list[Section] = field(default_factory=list)

    @property
    def figures(self) -> list[Figure]:
        """Of all sections."""
        return [figure for section in self.sections for figure in section.figures]


def peer(rows: list[Row], row: Row) -> Row | None:
    """The best of what a user would pick instead, of the same interface."""
    kind = (row.name, row.size, row.unit, row.api, row.op, row.depth, direction(row))
    same = [each for each in rows if words.is_peer(each) and each.outstanding in (None, row.outstanding)
            and (each.name, each.size, each.unit, each.api, each.op, each.depth, direction(each)) == kind]
    best = min if row.unit == "ns" else max
    return best(same, key=lambda each: each.figure, default=None)


def faster(row: Row, other: Row) -> list[float]:
    """How many times as fast it is: in all, then in each round, if those of both were neighbours in time.

    In all is the median of the rounds, as of the bars: a machine that drifts moves both figures of a round alike.
    """
    power = -1 if row.unit in ("ns", "us", "ms", "s") else 1
    if not row.rounds or len(row.rounds) != len(other.rounds):
        return [(row.figure / other.figure) ** power]
    rounds = [(one / two) ** power for one, two in zip(row.rounds, other.rounds, strict=True)]
    return [statistics.median(rounds), *rounds]


def times(value: float) -> str:
    """As people read it."""
    return f"{words.digits(value)}\N{MULTIPLICATION SIGN}"


def direction(row: Row) -> str:
    """Of the network: version of IP, and which way; no way of ours that others lack, as the mode of rings is."""
    return row.mode or "" if row.name in ("net", "ping") else ""


def device_words(row: Row) -> str:
    """What was done to a device, in words."""
    depth = f"depth {row.depth}" if row.depth else ""
    parts = [row.name, row.op or "", direction(row), depth, words.size(row.size) if row.size else ""]
    return " ".join(part for part in parts if part)
