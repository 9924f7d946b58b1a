"""Streams: copied in by the sender, copied out by the receiver, every byte; beside a bare copy pipeline and peers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from testbed.bench.groups import Group
from testbed.bench.iceoryx import iceoryx
from testbed.bench.names import Bench
from testbed.bench.peers import Iperf
from testbed.bench.subjects import copies, pipelines, socket_stream, stream

if TYPE_CHECKING:
    from testbed.bench.groups import Pace
    from testbed.bench.places import Place
    from testbed.bench.subjects import Subject

SIZES = (64, 1024, 4096, 16 << 10, 64 << 10, 256 << 10, 1 << 20)
#: What the bars are about, and what the quick run has the slow peers for.
MAIN = 64 << 10
MODES = ("poll", "adaptive")


def groups(place: Place, pace: Pace) -> list[Group]:
    """One for each size. A turn begins with the limit, and the core's stream, judged by it, comes next."""
    return [Group(f"streams in pieces of {size} bytes", place.pair, _subjects(place, size, pace),
                  rivals=_tools(place, size, pace), scout=[copies(place.pair, size), pipelines(place.pair, size)])
            for size in SIZES]


def _subjects(place: Place, size: int, pace: Pace) -> list[Subject]:
    pair = place.pair
    modes = ("poll",) if pace.quick and size != MAIN else MODES
    subjects: list[Subject] = [stream(pair, mode, api, size) for api in ("core", "python") for mode in modes]
    subjects += [socket_stream(pair, path, api, size) for path in place.sockets for api in ("core", "python")]
    # Two new processes for each take: for a few sizes only.
    if size == MAIN or (size in (4096, 1 << 20) and not pace.quick):
        subjects += iceoryx(place, "stream", size)
    return subjects


def _tools(place: Place, size: int, pace: Pace) -> list[list[Subject]]:
    if place.vms is None or (pace.quick and size != MAIN):
        return []
    near, far = place.vms
    return [[Iperf(near, far, place.address, size, *options) for options in ((), ("--zerocopy",))]]


BENCH = Bench("stream", "bytes one way", groups=groups, order=30)
