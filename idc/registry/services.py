"""Services found by name: who offers one writes where each front end meets it, and only that front end may read it.

    /domain/OWNER/service/SERVICE/PEER       may be read by PEER
    /domain/OWNER/service/SERVICE/PEER/at    REGION/CHANNEL; ephemeral, so that it is there as long as the owner is

Depends on idc.registry and idc.transport.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from idc.errors import DeniedError, MisuseError, TimedOutError
from idc.registry.frames import Permissions, Permit, home

if TYPE_CHECKING:
    from idc.registry.client import Event, Registry
    from idc.transport.shared import SharedPort

#: Longest sleep between two looks, seconds; a change wakes it.
_LOOK: Final = 0.5


def publish(registry: Registry, service: str, port: SharedPort) -> str:
    """Say that the domain at the other end of the port's channel meets the service there. Returns the key's path.

    Raises as `Operations.write`.
    """
    base = f"{registry.home}/service/{service}/{port.peer}"
    registry.mkdir(base)
    registry.set_permissions(base, Permissions(registry.domain, named=((port.peer, Permit.READ),)))
    # Below it, for what is made after a lost link has the permissions of the node above.
    registry.write(f"{base}/at", f"{port.region.header.name}/{port.channel}", ephemeral=True)
    return f"{base}/at"


def find(registry: Registry, service: str, own: str, timeout: float) -> str:
    """The address at which this domain meets the service, once somebody offers it.

    Args:
        registry: of this domain.
        service: name of it.
        own: address of this domain's link to the registry, which tells how it reaches regions.
        timeout: seconds to wait for somebody to offer it.

    Raises:
        TimedOutError: nobody did.
        MisuseError: several domains offer it.
    """
    deadline = time.monotonic() + timeout
    events: list[Event] = []
    watch = registry.watch("/domain", events.append)
    try:
        while True:
            events.clear()
            found = _offers(registry, service)
            if len(found) > 1:
                raise MisuseError(f"service {service!r} is offered by several domains: {', '.join(sorted(found))}")
            for place in found.values():
                return address(place, own)
            while not events:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimedOutError(f"nobody offers service {service!r} to {registry.domain} within {timeout:g} s")
                registry.pump(min(left, _LOOK))
    finally:
        watch.close()


def address(place: str, own: str) -> str:
    """REGION/CHANNEL as an address of a domain whose own link to the registry has the address `own`.

    Raises MisuseError if that is no address of a control region.
    """
    scheme, _, rest = own.partition(":")
    region, slash, channel = place.partition("/")
    if slash and region and channel:
        if scheme == "ivshmem":
            return f"ivshmem:{place}"
        directory, _, socket = rest.rpartition("/")[0].rpartition("/")  # DIRECTORY/MEMBER@REGION.sock/CHANNEL
        member, at, _ = socket.partition("@")
        if scheme == "member" and at:
            return f"member:{directory}/{member}@{region}.sock/{channel}"
    raise MisuseError(f"a service at {place!r} cannot be reached by a domain whose registry is at {own!r}")


def _offers(registry: Registry, service: str) -> dict[str, str]:
    """REGION/CHANNEL by domain that offers the service to this one."""
    found = {}
    for owner in registry.list("/domain"):
        try:
            place = registry.get(f"{home(owner)}/service/{service}/{registry.domain}/at")
        except DeniedError:
            continue  # not to us
        if place is not None:
            found[owner] = place.decode(errors="replace")
    return found
