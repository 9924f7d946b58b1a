"""Where it is measured: between two VMs, a VM and this machine, two processes of this machine.

Each place is a region with a worker at both ends, and the peers that can be had there; what cannot is said. Depends on
`testbed.bed`, `testbed.bench.ends` and below.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from host.region import RegionService
from testbed import network as networks
from testbed.bed import Testbed
from testbed.bench.ends import HostEnd, Pair, VmEnd, region_spec
from testbed.errors import NetworkError, VmError
from testbed.run import Run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.accel import Wish
    from testbed.progress import Steps
    from testbed.vm import Vm

Domains = Literal["process", "vm-vm", "host-vm"]
DOMAINS: Final[tuple[Domains, ...]] = ("process", "vm-vm", "host-vm")
VM_MIB = 512
LOOPBACK = "127.0.0.1"
TCP_PORT, HOST_TCP_PORT, VSOCK_PORT = 7003, 7005, 7004
#: This machine's on the VMs' network, as far as its worker is concerned: no VM has it.
HOST_ADDRESS = "10.77.0.254/24"
VHOST_VSOCK = Path("/dev/vhost-vsock")


@dataclass
class Place:
    """One pair of ends and what is there beside it.

    Attributes:
        pair: the ends.
        sockets: paths (as in `Row.path`) of the plain sockets that connect the workers.
        vms: the near and the far VM, where both are.
        address: of the far VM on the network of both.
        absent: what cannot be measured here, and why.
        run: of two processes, for peers that are processes too.
        bed: of two VMs, for regions of one's own.
        tcp: address where the far end can listen for the near end's TCP; empty where there is none.
    """

    pair: Pair
    sockets: list[str] = field(default_factory=list)
    vms: tuple[Vm, Vm] | None = None
    address: str = ""
    absent: list[str] = field(default_factory=list)
    run: Run | None = None
    bed: Testbed | None = None
    tcp: str = ""

    def tcp_address(self) -> str:
        """HOST:PORT that was free a moment ago on this machine; in a VM nobody else listens."""
        with socket.create_server((LOOPBACK, 0)) as free:
            return f"{self.tcp}:{free.getsockname()[1]}"

    def miss(self, what: str) -> None:
        """Note that something is absent; once."""
        if what not in self.absent:
            self.absent.append(what)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Each VM's CPU is shared with something that only burns it."""
        assert self.vms is not None
        with contextlib.ExitStack() as stack:
            for vm in self.vms:
                burner = vm.spawn("while :; do :; done")
                stack.callback(burner.kill)
            yield

    def connect(self, path: str, near: str, far: str) -> None:
        """Connect the workers by a socket: `near` is the address to connect to, `far` to listen on."""
        ends, family = self.pair, path
        ends.far.ask(do="listen", name=path, family=family, address=far)
        ends.run({"do": "connect", "name": path, "family": family, "address": near}, {"do": "accept", "name": path})
        self.sockets.append(path)


def cpus() -> list[int]:
    """Those that this process may use."""
    return sorted(os.sched_getaffinity(0))


def places_for_each() -> tuple[int | None, int | None]:
    """A CPU for each end; none of its own where there is only one."""
    allowed = cpus()
    return (allowed[0], allowed[1]) if len(allowed) > 1 else (None, None)


@contextlib.contextmanager
def processes() -> Iterator[Place]:
    """Two processes of this machine. No VM, no image."""
    near_cpu, far_cpu = places_for_each()
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(Run())
        service = RegionService(run.directory, run.env)
        service.start()
        stack.callback(service.close)
        region = service.create(region_spec("near", "far"))
        ends = [HostEnd(run, region, name, cpu=cpu) for name, cpu in (("near", near_cpu), ("far", far_cpu))]
        for end in ends:
            stack.callback(end.close)
        place = Place(Pair("process", *ends), run=run, tcp=LOOPBACK)
        address = str(run.path("peer"))
        place.connect("unix", address, address)
        yield place


@dataclass
class Machines:
    """Two VMs and the places that they make.

    Attributes:
        bed: what they belong to.
        places: those asked for.
    """

    bed: Testbed
    places: list[Place]


@contextlib.contextmanager
def machines(domains: set[Domains], steps: Steps, *, accel: Wish, qemu: str) -> Iterator[Machines]:
    """Boot two VMs. They are booted and not cloned: a clone's memory is copied page by page when it is first written,
    which would be in the measurements."""
    pins = places_for_each()
    with contextlib.ExitStack() as stack:
        bed = stack.enter_context(Testbed(accel=accel, qemu=qemu, boot="cold", notify=steps.say))
        steps.say(f"accelerator: {bed.verdict.accel} ({bed.verdict.reason})")
        names = ("front", "back") if "vm-vm" in domains else ("front",)
        specs = [bed.spec(name, memory_mib=VM_MIB, pin=() if pin is None else (pin,))
                 for name, pin in zip(names, pins, strict=False)]
        cid = _vsock_cid() if "host-vm" in domains else None
        if cid is not None:
            specs[0] = dataclasses.replace(specs[0], extra=("-device", f"vhost-vsock-pci,guest-cid={cid}"))
        network = stack.enter_context(networks.make(len(specs)))
        with steps.wait(f"booting {' and '.join(names)}"):
            bed.boot(*specs, network=network)
        found = Machines(bed, [])
        if "vm-vm" in domains:
            found.places.append(stack.enter_context(_between_vms(bed)))
        if "host-vm" in domains:
            found.places.append(stack.enter_context(_host_and_vm(bed, network, cid, pins[1])))
        yield found


