"""Rows, sizes and figures as people read them. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from testbed.bench.rows import Row

PLACES: Final = {"vm-vm": "between two VMs", "host-vm": "between this machine and a VM",
                 "process": "between two processes", "vm": "one VM"}
LIMITS: Final = {"poll": "bare cache line", "doorbell": "bare doorbell", "pipeline": "bare copy pipeline",
                 "copy": "local copy"}
#: Paths that are ours; others are limits, or peers that a user would pick instead.
OURS: Final = ("ivshmem", "idc-tcp")
_PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
_SHORT = {"msg/s": "msg/s", "txn/s": "txn/s", "B/s": "B/s", "iops": "IO/s"}


def is_peer(row: Row) -> bool:
    """Whether it is what a user would pick instead."""
    return row.path not in (*OURS, "limit", "ring", "nbd-local")


def title(row: Row, *, variant: bool = True) -> str:
    """Which way the row went: path, mode, interface; with the variant, if any."""
    if row.path == "limit":
        text = LIMITS.get(row.mode or "", "limit")
    elif row.path == "ring":
        text = "ring alone"
    else:
        words = [row.path, row.mode or "", "Python" if row.api == "python" else row.api, row.strategy or "",
                 "" if row.touched is None else "summed" if row.touched else "untouched",
                 f"{row.outstanding} at a time" if row.name == "trace" and row.outstanding else "",
                 f"{row.outstanding} in a call" if row.name == "rate" and row.outstanding and not row.variant else ""]
        text = " ".join(word for word in words if word)
    return text + (f" ({row.variant})" if row.variant and variant else "")


def size(count: int) -> str:
    """So many bytes."""
    for unit, shift in (("MiB", 20), ("KiB", 10)):
        if count >= 1 << shift and count % (1 << shift) == 0:
            return f"{count >> shift} {unit}"
    return f"{count} B"


def micros(value: float | None) -> str:
    """Nanoseconds as microseconds, without the unit."""
    found = (value or 0.0) / 1e3
    return f"{found:.2f}" if found < 100 else f"{found:.0f}"


def rate(value: float, unit: str) -> str:
    """Bytes or operations in a second."""
    if unit == "MB/s":
        value, unit = value * 1e6, "B/s"
    if unit == "B/s":
        return f"{value / 1e9:.2f} GB/s" if value >= 1e9 else f"{value / 1e6:.1f} MB/s"
    return f"{value / 1e6:.2f} M/s" if value >= 1e6 else f"{value / 1e3:.1f} k/s"


def figure(value: float, unit: str) -> str:
    """Any figure with its unit, three digits."""
    if unit == "us":
        value, unit = value * 1e3, "ns"
    if unit == "ns":
        for bound, word in ((1e9, "s"), (1e6, "ms"), (1e3, "us")):
            if value >= bound:
                return f"{digits(value / bound)} {word}"
        return f"{digits(value)} ns"
    if unit in _SHORT:
        for bound, prefix in _PREFIXES:
            if value >= bound:
                return f"{digits(value / bound)} {prefix}{_SHORT[unit]}"
        return f"{digits(value)} {_SHORT[unit]}"
    return f"{digits(value)} {unit}"


def digits(value: float) -> str:
    """Three that count, no exponent."""
    before = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, 2 - before)}f}"
