"""What tracing costs a transaction of the endpoints, in Python and in the core: off against a build without the hook,
and on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from testbed.bench.groups import Group
from testbed.bench.names import Bench
from testbed.bench.scenes import Machines, Processes, Stage
from testbed.bench.tracing import WORKS, Measurement, subjects

if TYPE_CHECKING:
    from testbed.bench.groups import Pace
    from testbed.bench.places import Place


def groups(place: Place, pace: Pace) -> list[Group]:
    """Round trips in Python; of the core one at a time, and many."""
    stage: Stage
    if place.run is not None:
        stage = Processes(place.run)
    elif place.bed is not None and place.vms is not None:
        stage = Machines(place.bed, (place.vms[0].name, place.vms[1].name))
    else:
        place.miss(f"tracing's cost ({place.pair.domains}): measured between processes and between VMs only")
        return []
    return [Group(f"{work.api} transactions, {work.outstanding} under way, with tracing off and on", place.pair,
                  [*subjects(Measurement(stage, 0.6 if pace.quick else 5.0, work))]) for work in WORKS]


BENCH = Bench("trace", "what tracing costs", groups=groups, default=False, order=60)
