"""Native round-trip loops between two ends in one process."""

from __future__ import annotations

from array import array
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import local_region

from idc.channel import MessageChannel
from idc.errors import IdcError
from idc.loops import echo, percentiles, ping


@pytest.mark.parametrize("spin", [0.0, -1.0])
def test_every_round_trip_is_counted(spin: float) -> None:
    with local_region() as local, local.join(0) as front, local.join(1) as back, ThreadPoolExecutor(2) as pool:
        ends = [pool.submit(MessageChannel.attach, end, "notes", timeout=10) for end in (front, back)]
        with ends[0].result() as near, ends[1].result() as far:
            echoing = pool.submit(echo, far, 200, spin=spin, limit=20)
            samples = ping(near, 64, 100, per=2, spin=spin, limit=20)
            echoing.result()
            assert len(samples) == 100
            assert all(sample > 0 for sample in samples)
            with pytest.raises(IdcError):
                ping(near, 64, 1, spin=spin, limit=0.05)  # nobody echoes any more


def test_percentiles_are_nearest_rank() -> None:
    found = percentiles(array("Q", range(1, 1001)))
    assert found == {"p50": 500, "p90": 900, "p99": 990, "p999": 999, "max": 1000}
    assert set(percentiles(array("Q", [7])).values()) == {7}
