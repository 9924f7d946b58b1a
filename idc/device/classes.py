"""Device classes: declared in one place, found by name.

    class Echo(DeviceClass):
        name = "echo"
        options = {"times": Option(1, "how often each word comes back", least=1)}
        back = EchoBack

and in the pyproject.toml of whoever brings it, so that no line of this tree changes:

    [project.entry-points."idc_testbed.devices"]
    echo = "echo_device:Echo"

Depends on idc.device.driver and options, idc.domain and idc.layout.
"""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Final

from idc.device.driver import BackDriver, FrontDriver, SocketFront
from idc.device.options import Option
from idc.domain import Service
from idc.endpoint import Quotas, frames
from idc.errors import MisuseError
from idc.layout import BLOCK_BYTES, HEADER_BYTES, PAGE, SLOT_HEADER_BYTES, ChannelSpec, Kind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from idc.device.options import Value

#: The entry point group.
GROUP: Final = "idc_testbed.devices"
#: The channel of an endpoint between the two ends.
CHANNEL: Final = "device"
#: Most queues of one device: a header page has room for that many channels beside the first.
MOST_QUEUES: Final = 16
_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,23}")
_OPTION: Final = re.compile(r"[a-z][a-z0-9_-]{0,31}")


def queue_channel(index: int) -> str:
    """Name of the channel of a device's queue."""
    return f"queue-{index}"


@dataclass(frozen=True, slots=True)
class Queues:
    """Channels of a device beside that of its endpoint, for data: endpoints that pumps drive (docs/pump.md).

    Attributes:
        count: how many, 1 to 16.
        quotas: what each side of a queue accepts of the other.
        requests: each side's own transactions outstanding at a time, of one queue.
        room: bytes for buffers in the region, for each side of each queue.
    """

    count: int = 1
    quotas: Quotas = field(default_factory=lambda: Quotas(64, 0))
    requests: int = 64
    room: int = 0

    @property
    def frames(self) -> int:
        """Most frames under way in one direction of a queue: as `Resources.frames` of its endpoint."""
        return self.requests + self.quotas.requests + self.quotas.messages + 2


class DeviceClass:
    """What makes a device: declare a subclass, whose attributes say all. It is never instantiated.

    Attributes:
        name: lower-case letters, digits and "-"; what `testbed attach` calls it.
        options: by name.
        service: what the two ends accept of each other; by default `Service(name)`.
        front, back: drivers of the ends.
        room: bytes of the region beside its channels, for buffers; shared out evenly.
        modules: of Linux, that both ends need; a testbed loads them in its VMs.

    Raises:
        MisuseError: when a subclass is declared that makes no sense.
    """

    name: ClassVar[str]
    options: ClassVar[Mapping[str, Option]] = {}
    service: ClassVar[Service]
    front: ClassVar[type[FrontDriver]] = SocketFront
    back: ClassVar[type[BackDriver]]
    room: ClassVar[int] = 0
    modules: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        where = f"device class {cls.__qualname__}"
        for attribute in ("name", "back"):
            if not hasattr(cls, attribute):
                raise MisuseError(f"{where} does not say its {attribute}")
        if not _NAME.fullmatch(cls.name):
            raise MisuseError(f"{where}: {cls.name!r} is no name of 1 to 24 lower-case letters, digits and '-'")
        if not issubclass(cls.front, FrontDriver) or not issubclass(cls.back, BackDriver):
            raise MisuseError(f"{where}: front must be a FrontDriver, and back a BackDriver")
        for option, declared in cls.options.items():
            if not _OPTION.fullmatch(option) or not isinstance(declared, Option):
                raise MisuseError(f"{where}: option {option!r} is no name, or declared as {declared!r}, no Option")
            declared.check(declared.default, f"{where}, default of option {option}")
        if not hasattr(cls, "service"):
            cls.service = Service(cls.name)

    @classmethod
    def channels(cls, front: str, back: str) -> Sequence[ChannelSpec]:
        """Those of its region: one for an endpoint between the two domains, large enough for the service."""
        return [_channel(CHANNEL, front, back, cls.service.resources().frames, cls.service.quotas)]

    @classmethod
    def queues(cls, options: Mapping[str, Value]) -> Queues | None:
        """Those of a device with these options, which are complete; by default none. Raises MisuseError if the options
        make no sense together: `attach` says so.
        """
        del options
        return None

    @classmethod
    def plan(cls, front: str, back: str, options: Mapping[str, Value]) -> tuple[list[ChannelSpec], int]:
        """All channels of a device's region, those of its queues too, and bytes of the region: a power of two.

        Raises MisuseError as `queues`.
        """
        channels, room, queues = list(cls.channels(front, back)), cls.room, cls.queues(options)
        if queues is not None:
            if not 1 <= queues.count <= MOST_QUEUES:
                raise MisuseError(f"device class {cls.name}: {queues.count} queues; 1 to {MOST_QUEUES} are possible")
            channels += [_channel(queue_channel(index), front, back, queues.frames, queues.quotas)
                         for index in range(queues.count)]
            room += 2 * queues.count * queues.room
        needed = HEADER_BYTES + sum(BLOCK_BYTES + 2 * -(-c.ring_bytes // PAGE) * PAGE for c in channels) + room
        return channels, 1 << (needed - 1).bit_length()


def _channel(name: str, front: str, back: str, most: int, quotas: Quotas) -> ChannelSpec:
    """A message channel for an endpoint with so many frames under way."""
    slot = -(-(SLOT_HEADER_BYTES + frames.HEADER_BYTES + max(quotas.body_bytes, 64)) // 64) * 64
    slots = 1 << (most - 1).bit_length()
    return ChannelSpec(name, Kind.MESSAGE, front, back, slots * slot, slot)


def load() -> dict[str, type[DeviceClass]]:
    """All classes that are installed here, by name.

    Raises MisuseError, which names the entry point, if one cannot be imported or is no device class of that name.
    """
    found: dict[str, type[DeviceClass]] = {}
    for entry in importlib.metadata.entry_points(group=GROUP):
        if entry.name in found:
            continue  # the same distribution, found twice on the path
        found[entry.name] = _load(entry)
    return found


def find(name: str) -> type[DeviceClass]:
    """The class of that name, without importing others. Raises MisuseError."""
    entries = importlib.metadata.entry_points(group=GROUP)
    for entry in entries:
        if entry.name == name:
            return _load(entry)
    known = ", ".join(sorted({entry.name for entry in entries})) or "none"
    raise MisuseError(f"there is no device class {name!r} here (there are: {known})")


def _load(entry: importlib.metadata.EntryPoint) -> type[DeviceClass]:
    try:
        loaded = entry.load()
    except Exception as error:
        raise MisuseError(f"device class {entry.name!r} ({entry.value}) cannot be loaded: "
                          f"{type(error).__name__}: {error}") from error
    if not isinstance(loaded, type) or not issubclass(loaded, DeviceClass) or loaded.name != entry.name:
        raise MisuseError(f"entry point {entry.name!r} ({entry.value}) is no device class of that name")
    return loaded
