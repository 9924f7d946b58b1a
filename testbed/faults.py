"""Faults to order, replayed by their seed: lost and late doorbells, a side stopped at a point. See docs/faults.md.

    link = bed.link(front, back, doorbells=Doorbells(drop=0.2, delay=(0.0, 0.01), seed=7))
    bed.doorbells(link.name)["front", "back"].dropped
    with back.starve(0.25, seed=7): ...
    front.spawn("python3 -m guest.transfer send FILE --region link", env=Fault(Point.PUBLISHED, 3, Action.KILL).env)

A VM's own faults are its methods: crash, pause, resume, starve. Depends on host.ivshmem.detour, host.region,
idc.layout and idc.faults.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from host.errors import RegionError
from host.ivshmem.detour import Counts, Detour, Doorbells
from idc.faults import Action, Fault, Point
from idc.layout import Rights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from host.region import Region

    #: For all doorbells of a region, or by (member that rings, member rung).
    DoorbellPlan = Doorbells | Mapping[tuple[str, str], Doorbells]

__all__ = ["Action", "Counts", "Detour", "Doorbells", "Fault", "Point", "counts", "detour"]


def detour(region: Region, plan: DoorbellPlan) -> tuple[Region, dict[str, Detour]]:
    """The region as those members see it whose doorbells have faults, and the detours, by member, for the caller to
    close.

    Raises RegionError: the plan names a member that cannot ring or be rung.
    """
    writers = {member.name: member.id for member in region.header.members if member.rights is Rights.RW}
    if isinstance(plan, Doorbells):
        plan = {(a, b): plan for a in writers for b in writers if a != b}
    for pair in plan:
        if pair[0] == pair[1] or not set(pair) <= set(writers):
            raise RegionError(f"doorbells of region {region.name!r}: {pair[0]!r} cannot ring {pair[1]!r} "
                              f"(rw members: {', '.join(writers)})")
    made: dict[str, Detour] = {}
    try:
        for sender in dict.fromkeys(a for a, _ in plan):
            socket = region.socket(sender)
            faults = {writers[b]: plan[a, b] for a, b in plan if a == sender}
            made[sender] = Detour(socket, socket.with_name(f"{socket.stem}.bells.sock"), faults)
    except BaseException:
        for one in made.values():
            one.close()
        raise
    sockets = {**region.sockets, **{sender: one.path for sender, one in made.items()}}
    return dataclasses.replace(region, sockets=sockets), made


def counts(region: Region, detours: Mapping[str, Detour]) -> dict[tuple[str, str], Counts]:
    """What happened so far, by (member that rings, member rung)."""
    names = {member.id: member.name for member in region.header.members}
    return {(sender, names[to]): one.total(to) for sender, one in detours.items() for to in one.receivers}
