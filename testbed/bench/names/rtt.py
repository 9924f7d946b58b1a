"""Round trips: polled, by doorbell, adaptive; beside the bare cache line, the bare doorbell, and the peers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from testbed.bench.groups import Group
from testbed.bench.iceoryx import iceoryx
from testbed.bench.names import Bench
from testbed.bench.peers import Sockperf
from testbed.bench.subjects import RARE_NS, OpenLoop, bare_bell, bare_line, round_trip, socket_round_trip

if TYPE_CHECKING:
    from testbed.bench.groups import Pace
    from testbed.bench.places import Place
    from testbed.bench.subjects import Subject

SIZES = (64, 4096)
MODES = ("poll", "doorbell", "adaptive")


def groups(place: Place, pace: Pace) -> list[Group]:
    """One for each size, in which all modes and peers take turns; then by timetable, as many as half of what goes and
    then rare ones, of which all get the same; then with busy VMs, as fast as it goes and rare ones."""
    pair = place.pair
    found = [Group(f"round trips of {size} bytes", pair, _closed(place, size, pace), rivals=_tools(place, size, pace))
             for size in SIZES]
    found.append(Group("round trips by a timetable", pair, [OpenLoop(pair, mode, 64) for mode in MODES]))
    found.append(Group("rare round trips", pair, [*_rare(place, "rtt-rare"),
                       *(OpenLoop(pair, None, 64, name="rtt-rare", path=path, interval=RARE_NS)
                         for path in place.sockets)]))
    if place.vms:
        busy = "rtt-busy"
        subjects: list[Subject] = [*bare_line(pair, 64, name=busy), bare_bell(pair, 64, name=busy),
                                   *(round_trip(pair, mode, "core", 64, name=busy) for mode in MODES)]
        found.append(Group("round trips with both VMs busy", pair, subjects, during=place.busy))
        found.append(Group("rare round trips with both VMs busy", pair, _rare(place, "rtt-busy-rare"),
                           during=place.busy))
    return found


def _rare(place: Place, name: str) -> list[Subject]:
    return [OpenLoop(place.pair, mode, 64, name=name, interval=RARE_NS) for mode in MODES]


def _closed(place: Place, size: int, pace: Pace) -> list[Subject]:
    pair = place.pair
    subjects: list[Subject] = [bare_bell(pair, size), *bare_line(pair, size)]
    subjects += [round_trip(pair, mode, api, size) for api in ("core", "python") for mode in MODES]
    for path in place.sockets:
        subjects += [socket_round_trip(pair, path, api, size, polls=polls) for api in ("core", "python")
                     for polls in (False, True)]
    return subjects if pace.quick and size != SIZES[0] else [*subjects, *iceoryx(place, "rtt", size)]


def _tools(place: Place, size: int, pace: Pace) -> list[list[Subject]]:
    if place.vms is None or (pace.quick and size != SIZES[0]):
        return []
    near, far = place.vms
    ways: list[tuple[str, ...]] = [()] if pace.quick else [(), ("--nonblocked",)]
    return [[Sockperf(near, far, place.address, size, *options) for options in ways]]


BENCH = Bench("rtt", "round trips of messages", groups=groups, order=10)
