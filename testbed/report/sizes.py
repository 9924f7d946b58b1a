"""Throughput by size with its limits; copy, map and hand-over by size. Pure; depends on `testbed.report.parts`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from testbed.report.figures import Axis, Figure, Series, label, row_table, style
from testbed.report.parts import Run, Section

if TYPE_CHECKING:
    from testbed.bench.rows import Row


def throughput(run: Run, domains: str) -> Section | None:
    """Streams by the size of one write."""
    figures = []
    for api, word in (("core", "core"), ("python", "Python")):
        rows = [row for row in run.rows(domains) if row.name == "stream" and (row.api == api or row.path == "limit")]
        if all(row.path == "limit" for row in rows):
            continue
        figures.append(Figure(f"{domains}-stream-{api}", "lines", f"Stream by size of one write, {word}",
                              run.stamp(domains), Axis("bytes of one write", "log2", "bytes"), row_table(rows),
                              Axis("", "log", "rate"), "Higher is faster. Dashed grey: the limit, and one end's own "
                              "copy for orientation.", _by_size(rows)))
    if not figures:
        return None
    return Section("throughput", "Throughput and its limits", "Every byte is copied in by the sender, and out by the "
                   "receiver. The bare pipeline is those two copies and nothing else.", figures)  # fmt: skip


def crossing(run: Run, domains: str) -> Section | None:
    """Ways to move pages by the size of a transfer."""
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


def _by_size(rows: list[Row]) -> list[Series]:
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault((label(row), style(row)), []).append((float(row.size), row.figure))
    return [Series(name, kind, sorted(points)) for (name, kind), points in lines.items()]


def _about(size: float) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"
