"""What a testbed is made of, as a user writes it: VMs, regions, links, buses, networks. Pure, but for `load`.

May depend on pydantic, tomllib, `host.region` (to lay regions out),
`host.ivshmem.detour` (faults of doorbells) and `testbed.errors`. One model for the TOML
file, for Python and for fixtures:

    topology = load(Path("pair.toml"))
    topology = Topology(vms={"a": Machine(), "b": Machine(cpus=2)}, links={"ab": Link(members=("a", "b"))})
    resolve(topology)        # defaults filled in, links and buses turned into regions, everything checked

Every mistake is one line: file, table, key, what is wrong with it and the nearest thing that would be right.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, Self

import tomli_w
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from host import control_region
from host.errors import RegionError
from host.ivshmem.detour import Doorbells
from host.region import RegionSpec
from idc.errors import MisuseError
from idc.layout import ChannelSpec, Kind, Rights
from testbed.errors import SpecError, nearest
from testbed.qemu_args import DEFAULT_QEMU

if TYPE_CHECKING:
    from collections.abc import Sequence

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
#: A bus has a channel for each pair of its members, and a header page has room for 24: seven members.
BUS_MEMBERS = 7
_UNITS = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1 << 40}
_SIZE = re.compile(r"([0-9]+) ?(?:([KMGT])(?:iB|B)?)?")
_VM_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class TopologyError(SpecError):
    """A topology that makes no sense; one line with file, table and key."""


def parse_size(value: object) -> object:
    """Bytes of 4096, "64K", "16M" or "1 GiB" (powers of 1024). Raises ValueError for other text."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value)
    if match is None:
        raise ValueError(f'{value!r} is no size; write bytes, or a number with K, M or G, such as "16M"')
    return int(match[1]) * _UNITS[match[2] or ""]


def size_text(size: int) -> str:
    """The shortest exact way to write a size: "16M"."""
    unit = next(unit for unit in "TGMK" if size % _UNITS[unit] == 0) if size and size % KIB == 0 else ""
    return f"{size // _UNITS[unit]}{unit}"


def _path(value: object) -> object:
    return Path(value) if isinstance(value, str) and value else value


Size = Annotated[int, BeforeValidator(parse_size), Field(strict=True, gt=0), PlainSerializer(size_text)]
File = Annotated[Path, BeforeValidator(_path), PlainSerializer(str)]
Number = Annotated[int, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True)]
Real = Annotated[float, Field(strict=True)]


class Table(BaseModel):
    """What all tables share: they cannot be changed, and a key that they do not know is an error with a suggestion."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: object) -> object:
        names = [field.alias or name for name, field in cls.model_fields.items()]
        for key in data if isinstance(data, dict) else ():
            if key not in names:
                raise PydanticCustomError("unknown_key", "no such key {key}{hint}", {
                    "key": repr(key), "hint": nearest(str(key), names)})
        return data


class DiskFile(Table):
    """One more disk, the guest's /dev/vdb and on. `path` is a file of the host."""

    path: File
    format: Literal["raw", "qcow2"] = "raw"
    readonly: Flag = False


class Machine(Table):
    """One VM.

    Attributes:
        memory: RAM.
        cpus: virtual CPUs.
        cpu: QEMU's -cpu; empty for the host's under KVM, and what TCG does best under TCG.
        kernel: a bzImage or vmlinux, or a kernel's build tree; by default the image's.
        initrd: by default the image's.
        rootfs: by default the image's.
        image: label of an image of `testbed image list`; empty for the one that fits this testbed.
        kernel_args: appended to the kernel's command line.
        pin: host CPUs; virtual CPU i runs on number i modulo their count, and nowhere else.
        hugepages: RAM from the host's huge pages, which must be reserved there.
        region_ports: how many regions can be plugged at a time; None for at least 4.
        region_port: the largest region that fits a port, a power of two; None for at least 256M.
        disks: in order.
        gdb: "on" gives gdb a socket; with "wait" the guest does not start before gdb lets it.
        extra: goes to QEMU as it is.
    """

    memory: Size = 256 * MIB
    cpus: Number = 1
    cpu: Text = ""
    kernel: File | None = None
    initrd: File | None = None
    rootfs: File | None = None
    image: Text = ""
    kernel_args: tuple[Text, ...] = ()
    pin: tuple[Number, ...] = ()
    hugepages: Flag = False
    region_ports: Number | None = None
    region_port: Size | None = None
    disks: tuple[DiskFile, ...] = ()
    gdb: Literal["off", "on", "wait"] = "off"
    extra: tuple[Text, ...] = ()


