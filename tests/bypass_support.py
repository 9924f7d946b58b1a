"""What the stack of three drivers must have to run, and what must be true afterwards; in processes and in VMs alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.topology import Topology, load, resolve

if TYPE_CHECKING:
    from collections.abc import Iterable

    from host.region import Region, RegionSpec

STACK = Path(__file__).parent / "bypass" / "stack.py"
TOPOLOGY = STACK.with_suffix(".toml")
LINKS = ("upper", "lower")
BUS = ("bus",)
ROLES = ("front", "middle", "back")
#: Bytes that the front end writes and then reads again, see the program.
BYTES = 4 << 20


def topology() -> Topology:
    """VMs, regions and broker."""
    return resolve(load(TOPOLOGY))


def specs(*names: str) -> list[RegionSpec]:
    """Regions of the topology, for host processes."""
    regions = topology().regions
    return [regions[name].spec(name) for name in names]


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
