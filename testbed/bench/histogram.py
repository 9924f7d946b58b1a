"""Histograms of nanoseconds: recorded, merged, kept and read back. Depends on hdrhistogram.

Three significant digits from 1 ns to an hour: a percentile is at most 0.1 % above what was measured.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from hdrh.histogram import HdrHistogram

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

LOWEST: Final = 1
HIGHEST: Final = 3_600_000_000_000
DIGITS: Final = 3
#: What `Histogram.encoded` holds: HdrHistogram's own V2 format, compressed, in base64; any of its libraries reads it.
ENCODING: Final = "hdrhistogram-v2"
_PARTS = (500, 900, 990, 999)  # of a thousand


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
        p50, p90, p99, p999, highest = self.at([*_PARTS, 1000], 1000)
        return Percentiles(p50, p90, p99, p999, highest)

    def at(self, parts: Sequence[int], whole: int) -> list[float]:
        """Values that so many parts of the whole of all samples do not exceed; `parts` ascend.

        Raises ValueError when nothing was recorded.
        """
        if not self.count:
            raise ValueError("no samples")
        # Nearest rank, by ourselves: the library rounds the rank, which for few samples is one too low.
        ranks = [-(-self.count * part // whole) for part in parts]
        highest = float(self._max or self._hdr.get_max_value())
        found: list[float] = []
        seen = 0
        # Not by the library's iterator, which takes some hundred times as long over the many that are empty.
        for index, count in enumerate(self._hdr.counts):
            if not count:
                continue
            seen += count
            value = self._hdr.get_highest_equivalent_value(self._hdr.get_value_from_index(index))
            while len(found) < len(ranks) and seen >= ranks[len(found)]:
                found.append(highest if seen >= self.count else min(float(value), highest))
            if len(found) == len(ranks):
                break
        return found

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