@contextlib.contextmanager
def vm_pair(bed: Testbed, near: Vm, far: Vm) -> Iterator[Pair]:
    """Workers in two VMs, over a region of their own."""
    region = bed.region(region_spec(near.name, far.name))
    with contextlib.ExitStack() as stack:
        ends = [VmEnd(vm, region.name) for vm in (near, far)]
        for end in ends:
            stack.callback(end.close)
        yield Pair("vm-vm", *ends)


@contextlib.contextmanager
def _between_vms(bed: Testbed) -> Iterator[Place]:
    front, back = bed.vms["front"], bed.vms["back"]
    assert bed.network is not None
    with vm_pair(bed, front, back) as pair:
        address = bed.network.members[1].address
        place = Place(pair, vms=(front, back), address=address, bed=bed, tcp=address)
        where = f"{place.address}:{TCP_PORT}"
        place.connect("tcp", where, where)
        place.miss("vsock between VMs: vhost-vsock joins a VM and its host only")
        _miss_stronger(place, bed.network)
        yield place


@contextlib.contextmanager
def _host_and_vm(bed: Testbed, network: networks.Network, cid: int | None, cpu: int | None) -> Iterator[Place]:
    front = bed.vms["front"]
    region = bed.region(region_spec("host", "front"))
    with contextlib.ExitStack() as stack:
        inside, reason = None, ""
        try:
            inside = network.namespace()
            stack.callback(os.close, inside)
        except NetworkError as error:
            reason = error.message
        host = HostEnd(bed.run, region, "host", cpu=cpu, network=None if inside is None else (inside, HOST_ADDRESS))
        stack.callback(host.close)
        vm = VmEnd(front, region.name)
        stack.callback(vm.close)
        place = Place(Pair("host-vm", host, vm))
        place.miss("sockperf and iperf3 between host and VM: the image has them, this machine need not; the peers "
                   "there are plain sockets")
        if inside is not None:
            place.tcp = network.members[0].address
        if inside is None:
            place.miss(f"TCP between host and VM: {reason}")
        else:
            where = f"{network.members[0].address}:{HOST_TCP_PORT}"
            place.connect("tcp", where, where)
            _miss_stronger(place, network)
        if cid is None:
            place.miss(f"vsock between host and VM: {_vsock_absent()}")
        else:
            front.succeed("modprobe vmw_vsock_virtio_transport")
            place.connect("vsock", f"{cid}:{VSOCK_PORT}", f"{_VSOCK_ANY}:{VSOCK_PORT}")
        yield place


def _miss_stronger(place: Place, network: networks.Network) -> None:
    """Say what TCP would be faster with."""
    if network.kind != "tap":
        place.miss(f"TCP over TAPs, so what is called tcp goes through QEMU's sockets, which is weaker: "
                   f"{network.reason}")
    elif network.vhost != "on":
        place.miss(f"TCP with vhost-net: {network.vhost.removeprefix('off: ')}")


_VSOCK_ANY = 0xFFFFFFFF


def _vsock_cid() -> int | None:
    """A context id that is most likely free (QEMU refuses one in use); None where there is no vsock."""
    return None if _vsock_absent() else 3 + secrets.randbelow((1 << 31) - 3)


def _vsock_absent() -> str:
    """Why there is no vsock here; empty if there is."""
    if not VHOST_VSOCK.exists():
        return f"this machine has no {VHOST_VSOCK} (kernel module vhost_vsock)"
    return "" if os.access(VHOST_VSOCK, os.R_OK | os.W_OK) else f"{VHOST_VSOCK} may not be opened by this user"


def guest_mapping(vm: Vm) -> str:
    """How the guest's kernel maps its device's memory: the memory type it asked for, where it tells."""
    try:
        text = vm.succeed("mountpoint -q /sys/kernel/debug || mount -t debugfs none /sys/kernel/debug; "
                          "cat /sys/kernel/debug/x86/pat_memtype_list; "
                          "for d in /sys/bus/pci/devices/*; do grep -q 0x1110 $d/device && sed -n 3p $d/resource; done")
    except VmError as error:
        return f"unknown ({error.message.splitlines()[0]})"
    bars = [line.split()[0] for line in text.splitlines() if line.startswith("0x") and int(line.split()[1], 16)]
    for bar in bars:
        for line in text.splitlines():
            if line.startswith("PAT: ") and int(line.split("0x")[1].split("-")[0], 16) == int(bar, 16):
                return line.split("] ")[1]
    return "unknown"
