"""A TAP interface with vnet headers, so that packets of 64 KiB and unfinished checksums cross as they are.

Requests and flags are those of linux/if_tun.h. The interface outlives the process that made it, with its addresses and
routes: one whose drivers are killed has no carrier until the next ones are there. Needs CAP_NET_ADMIN, and the tun
module. Depends on the standard library.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Final

_TUN: Final = "/dev/net/tun"
_TUNSETIFF, _TUNSETPERSIST, _TUNSETOFFLOAD, _TUNSETCARRIER = 0x400454CA, 0x400454CB, 0x400454D0, 0x400454E2
_IFF_TAP, _IFF_NO_PI, _IFF_MULTI_QUEUE, _IFF_VNET_HDR = 0x0002, 0x1000, 0x0100, 0x4000
#: Checksums and segments are left to whoever is at the far end: TUN_F_CSUM, TSO4, TSO6, TSO_ECN.
OFFLOADS: Final = 0x0F


class Interface:
    """An interface and a descriptor for each of its queues, without carrier at first.

    Args:
        name: of 1 to 15 bytes; one that an earlier process left is taken over.
        queues: 1 or more.

    Attributes:
        name: of it.
        fds: non-blocking; each gives and takes whole packets behind a vnet header of 10 bytes.

    Raises:
        OSError: which says what to do about it.
    """

    def __init__(self, name: str, queues: int) -> None:
        self.name = name
        self.fds: list[int] = []
        try:
            for _ in range(queues):
                self.fds.append(os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
                self._attach(self.fds[-1], many=queues > 1)
            self.carrier(up=False)
        except OSError as error:
            self.close()
            raise _explained(error, name) from error

    def _attach(self, fd: int, *, many: bool) -> None:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if many else 0)
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", self.name.encode(), flags))
        fcntl.ioctl(fd, _TUNSETPERSIST, 1)
        fcntl.ioctl(fd, _TUNSETOFFLOAD, OFFLOADS)

    def carrier(self, *, up: bool) -> None:
        """Say whether packets get anywhere. Raises OSError."""
        fcntl.ioctl(self.fds[0], _TUNSETCARRIER, struct.pack("i", up))

    def close(self, *, keep: bool = False) -> None:
        """Let go of it; with `keep` it stays for the next process, else it is gone. Idempotent."""
        while self.fds:
            fd = self.fds.pop()
            if not keep:
                try:
                    fcntl.ioctl(fd, _TUNSETPERSIST, 0)
                except OSError as error:
                    if error.errno != errno.EBADFD:  # it was never attached, or somebody has deleted the interface
                        os.close(fd)
                        raise
            os.close(fd)


def _explained(error: OSError, name: str) -> OSError:
    hints = {
        errno.ENOENT: f"{_TUN} is missing; is the kernel module tun loaded? (modprobe tun)",
        errno.EPERM: f"making interface {name} takes CAP_NET_ADMIN",
        errno.EACCES: f"{_TUN} may not be opened by this user",
        errno.EBUSY: f"interface {name} is in use by another process; give this end another name",
        errno.EINVAL: f"an interface {name} is there already, and is no TAP with the same queues; give this end "
                      f"another name, or remove it (ip link del {name})",
    }
    code = error.errno or 0
    return OSError(code, hints.get(code, f"interface {name}: {os.strerror(code)}"))
