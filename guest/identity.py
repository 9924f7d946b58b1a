"""What makes a cloned guest a machine of its own: randomness, clock, names, keys. Called by the agent.

All clones of one template wake with the same memory, so everything that must differ is replaced here, before the
host hands the clone to anybody. Every step here is code that each clone's QEMU has to translate anew, hence the bare
system calls. May import the standard library only. Host keys of ssh need no care: a template has none.

What stays the same in all clones, because the kernel or a program drew it before the snapshot and keeps it: address
layout, stack canaries and hash seeds of programs that ran then (init and the agent), keys of the kernel's hash tables
and TCP sequence numbers. Programs started afterwards draw their own.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import sys
import time
from typing import Any, Final

_RNDADDENTROPY: Final = 0x40085203
_RNDRESEEDCRNG: Final = 0x5207
_MS_BIND: Final = 4096
_BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"
_BOOT_ID_FILE: Final = "/run/idc-testbed-boot-id"
_MACHINE_ID: Final = "/etc/machine-id"

# Loaded by the template, before the snapshot, so that it costs a clone nothing.
_libc: Final = ctypes.CDLL(None, use_errno=True)


def apply(request: dict[str, Any]) -> None:
    """Become the machine that `request` describes. Raises OSError.

    Fields: `entropy` (hexadecimal, 32 bytes or more, drawn by the host for this clone alone), `time_ns` (the host's
    clock, nanoseconds since 1970), `name` (host name), `machine_id` (32 hexadecimal digits), `boot_id` (a UUID).
    """
    _seed(bytes.fromhex(request["entropy"]))
    time.clock_settime_ns(time.CLOCK_REALTIME, int(request["time_ns"]))
    _write("/proc/sys/kernel/hostname", request["name"])
    _write(_MACHINE_ID, request["machine_id"] + "\n")
    _new_boot_id(request["boot_id"])


def _seed(entropy: bytes) -> None:
    """Mix the host's bytes into the kernel's pool, credited, and have its generator start anew from there.

    The kernel does the same by itself when it learns of a new VM generation, but at a time of its own choosing.
    """
    fd = os.open("/dev/urandom", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _RNDADDENTROPY, struct.pack("ii", 8 * len(entropy), len(entropy)) + entropy)
        fcntl.ioctl(fd, _RNDRESEEDCRNG)
    finally:
        os.close(fd)
    # Generators in user space know nothing of the kernel's. The agent's own is the only program that was running.
    if "random" in sys.modules:
        sys.modules["random"].seed()


def _write(path: str, text: str) -> None:
    # Not truncated: what stands there is as long, or a name that the kernel replaces as a whole.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o444)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _new_boot_id(boot_id: str) -> None:
    """The kernel draws it once and lets nobody write it; a mount over it is what containers do too."""
    _write(_BOOT_ID_FILE, boot_id + "\n")
    if os.path.samefile(_BOOT_ID_FILE, _BOOT_ID):
        return  # mounted by the template, and new now
    if _libc.mount(_BOOT_ID_FILE.encode(), _BOOT_ID.encode(), None, _MS_BIND, None) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), _BOOT_ID)
