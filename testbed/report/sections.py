"""Which sections a run has, place by place. Pure; depends on `testbed.bench` and the rest of `testbed.report`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from testbed.bench import words
from testbed.report.dots import cpu, devices, machines, messages
from testbed.report.glance import glance, tiles
from testbed.report.latency import latency
from testbed.report.parts import Place, Run, Section
from testbed.report.sizes import crossing, throughput

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ORDER: Final = ("vm-vm", "host-vm", "process", "vm")


def places(run: Run) -> list[Place]:
    """Those that have rows, VMs first."""
    present = {row.domains for row in run.result.results}
    makers: Sequence[Callable[[Run, str], Section | None]] = (
        glance, latency, throughput, crossing, messages, devices, cpu, machines)
    found = []
    for domains in [*(each for each in ORDER if each in present), *sorted(present - set(ORDER))]:
        sections = [section for maker in makers if (section := maker(run, domains)) is not None]
        found.append(Place(domains, words.PLACES.get(domains, domains), tiles(run.rows(domains)), sections))
    return found
