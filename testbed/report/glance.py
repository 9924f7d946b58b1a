"""What a reader asks first: how fast, against what. Pure; depends on `testbed.report.parts`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from testbed.bench import words
from testbed.report.figures import Axis, Cell, Figure, Item, Table, label, number, style
from testbed.report.parts import Run, Section, Tile, device_words, faster, peer, times

if TYPE_CHECKING:
    from testbed.bench.rows import Row

#: What a ratio is against, in a sentence.
_INSTEAD: Final = {
    "tcp": "TCP: virtio-net, and of several programs, asleep or polled, the fastest.",
    "unix": "Unix: a stream socket, asleep or polled, whichever is faster.",
    "iceoryx2": "iceoryx2: its own Python package, polled.",
    "virtio-net": "virtio-net: one queue, segmentation offload.",
    "virtio-blk": "virtio-blk: a disk of the host's, in memory; no other VM takes part.",
}


def tiles(rows: list[Row]) -> list[Tile]:
    """Four at most."""
    found: list[Tile] = []
    for what, row in _wanted(rows):
        if what.endswith(("adaptive", "Python")) or len(found) == 4:
            continue
        other = peer(rows, row)
        against = "no peer was measured" if other is None else _against(row, other)
        found.append(Tile(what, words.figure(row.figure, row.unit), against))
    return found


def glance(run: Run, domains: str) -> Section | None:
    """How many times as fast as what a user would pick instead."""
    rows = run.rows(domains)
    items: list[Item] = []
    lines: list[tuple[Cell, ...]] = []
    others: dict[str, None] = {}
    for what, row in _wanted(rows):
        if (other := peer(rows, row)) is None:
            continue
        others.setdefault(other.path)
        ratio, *rounds = faster(row, other)
        items.append(Item(f"{what} / {label(other)}", style(row), ratio, min(rounds, default=None),
                          max(rounds, default=None), times(ratio)))
        lines.append((Cell(what), number(row.figure, row.unit), Cell(label(other)), number(other.figure, other.unit),
                      Cell(times(ratio), ratio)))
    if not items:
        return None
    table = Table(("what", "IDC", "instead", "that one", "times as fast"), lines)
    figure = Figure(f"{domains}-glance", "dots", "Times as fast as what you would use instead", run.stamp(domains),
                    Axis("times as fast; right of the line is faster", "log", "times"), table, items=items,
                    rules=[(1.0, "as fast")], lead="Dot: median of the rounds. Line: from the worst round to the best.")
    said = [_INSTEAD[path] for path in others if path in _INSTEAD]
    if domains != "process" and "network" in run.result.host:
        said = [text.replace("virtio-net", f"virtio-net, {run.result.host['network']}", 1) for text in said]
    return Section("glance", "How fast, against what", " ".join(said), [figure])


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
    return found + [(device_words(row), row) for row in rows
                    if row.name in ("block", "net", "ping") and row.path == "ivshmem"]


def _pick(rows: list[Row], name: str, path: str, mode: str | None = None, api: str = "core",
          size: int | None = None) -> Row | None:  # fmt: skip
    for row in rows:
        if (row.name, row.path, row.api) == (name, path, api) and mode in (None, row.mode) and size in (None, row.size):
            return row
    return None


def _against(row: Row, peer: Row) -> str:
    ratio, name = faster(row, peer)[0], f"{label(peer)} ({words.figure(peer.figure, peer.unit)})"
    return f"{times(ratio)} as fast as {name}" if ratio >= 1 else f"{times(1 / ratio)} slower than {name}"
