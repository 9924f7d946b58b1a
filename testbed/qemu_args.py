"""What a VM is made of, and the QEMU arguments that say so. Pure: no I/O; depends on `testbed.errors` and a name of
`idc.framing`.

`qemu_args` turns a `VmSpec` and the `Wiring` (where the host's ends of its sockets are) into a `list[str]`.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from idc.framing import PORT_NAME
from testbed.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from images import Image

Accel = Literal["kvm", "tcg"]
DEFAULT_QEMU = "qemu-system-x86_64"
ROOT_PORTS = 28
"""Root ports that q35's bus has room for beside our own devices."""
BOOT_ARGS = ("console=ttyS0", "quiet", "panic=-1", "intel_iommu=on", "iommu=pt")
"""What our guests need on the kernel's command line; an image may know better (`Image.kernel_arguments`).

Without panic=-1 a panicked guest sits there for ever; with it, it resets, and -no-reboot ends QEMU. iommu=pt: only
devices given to user space (VFIO) pay for translation.
"""
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")


def check_name(name: str) -> None:
    """Raise SpecError if a VM cannot have this name, which becomes a host name and part of file names."""
    if not _NAME.fullmatch(name):
        raise SpecError(
            f"{name!r} cannot be the name of a VM",
            hint='use lower-case letters, digits and "-", 32 characters at most',
        )


@dataclass(frozen=True)
class Nic:
    """One network interface: `netdev` is QEMU's -netdev text without its id, such as "tap,fd=9".

    `mac` must be unique on its network. `mtu` in bytes is offered to the guest, which takes it; 0 offers
    none. `fds` are the descriptors that `netdev` names, for QEMU to inherit.
    """

    netdev: str
    mac: str
    mtu: int = 0
    fds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Disk:
    """One more virtio-blk disk, after the root file system: the guest's /dev/vdb and on."""

    path: Path
    format: Literal["raw", "qcow2"] = "raw"
    readonly: bool = False


@dataclass(frozen=True)
class Memory:
    """The guest's RAM. "anonymous" is private to QEMU; "memfd" and "file" (at `path`) can be shared and snapshotted.

    `hugepages` takes it from the host's reserved huge pages; "memfd" only.
    """

    mib: int = 256
    backend: Literal["anonymous", "memfd", "file"] = "anonymous"
    path: Path | None = None
    share: bool = False
    hugepages: bool = False


