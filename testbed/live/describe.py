"""What a supervisor knows of its testbed for who looks on: processes, layouts of regions, presence. Plain data.

All of it is the host's own word: the layout of a region is the one that the host wrote, not what its header page says
by now. Runs in the supervisor. Depends on testbed.bed and host.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from host.errors import HostError
from testbed.bed import plugged

if TYPE_CHECKING:
    from host.region import Region
    from testbed.bed import Testbed


def describe(bed: Testbed) -> dict[str, Any]:
    """Everything but the devices, whose states are the registry's to tell."""
    service, trouble = bed.service, ""
    presence: dict[str, dict[str, tuple[int, bool]]] = {}
    if service is not None:
        try:
            presence = service.presence()
        except HostError as error:
            trouble = str(error)
    vms = []
    for name, vm in list(bed.vms.items()):
        alive = vm.alive
        vms.append({"name": name, "state": vm.state, "pid": vm.pid if alive else None, "cpus": vm.spec.cpus,
                    "memory_mib": vm.spec.memory.mib})
    return {"accel": bed.verdict.accel, "vms": vms, "trouble": trouble,
            "processes": {} if service is None else service.processes(),
            "devices": bed.broker_spec is not None,
            "regions": [_region(bed, region, presence.get(name)) for name, region in list(bed.regions.items())]}


def _region(bed: Testbed, region: Region, presence: dict[str, tuple[int, bool]] | None) -> dict[str, Any]:
    header, members = region.header, []
    for member in header.members:
        vm = bed.vms.get(member.name)
        incarnation, present = (presence or {}).get(member.name, (0, False))
        members.append({"name": member.name, "rights": member.rights.name.lower(), "present": present,
                        "incarnation": incarnation, "plugged": vm is not None and plugged(vm, region)})
    names = [member.name for member in header.members]
    channels = [{"name": entry.name, "kind": entry.kind.name.lower(), "a": names[entry.member_a],
                 "b": names[entry.member_b], "offset": entry.offset,
                 "capacity": entry.slots or entry.ring_bytes} for entry in header.channels]
    faults = [{"from": pair[0], "to": pair[1], **dataclasses.asdict(counts)}
              for pair, counts in bed.doorbells(header.name).items()]
    return {"name": header.name, "uuid": header.uuid.hex, "size": header.size, "known": presence is not None,
            "members": members, "channels": channels, "doorbell_faults": faults}
