"""What commands of the measuring worker share: timing a loop, keeping its samples, ending in time.

Depends on idc._core, idc.ringbase and idc.errors.
"""

from __future__ import annotations

import time
from array import array
from typing import TYPE_CHECKING, Any

from idc._core import ffi, lib
from idc.errors import MisuseError, TimedOutError
from idc.ringbase import DEFAULT_SPIN, POLL_ONLY

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc.region import Region

Answer = dict[str, Any]

#: How long a side polls before it sleeps, by the name of the mode; seconds.
SPIN = {"poll": POLL_ONLY, "doorbell": 0.0, "adaptive": DEFAULT_SPIN}


class Timing:
    """Runs loops; `limit` seconds bound each."""

    def __init__(self, region: Region, limit: float) -> None:
        self._region = region
        self._limit = limit
        self._samples: array[int] = array("Q")

    def _deadline(self) -> int:
        return int(lib.idc_now_ns()) + int(self._limit * 1e9)

    def _check(self, result: int) -> int:
        if result == lib.IDC_TIMEOUT:
            raise TimedOutError(f"the loop took longer than {self._limit:g} s")
        if result < 0:
            raise MisuseError(ffi.string(lib.idc_result_text(result)).decode())
        return int(result)

    def _keep(self, samples: array[int]) -> None:
        self._samples = samples

    def _ping(self, loop: Callable[[Any, int], int], count: int, warm: int, *, in_one: bool = False) -> Answer:
        """Samples of a native loop, after `warm` that are thrown away: from a call of their own, or the same."""
        extra = warm if in_one else 0
        samples = array("Q", bytes(8 * (count + extra)))
        view = ffi.from_buffer("uint64_t[]", samples, require_writable=True)
        if warm and not in_one:
            unused = ffi.new("uint64_t[]", warm)
            self._check(loop(unused, warm))
        answer = self._timed(lambda: self._check(loop(view, count + extra)))
        ffi.release(view)
        self._keep(samples[extra:])
        return answer

    def _timed(self, run: Callable[[], object]) -> Answer:
        """Run it: "ns" by the clock, or by its own if it returns one, and "cpu", processor seconds of this process."""
        began, used = time.monotonic_ns(), processor_seconds()
        own = run()
        cpu, took = processor_seconds() - used, time.monotonic_ns() - began
        if isinstance(own, int) and own < 0:
            self._check(own)
        return {"ns": took, "cpu": cpu}


def processor_seconds() -> float:
    """Of this process so far."""
    return time.process_time()
