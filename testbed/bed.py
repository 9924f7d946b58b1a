"""A testbed: one run, its VMs, and the regions between them, all ended together.

    with Testbed() as bed:
        front, back = bed.boot("front", "back")
        link = bed.link(front, back)
        transfer(front, "/tmp/data", back, "/tmp/copy", OverRegion(link.name))

Depends on everything else in `testbed` but the command line, on `host` and on `images`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import images
from host import broker as brokers
from host import control_region
from host import registry as registries
from host.region import DoorbellAttachment, Region, RegionService, RegionSpec
from host.revocation import Worth
from idc.layout import ChannelSpec, Kind, Rights
from idc.registry import VARIABLE as REGISTRY
from idc.remote.control import VARIABLE as CONTROL
from testbed import accel as accelerators
from testbed import faults
from testbed import network as networks
from testbed.clone import Clone
from testbed.errors import SpecError
from testbed.hints import BROKER_HINT
from testbed.kernel import resolve_files
from testbed.qemu_args import DEFAULT_QEMU, Memory, VmSpec
from testbed.run import Keep, Run
from testbed.template import Template, key_of, why_cold
from testbed.template_build import obtain
from testbed.unplug import settle, unplug_doorbell
from testbed.vm import BOOT_SECONDS, Vm, start_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from host.revocation import Revocation
    from testbed.accel import Verdict, Wish
    from testbed.devices import Devices
    from testbed.faults import DoorbellPlan

Boot = Literal["auto", "warm", "cold"]
"""How VMs start: cloned where a template can serve them, else booted and said so; cloned or refused; booted."""
GDB_SECONDS = 3600.0
"""How long a boot may take that starts in somebody's hands."""
MIB = 1 << 20
#: Bytes of a link: header page, the channels below, and a part of its own for each member.
LINK_BYTES = 16 * MIB


def link_channels(a: str, b: str) -> tuple[ChannelSpec, ...]:
    """The channels of a default link: notes and bulk for transfers, rtt for round trips."""
    return (
        ChannelSpec("notes", Kind.MESSAGE, a, b, 16 * 4096, 4096),
        ChannelSpec("bulk", Kind.BYTE, a, b, 2 * MIB),
        ChannelSpec("rtt", Kind.MESSAGE, a, b, 64 * 128, 128),
    )


