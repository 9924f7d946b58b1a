"""Figures of a dot a row: messages, devices, processor time, starting. Pure; depends on `testbed.report.parts`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from testbed.bench import words
from testbed.report.figures import Axis, Cell, Figure, Item, Table, label, row_table, spread, style
from testbed.report.parts import Run, Section, device_words

if TYPE_CHECKING:
    from testbed.bench.rows import Row

_CPU_PLACES: Final = ("near", "far", "host_near", "host_far")


def messages(run: Run, domains: str) -> Section | None:
    """Messages one way; transactions, one at a time and many."""
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


def devices(run: Run, domains: str) -> Section | None:
    """Rows of device classes, by what was done."""
    rows = [row for row in run.rows(domains) if row.name in ("block", "net", "ping")]
    if not rows and domains != "vm-vm":
        return None
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((device_words(row), row.unit), []).append(row)
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


def cpu(run: Run, domains: str) -> Section | None:
    """Processor time of an operation, or of a GB."""
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


def machines(run: Run, domains: str) -> Section | None:
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


def _seconds(value: float | None) -> Cell:
    return Cell("") if value is None else Cell(f"{value:.3g}", value)
