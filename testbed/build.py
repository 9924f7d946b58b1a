"""From a topology to a running testbed. May depend on everything in `testbed` but the command line.

    with open_testbed(load(Path("pair.toml"))) as bed:
        bed.vms["front"].succeed("true")
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import TYPE_CHECKING, Any

import images
from images import ImageError
from testbed import network as networks
from testbed.bed import BrokerSpec, Testbed
from testbed.kernel import find_kernel
from testbed.qemu_args import Disk, Memory, Nic, VmSpec
from testbed.topology import MIB, Machine, NetworkTable, Topology, TopologyError, resolve

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

#: Seconds that the drivers of a device at the start have to start and to meet.
DEVICE_SECONDS = 120.0


def _quiet(_: str) -> None:
    """Tell nobody."""


def open_testbed(topology: Topology, *, notify: Callable[[str], None] = _quiet) -> Testbed:
    """Check, boot and plug all of it; returns when every VM is ready. If anything fails, nothing is left running.

    Args:
        topology: need not be resolved.
        notify: told, a line at a time, of what takes long.

    Raises:
        SpecError: it makes no sense, or names files that are not there.
        ImageError: there is no image.
        NetworkError: one of its networks cannot be had here.
        VmError: a VM did not boot.
    """
    topology = resolve(topology)
    check_host(topology)
    table = topology.broker
    broker = False if table is None else BrokerSpec(table.members, table.patience, table.piece)
    bed = Testbed(accel=topology.accel, qemu=topology.qemu, keep=topology.keep, boot=topology.boot, broker=broker,
                  notify=notify)
    try:
        populate(bed, topology, notify=notify)
    except BaseException as error:
        bed.close(failed=isinstance(error, Exception))
        raise
    return bed


def check_host(topology: Topology) -> None:
    """What a topology needs of this machine and can be looked at before anything is started. Raises SpecError."""
    allowed = os.sched_getaffinity(0)
    for name, vm in topology.vms.items():
        where = f"[vms.{name}]"
        for key in ("initrd", "rootfs"):
            _check_file(f"{where} {key}", getattr(vm, key))
        if vm.kernel is not None:
            find_kernel(vm.kernel, f"{where} kernel:")
        for index, disk in enumerate(vm.disks):
            _check_file(f"{where} disks[{index}].path", disk.path, write=not disk.readonly)
        for cpu in vm.pin:
            if cpu not in allowed:
                raise TopologyError(f"{where} pin: this process may not run on CPU {cpu} (it may on "
                                    f"{', '.join(map(str, sorted(allowed)))})")
        if vm.image:
            try:
                images.show(vm.image)
            except ImageError as error:
                raise TopologyError(f"{where} image: {error}") from error


def _check_file(where: str, path: Path | None, *, write: bool = False) -> None:
    if path is None:
        return
    if not path.exists():
        raise TopologyError(f"{where}: there is no {path}")
    if not path.is_file() and not path.is_block_device():
        raise TopologyError(f"{where}: {path} is neither a file nor a block device")
    if not os.access(path, os.R_OK | (os.W_OK if write else 0)):
        raise TopologyError(f"{where}: no permission to {'write' if write else 'read'} {path}")


def populate(bed: Testbed, topology: Topology, *, notify: Callable[[str], None] = _quiet) -> None:
    """Boot the VMs of a resolved topology in `bed`, and make and plug its regions. Raises as `open_testbed` does."""
    specs = {name: vm_spec(bed, name, vm) for name, vm in topology.vms.items()}
    routed: list[tuple[str, networks.Member]] = []
    with contextlib.ExitStack() as stack:
        for subnet, (name, table) in enumerate(topology.networks.items()):
            network = _network(table, subnet)
            stack.callback(network.close)
            bed.networks[name] = network
            for vm, member in zip(table.members, network.members, strict=True):
                specs[vm] = _join(specs[vm], member)
                if table.kind == "user":
                    routed.append((vm, member))
        notify(f"booting {', '.join(specs)} ({bed.verdict})")
        bed.boot(*specs.values())
    for vm, member in routed:
        gateway, resolver = (f"{member.address.rpartition('.')[0]}.{last}" for last in (2, 3))
        bed.vms[vm].succeed(f"busybox ip route replace default via {gateway} && "
                            f"echo nameserver {resolver} > /etc/resolv.conf")
    for name in topology.processes:
        if topology.broker is not None and name in (topology.broker.members or ()):
            bed.control(name)
            variables = " ".join(f"{key}={value}" for key, value in bed.environment(name).items())
            notify(f"process {name}: {variables}")
    for name, region in topology.regions.items():
        bed.region(region.spec(name), plug_in=region.plug, doorbells=region.plan() or None)
    for name, device in topology.devices.items():
        # An end in a host process comes when that runs its drivers.
        here = {device.frontend, device.backend} <= bed.vms.keys()
        notify(f"attaching device {name}" + ("" if here else "; it is connected when drivers run in its host process"))
        bed.devices.attach(device.kind, device.frontend, device.backend, device.options, number=device.number,
                           wait=DEVICE_SECONDS if here else None)


def vm_spec(bed: Testbed, name: str, vm: Machine) -> VmSpec:
    """The specification of one VM of a resolved topology."""
    assert vm.region_ports is not None
    assert vm.region_port is not None
    fields: dict[str, Any] = {"cpus": vm.cpus, "cpu": vm.cpu, "pin": vm.pin, "kernel_args": vm.kernel_args,
                              "gdb": vm.gdb, "extra": vm.extra, "region_ports": vm.region_ports,
                              "region_port_mib": vm.region_port // MIB}
    if vm.hugepages:
        fields["memory"] = Memory(vm.memory // MIB, "memfd", share=True, hugepages=True)
    if vm.image:
        image = images.show(vm.image)
        fields |= {"kernel": image.kernel, "initrd": image.initrd, "rootfs": image.rootfs,
                   "boot_args": tuple(image.kernel_arguments)}
    own = {"kernel": vm.kernel, "initrd": vm.initrd, "rootfs": vm.rootfs}
    fields |= {key: path for key, path in own.items() if path is not None}
    fields["disks"] = tuple(Disk(disk.path, disk.format, disk.readonly) for disk in vm.disks)
    return bed.spec(name, memory_mib=vm.memory // MIB, **fields)


def _network(table: NetworkTable, subnet: int) -> networks.Network:
    if table.kind == "user":
        return networks.user(len(table.members), subnet)
    return networks.make(len(table.members), wish=table.kind, mtu=table.mtu or networks.TAP_MTU, subnet=subnet)


def _join(spec: VmSpec, member: networks.Member) -> VmSpec:
    """With one more NIC and its address."""
    nics: tuple[Nic, ...] = (*spec.nics, member.nic)
    if len(nics) == 1:
        return dataclasses.replace(spec, nics=nics, ip=member.ip)
    return dataclasses.replace(spec, nics=nics, kernel_args=(*spec.kernel_args, f"idc.ip={member.ip},{member.nic.mac}"))
