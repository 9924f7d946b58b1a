"""A file from one VM of a running testbed to another: what `testbed transfer` does when both run already.

May depend on `testbed.bed` and `testbed.transfer`. The regions and networks that are there are used; a link is made
only where the two VMs share none. The file passes through the guests' memory, so it must fit there.
"""

from __future__ import annotations

import dataclasses
import shlex
import threading
from typing import TYPE_CHECKING

from idc.layout import Kind, Rights
from testbed.bed import MIB, Testbed, plugged
from testbed.errors import SpecError
from testbed.ship import check
from testbed.transfer import OverRegion, OverTcp, Transferred, transfer

if TYPE_CHECKING:
    from collections.abc import Callable

    from host.region import Region
    from testbed.ship import Job
    from testbed.transfer import Progress
    from testbed.vm import Vm

_ONE_AT_A_TIME = threading.Lock()
_ROOM = "awk '/MemAvailable/ {print $2 * 1024}' /proc/meminfo; df -B1 --output=avail /tmp | tail -n 1"


def ship(bed: Testbed, job: Job, *, say: Callable[[str], None], progress: Progress) -> Transferred:
    """Put the file into `job.source`, send it, verify it, and take it out of `job.target` if it is to be saved.

    Transfers of one testbed follow one another: they would share a channel. Raises SpecError, TransferFailed, VmError.
    """
    size = check(job)
    source, target = bed.vms[job.source], bed.vms[job.target]
    with _ONE_AT_A_TIME:
        for vm in (source, target) if job.path is None else (source,):
            _check_room(vm, size)
        over = _over_tcp(bed, source, target) if job.tcp else _over_region(bed, source, target, say)
        directory = source.succeed("mktemp -d /tmp/transfer.XXXXXX").strip()
        try:
            path = f"{directory}/{job.file.name}"
            source.copy_to(job.file, path, progress=lambda done, total: progress("source", "push", done, total))
            landed = job.path or "/tmp"
            if target.execute(["test", "-d", landed]).exit_code == 0:
                landed = f"{landed.rstrip('/')}/{job.file.name}"
            done = transfer(source, path, target, landed, over, progress=progress)
        finally:
            if source.alive:
                source.execute(f"rm -rf {shlex.quote(directory)}")
        if job.save is not None:
            target.copy_from(landed, job.save, progress=lambda at, total: progress("target", "save", at, total))
    return dataclasses.replace(done, name=job.file.name)


def _check_room(vm: Vm, size: int) -> None:
    room = min(int(line) for line in vm.succeed(_ROOM).split())
    if size > room - 16 * MIB:
        raise SpecError(f"{size >> 20} MiB do not fit into the memory of VM {vm.name} ({room >> 20} MiB free)",
                        hint="give it more memory, or name VMs that do not run: those are booted with disks for it")


def _over_tcp(bed: Testbed, source: Vm, target: Vm) -> OverTcp:
    ours, theirs = ({nic.mac for nic in vm.spec.nics} for vm in (source, target))
    for network in bed.networks.values():
        addresses = {member.nic.mac: member.address for member in network.members}
        shared = [mac for mac in theirs if mac in addresses]
        if network.kind != "user" and shared and ours & addresses.keys():
            return OverTcp(addresses[shared[0]])
    raise SpecError(f"{source.name} and {target.name} share no network",
                    hint="write a [networks] table, or leave out --tcp")


def _over_region(bed: Testbed, source: Vm, target: Vm, say: Callable[[str], None]) -> OverRegion:
    for region in bed.regions.values():
        if _fits(region, source, target) and plugged(source, region) and plugged(target, region):
            return OverRegion(region.name)
    name = f"{source.name}-{target.name}-transfer"[:40]
    say(f"{source.name} and {target.name} share no plugged region with channels for a transfer: adding link {name}")
    return OverRegion(bed.link(source, target, name=name).name)


def _fits(region: Region, source: Vm, target: Vm) -> bool:
    """Whether both may write, and the channels that `guest.transfer` uses are between them."""
    header = region.header
    ids = {member.name: member.id for member in header.members if member.rights is Rights.RW}
    wanted = {ids.get(source.name), ids.get(target.name)}
    channels = {(channel.name, channel.kind) for channel in header.channels
                if {channel.member_a, channel.member_b} == wanted}
    return {("notes", Kind.MESSAGE), ("bulk", Kind.BYTE)} <= channels
