"""Distributions of round trips, and their slowest ones. Pure; depends on `testbed.report.parts`."""

from __future__ import annotations

import math
from typing import Final

from testbed.report.figures import Axis, Figure, Series, label, row_table, style
from testbed.report.parts import Run, Section

_TIME = Axis("", "log", "time")
#: Parts of ten thousand at which a distribution is drawn.
_WHOLE: Final = 10_000
_ECDF = [1, 10, 50, *range(100, 10_000, 100), 9950, 9990, 9999, 10_000]
_TAIL = [5000, 6000, 7000, 8000, 8500, 9000, 9200, 9400, 9600, 9800, 9900, 9920, 9940, 9960, 9980, 9990, 9993, 9996,
         9999]  # fmt: skip


def latency(run: Run, domains: str) -> Section | None:
    """Round trips in a closed loop, by a timetable, and on busy VMs."""
    figures: list[Figure] = []
    for name, api, title in (("rtt", "core", "Round trip, 64 B, core"), ("rtt", "python", "Round trip, 64 B, Python"),
                             ("rtt-open", "core", "By a timetable, 64 B"), ("rtt-busy", "core", "Both VMs busy, 64 B")):
        figures += _distribution(run, domains, name, api, 64, title)
    if not figures:
        return None
    return Section("latency", "Latency", "Times there and back. By a timetable, each is counted from when it was due: "
                   "a stall is as many slow ones as were due in it.", figures)  # fmt: skip


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