class ChannelTable(Table):
    """A channel between two rw members. `slot`: bytes of a message slot, 8 of them its header; none for "byte"."""

    kind: Literal["message", "byte"]
    members: tuple[Text, Text]
    ring: Size
    slot: Size | None = None

    def spec(self, name: str) -> ChannelSpec:
        """For `host.region`."""
        return ChannelSpec(name, Kind[self.kind.upper()], *self.members, self.ring, self.slot or 0)


class DoorbellFaults(Table):
    """Faults of what one rw member rings at another, as `pair` names them; without one, of all that have no entry of
    their own. The rest is as in `host.ivshmem.detour.Doorbells`.
    """

    pair: tuple[Text, Text] | None = None
    drop: Real = 0.0
    double: Real = 0.0
    delay: tuple[Real, Real] = (0.0, 0.0)
    seed: Number = 0

    def faults(self) -> Doorbells:
        """For `testbed.faults`. Raises RegionError for what is no probability or no delay."""
        return Doorbells(self.drop, self.double, self.delay, self.seed)


class RegionTable(Table):
    """Shared memory and who may do what with it. `plug = false` leaves it to `testbed plug`. `parts` are the bytes from
    which each rw member allocates, whole pages; None shares what the channels leave out evenly.
    """

    size: Size = 16 * MIB
    members: dict[str, Literal["rw", "ro"]]
    channels: dict[str, ChannelTable] = {}
    parts: dict[str, Size] | None = None
    doorbells: tuple[DoorbellFaults, ...] = ()
    plug: Flag = True

    def spec(self, name: str) -> RegionSpec:
        """For `host.region`."""
        members = {member: Rights[rights.upper()] for member, rights in self.members.items()}
        channels = [c.spec(channel) for channel, c in self.channels.items()]
        return RegionSpec(name, self.size, members, channels, parts=self.parts)

    def plan(self) -> dict[tuple[str, str], Doorbells]:
        """Of a resolved region: the faults of its doorbells, by (member that rings, member rung)."""
        return {entry.pair: entry.faults() for entry in self.doorbells if entry.pair is not None}


class Link(Table):
    """A region of two members' own, with the channels that transfers and round trips use."""

    members: tuple[Text, ...]
    size: Size = 16 * MIB
    parts: dict[str, Size] | None = None
    doorbells: tuple[DoorbellFaults, ...] = ()
    plug: Flag = True

    @model_validator(mode="after")
    def _two(self) -> Self:
        if len(self.members) != 2:
            raise PydanticCustomError("members", "a link has two members, this one {count}; for more, write a [buses] "
                                      "table", {"count": len(self.members)})
        return self


class Bus(Table):
    """A region for several members that trust each other, with a message channel for each pair."""

    members: tuple[Text, ...]
    size: Size = 16 * MIB
    ring: Size = 64 * KIB
    slot: Size = KIB
    parts: dict[str, Size] | None = None
    doorbells: tuple[DoorbellFaults, ...] = ()
    plug: Flag = True

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not 2 <= len(self.members) <= BUS_MEMBERS:
            raise PydanticCustomError("members", "a bus has 2 to {most} members, this one {count}",
                                      {"most": BUS_MEMBERS, "count": len(self.members)})
        return self


class NetworkTable(Table):
    """A network: "tap" (a bridge of its own), "stream" (a socket between two VMs), "user" (each VM alone, out through
    the host), or "auto" (tap where it can be had, else stream). `mtu` in bytes is for "tap"; None for the largest.
    """

    members: tuple[Text, ...]
    kind: Literal["auto", "tap", "stream", "user"] = "auto"
    mtu: Number | None = None


