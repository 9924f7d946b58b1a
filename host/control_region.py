"""What a control region is: the one region of a domain that leads to broker and registry, and says who the domain is.

    CONTROL REGION of domain NAME: members NAME, broker, registry; channels control (to the broker), registry

Depends on idc.layout, host.broker and host.registry for their names and sizes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from host import broker, registry
from idc.layout import ChannelSpec, Kind, Rights

if TYPE_CHECKING:
    from idc.layout import RegionHeader

#: What the name of a control region begins with; the domain's name follows.
PREFIX: Final = "control-"
#: Bytes of a control region: header page and both channels.
REGION_BYTES: Final = 1 << 20
#: Names that no domain can have.
RESERVED: Final = (broker.MEMBER, registry.MEMBER, "host")


def members(domain: str) -> dict[str, Rights]:
    """Of the control region of that domain."""
    return dict.fromkeys((domain, broker.MEMBER, registry.MEMBER), Rights.RW)


def channels(domain: str) -> list[ChannelSpec]:
    """Of the control region of that domain."""
    return [ChannelSpec(who.CHANNEL, Kind.MESSAGE, domain, who.MEMBER, who.RING_BYTES, who.SLOT_BYTES)
            for who in (broker, registry)]


def domain_of(header: RegionHeader) -> str | None:
    """The name of the domain whose control region this is; None if it is none."""
    name = header.name.removeprefix(PREFIX)
    if header.name == name or {member.name: member.rights for member in header.members} != members(name):
        return None
    named = {channel.name for channel in header.channels}
    return name if named == {broker.CHANNEL, registry.CHANNEL} else None
