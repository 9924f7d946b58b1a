"""Where a trace's channel is, as text: ivshmem:REGION/CHANNEL in a VM, member:SOCKET/CHANNEL in a host process.

Depends on idc.errors; imports what knows the scheme when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

from idc.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc.region import Region

_JOIN: Final = {"ivshmem": "guest.ivshmem:open_region", "member": "host.ivshmem.client:join"}


def open_place(address: str) -> tuple[Region, str]:
    """The region, which the caller closes, and the channel's name.

    Raises:
        MisuseError: the address is of no such form.
        OSError, IdcError: what it names cannot be opened.
    """
    scheme, _, rest = address.partition(":")
    name, _, channel = rest.rpartition("/")
    if scheme not in _JOIN or not name or not channel:
        raise MisuseError(f"address {address!r} of a trace: ivshmem:REGION/CHANNEL or member:SOCKET/CHANNEL is wanted")
    module, _, function = _JOIN[scheme].partition(":")
    join: Callable[[str], Region] = getattr(importlib.import_module(module), function)
    return join(name), channel
