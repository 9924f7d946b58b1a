"""Takes a region away from a VM of a testbed, and says what that is worth: what `Testbed.revoke` does.

Depends on testbed.bed, host and idc.layout.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING

from host.control_region import domain_of
from host.errors import RegionError
from host.revocation import GONE, Revocation, Worth
from idc.layout import Rights
from testbed.bed import plug, plugged
from testbed.errors import QmpFailed, SpecError, TestbedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from host.region import Region
    from testbed.bed import Testbed


def revoke(bed: Testbed, name: str, member: str, ways: Sequence[Worth], live: Iterable[tuple[int, int]] | None,
           patience: float) -> Revocation:
    """See `Testbed.revoke`."""
    if name not in bed.regions:
        raise SpecError(f"no region {name!r} here", hint=f"there are: {', '.join(bed.regions) or 'none'}")
    if Worth.SOFT in ways or not ways:
        raise SpecError("the host revokes hard or abandons", hint="soft is the owner's: Registration.unregister")
    region = bed.regions[name]
    refusals: list[str] = []
    region.attachment(member)  # raises if there is no such member
    for n, way in enumerate(ways, 1):
        try:
            if way is Worth.HARD:
                _cut(bed, region, member, patience)
                return Revocation(name, member, Worth.HARD, refusals=tuple(refusals))
            return dataclasses.replace(_abandon(bed, region, member, live, patience), refusals=tuple(refusals))
        except (TestbedError, RegionError) as error:
            if n == len(ways):
                raise
            refusals.append(f"{way.value}: {error}")
    raise AssertionError("every way returns or raises")


def _cut(bed: Testbed, region: Region, member: str, patience: float) -> None:
    vm = bed.vms.get(member)
    if vm is None:
        raise SpecError(f"{member} is a host process: only its end takes region {region.name!r} from it")
    if vm.alive and plugged(vm, region):
        bed.unplug(vm, region, timeout=patience)


def _abandon(bed: Testbed, region: Region, member: str, live: Iterable[tuple[int, int]] | None,
             patience: float) -> Revocation:
    service = bed.service
    assert service is not None  # there is a region
    if bed.doorbells(region.name):
        raise SpecError(f"region {region.name!r} has faulty doorbells, which cannot be moved to a fresh region")
    others = {entry.name for entry in region.header.members} - {member}
    moving = [vm for vm in bed.vms.values() if vm.name in others and vm.alive and plugged(vm, region)]
    for vm in moving:
        if len(vm.devices) >= vm.spec.region_ports:
            raise SpecError(f"VM {vm.name} has no free port for the fresh region",
                            hint="raise region_ports in its spec")
    dead(bed)
    done = service.abandon(region, member, live=live)
    assert done.fresh is not None
    del bed.regions[region.name]
    bed.regions[done.fresh.name] = done.fresh
    left_out: dict[str, TestbedError] = {}
    for vm in moving:
        try:
            plug(vm, done.fresh)
        except TestbedError as error:  # the others move all the same
            left_out[vm.name] = error
    for vm in moving:
        # One that does not let go holds a dead mapping now, which is counted and told; the revocation stands.
        with contextlib.suppress(QmpFailed):
            bed.unplug(vm, region, timeout=patience)
    if left_out:
        first, why = next(iter(left_out.items()))
        raise SpecError(f"region {region.name!r} is taken from {member}, abandoned; but {', '.join(left_out)} could "
                        f"not be given {done.fresh.name!r} in its place: {why.message}",
                        hint=f"testbed plug {done.fresh.name} {first}, once that is mended")
    holders = sorted(name for name, names in dead(bed).items() if region.name in names)
    return dataclasses.replace(done, holders=tuple(holders))


def trusted_set(region: Region) -> bool:
    """Whether more than a pair writes to it, as on a bus: then each can do to any two of the others what it likes.

    A control region has three, of which two are the host's own.
    """
    writers = [member for member in region.header.members if member.rights is Rights.RW
               and not member.name.startswith(GONE)]
    return len(writers) > 2 and domain_of(region.header) is None


def dead(bed: Testbed) -> dict[str, tuple[str, ...]]:
    """Abandoned regions that each domain still maps, after those that were let go are taken off."""
    service = bed.service
    if service is None:
        return {}
    for domain, names in service.dead.items():
        vm = bed.vms.get(domain)
        for name in names:
            if vm is not None and not (vm.alive and f"iv-{name}" in vm.devices):
                service.released(name, domain)
    return service.dead
