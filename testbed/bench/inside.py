"""`python3 -m testbed.bench.inside FD ADDRESS PROGRAM...`: a program of this machine on the VMs' own network.

Enters the network namespace that FD is of, gives its bridge ADDRESS (with prefix), and becomes PROGRAM. Depends on
pyroute2 and `testbed.network`.
"""

from __future__ import annotations

import ctypes
import os
import sys

_CLONE_NEWNET = 0x40000000


def main() -> None:
    """See the top of the file."""
    fd, address, *program = sys.argv[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(int(fd), _CLONE_NEWNET) != 0:
        raise SystemExit(f"cannot enter the VMs' network: {os.strerror(ctypes.get_errno())}")
    # Here, because it opens its sockets in the namespace that it finds itself in.
    from pyroute2 import IPRoute

    from testbed.network import BRIDGE

    host, _, prefix = address.partition("/")
    with IPRoute() as ip:
        ip.addr("add", index=ip.link_lookup(ifname=BRIDGE)[0], address=host, prefixlen=int(prefix))
    os.execvp(program[0], program)


if __name__ == "__main__":
    main()
