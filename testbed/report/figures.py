"""What the report draws: figures and their tables, as plain data. Pure; depends on `testbed.bench.rows` and `.words`.

A figure is drawn by assets/report.js from what `as_dict` gives; its table says the same to who cannot see it, or wants
the numbers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from testbed.bench import words

if TYPE_CHECKING:
    from testbed.bench.rows import Row

#: How numbers of an axis are written, and with which unit: see `format` in report.js.
Format = Literal["time", "bytes", "rate", "ops", "percent", "tail", "times", "change", "plain"]
Scale = Literal["linear", "log", "log2"]


@dataclass(frozen=True)
class Axis:
    """One axis: its label has the unit, unless the format writes one with every number."""

    label: str
    scale: Scale
    format: Format


@dataclass(frozen=True)
class Series:
    """A line.

    Attributes:
        label: written beside it, so short.
        style: its colour, symbol and dashes, the same in every figure; see STYLES in report.js.
        points: x and y.
    """

    label: str
    style: str
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Item:
    """One line of a dot plot: a figure, with the range that it was found in; `text` is the figure as people read it."""

    label: str
    style: str
    value: float
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True)
class Cell:
    """Of a table: what is read, and the number it is sorted by, if it is one."""

    text: str
    number: float | None = None


@dataclass(frozen=True)
class Table:
    """A heading for each column; which columns are numbers is told by the cells."""

    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]

    def numeric(self, column: int) -> bool:
        """Whether it holds numbers."""
        return any(row[column].number is not None for row in self.rows)


@dataclass(frozen=True)
class Figure:
    """One plot.

    Attributes:
        id: of the element.
        kind: "lines": x and y; "dots": a line for each item, x alone.
        title: what it shows, and of what.
        lead: what to see in it, in a sentence; may be empty.
        stamp: the accelerator it was measured under.
        x, y: axes; of dots, y is unused.
        series: of lines.
        items: of dots.
        labels: where lines have their names: "end", or "along" of curves that all end at the top.
        rules: x and a word for it: upright lines.
        table: the same in numbers.
    """

    id: str
    kind: Literal["lines", "dots"]
    title: str
    stamp: str
    x: Axis
    table: Table
    y: Axis | None = None
    lead: str = ""
    series: list[Series] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    labels: Literal["end", "along"] = "end"
    rules: list[tuple[float, str]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For the page's script; the table is in the page already."""
        found = dataclasses.asdict(dataclasses.replace(self, table=Table((), [])))
        del found["table"]
        return found


_MODES: Final = {"poll": "polled", "doorbell": "doorbell", "adaptive": "adaptive"}
_PEERS: Final = {"tcp": "TCP", "unix": "Unix", "vsock": "vsock", "iceoryx2": "iceoryx2", "ring": "ring alone",
                 "idc-tcp": "IDC over TCP", "nbd-tcp": "NBD over TCP", "nbd-local": "NBD within one VM",
                 "virtio-blk": "virtio-blk", "virtio-net": "virtio-net", "virtio-9p": "virtio-9p"}
_LIMITS: Final = {"poll": "bare cache line", "doorbell": "bare doorbell", "pipeline": "bare pipeline",
                  "copy": "local copy"}


def label(row: Row) -> str:
    """Short enough to stand beside a line."""
    if row.path == "limit":
        return _LIMITS.get(row.mode or "", "limit")
    if row.strategy:
        return {"handover": "hand over"}.get(row.strategy, row.strategy)
    if row.path == "ivshmem":
        return _MODES.get((row.mode or "").rpartition("-")[2], "IDC")
    framed = ", framed" if row.name == "transact" and row.path == "tcp" and row.outstanding else ""
    return _PEERS.get(row.path, row.path) + framed


def style(row: Row) -> str:
    """Name of its colour, symbol and dashes."""
    if row.path == "limit":
        return {"doorbell": "limit2", "copy": "limit2"}.get(row.mode or "", "limit")
    if row.strategy:
        return row.strategy
    if row.path == "ivshmem":
        return _MODES.get(row.mode or "", "idc")
    return row.path


def row_table(rows: list[Row]) -> Table:
    """Rows with percentiles, or with their spread."""
    if all(row.p50 is not None for row in rows):
        heads = ("way", "interface", "p50", "p90", "p99", "p99.9", "max", "samples")
        return Table(heads, [(Cell(words.title(row)), Cell(row.api),
                              *(number(value, row.unit) for value in row.told),
                              Cell(f"{row.samples}", row.samples)) for row in rows])  # fmt: skip
    return Table(("way", "interface", "size", "median", "least", "most"), [
        (Cell(words.title(row)), Cell(row.api), Cell(words.size(row.size), row.size),
         *(number(value, row.unit) for value in (row.figure, *spread(row)))) for row in rows])  # fmt: skip


def spread(row: Row) -> tuple[float, float]:
    """Least and most of the rounds."""
    rounds = row.rounds or (row.figure,)
    return min(rounds), max(rounds)


def number(value: float | None, unit: str) -> Cell:
    """With its unit; sorted by the number itself."""
    return Cell("") if value is None else Cell(words.figure(value, unit), value)
