"""Sets an interface up: MTU, MAC, addresses, up. By one call of iproute2's `ip`, which every image has.

A library that speaks netlink (pyroute2) takes seconds to import in an emulated guest, 37 on a busy machine: longer than
anybody waits for a device. Depends on the standard library.
"""

from __future__ import annotations

import errno
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import ipaddress
    from collections.abc import Sequence

#: Seconds for it.
_LIMIT: Final = 30.0


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


def commands(name: str, settings: Settings) -> list[str]:
    """What `ip -batch` is given. Addresses that the interface has already stay.

    There is no duplicate address detection: it would keep an IPv6 address from use until the carrier has been up for a
    second.
    """
    lines = [f"link set dev {name} address {settings.mac} mtu {settings.mtu} alias '{settings.alias}'"]
    lines += [f"addr replace {address.with_prefixlen} dev {name}" + (" nodad" if address.version == 6 else "")
              for address in settings.addresses]
    return [*lines, f"link set dev {name} up"]


def set_up(name: str, settings: Settings) -> None:
    """Set the interface up. Raises OSError, with what `ip` said."""
    batch = "".join(f"{line}\n" for line in commands(name, settings))
    try:
        done = subprocess.run(["ip", "-batch", "-"], input=batch, capture_output=True, text=True, timeout=_LIMIT,
                              check=False)
    except FileNotFoundError:
        raise OSError(errno.ENOENT, f"interface {name}: the program ip is missing (package iproute2)") from None
    except subprocess.TimeoutExpired:
        raise OSError(errno.ETIMEDOUT, f"interface {name}: ip does not end within {_LIMIT:g} s") from None
    if done.returncode:
        raise OSError(errno.EINVAL, f"interface {name}: ip said: {' '.join(done.stderr.split())[:300]}")
