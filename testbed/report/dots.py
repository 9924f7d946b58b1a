"""Figures of a dot a row: messages, devices, processor time, starting. Pure; depends on `testbed.report.parts`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from testbed.bench import words
from testbed.report.figures import Axis, Cell, Figure, Item, Table, label, row_table, spread, style
from testbed.report.parts import Run, Section, cpu_cell, cpu_words, device_action, device_words, for_bytes

if TYPE_CHECKING:
    from testbed.bench.rows import Row

DEVICES: Final = ("block", "net", "ping")
_PEER_WORDS: Final = {
    "nbd-tcp": "NBD over TCP is what two VMs would use instead.",
    "nbd-local": "NBD within one VM has no way between its ends.",
    "virtio-blk": "virtio-blk is a disk of the host's, with no other VM behind it.",
    "virtio-net": "virtio-net has one queue and segmentation offload, a TAP for each VM, a bridge between.",
}
#: Where it was used, and by whom it was counted.
_CPU_PLACES: Final = {"near": "near end", "far": "far end", "host_near": "near QEMU or process",
                      "host_far": "far QEMU or process"}


def messages(run: Run, domains: str) -> Section | None:
    """Messages one way; transactions, one at a time and many."""
    rows, figures = run.rows(domains), []
    for slug, title, axis, lead, found in (
            ("rate", "Messages 64 B one way", Axis("messages a second", "log", "ops"),
             "Further right is faster. Line: from the worst round to the best.",
             [row for row in rows if row.name == "rate"]),
            ("transact", "One transaction of 64 B", Axis("", "log", "time"),
             "Further left is faster. Dot: median; line: to the 99th percentile. Framed: with its length before each.",
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
    rows = _device_rows(run, domains)
    if not rows and domains != "vm-vm":
        return None
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((device_words(row), row.unit), []).append(row)
    figures = []
    for place, ((what, unit), found) in enumerate(groups.items()):
        less = unit == "us"
        scale = 1e3 if less else 1.0
        items = [Item(label(row), style(row), row.figure * scale, low * scale, high * scale,
                      words.figure(row.figure, unit)) for row in found for low, high in [spread(row)]]
        figures.append(Figure(f"{domains}-device-{place}", "dots", what, run.stamp(domains),
                              Axis("", "log", "time") if less else Axis({"iops": "IO/s"}.get(unit, unit), "log",
                                                                        "plain"), row_table(found), items=items,
                              lead=f"Further {'left' if less else 'right'} is faster. Line: from the worst round to "
                                   "the best."))
    have = {row.name for row in rows}
    missing = [name for name in DEVICES if name not in have]
    names = " ".join(dict.fromkeys("net" if name == "ping" else name for name in missing))
    lead = " ".join(words_ for path, words_ in _PEER_WORDS.items() if path in {row.path for row in rows})
    return Section("devices", "Devices against their peers", lead, figures,
                   f"Not measured in this run: {', '.join(missing)}." if missing else "",
                   f"testbed bench {names}" if missing else "")


def cpu(run: Run, domains: str) -> Section | None:
    """Processor time of an operation, or of a GB."""
    rows = [row for row in run.rows(domains) if row.cpu_s]
    disks = [row for row in rows if row.name == "block"]
    figures = []
    for slug, title, found in (
            ("rtt", "Round trip, 64 B", [row for row in rows if (row.name, row.size) == ("rtt", 64)]),
            ("stream", "Stream, 64 KiB",
             [row for row in rows if (row.name, row.size) == ("stream", 65536) and row.mode != "copy"]),
            ("block", "Block, a request", [row for row in disks if not for_bytes(row)]),
            ("disk", "Block, a GB", [row for row in disks if for_bytes(row)]),
            ("net", "Net, a GB", [row for row in rows if row.name == "net"]),
            ("ping", "Ping", [row for row in rows if row.name == "ping"])):  # fmt: skip
        if not found:
            continue
        items = [Item(_cpu_label(row), style(row), (row.cpu_s or 0.0) * (1 if for_bytes(row) else 1e6), None, None,
                      cpu_words(row)) for row in found]
        table = Table(("way", "interface", "in all", *_CPU_PLACES.values()), [
            (Cell(_cpu_label(row)), Cell(row.api), cpu_cell(row, row.cpu_s),
             *(cpu_cell(row, row.cpu.get(place)) for place in _CPU_PLACES)) for row in found])  # fmt: skip
        axis = (Axis("CPU seconds for a GB", "log", "plain") if for_bytes(found[0])
                else Axis("CPU time for one operation", "log", "time"))
        figures.append(Figure(f"{domains}-cpu-{slug}", "dots", f"{title}: processor time", run.stamp(domains), axis,
                              table, items=items, lead="Further left is cheaper. Both ends together, with QEMU."))
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



def _device_rows(run: Run, domains: str) -> list[Row]:
    return [row for row in run.rows(domains) if row.name in DEVICES]


def _cpu_label(row: Row) -> str:
    if row.name in DEVICES:
        return f"{label(row)}, {device_action(row)}"
    return f"{label(row)}{'' if row.path == 'limit' else ', Python' if row.api == 'python' else ', core'}"
