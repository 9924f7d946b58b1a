"""What a report is made of, and how two rows are compared. Pure; depends on `testbed.bench`."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from testbed.bench import words
from testbed.report.figures import Cell

if TYPE_CHECKING:
    from collections.abc import Mapping

    from testbed.bench.histogram import Histogram
    from testbed.bench.rows import Result, Row
    from testbed.report.figures import Figure

_TIMES: Final = ("ns", "us", "ms", "s")
_OPERATIONS: Final = {"randread": "random read", "randwrite": "random write", "seqread": "sequential read",
                      "seqwrite": "sequential write"}


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
    """Figures under one heading. `missing` says what was not measured, `command` how it is."""

    id: str
    title: str
    lead: str
    figures: list[Figure]
    missing: str = ""
    command: str = ""


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
    best = min if row.unit in _TIMES else max
    return best(same, key=lambda each: each.figure, default=None)


def faster(row: Row, other: Row) -> list[float]:
    """How many times as fast it is: in all, then in each round, if those of both were neighbours in time.

    In all is the median of the rounds, as of the bars: a machine that drifts moves both figures of a round alike.
    """
    power = -1 if row.unit in _TIMES else 1
    if not row.rounds or len(row.rounds) != len(other.rounds):
        return [(row.figure / other.figure) ** power]
    rounds = [(one / two) ** power for one, two in zip(row.rounds, other.rounds, strict=True)]
    return [statistics.median(rounds), *rounds]


def times(value: float) -> str:
    """As people read it."""
    return f"{words.digits(value)}\N{MULTIPLICATION SIGN}"


def direction(row: Row) -> str:
    """Of the network: version of IP, and which way; no way of ours that others lack, as the mode of rings is."""
    return (row.mode or "").removesuffix("-poll") if row.name in ("net", "ping") else ""


def polled(row: Row) -> bool:
    """Whether a device's queues were told to poll, or its peer was given the like of it."""
    return row.name in ("block", "net", "ping") and (row.mode or "").rpartition("-")[2] == "poll"


def device_words(row: Row) -> str:
    """Which device, what was done to it, in which pieces."""
    what = {"block": "Block", "net": "Net", "ping": "Ping"}.get(row.name, row.name)
    parts = [device_action(row), words.size(row.size) if row.size else ""]
    return f"{what}: {', '.join(part for part in parts if part)}"


def device_action(row: Row) -> str:
    """What was done to a device; empty of other rows."""
    version, _, reverse = direction(row).partition("-")
    parts = [_OPERATIONS.get(row.op or "", row.op or ""), version.replace("ipv", "IPv"), "far to near" * bool(reverse),
             f"depth {row.depth}" if row.depth else "", "told to poll" * polled(row)]
    return ", ".join(part for part in parts if part)


def cpu_words(row: Row, seconds: float | None = None) -> str:
    """Processor time with what it is for, an operation or a GB: of all, or `seconds` of it as rows count them."""
    value = (row.cpu_s or 0.0) if seconds is None else seconds
    return f"{words.digits(value)} s/GB" if for_bytes(row) else f"{words.figure(value * 1e6, 'ns')}/op"


def cpu_cell(row: Row, seconds: float | None) -> Cell:
    """The same in a table; empty where it was too short to count."""
    return Cell("") if seconds is None else Cell(cpu_words(row, seconds), seconds)


def for_bytes(row: Row) -> bool:
    """Whether its processor time is that of a GB; else that of 1,000 operations."""
    return row.unit.endswith(("B/s", "bit/s"))
