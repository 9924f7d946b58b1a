"""What the stack of three drivers must have to run, and what must be true afterwards; in processes and in VMs alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from host.region import RegionSpec
from idc.layout import ChannelSpec, Kind, Rights

if TYPE_CHECKING:
    from collections.abc import Iterable

    from host.region import Region

STACK = Path(__file__).parent / "bypass" / "stack.py"
ROLES = ("front", "middle", "back")
MIB = 1 << 20
#: Bytes that the front end writes and then reads again, see the program.
BYTES = 4 * MIB
DEVICE = 12 * MIB
_RING, _SLOT = 128 * 512, 512


def links() -> list[RegionSpec]:
    """A region of its own for each pair; front and back share none."""
    return [
        RegionSpec("upper", 16 * MIB, {"front": Rights.RW, "middle": Rights.RW},
                   [ChannelSpec("upper", Kind.MESSAGE, "front", "middle", _RING, _SLOT)], parts={"front": 8 * MIB}),
        RegionSpec("lower", 16 * MIB, {"middle": Rights.RW, "back": Rights.RW},
                   [ChannelSpec("lower", Kind.MESSAGE, "middle", "back", _RING, _SLOT)], parts={"back": DEVICE}),
    ]


def bus() -> list[RegionSpec]:
    """One region for all three."""
    channels = [ChannelSpec("upper", Kind.MESSAGE, "front", "middle", _RING, _SLOT),
                ChannelSpec("lower", Kind.MESSAGE, "middle", "back", _RING, _SLOT)]
    return [RegionSpec("bus", 32 * MIB, dict.fromkeys(ROLES, Rights.RW), channels,
                       parts={"front": 8 * MIB, "back": DEVICE})]


def channels_of(region: Region, member: str) -> list[str]:
    """Names of the channels of which a member is an end."""
    names = [m.name for m in region.header.members]
    return [c.name for c in region.header.channels if member in (names[c.member_a], names[c.member_b])]


def verify(outputs: Iterable[str], route: str) -> dict[str, dict[str, Any]]:
    """The facts by role, once they are known to be right."""
    facts = {fact["role"]: fact for fact in (json.loads(line) for output in outputs for line in output.splitlines())}
    front, middle, back = (facts[role] for role in ROLES)
    assert front["sent"] == front["got"] == back["device"]
    assert len(set(front["sent"])) == len(front["sent"]) == 4
    assert front["routes"] == [route]
    assert middle["passed"] == back["moved"] == 2 * BYTES
    # each byte once, whoever did it, and none by those that only passed a reference on or owned the buffer
    assert back["copied"] == 2 * BYTES
    assert middle["copied"] == front["copied"] == back["served"] == 0
    return facts