def _quiet(_: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class BrokerSpec:
    """A broker and a registry, see docs/broker.md and docs/registry.md.

    Attributes:
        members: VMs and host processes that get a control link; None for every VM.
        patience: seconds that an owner has to answer.
        piece: bytes that are copied before the next domain has its turn.
    """

    members: tuple[str, ...] | None = None
    patience: float = 5.0
    piece: int = MIB

    @property
    def options(self) -> list[str]:
        """Of `python3 -m host.broker`."""
        return ["--patience", str(self.patience), "--piece", str(self.piece)]


class Testbed:
    """VMs and regions of one run. A context manager; leaving it ends everything.

    Args:
        accel: "auto", "kvm" or "tcg"; see `testbed.accel`.
        qemu: the QEMU binary.
        image: None for our own, built when it is not there yet.
        keep: whether the logs stay; see `testbed.run.Keep`.
        boot: how VMs start; see `Boot`.
        broker: start one, and a registry, and give each VM a control region when it is booted (or those that a
            BrokerSpec names), which leads to both; the guest's programs find the addresses in IDC_CONTROL and
            IDC_REGISTRY. Takes one of the VM's region ports.
        notify: told, a line at a time, of what takes long (building the image or a template), and of VMs that boot
            though others are cloned.

    Attributes:
        verdict: the accelerator, and why.
        image: kernel and root file system of VMs that bring none.
        run: directory and processes.
        networks: those of a topology, by name.
        regions: those that were made, by name.
    """

    __test__ = False  # pytest collects classes by their name

    def __init__(self, *, accel: Wish = "auto", qemu: str = DEFAULT_QEMU, image: images.Image | None = None,
                 keep: Keep = "failed", boot: Boot = "auto", broker: bool | BrokerSpec = False,
                 notify: Callable[[str], None] = _quiet) -> None:
        self.image = image or images.ensure(progress=notify)
        self.verdict: Verdict = accelerators.choose(accel, self.image.kernel, qemu=qemu)
        self.run = Run(keep=keep)
        self.vms: dict[str, Vm] = {}
        self.network: networks.Network | None = None
        self.networks: dict[str, networks.Network] = {}
        self.regions: dict[str, Region] = {}
        self._qemu = qemu
        self._service: RegionService | None = None
        self._boot = boot
        self._broker = (BrokerSpec() if broker is True else broker) or None
        self._notify = notify
        self._templates: dict[str, Template] = {}
        self._devices: Devices | None = None
        self._detours: dict[str, tuple[Region, dict[str, faults.Detour]]] = {}

    def spec(self, name: str, *, memory_mib: int = 256, **fields: Any) -> VmSpec:  # noqa: ANN401 - any field of VmSpec
        """A VM of this testbed's image, QEMU and accelerator; `fields` are those of `VmSpec`."""
        defaults: dict[str, Any] = {"accel": self.verdict.accel, "qemu": self._qemu, "memory": Memory(memory_mib)}
        return VmSpec.from_image(name, self.image, **(defaults | fields))

    def boot(self, *vms: str | VmSpec, network: bool | networks.Network = False) -> list[Vm]:
        """Boot or clone VMs, all at the same time, and wait until they are ready. A name stands for `spec(name)`.

        Args:
            vms: what to boot.
            network: give each an interface on one network of their own, or on this one, which has a member for each and
                which the caller closes; see `testbed.network`.

        Raises:
            VmError: one did not boot; none of them is left running then.
            SpecError: one names a file that cannot be read, or cannot be cloned, and that was asked for.
            TemplateError: a template could not be built.
        """
        # Files first: a template is known by the kernel's own file, not by the build tree that it was found in.
        specs = [resolve_files(self.spec(vm) if isinstance(vm, str) else vm) for vm in vms]
        with contextlib.ExitStack() as stack:
            if network:
                # QEMU has its own copies of the descriptors once it runs
                self.network = (network if isinstance(network, networks.Network) else
                                stack.enter_context(networks.make(len(specs))))
                specs = [dataclasses.replace(spec, nics=(*spec.nics, member.nic), ip=member.ip)
                         for spec, member in zip(specs, self.network.members, strict=True)]
            made = [self._vm(spec) for spec in specs]
            for vm in made:
                if vm.gdb is not None:
                    waits = "the guest waits for gdb" if vm.spec.gdb == "wait" else "gdb"
                    self._notify(f"VM {vm.name}: {waits}: target remote {vm.gdb}")
            slow = any(spec.gdb == "wait" for spec in specs)
            booted = start_all(made, GDB_SECONDS if slow else BOOT_SECONDS)
        self.vms.update((vm.name, vm) for vm in booted)
        for vm in booted:
            if self._broker is not None and (self._broker.members is None or vm.name in self._broker.members):
                self.control(vm.name)
        return booted

    def revive(self, name: str) -> Vm:
        """Boot a VM again that has ended, under its own name. Its regions are plugged in again and its drivers started,
        so that its devices come back.

        Raises as `boot`, and SpecError for a VM that runs, was never there, or had network cards.
        """
        old = self.vms.get(name)
        if old is None or old.alive:
            raise SpecError(f"VM {name!r} " + ("was never booted" if old is None else "runs"))
        if old.spec.nics:
            raise SpecError(f"VM {name} had network cards, which ended with it", hint="boot the testbed anew")
        old.close()
        vm = self.vms[name] = start_all([self._vm(old.spec)])[0]
        vm.agent.environment.update(old.agent.environment)
        for region in self.regions.values():
            if any(member.name == name for member in region.header.members):
                plug(vm, region)
        if self._devices is not None:
            self._devices.returned(name)
        return vm

    def mend(self) -> list[str]:
        """Start again what has died of the region service's daemons and of the drivers in VMs; what that was, in words.

        Raises ServerError, VmError if that fails; it can be called again.
        """
        mended = [] if self._service is None else self._service.mend()
        return mended + ([f"drivers of {name}" for name in self._devices.mend()] if self._devices is not None else [])

    def _vm(self, spec: VmSpec) -> Vm:
        """Not started yet."""
        if self._boot == "cold":
            return Vm(spec, self.run)
        if reason := why_cold(spec):
            if self._boot == "warm":
                raise SpecError(f"VM {spec.name} cannot be cloned: {reason}", hint='boot="auto" boots such a VM')
            self._notify(f"VM {spec.name} boots, for it cannot be cloned: {reason}")
            return Vm(spec, self.run)
        key = key_of(spec)
        if key not in self._templates or self._templates[key].misfit():
            if stale := self._templates.pop(key, None):
                stale.close()
            self._templates[key] = obtain(spec, notify=self._notify)
        return Clone(self._templates[key], spec, self.run)

    def region(self, spec: RegionSpec, *, plug_in: bool = True, doorbells: DoorbellPlan | None = None) -> Region:
        """Make a region and plug it into those members that are VMs of this testbed; the others join by themselves.

        Args:
            spec: see there.
            plug_in: false leaves that to `plug`.
            doorbells: faults of the doorbells between its members; see `testbed.faults`.

        Raises:
            SpecError: it is larger than what a member's root ports were given room for.
        """
        for member in spec.members:
            if member in self.vms:
                check_fits(self.vms[member], spec.name, spec.size)
        region = self._started().create(spec)
        if doorbells is not None:
            region, detours = faults.detour(region, doorbells)
            self._detours[region.name] = region, detours
        self.regions[region.name] = region
        for member in spec.members:
            if plug_in and member in self.vms:
                plug(self.vms[member], region)
        return region

    def control(self, domain: str) -> str:
        """Make the control region of a VM, and plug it, or of a host process. Returns its address, for IDC_CONTROL.

        Raises:
            SpecError: this testbed has no broker.
            RegionError: the domain has one already.
        """
        if self._broker is None:
            raise SpecError("this testbed has no broker", hint=BROKER_HINT)
        region = self._started().control(domain)
        self.regions[region.name] = region
        if domain in self.vms:
            plug(self.vms[domain], region)
            self.vms[domain].agent.environment.update(self.environment(domain))
        return self.environment(domain)[CONTROL]

    def environment(self, domain: str) -> dict[str, str]:
        """What the programs of a domain find broker and registry by. Raises SpecError if it has no control region."""
        region = self.regions.get(control_region.PREFIX + domain)
        if region is None:
            raise SpecError(f"{domain!r} has no control region", hint=f"control({domain!r}) makes it")
        place = f"ivshmem:{region.name}" if domain in self.vms else f"member:{region.socket(domain)}"
        return {CONTROL: f"{place}/{brokers.CHANNEL}", REGISTRY: f"{place}/{registries.CHANNEL}"}

    @property
    def registry_address(self) -> str:
        """Where a host process reaches the registry as the host, for `idc.registry.Registry(open_port(...))`.

        Raises SpecError: this testbed has none.
        """
        if self._broker is None:
            raise SpecError("this testbed has no registry", hint=BROKER_HINT)
        return f"unix:{self._started().registry_socket}"

    @property
    def devices(self) -> Devices:
        """Attaches and detaches devices."""
        # Late: it plugs by this module's functions.
        from testbed.devices import Devices

        if self._devices is None:
            self._devices = Devices(self)
        return self._devices

    def unplug(self, vm: Vm, region: Region, *, timeout: float = 30.0) -> None:
        """Take a region out of a VM. The other VMs that can ring it stand still meanwhile, for two seconds at most.

        Needs the guest's consent: raises QmpFailed when it does not let go in `timeout` seconds.
        """
        device, backend = f"iv-{region.name}", f"ivb-{region.name}"
        if not isinstance(region.attachment(vm.name), DoorbellAttachment):
            vm.unplug(device, timeout=timeout)
            vm.qmp("object-del", {"id": backend})
            return
        peers = [self.vms[member.name] for member in region.header.members if member.rights is Rights.RW
                 and member.name in self.vms and member.name != vm.name]
        unplug_doorbell(vm, device, [peer for peer in peers if plugged(peer, region)], timeout)
        vm.remove_chardev(backend)

    def drop(self, name: str) -> None:
        """Stop serving a region that is plugged into no VM any more. Raises ServerError."""
        self._started().drop(name)
        del self.regions[name]

    def revoke(self, region: str, member: str, *ways: Worth, live: Iterable[tuple[int, int]] | None = None,
               patience: float = 10.0) -> Revocation:
        """Take a region away from a member. The answer says what that is worth; see docs/isolation.md.

        Args:
            region: its name.
            member: who loses it, a VM; for Worth.ABANDONED a host process as well.
            ways: what is tried, in this order, until one holds: Worth.HARD, Worth.ABANDONED; by default these two.
            live: what is copied to the fresh region, see `RegionService.abandon`.
            patience: seconds that a guest has to let go of a device.

        After ABANDONED the remaining VMs have the fresh region plugged, under its own name, and the old one unplugged;
        who does not let go of that is among `holders`.

        Raises:
            SpecError: no such region; a way that is not the host's; no port for the fresh region in a remaining VM.
            RegionError: no such member; its cap of dead mappings is reached. Nothing has changed then.
            QmpFailed: the guest does not let go, and that was the only way asked for.
        """
        # Late: it plugs by this module's functions.
        from testbed import isolation

        return isolation.revoke(self, region, member, ways or (Worth.HARD, Worth.ABANDONED), live, patience)

    @property
    def broker_spec(self) -> BrokerSpec | None:
        """What was asked for as broker; None for none."""
        return self._broker

    def broker_status(self) -> dict[str, Any] | None:
        """What the broker says of itself: plain data; None without a broker. Raises ServerError if it is gone."""
        return None if self._broker is None or self._service is None else self._service.broker_status()

    def _started(self) -> RegionService:
        """The region service, with broker and registry if there are to be."""
        if self._service is None:
            service = RegionService(self.run.directory, self.run.env)
            service.start()
            self._service = service
            if self._broker is not None:
                service.start_broker(*self._broker.options)
                service.start_registry()
        return self._service

    def link(self, a: Vm, b: Vm, *, name: str = "", size: int = LINK_BYTES,
             doorbells: DoorbellPlan | None = None) -> Region:
        """A region for two VMs, both of which may write, with the channels of `link_channels`."""
        members = {a.name: Rights.RW, b.name: Rights.RW}
        spec = RegionSpec(name or f"{a.name}-{b.name}", size, members, link_channels(a.name, b.name))
        return self.region(spec, doorbells=doorbells)

    def doorbells(self, region: str) -> dict[tuple[str, str], faults.Counts]:
        """What happened so far to the doorbells of a region made with faults, by (member that rings, member rung)."""
        return faults.counts(*self._detours[region]) if region in self._detours else {}

    @property
    def service(self) -> RegionService | None:
        """The region service, once there is a region."""
        return self._service

    def close(self, *, failed: bool = False) -> None:
        """End all VMs, regions and processes. Idempotent."""
        try:
            for vm in self.vms.values():
                vm.close()
            for _, detours in self._detours.values():
                for detour in detours.values():
                    detour.close()
            if self._service is not None:
                self._service.close()
        finally:
            while self._templates:
                self._templates.popitem()[1].close()
            self.run.close(failed=failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close(failed=kind is not None and issubclass(kind, Exception))


def check_fits(vm: Vm, name: str, size: int) -> None:
    """Raise SpecError if the VM's root ports have no room for a region of `size` bytes.

    The guest's kernel shares out addresses at boot, so nothing can be done about it in a VM that runs.
    """
    room = vm.spec.region_port_mib * MIB
    if size > room:
        raise SpecError(f"region {name!r} of {size / MIB:g} MiB does not fit into VM {vm.name}: its ports have room "
                        f"for {vm.spec.region_port_mib} MiB", hint=f"give the VM region_port_mib={size // MIB}")


def plug(vm: Vm, region: Region) -> None:
    """Plug a region into the VM that is its member of the same name.

    Raises:
        RegionError: the VM is no member.
        SpecError: the region is larger than the VM's root ports allow.
        QmpFailed: QEMU refused; nothing of the attempt stays behind.
    """
    attachment = region.attachment(vm.name)
    check_fits(vm, region.name, attachment.size)
    device, backend = f"iv-{region.name}", f"ivb-{region.name}"
    if isinstance(attachment, DoorbellAttachment):
        with vm.ports.exclusive:
            for late in settle(vm):
                vm.remove_chardev(f"ivb-{late.removeprefix('iv-')}")
            vm.add_chardev(backend, attachment.socket)
            try:
                vm.plug({"driver": "ivshmem-doorbell", "id": device, "chardev": backend, "vectors": attachment.vectors})
            except BaseException:
                vm.remove_chardev(backend)
                raise
        return
    vm.qmp("object-add", {"qom-type": "memory-backend-file", "id": backend, "mem-path": str(attachment.memory),
                          "size": attachment.size, "share": True, "readonly": True})
    try:
        vm.plug({"driver": "ivshmem-plain", "id": device, "memdev": backend})
    except BaseException:
        vm.qmp("object-del", {"id": backend})
        raise


def plugged(vm: Vm, region: Region) -> bool:
    """Whether the region is in the VM now."""
    return f"iv-{region.name}" in vm.devices
