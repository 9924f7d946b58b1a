"""The host's own records: devices that are attached, and links between two domains. In the registry, so on disk.

    /device/C/F/N        JSON: back, options, link, id
    /link/REGION         JSON: front, back, layout, device: "" for a spare one

No domain reads or writes them. Depends on idc.device and idc.registry.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

from idc.device import keys
from idc.device.keys import Name
from idc.errors import NoSuchKeyError
from idc.registry import Permissions, Permit
from idc.registry.frames import HOST

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from idc.device.options import Value
    from idc.registry.operations import Operations

LINKS: Final = "/link"
#: Slashes in the path of a device's record below RECORDS.
_DEPTH: Final = 2
#: What only the host sees.
PRIVATE: Final = Permissions(HOST, Permit.NOTHING)


@dataclass(frozen=True)
class Record:
    """A device that is attached, or is being.

    Attributes:
        back: domain of the back end.
        options: all of them.
        link: region in which the ends meet.
        id: new whenever it is attached.
    """

    back: str
    options: dict[str, Value]
    link: str
    id: str

    def pack(self) -> str:
        """For the registry."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Link:
    """A region of two domains' own.

    Attributes:
        front, back: the domains; it never serves others.
        layout: what devices it fits: size and channels.
        device: that uses it; empty if none does.
    """

    front: str
    back: str
    layout: str
    device: str = ""

    def pack(self) -> str:
        """For the registry."""
        return json.dumps(asdict(self), sort_keys=True)


def prepare(registry: Operations) -> None:
    """Make the places of the records, unless they are there."""
    for path in (keys.RECORDS, LINKS):
        if not registry.exists(path):
            registry.mkdir(path)
            registry.set_permissions(path, PRIVATE)


def devices(registry: Operations) -> Iterator[tuple[Name, Record]]:
    """All that are attached."""
    for path, value in _tree(registry, keys.RECORDS):
        if value and path.count("/") == _DEPTH:
            yield Name(*path.split("/")), Record(**json.loads(value))


def device(registry: Operations, name: Name) -> Record | None:
    """One, if it is attached."""
    value = registry.get(name.record)
    return Record(**json.loads(value)) if value else None


def links(registry: Operations) -> Iterator[tuple[str, Link]]:
    """(region, link) of all."""
    for region, value in _tree(registry, LINKS):
        if value:
            yield region, Link(**json.loads(value))


def write_link(registry: Operations, region: str, link: Link) -> None:
    """Note it."""
    registry.write(f"{LINKS}/{region}", link.pack())


def _tree(registry: Operations, path: str) -> Iterable[tuple[str, bytes]]:
    try:
        return registry.tree(path).items()
    except NoSuchKeyError:
        return ()
