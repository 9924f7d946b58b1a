"""A whole run: every name at every place, and what it found. Depends on the rest of `testbed.bench`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from testbed.bench import facts, groups, places
from testbed.bench.errors import PeerFailed
from testbed.bench.names import Bench, load
from testbed.bench.rows import Result
from testbed.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from testbed.bench.groups import Found, Group, Pace
    from testbed.bench.places import Domains, Place
    from testbed.bench.setting import Setting


@dataclass
class _Run:
    """What has been found so far."""

    setting: Setting
    pace: Pace
    host: dict[str, Any]
    found: list[Found] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    accel: str = "none"
    reason: str = "no VM took part"


def chosen(names: Sequence[str]) -> list[Bench]:
    """The names that are meant; none: all that run by default. Raises SpecError for one that there is not."""
    known = load()
    for name in names:
        if name not in known:
            raise SpecError(f"no benchmark is called {name!r} (there are: {', '.join(known)})")
    return [bench for bench in known.values() if (bench.name in names if names else bench.default)]


def run(setting: Setting) -> tuple[Result, list[Found]]:
    """Measure. The rows of the result are those found, which have their histograms too.

    Raises:
        SpecError: a name that there is not.
        BenchFailed: a measurement did not come out; everything that was started is ended.
        TestbedError: whatever else can happen to VMs.
    """
    benches = chosen(setting.names)
    pace = groups.IN_TURN if setting.baton.shared else groups.QUICK if setting.quick else groups.FULL
    began, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    state, meanwhile = _Run(setting, pace, facts.of_host()), facts.Meanwhile()
    placed = [bench for bench in benches if bench.groups is not None]
    # Apart from the VMs: an idle one still takes some of the processors that the processes are on.
    if placed and "process" in setting.domains:
        with places.processes() as place:
            _note_ends(state, place)
            _at(place, placed, state)
    virtual: set[Domains] = {domains for domains in setting.domains if domains != "process"}
    if placed and virtual:
        with places.machines(virtual, setting.steps, accel=setting.accel, qemu=setting.qemu) as found:
            state.accel, state.reason = found.bed.verdict.accel, found.bed.verdict.reason
            state.host |= facts.of_testbed(found.bed)
            for place in found.places:
                _note_ends(state, place)
                _at(place, placed, state)
    for bench in benches:
        if bench.alone is not None:
            alone = bench.alone(setting, pace)
            state.accel, state.reason = alone.verdict.accel, alone.verdict.reason
            state.host |= alone.facts
            state.found += alone.found
    state.host |= meanwhile.facts()
    result = Result(accel=state.accel, accel_reason=state.reason, host=state.host, quick=setting.quick, started=started,
                    results=tuple(each.row for each in state.found), absent=tuple(state.absent),
                    seconds=round(time.monotonic() - began, 1))  # fmt: skip
    return result, state.found


def _at(place: Place, benches: list[Bench], state: _Run) -> None:
    for bench in benches:
        assert bench.groups is not None
        for group in bench.groups(place, state.pace):
            with state.setting.steps.wait(f"{place.pair.domains}: {group.title}"):
                state.found += _measured(group, place, state)
    state.absent += place.absent


def _measured(group: Group, place: Place, state: _Run) -> list[Found]:
    """A group; what a peer's own failure leaves of it, which is measured from the beginning and said to be less."""
    while True:
        try:
            return groups.measure(group, state.pace, state.setting.baton)
        except PeerFailed as error:
            place.miss(error.message)
            group = without(group, error.subject)


def without(group: Group, subject: object) -> Group:
    """The same group, less one of its subjects or rivals."""
    rivals = [[each for each in ways if each is not subject] for ways in group.rivals]
    return replace(group, subjects=[each for each in group.subjects if each is not subject],
                   rivals=[ways for ways in rivals if ways])


def _note_ends(state: _Run, place: Place) -> None:
    """What both ends said of themselves."""
    near, far = place.pair.near.facts, place.pair.far.facts
    keep = ("kernel", "clock", "clock_ns", "mapping", "chosen", "routines", "cpu")
    ends = state.host.setdefault("ends", {})
    ends[place.pair.domains] = {"near": {key: near[key] for key in keep}, "far": {key: far[key] for key in keep}}
