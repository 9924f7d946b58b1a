"""How long a boot took, and where. Pure; depends on nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BootTimes:
    """Seconds from the start of QEMU to: QMP answers; the first byte on the console (the kernel is quiet: the
    first thing said by firmware, kernel or init); READY. `guest` is the guest's own clock at READY: what is
    missing to `ready` went to QEMU and the firmware."""

    qmp: float
    console: float | None
    ready: float
    guest: float