@dataclass(frozen=True)
class VmSpec:
    """One VM. The defaults boot our own image on one CPU.

    `name` becomes host name and file names: lower-case letters, digits, "-". `kernel`, `initrd` and `rootfs`
    come from `images.ensure()`; the root file system is the first disk, read-only, shared with every other
    VM. `accel` is what `testbed.accel` proved. `region_ports` root ports wait for shared-memory devices,
    because nothing can be plugged into q35's own bus; each can take a region of `region_port_mib` at most, a
    power of two. `hot_ports` more wait for network cards that come later, as they do in a clone. Virtual CPU i runs
    on host CPU `pin[i % len(pin)]` alone. `ip` is an address with prefix for the first NIC. `kernel_args` are
    appended, `extra` goes to QEMU as it is. `kernel` may be a build tree. `gdb` "on" gives gdb a socket, `Vm.gdb`;
    with "wait", too, and the guest does not start before gdb lets it.
    """

    name: str
    kernel: Path
    initrd: Path | None = None
    rootfs: Path | None = None
    accel: Accel = "tcg"
    cpu: str = ""
    cpus: int = 1
    pin: tuple[int, ...] = ()
    memory: Memory = field(default_factory=Memory)
    region_ports: int = 4
    region_port_mib: int = 256
    hot_ports: int = 0
    nics: tuple[Nic, ...] = ()
    disks: tuple[Disk, ...] = ()
    ip: str = ""
    boot_args: tuple[str, ...] = BOOT_ARGS
    kernel_args: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    gdb: Literal["off", "on", "wait"] = "off"
    qemu: str = DEFAULT_QEMU
    tb_mib: int = 128

    @classmethod
    def from_image(cls, name: str, image: Image, **fields: Any) -> VmSpec:  # noqa: ANN401 - any field, by its name
        """A VM that boots `image`, with any other fields as given."""
        paths = {"kernel": image.kernel, "initrd": image.initrd, "rootfs": image.rootfs}
        return cls(name, **{**paths, "boot_args": tuple(image.kernel_arguments), **fields})

    def __post_init__(self) -> None:
        check_name(self.name)
        for what, value, least in (
            ("cpus", self.cpus, 1),
            ("memory", self.memory.mib, 64),
            ("region_ports", self.region_ports, 0),
            ("hot_ports", self.hot_ports, 0),
            ("tb_mib", self.tb_mib, 1),
        ):
            if value < least:
                raise SpecError(f"VM {self.name}: {what} is {value}, the least is {least}")
        if self.region_ports + self.hot_ports > ROOT_PORTS:
            ports = f"{self.region_ports} region ports" + (f", {self.hot_ports} hot ports" if self.hot_ports else "")
            raise SpecError(f"VM {self.name}: {ports}; q35's bus has room for {ROOT_PORTS}")
        if self.region_port_mib < 1 or self.region_port_mib & (self.region_port_mib - 1):
            raise SpecError(f"VM {self.name}: region_port_mib is {self.region_port_mib}; it must be a power of two")
        if (self.memory.backend == "file") != (self.memory.path is not None):
            raise SpecError(f"VM {self.name}: memory backend {self.memory.backend!r} with path {self.memory.path}")
        if self.memory.hugepages and self.memory.backend != "memfd":
            raise SpecError(f"VM {self.name}: huge pages need memory backend 'memfd', not {self.memory.backend!r}")
        if any(char in word for word in self.kernel_args for char in " \n"):
            raise SpecError(f"VM {self.name}: a kernel argument holds a blank: {self.kernel_args}")

    @property
    def cpu_model(self) -> str:
        """QEMU's -cpu: `cpu` if given, else the host's under KVM and what TCG does best under TCG.

        Without erms and fsrm the guest's kernel copies with `rep movsq` in place of `rep movsb`, which TCG runs a byte
        at a time: reading a cached file is three times faster (dd, 256 KiB blocks: 1.5 GB/s against 0.5).
        """
        return self.cpu or ("host" if self.accel == "kvm" else "max,-erms,-fsrm")

    @property
    def smp(self) -> str:
        """QEMU's -smp. Under TCG never with one possible CPU: TCG then leaves out every memory barrier of the guest.

        That is right for a lone CPU, and wrong as soon as its memory is shared with another VM: a store and a later
        load of another word pass each other in spite of the fence between them (docs/design.md has the measurement).
        """
        alone = self.accel == "tcg" and self.cpus == 1
        return f"cpus={self.cpus}" + (",maxcpus=2" if alone else "")

    @property
    def command_line(self) -> str:
        """The kernel's command line."""
        # Newer firmware puts 64-bit PCI windows at the top of the address space, where QEMU from 7.1 on marks the last
        # 12 GiB below 1 TiB as reserved if the CPU is an AMD one, and so TCG's; the kernel then finds no room there for
        # a region's BAR (seen with QEMU 10.0 and SeaBIOS 1.16.3). No device has memory in that range.
        words = [*self.boot_args, "pci=no_e820", f"idc.name={self.name}"]
        if self.accel == "tcg":
            # The kernel panics when its timer does not tick in time during boot, which happens on a busy machine; under
            # KVM it leaves the check out by itself.
            words.append("no_timer_check")
            # Where a second CPU is possible (see `smp`) the kernel distrusts the TSC of a CPU model that is not known
            # to keep it constant, and falls back to the HPET: a microsecond and an exit from the translated code
            # for each look at the clock. TCG's TSC is the host's clock, the same for all CPUs.
            words.append("tsc=reliable")
        if self.ip:
            words.append(f"idc.ip={self.ip}")
        return " ".join([*words, *self.kernel_args])


