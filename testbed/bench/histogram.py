"""Histograms of nanoseconds: recorded, merged, kept and read back. Depends on hdrhistogram.

Three significant digits from 1 ns to an hour: a percentile is at most 0.1 % above what was measured.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from hdrh.histogram import HdrHistogram

if TYPE_CHECKING:
    from collections.abc import Iterable

LOWEST: Final = 1
HIGHEST: Final = 3_600_000_000_000
DIGITS: Final = 3
#: What `Histogram.encoded` holds: HdrHistogram's own V2 format, compressed, in base64; any of its libraries reads it.
ENCODING: Final = "hdrhistogram-v2"
_PARTS = {"p50": 500, "p90": 900, "p99": 990, "p999": 999}  # of a thousand


@dataclass(frozen=True)
class Percentiles:
    """Of all samples, in ns: the least value that so many of them do not exceed."""

    p50: float
    p90: float
    p99: float
    p999: float
    max: float


class Histogram:
    """Samples in ns; more can be added at any time."""

    def __init__(self) -> None:
        self._hdr = HdrHistogram(LOWEST, HIGHEST, DIGITS)
        # HdrHistogram rounds its maximum to its precision too; the largest sample is worth its last digit.
        self._max = 0

    @property
    def count(self) -> int:
        """Samples recorded."""
        return int(self._hdr.get_total_count())

    def record(self, samples: Iterable[int]) -> None:
        """Add samples. Raises ValueError for one that is longer than an hour."""
        for value, times in Counter(samples).items():
            if not self._hdr.record_value(max(value, LOWEST), times):
                raise ValueError(f"a sample of {value} ns is beyond this histogram's {HIGHEST} ns")
            self._max = max(self._max, value)

    def add(self, other: Histogram) -> None:
        """Add all samples of another one."""
        self._hdr.add(other._hdr)
        self._max = max(self._max, other._max)

    def percentiles(self) -> Percentiles:
        """Raises ValueError when nothing was recorded."""
        if not self.count:
            raise ValueError("no samples")
        # Nearest rank, by ourselves: the library rounds the rank, which for few samples is one too low.
        ranks = [(name, -(-self.count * parts // 1000)) for name, parts in _PARTS.items()]
        highest = float(self._max or self._hdr.get_max_value())
        at: dict[str, float] = {}
        seen = 0
        for item in self._hdr.get_recorded_iterator():
            seen += item.count_added_in_this_iter_step
            while ranks and seen >= ranks[0][1]:
                at[ranks.pop(0)[0]] = min(float(item.value_iterated_to), highest)
        return Percentiles(**at, max=highest)

    def encoded(self) -> bytes:
        """For keeping; see ENCODING."""
        return bytes(self._hdr.encode())

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """What `encoded` gave. Raises ValueError when it is no histogram."""
        histogram = cls()
        try:
            histogram._hdr.decode_and_add(data)
        except Exception as error:  # the library raises whatever zlib, base64 and ctypes raise
            raise ValueError(f"not a histogram: {error}") from error
        return histogram
