"""Which figures a run has, place by place. Pure; depends on `testbed.bench` and `testbed.report.figures`."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from testbed.bench import words
from testbed.report.figures import Axis, Cell, Figure, Item, Series, Table, label, number, row_table, spread, style

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from testbed.bench.histogram import Histogram
    from testbed.bench.rows import Result, Row

ORDER: Final = ("vm-vm", "host-vm", "process", "vm")
_TIME = Axis("", "log", "time")
#: Parts of ten thousand at which a distribution is drawn.
_WHOLE: Final = 10_000
_ECDF = [1, 10, 50, *range(100, 10_000, 100), 9950, 9990, 9999, 10_000]
_TAIL = [5000, 6000, 7000, 8000, 8500, 9000, 9200, 9400, 9600, 9800, 9900, 9920, 9940, 9960, 9980, 9990, 9993, 9996,
         9999]  # fmt: skip


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


def places(run: Run) -> list[Place]:
    """Those that have rows, VMs first."""
    present = {row.domains for row in run.result.results}
    makers: Sequence[Callable[[Run, str], Section | None]] = (
        _glance, _latency, _throughput, _crossing, _messages, _devices, _cpu, _machines)
    found = []
    for domains in [*(each for each in ORDER if each in present), *sorted(present - set(ORDER))]:
        sections = [section for maker in makers if (section := maker(run, domains)) is not None]
        found.append(Place(domains, words.PLACES.get(domains, domains), _tiles(run.rows(domains)), sections))
    return found


def _pick(rows: list[Row], name: str, path: str, mode: str | None = None, api: str = "core",
          size: int | None = None) -> Row | None:  # fmt: skip
    for row in rows:
        if (row.name, row.path, row.api) == (name, path, api) and mode in (None, row.mode) and size in (None, row.size):
            return row
    return None


def _peer(rows: list[Row], row: Row) -> Row | None:
    """The best of what a user would pick instead, of the same interface."""
    kind = (row.name, row.size, row.unit, row.api, row.op, row.depth, _direction(row))
    same = [each for each in rows if words.is_peer(each) and each.outstanding in (None, row.outstanding)
            and (each.name, each.size, each.unit, each.api, each.op, each.depth, _direction(each)) == kind]
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


def _wanted(rows: list[Row]) -> list[tuple[str, Row]]:
    """What a reader asks first, as far as it was measured."""
    asked = [("Round trip 64 B, polled", _pick(rows, "rtt", "ivshmem", "poll", size=64)),
             ("Round trip 64 B, doorbell", _pick(rows, "rtt", "ivshmem", "doorbell", size=64)),
             ("Round trip 64 B, adaptive", _pick(rows, "rtt", "ivshmem", "adaptive", size=64)),
             ("Round trip 64 B, Python", _pick(rows, "rtt", "ivshmem", "poll", "python", 64)),
             ("Messages 64 B one way", _pick(rows, "rate", "ivshmem", "poll", size=64)),
             ("Stream 64 KiB", _pick(rows, "stream", "ivshmem", "poll", size=65536)),
             ("Stream 64 KiB, Python", _pick(rows, "stream", "ivshmem", "poll", "python", 65536)),
             ("Transaction 64 B, Python", _pick(rows, "transact", "ivshmem", "poll", "python", 64))]
    found = [(what, row) for what, row in asked if row is not None]
    return found + [(_device_words(row), row) for row in rows
                    if row.name in ("block", "net", "ping") and row.path == "ivshmem"]


def _tiles(rows: list[Row]) -> list[Tile]:
    """Four at most."""
    tiles: list[Tile] = []
    for what, row in _wanted(rows):
        if what.endswith(("adaptive", "Python")) or len(tiles) == 4:
            continue
        peer = _peer(rows, row)
        against = "no peer was measured" if peer is None else _against(row, peer)
        tiles.append(Tile(what, words.figure(row.figure, row.unit), against))
    return tiles


def _against(row: Row, peer: Row) -> str:
    ratio, name = faster(row, peer)[0], f"{label(peer)} ({words.figure(peer.figure, peer.unit)})"
    return f"{times(ratio)} as fast as {name}" if ratio >= 1 else f"{times(1 / ratio)} slower than {name}"


def _glance(run: Run, domains: str) -> Section | None:
    """How many times as fast as what a user would pick instead."""
    rows = run.rows(domains)
    items: list[Item] = []
    lines: list[tuple[Cell, ...]] = []
    for what, row in _wanted(rows):
        if (peer := _peer(rows, row)) is None:
            continue
        ratio, *rounds = faster(row, peer)
        items.append(Item(f"{what} / {label(peer)}", style(row), ratio, min(rounds, default=None),
                          max(rounds, default=None), times(ratio)))
        lines.append((Cell(what), number(row.figure, row.unit), Cell(label(peer)), number(peer.figure, peer.unit),
                      Cell(times(ratio), ratio)))
    if not items:
        return None
    table = Table(("what", "IDC", "instead", "that one", "times as fast"), lines)
    figure = Figure(f"{domains}-glance", "dots", "Times as fast as what you would use instead", run.stamp(domains),
                    Axis("times as fast; right of the line is faster", "log", "times"), table, items=items,
                    rules=[(1.0, "as fast")], lead="Dot: median of the rounds. Line: from the worst round to the best.")
    return Section("glance", "How fast, against what", "", [figure])


def _distribution(run: Run, domains: str, name: str, api: str, size: int, title: str) -> list[Figure]:
    """ECDF and tail of the same rows."""
    found = [(row, histogram) for row in run.rows(domains)
             if (row.name, row.size) == (name, size) and (row.api == api or (row.path == "limit" and api == "core"))
             and row.unit == "ns" and (histogram := run.histogram(row)) is not None]
    if not found:
        return []
    rows = [row for row, _ in found]
    table, stamp, slug = row_table(rows), run.stamp(domains), f"{domains}-{name}-{api}-{size}"
    ecdf, tail = [], []
    for row, histogram in found:
        values = histogram.at(_ECDF, _WHOLE)
        ecdf.append(Series(label(row), style(row), [(value, part / _WHOLE) for value, part in
                                                    zip(values, _ECDF, strict=True)]))
        # A percentile that fewer than one sample stands for is none.
        parts = [part for part in _TAIL if histogram.count * (_WHOLE - part) >= _WHOLE]
        tail.append(Series(label(row), style(row), [(-math.log10(1 - part / _WHOLE), value) for part, value in
                                                    zip(parts, histogram.at(parts, _WHOLE), strict=True)]))
    per = max(row.per for row in rows)
    mean = f" Where the clock is slow a sample is the mean of {per} round trips." if per > 1 else ""
    return [Figure(f"{slug}-ecdf", "lines", f"{title}: how many took no longer", stamp, _TIME, table,
                   Axis("share of round trips", "linear", "percent"),
                   "Further left is faster; upright is steady." + mean, ecdf, labels="along"),
            Figure(f"{slug}-tail", "lines", f"{title}: the slowest ones", stamp, Axis("percentile", "linear", "tail"),
                   table, _TIME, "Lower is faster; flat has no tail." + mean, tail)]


def _latency(run: Run, domains: str) -> Section | None:
    figures: list[Figure] = []
    for name, api, title in (("rtt", "core", "Round trip, 64 B, core"), ("rtt", "python", "Round trip, 64 B, Python"),
                             ("rtt-open", "core", "By a timetable, 64 B"), ("rtt-busy", "core", "Both VMs busy, 64 B")):
        figures += _distribution(run, domains, name, api, 64, title)
    if not figures:
        return None
    return Section("latency", "Latency", "Times there and back. By a timetable, each is counted from when it was due: "
                   "a stall is as many slow ones as were due in it.", figures)  # fmt: skip


def _throughput(run: Run, domains: str) -> Section | None:
    figures = []
    for api, word in (("core", "core"), ("python", "Python")):
        rows = [row for row in run.rows(domains) if row.name == "stream" and (row.api == api or row.path == "limit")]
        if all(row.path == "limit" for row in rows):
            continue
        figures.append(Figure(f"{domains}-stream-{api}", "lines", f"Stream by size of one write, {word}",
                              run.stamp(domains), Axis("bytes of one write", "log2", "bytes"), row_table(rows),
                              Axis("", "log", "rate"), "Higher is faster. Dashed grey: what the machine can do at all.",
                              _by_size(rows)))
    if not figures:
        return None
    return Section("throughput", "Throughput and its limits", "Every byte is copied in by the sender, and out by the "
                   "receiver. The bare pipeline is those two copies and nothing else.", figures)  # fmt: skip


def _by_size(rows: list[Row]) -> list[Series]:
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault((label(row), style(row)), []).append((float(row.size), row.figure))
    return [Series(name, kind, sorted(points)) for (name, kind), points in lines.items()]


def _crossing(run: Run, domains: str) -> Section | None:
    figures = []
    for touched, word in ((False, "not looked at"), (True, "every byte summed")):
        rows = [row for row in run.rows(domains) if (row.name, row.api, row.touched) == ("bulk", "python", touched)]
        if not rows:
            continue
        ring = [row for row in run.rows(domains) if (row.name, row.path) == ("bulk", "ring")] if not touched else []
        over = crossings(rows)
        rules = [(size, f"{way}: {when.removeprefix('from ').removesuffix(' on')}") for size, way, when in over]
        lead = ("; ".join(f"{way} beats copy {when}" for _, way, when in over)
                or "To copy is fastest at the largest size")
        figures.append(Figure(f"{domains}-bulk-{'touched' if touched else 'untouched'}", "lines",
                              f"Copy, map, hand over: {word}", run.stamp(domains),
                              Axis("bytes of one transfer", "log2", "bytes"), row_table([*rows, *ring]),
                              Axis("", "log", "rate"), f"{lead}.", _by_size([*rows, *ring]), rules=rules))
    if not figures:
        return None
    return Section("crossing", "Where copy, map and hand-over cross", "Pages of a region, by Python, two transfers "
                   "under way. Upright lines: from there on the other way is faster than to copy.", figures)


def crossings(rows: list[Row]) -> list[tuple[float, str, str]]:
    """Sizes from which on to map, and to hand over, beats to copy, between two measured ones by their logarithms.

    Each with the way and the size in words; a way that loses at the largest size is not there.
    """
    by_size: dict[str, dict[int, float]] = {}
    for row in rows:
        by_size.setdefault(row.strategy or "", {})[row.size] = row.figure
    copy = by_size.get("copy", {})
    found: list[tuple[float, str, str]] = []
    for strategy, word in (("map", "map"), ("handover", "hand over")):
        other = by_size.get(strategy, {})
        sizes = sorted(copy.keys() & other.keys())
        leads = [math.log(other[size] / copy[size]) for size in sizes]
        last = max((at for at, lead in enumerate(leads) if lead <= 0), default=-1)
        if not sizes or last == len(sizes) - 1:
            continue
        if last < 0:
            found.append((float(sizes[0]), word, "at every size"))
            continue
        part = -leads[last] / (leads[last + 1] - leads[last])
        size = sizes[last] * (sizes[last + 1] / sizes[last]) ** part
        found.append((size, word, f"from {_about(size)} on"))
    return found


def _about(size: float) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"


def _ranges(rows: list[Row]) -> list[Item]:
    """Of times from the median to the 99th percentile; of rates from the worst round to the best."""
    items = []
    for row in rows:
        low, high = (row.p50, row.p99) if row.p50 is not None else spread(row)
        many = f", {row.outstanding} at a time" if row.outstanding and row.outstanding > 1 else ""
        api = {"python": ", Python", "core": ", core"}.get(row.api, "") if row.path != "limit" else ""
        items.append(Item(f"{label(row)}{api}{many}", style(row), row.figure, low, high,
                          words.figure(row.figure, row.unit)))
    return items


def _messages(run: Run, domains: str) -> Section | None:
    rows, figures = run.rows(domains), []
    for slug, title, axis, lead, found in (
            ("rate", "Messages 64 B one way", Axis("messages a second", "log", "ops"),
             "Further right is faster. Line: from the worst round to the best.",
             [row for row in rows if row.name == "rate"]),
            ("transact", "One transaction of 64 B", Axis("", "log", "time"),
             "Further left is faster. Dot: median; line: to the 99th percentile.",
             [row for row in rows if (row.name, row.unit, row.size) == ("transact", "ns", 64)]),
            ("transact-many", "Transactions of 64 B, many at a time", Axis("transactions a second", "log", "ops"),
             "Further right is faster. Line: from the worst round to the best.",
             [row for row in rows if (row.name, row.unit) == ("transact", "txn/s")])):  # fmt: skip
        if found:
            figures.append(Figure(f"{domains}-{slug}", "dots", title, run.stamp(domains), axis, row_table(found),
                                  lead=lead, items=_ranges(found)))
    return Section("messages", "Messages and transactions", "", figures) if figures else None


def _direction(row: Row) -> str:
    """Of the network: version of IP, and which way; no way of ours that others lack, as the mode of rings is."""
    return row.mode or "" if row.name in ("net", "ping") else ""


def _device_words(row: Row) -> str:
    depth = f"depth {row.depth}" if row.depth else ""
    parts = [row.name, row.op or "", _direction(row), depth, words.size(row.size) if row.size else ""]
    return " ".join(part for part in parts if part)


def _devices(run: Run, domains: str) -> Section | None:
    """Rows of device classes, by what was done."""
    rows = [row for row in run.rows(domains) if row.name in ("block", "net", "ping")]
    if not rows and domains != "vm-vm":
        return None
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((_device_words(row), row.unit), []).append(row)
    figures = []
    for place, ((what, unit), found) in enumerate(groups.items()):
        less = unit in ("ns", "us", "ms")
        items = [Item(label(row), style(row), row.figure, *spread(row), words.figure(row.figure, unit))
                 for row in found]
        figures.append(Figure(f"{domains}-device-{place}", "dots", what, run.stamp(domains),
                              Axis(unit, "log", "plain"), row_table(found), items=items,
                              lead=f"Further {'left' if less else 'right'} is faster."))
    have = {row.name for row in rows}
    missing = [name for name in ("block", "net", "ping") if name not in have]
    said = "" if not missing else (f"Not measured in this run: {', '.join(missing)}. testbed bench "
                                   f"{' '.join(dict.fromkeys('net' if name == 'ping' else name for name in missing))} "
                                   "measures devices beside virtio and NBD, where this version has them.")
    return Section("devices", "Devices against their peers", "", figures, said)


def _cpu(run: Run, domains: str) -> Section | None:
    rows, figures = [row for row in run.rows(domains) if row.cpu_s], []
    for slug, title, label_, found in (
            ("cpu-rtt", "Processor time of round trips, 64 B", "CPU ms for one operation",
             [row for row in rows if (row.name, row.size) == ("rtt", 64)]),
            ("cpu-stream", "Processor time of a stream, 64 KiB", "CPU seconds for a GB",
             [row for row in rows if (row.name, row.size) == ("stream", 65536) and row.mode != "copy"])):  # fmt: skip
        if not found:
            continue
        items = [Item(f"{label(row)}{'' if row.path == 'limit' else ', Python' if row.api == 'python' else ', core'}",
                      style(row), row.cpu_s or 0.0, None, None, words.digits(row.cpu_s or 0.0)) for row in found]
        table = Table(("way", "interface", "CPU s", *_CPU_PLACES), [
            (Cell(words.title(row)), Cell(row.api), _seconds(row.cpu_s),
             *(_seconds(row.cpu.get(place)) for place in _CPU_PLACES)) for row in found])  # fmt: skip
        figures.append(Figure(f"{domains}-{slug}", "dots", title, run.stamp(domains), Axis(label_, "log", "cpu"), table,
                              items=items, lead="Further left is cheaper. Of both ends together, QEMU included."))
    if not figures:
        return None
    return Section("cpu", "What it costs", "Who polls burns a processor while nothing comes; who sleeps pays to be "
                   "woken.", figures)  # fmt: skip


def _seconds(value: float | None) -> Cell:
    return Cell("") if value is None else Cell(f"{value:.3g}", value)


_CPU_PLACES: Final = ("near", "far", "host_near", "host_far")


def _machines(run: Run, domains: str) -> Section | None:
    """Boots and connecting."""
    figures = []
    for unit, title, axis in (("s", "Until a VM answers", Axis("seconds", "log", "plain")),
                              ("ms", "Until a device is connected", Axis("milliseconds", "log", "plain"))):
        rows = [row for row in run.rows(domains) if row.unit == unit and row.name in ("cold-boot", "clone", "connect")]
        if rows:
            items = [Item(f"{row.name} {row.mode or ''}".strip(), style(row), row.figure, row.p50, row.p99,
                          words.figure(row.figure, unit)) for row in rows]
            figures.append(Figure(f"{domains}-{rows[0].name}", "dots", title, run.stamp(domains), axis, row_table(rows),
                                  items=items, lead="Further left is faster. Line: to the 99th percentile."))
    return Section("machines", "Starting and connecting", "", figures) if figures else None