class BrokerTable(Table):
    """A broker and a registry, see docs/broker.md and docs/registry.md. `members`: VMs and processes that get a control
    region, which leads to both, None for all of them;
    `patience`: seconds that an owner has to answer; `piece`: bytes that are copied before the next domain's turn.
    """

    members: tuple[Text, ...] | None = None
    patience: Real = 5.0
    piece: Size = MIB


class DeviceTable(Table):
    """A device that is attached at the start, see docs/devices.md: `class`, domains of the two ends, options of the
    class; `number` tells it from others of the class with the same front end.
    """

    kind: Text = Field(alias="class")
    frontend: Text
    backend: Text
    options: dict[str, Any] = {}
    number: Text = ""

    @model_serializer(mode="wrap")
    def _as_written(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data = dict(dump(self))
        return {"class" if key == "kind" else key: value for key, value in data.items()}


class Topology(Table):
    """A whole testbed. `processes` are host processes that join regions by themselves, as members beside the VMs.
    `boot` says how VMs start, as in `testbed.bed.Boot`.
    """

    name: Text = ""
    accel: Literal["auto", "kvm", "tcg"] = "auto"
    boot: Literal["auto", "warm", "cold"] = "auto"
    qemu: Text = DEFAULT_QEMU
    keep: Literal["failed", "always", "never"] = "failed"
    vms: dict[str, Machine] = {}
    regions: dict[str, RegionTable] = {}
    links: dict[str, Link] = {}
    buses: dict[str, Bus] = {}
    networks: dict[str, NetworkTable] = {}
    broker: BrokerTable | None = None
    devices: dict[str, DeviceTable] = {}
    processes: tuple[Text, ...] = ()

    def as_toml(self, *, everything: bool = True) -> str:
        """The same topology as a file; with `everything` false, only what was set."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True, exclude_unset=not everything))


def pair(a: str = "front", b: str = "back") -> Topology:
    """What `testbed up` boots when it is given no file: two VMs and a link."""
    return Topology(name="pair", vms={a: Machine(), b: Machine()}, links={f"{a}-{b}": Link(members=(a, b))})


def load(path: Path) -> Topology:
    """Read a TOML file; paths in it are relative to its directory, its name is the default of `name`.

    Raises TopologyError.
    """
    try:
        with path.open("rb") as file:
            data = tomllib.load(file)
    except OSError as error:
        hint = "docs/topology.md has an example; `testbed up` without a file boots two VMs and a link"
        raise TopologyError(f"cannot read the topology {path}: {error.strerror}", hint=hint) from error
    except UnicodeDecodeError as error:
        raise TopologyError(f"{path} is no TOML: byte {error.start} is not UTF-8 text, which TOML has to be") from error
    except tomllib.TOMLDecodeError as error:
        raise TopologyError(f"{path} is no TOML: {error}") from error
    return parse(data, source=str(path), directory=path.resolve().parent, default_name=path.stem)


def parse(data: dict[str, Any], *, source: str = "topology", directory: Path | None = None,
          default_name: str = "") -> Topology:
    """A topology from plain data. `source` is what errors call it; relative paths are made absolute by `directory`.

    Raises TopologyError.
    """
    try:
        topology = Topology.model_validate({"name": default_name, **data})
    except ValidationError as error:
        raise TopologyError(f"{source}: {_sentence(error)}") from None
    if directory is not None:
        vms = {name: _absolute(vm, directory) for name, vm in topology.vms.items()}
        topology = topology.model_copy(update={"vms": vms})
    return topology


def _absolute(vm: Machine, directory: Path) -> Machine:
    given = {key: getattr(vm, key) for key in ("kernel", "initrd", "rootfs")}
    files = {key: directory / path for key, path in given.items() if path is not None}
    disks = tuple(disk.model_copy(update={"path": directory / disk.path}) for disk in vm.disks)
    return vm.model_copy(update={**files, "disks": disks})


def _sentence(error: ValidationError) -> str:
    """The first mistake in one line, and how many more there are."""
    first = error.errors(include_url=False)[0]
    loc, kind = first["loc"], first["type"]
    if kind in ("unknown_key", "members"):
        text = f"{_where((*loc, ''))}{first['msg']}"
    elif kind == "missing":
        text = f"{_where(loc)}is missing"
    elif kind in ("dict_type", "model_type"):
        text = f"{_where(loc)}should be a table, not {first['input']!r}"
    elif kind == "value_error":
        text = f"{_where(loc)}{first['ctx']['error']}"
    else:
        text = f"{_where(loc)}{first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}"
        if kind == "literal_error" and isinstance(first["input"], str):
            text += nearest(first["input"], re.findall(r"'([^']*)'", first["ctx"]["expected"]))
    more = error.error_count() - 1
    return text + (f" (and {more} more)" if more else "")


def _where(loc: tuple[int | str, ...]) -> str:
    """`("vms", "a", "disks", 0, "path")` as "[vms.a] disks[0].path: "."""
    key = ""
    for part in loc[2:] if len(loc) > 2 else loc[-1:]:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key and part else str(part)
    table = ".".join(map(str, loc[:2])) if len(loc) > 2 else str(loc[0]) if len(loc) > 1 else ""
    words = [f"[{table}]" if table else "", key]
    return " ".join(filter(None, words)) + (": " if any(words) else "")


def resolve(topology: Topology, *, source: str = "topology") -> Topology:
    """The same testbed with every default filled in, links and buses as regions, and all of it checked. Idempotent.

    Files of the host are not looked at. Raises TopologyError.
    """
    return _Resolver(topology, source).resolved()


class _Resolver:
    """Checks a topology and fills it in; knows how to name the place of a mistake."""

    def __init__(self, topology: Topology, source: str) -> None:
        self._given = topology
        self._source = source

    def _fail(self, where: str, text: str) -> NoReturn:
        raise TopologyError(f"{self._source}: {where}{': ' if where else ''}{text}")

    def resolved(self) -> Topology:
        given = self._given
        if not given.vms:
            self._fail("", "there is no VM; write a table such as [vms.front]")
        if not _VM_NAME.fullmatch(given.name or "testbed"):
            self._fail("name", f"{given.name!r} is no name; {_NAMING}")
        for name, vm in given.vms.items():
            self._check_vm(name, vm)
        broker = self._broker()
        regions = self._regions()
        for name, region in regions.items():
            self._check_region(name, region)
            regions[name] = region.model_copy(update={"doorbells": self._doorbells(name, region)})
        for name, network in given.networks.items():
            self._check_network(name, network)
        brokered = () if broker is None or broker.members is None else broker.members
        self._devices(brokered)
        vms = {name: self._ports(name, vm, regions, controlled=name in brokered) for name, vm in given.vms.items()}
        return given.model_copy(update={"name": given.name or "testbed", "vms": vms, "regions": regions, "links": {},
                                        "buses": {}, "broker": broker})

    def _broker(self) -> BrokerTable | None:
        """With its members; domains and regions may not have the names that it uses itself."""
        given, broker = self._given, self._given.broker
        if broker is None:
            return None
        known = (*given.vms, *given.processes)
        members = known if broker.members is None else broker.members
        self._members("[broker] members", members)
        if broker.patience <= 0:
            self._fail("[broker] patience", f"{broker.patience:g} is no time to answer in; take seconds above 0")
        for name in control_region.RESERVED:
            if name in known:
                self._fail("[broker]", f"{name!r} is a name of the host's own; call that domain otherwise")
        for name in (*given.regions, *given.links, *given.buses):
            if name.startswith(control_region.PREFIX):
                self._fail(self._region_table(name),
                           f"names that begin with {control_region.PREFIX!r} are the control links'")
        return broker.model_copy(update={"members": tuple(members)})

    def _devices(self, controlled: Sequence[str]) -> None:
        given = self._given
        seen: dict[tuple[str, str, str, str], str] = {}
        for name, device in given.devices.items():
            where = f"[devices.{name}]"
            if given.broker is None:
                self._fail(where, "devices need a registry; write a [broker] table, which may be empty")
            for key, domain in (("frontend", device.frontend), ("backend", device.backend)):
                self._members(f"{where} {key}", (domain,))
                if domain not in controlled:
                    self._fail(f"{where} {key}", f"{domain!r} has no control link; name it in [broker] members")
            if device.frontend == device.backend:
                self._fail(f"{where} backend", f"{device.backend!r} is the front end too; a device is between two")
            key_ = (device.kind, device.frontend, device.backend, device.number)
            if key_ in seen:
                self._fail(where, f"[devices.{seen[key_]}] is the same device; give one of them another number")
            seen[key_] = name
            # Late: it loads the code of devices, which a topology without any has no use for.
            from idc.device import find
            from idc.device.options import fill

            try:
                fill(find(device.kind).options, device.options, f"device class {device.kind}")
            except MisuseError as error:
                self._fail(where, str(error))

    def _check_vm(self, name: str, vm: Machine) -> None:
        where = f"[vms.{name}]"
        if not _VM_NAME.fullmatch(name):
            self._fail(where, f"{name!r} is no name of a VM; {_NAMING}")
        if vm.cpus < 1:
            self._fail(f"{where} cpus", f"a VM has at least one, not {vm.cpus}")
        if vm.memory % MIB or vm.memory < 64 * MIB:
            self._fail(f"{where} memory", f"{size_text(vm.memory)} is not whole mebibytes, 64M at least")
        if any(cpu < 0 for cpu in vm.pin):
            self._fail(f"{where} pin", f"{list(vm.pin)} holds a number that is no CPU's")
        for word in vm.kernel_args:
            if not word or any(char.isspace() for char in word):
                self._fail(f"{where} kernel_args", f"{word!r} is not one word; write a list of words")
        if name in self._given.processes:
            self._fail("processes", f"{name!r} is a VM too; the two need different names")

    def _members(self, where: str, members: Any, *, vms_only: bool = False) -> None:  # noqa: ANN401 - iterable of names
        known = [*self._given.vms, *(() if vms_only else self._given.processes)]
        seen: set[str] = set()
        for member in members:
            if member not in known:
                self._fail(where, f"{member!r} is no VM of this testbed{nearest(member, known, every=True)}")
            if member in seen:
                self._fail(where, f"{member!r} is named twice")
            seen.add(member)

    def _regions(self) -> dict[str, RegionTable]:
        """Links and buses as the regions that they are, after those that are written out."""
        given = self._given
        regions = dict(given.regions)
        for kind, tables in (("links", given.links), ("buses", given.buses)):
            for name, table in tables.items():
                if name in regions:
                    self._fail(f"[{kind}.{name}]", "another region has that name too")
                self._members(f"[{kind}.{name}] members", table.members)
                channels = _link_channels(table) if isinstance(table, Link) else _bus_channels(table)
                regions[name] = RegionTable(size=table.size, members=dict.fromkeys(table.members, "rw"),
                                            channels=channels, parts=table.parts, doorbells=table.doorbells,
                                            plug=table.plug)
        return regions

    def _region_table(self, name: str) -> str:
        kind = "regions" if name in self._given.regions else "links" if name in self._given.links else "buses"
        return f"[{kind}.{name}]"

    def _check_region(self, name: str, region: RegionTable) -> None:
        where = self._region_table(name)
        if region.size & (region.size - 1):
            below = 1 << region.size.bit_length() - 1
            self._fail(f"{where} size", f"{size_text(region.size)} is no power of two, which a region's size must be; "
                       f"take {size_text(below)} or {size_text(2 * below)}")
        self._members(f"{where} members", region.members)
        try:
            region.spec(name).plan()
        except RegionError as error:
            self._fail(where, str(error.__cause__ or error))

    def _doorbells(self, name: str, region: RegionTable) -> tuple[DoorbellFaults, ...]:
        """Each with its pair."""
        where = f"{self._region_table(name)} doorbells"
        writers = [member for member, rights in region.members.items() if rights == "rw"]
        every = list(itertools.permutations(writers, 2))
        found: dict[tuple[str, str], DoorbellFaults] = {}
        rest: DoorbellFaults | None = None
        for index, entry in enumerate(region.doorbells):
            try:
                entry.faults()
            except RegionError as error:
                self._fail(f"{where}[{index}]", str(error))
            if entry.pair is None:
                if rest is not None:
                    self._fail(f"{where}[{index}]", "a second entry without a pair")
                rest = entry
            elif entry.pair not in every:
                self._fail(f"{where}[{index}].pair", f"{entry.pair[0]!r} cannot ring {entry.pair[1]!r} (rw members: "
                           f"{', '.join(writers) or 'none'})")
            elif entry.pair in found:
                self._fail(f"{where}[{index}].pair", "named twice")
            else:
                found[entry.pair] = entry
        if rest is not None:
            found |= {pair: rest.model_copy(update={"pair": pair}) for pair in every if pair not in found}
        return tuple(found.values())

    def _check_network(self, name: str, network: NetworkTable) -> None:
        where = f"[networks.{name}]"
        if not _NAME.fullmatch(name):
            self._fail(where, f"{name!r} is no name; {_NAMING}")
        self._members(f"{where} members", network.members, vms_only=True)
        if not network.members:
            self._fail(f"{where} members", "a network needs at least one")
        if network.kind == "stream" and len(network.members) > 2:
            self._fail(f"{where} kind", "a stream is a socket between two VMs; take \"tap\" for more")
        if network.mtu is not None and not 576 <= network.mtu <= 65521:
            self._fail(f"{where} mtu", f"{network.mtu} is not 576 to 65521")

    def _ports(self, name: str, vm: Machine, regions: dict[str, RegionTable], *, controlled: bool) -> Machine:
        """Root ports enough, and large enough, for the regions that this VM may map, devices, and a control link."""
        mine = {region: table for region, table in regions.items() if name in table.members}
        devices = [table for table in self._given.devices.values() if name in (table.frontend, table.backend)]
        needed = len(mine) + controlled + len(devices)
        ports = max(4, needed) if vm.region_ports is None else vm.region_ports
        largest = max((table.size for table in mine.values()), default=0)
        room = max(256 * MIB, largest) if vm.region_port is None else vm.region_port
        where = f"[vms.{name}]"
        if not 0 <= ports <= 28:
            self._fail(f"{where} region_ports", f"{ports} is not 0 to 28, which is what q35's bus has room for")
        if needed > ports:
            control = " and its control link" if controlled else ""
            attached = f", its {len(devices)} devices" if devices else ""
            self._fail(f"{where} region_ports", f"{ports} are not enough for its {len(mine)} regions "
                       f"({', '.join(mine)}){attached}{control}")
        if room & (room - 1) or room < MIB:
            self._fail(f"{where} region_port", f"{size_text(room)} is no power of two from 1M")
        for region, table in mine.items():
            if table.size > room:
                self._fail(f"{where} region_port", f"{size_text(room)} is too small for region {region!r} of "
                           f"{size_text(table.size)}")
        return vm.model_copy(update={"region_ports": ports, "region_port": room})


_NAMING = 'use lower-case letters, digits and "-", 32 characters at most'


def _link_channels(link: Link) -> dict[str, ChannelTable]:
    # Late: testbed.bed loads everything that boots VMs, which reading a file has no use for.
    from testbed.bed import link_channels

    return {spec.name: ChannelTable(kind="message" if spec.kind is Kind.MESSAGE else "byte", members=(spec.a, spec.b),
                                    ring=spec.ring_bytes, slot=spec.slot_size or None)
            for spec in link_channels(link.members[0], link.members[1])}


def _bus_channels(bus: Bus) -> dict[str, ChannelTable]:
    # By number, because a channel's name has room for one VM's name only.
    pairs = itertools.combinations(enumerate(bus.members), 2)
    return {f"c{i}-{j}": ChannelTable(kind="message", members=(a, b), ring=bus.ring, slot=bus.slot)
            for (i, a), (j, b) in pairs}