@dataclass(frozen=True)
class Wiring:
    """Where QEMU's sockets are: the text after "socket," in -chardev, such as "fd=5,server=on,wait=on".

    `gdb` is empty when none is wanted.
    """

    console: str
    agent: str
    qmp: str
    gdb: str = ""


def path_wiring(directory: str, name: str) -> Wiring:
    """Wiring by socket paths, for reading and for starting QEMU by hand."""
    return Wiring(*(f"path={directory}/{name}.{end},server=on,wait=off" for end in ("console", "agent", "qmp")))


def escape(text: str) -> str:
    """A value inside a QEMU option list: a comma ends it unless doubled."""
    return text.replace(",", ",,")


def qemu_args(spec: VmSpec, wiring: Wiring) -> list[str]:
    """The whole command line, program first."""
    args = [spec.qemu]
    args += ["-name", f"{spec.name},debug-threads=on"]
    args += _machine(spec)
    args += _boot(spec)
    args += _links(wiring)
    args += _disks(spec)
    args += _nics(spec)
    args += _ports(spec)
    if spec.gdb == "wait":
        args += ["-S"]
    args += spec.extra
    return args


def _machine(spec: VmSpec) -> list[str]:
    args = ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    args += ["-machine", "q35,kernel-irqchip=split,memory-backend=ram"]
    args += ["-accel", "kvm" if spec.accel == "kvm" else f"tcg,thread=multi,tb-size={spec.tb_mib}"]
    args += ["-cpu", spec.cpu_model, "-smp", spec.smp, "-m", f"{spec.memory.mib}M"]
    size, share = f"size={spec.memory.mib}M", f"share={'on' if spec.memory.share else 'off'}"
    if spec.memory.backend == "anonymous":
        args += ["-object", f"memory-backend-ram,id=ram,{size},{share}"]
    elif spec.memory.backend == "memfd":
        huge = ",hugetlb=on" if spec.memory.hugepages else ""
        args += ["-object", f"memory-backend-memfd,id=ram,{size},{share}{huge}"]
    else:
        args += ["-object", f"memory-backend-file,id=ram,{size},{share},mem-path={escape(str(spec.memory.path))}"]
    # VFIO in the guest needs an IOMMU; interrupt remapping by the split irqchip.
    args += ["-device", "intel-iommu"]
    args += ["-object", "rng-builtin,id=rng", "-device", "virtio-rng-pci,rng=rng"]
    # Tells the host of a panic at once, with a QMP event, if the guest has the driver.
    args += ["-device", "pvpanic-pci"]
    # Changes in every clone, upon which the guest's kernel (5.18 and newer) seeds its random numbers anew.
    args += ["-device", "vmgenid,guid=auto"]
    return args


def _boot(spec: VmSpec) -> list[str]:
    args = ["-kernel", str(spec.kernel)]
    if spec.initrd is not None:
        args += ["-initrd", str(spec.initrd)]
    return [*args, "-append", spec.command_line]


def _links(wiring: Wiring) -> list[str]:
    args = ["-chardev", f"socket,id=console,{wiring.console}", "-serial", "chardev:console"]
    args += ["-chardev", f"socket,id=qmp,{wiring.qmp}", "-mon", "chardev=qmp,mode=control"]
    args += ["-device", "virtio-serial-pci,id=vserial"]
    args += ["-chardev", f"socket,id=agent,{wiring.agent}"]
    args += ["-device", f"virtserialport,bus=vserial.0,id=agent,chardev=agent,name={PORT_NAME}"]
    if wiring.gdb:
        args += ["-chardev", f"socket,id=gdb,{wiring.gdb}", "-gdb", "chardev:gdb"]
    return args


