"""Sets an interface up: MTU, MAC, addresses, up. By netlink, through pyroute2, which is slow to import: call it in a
thread. Depends on pyroute2."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import ipaddress
    from collections.abc import Sequence

#: No duplicate address detection: it would keep an IPv6 address from use until the carrier has been up for a second.
_IFA_F_NODAD: Final = 0x02


@dataclass(frozen=True, slots=True)
class Settings:
    """What an interface is given.

    Attributes:
        mtu: bytes.
        mac: six bytes in hexadecimal with colons.
        addresses: with prefix lengths.
        alias: for people, `ip link` shows it.
    """

    mtu: int
    mac: str
    addresses: Sequence[ipaddress.IPv4Interface | ipaddress.IPv6Interface]
    alias: str


def set_up(name: str, settings: Settings) -> None:
    """Set the interface up. Addresses that it has already stay. Raises OSError that names what was refused."""
    from pyroute2 import IPRoute, NetlinkError

    with IPRoute() as ip:
        step = "finding it"
        try:
            (index,) = ip.link_lookup(ifname=name)
            step = f"MAC {settings.mac}"
            link = ip.get_links(index)[0]
            if link.get_attr("IFLA_ADDRESS") != settings.mac:
                ip.link("set", index=index, address=settings.mac)
            step = f"MTU {settings.mtu}"
            ip.link("set", index=index, mtu=settings.mtu, ifalias=settings.alias)
            for address in settings.addresses:
                step = f"address {address}"
                more = {"flags": _IFA_F_NODAD} if address.version == 6 else {}
                try:
                    ip.addr("add", index=index, address=str(address.ip), prefixlen=address.network.prefixlen, **more)
                except NetlinkError as error:
                    if error.code != errno.EEXIST:
                        raise
            step = "up"
            ip.link("set", index=index, state="up")
        except (NetlinkError, ValueError) as error:
            code = error.code if isinstance(error, NetlinkError) else errno.ENODEV
            raise OSError(code, f"interface {name}: {step}: {error}") from error
