"""Where a peer is met, as text: SCHEME:REST. The one place that turns configuration into transports.

    local:NAME                 two endpoints of one process
    tcp-listen:HOST:PORT       TCP, no shared memory
    tcp-dial:HOST:PORT
    unix:PATH                  a host process: a server's Unix socket
    ivshmem:REGION/CHANNEL     in a VM: the region's device, through VFIO
    member:SOCKET/CHANNEL      a host process: the member's socket of the region server

Schemes name the module that knows them, which is imported when one is used. Depends on idc.errors.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

from idc.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc.transport.base import Port

#: Variables of the environment with the addresses of a domain's links to its broker and to its registry.
CONTROL_VARIABLE: Final = "IDC_CONTROL"
REGISTRY_VARIABLE: Final = "IDC_REGISTRY"

_SCHEMES: dict[str, str] = {
    "local": "idc.transport.local:port",
    "tcp-listen": "idc.transport.tcp:listen_port",
    "tcp-dial": "idc.transport.tcp:dial_port",
    "unix": "idc.transport.unix:port",
    "ivshmem": "guest.ivshmem:port",
    "member": "host.ivshmem.client:port",
}


def register(scheme: str, opener: str) -> None:
    """Add a transport of your own: `opener` is MODULE:FUNCTION, which makes a Port of what follows the scheme."""
    _SCHEMES[scheme] = opener


def open_port(address: str) -> Port:
    """The port of that address.

    Raises:
        MisuseError: no such scheme, or what follows it does not fit.
        OSError, IdcError: what stands there cannot be opened.
    """
    scheme, _, rest = address.partition(":")
    if scheme not in _SCHEMES:
        raise MisuseError(f"address {address!r}: the scheme is none of {', '.join(sorted(_SCHEMES))}")
    module, _, function = _SCHEMES[scheme].partition(":")
    opener: Callable[[str], Port] = getattr(importlib.import_module(module), function)
    return opener(rest)