def _disks(spec: VmSpec) -> list[str]:
    disks = list(spec.disks)
    if spec.rootfs is not None:
        disks.insert(0, Disk(spec.rootfs, readonly=True))
    args: list[str] = []
    for index, disk in enumerate(disks):
        # Read-only files are shared by many VMs; the lock would keep a new image from being put in place
        # meanwhile.
        options = "readonly=on,file.locking=off" if disk.readonly else "readonly=off"
        drive = f"id=disk{index},if=none,format={disk.format},{options},file={escape(str(disk.path))}"
        args += ["-drive", drive, "-device", f"virtio-blk-pci,drive=disk{index}"]
    return args


def _nics(spec: VmSpec) -> list[str]:
    args: list[str] = []
    for index, nic in enumerate(spec.nics):
        args += _netdev(index, nic)
        # No option ROM: nobody boots from this network, and SeaBIOS would spend its time on it.
        device = f"virtio-net-pci,netdev=net{index},mac={nic.mac},romfile="
        args += ["-device", device + (f",host_mtu={nic.mtu}" if nic.mtu else "")]
    return args


def _netdev(index: int, nic: Nic) -> list[str]:
    kind, _, rest = nic.netdev.partition(",")
    return ["-netdev", f"{kind},id=net{index}" + (f",{rest}" if rest else "")]


def _ports(spec: VmSpec) -> list[str]:
    args: list[str] = []
    for index in range(spec.region_ports):
        args += [
            "-device",
            # Without the reserve the kernel finds no address for BAR2 of a device that comes later.
            f"pcie-root-port,id={port_name(index)},chassis={index + 1},slot={index + 1},"
            f"pref64-reserve={spec.region_port_mib}M",
        ]
    for index in range(spec.hot_ports):
        number = spec.region_ports + index + 1
        args += ["-device", f"pcie-root-port,id={hot_port_name(index)},chassis={number},slot={number}"]
    return args


def port_name(index: int) -> str:
    """The id, for `bus=`, of the root port with this number."""
    return f"rp{index}"


def hot_port_name(index: int) -> str:
    """The id of the root port for a device other than a region."""
    return f"hp{index}"


def clone_args(machine: VmSpec, spec: VmSpec, wiring: Wiring) -> list[str]:
    """The command line of a QEMU that takes over a template's state: the template's `machine`, name and NICs of `spec`.

    No kernel: it is in the memory that is taken over, and reading it again would cost a tenth of the start. The NICs'
    back ends only: the cards are plugged in by `clone_nic` when the state is there, because it has none.
    """
    args = [machine.qemu, "-name", f"{spec.name},debug-threads=on", *_machine(machine), *_links(wiring)]
    args += [*_disks(machine), *_ports(machine), *machine.extra]
    for index, nic in enumerate(spec.nics):
        args += _netdev(index, nic)
    return [*args, "-incoming", "defer"]


def clone_nic(index: int, nic: Nic) -> dict[str, object]:
    """QMP device_add arguments for NIC number `index` of a clone."""
    device: dict[str, object] = {"driver": "virtio-net-pci", "id": f"nic{index}", "netdev": f"net{index}",
                                 "mac": nic.mac, "romfile": "", "bus": hot_port_name(index)}  # fmt: skip
    return device | ({"host_mtu": nic.mtu} if nic.mtu else {})


def format_args(args: Sequence[str]) -> str:
    """For --dry-run: a command that a shell takes, one option with its value a line."""
    lines: list[str] = []
    for word in args:
        # An option's value goes on the line of its option.
        if lines and not word.startswith("-") and " " not in lines[-1]:
            lines[-1] += f" {shlex.quote(word)}"
        else:
            lines.append(shlex.quote(word))
    if len(args) > 1:
        lines[0:1] = lines[0].split(" ", 1)
    return " \\\n  ".join(lines)
