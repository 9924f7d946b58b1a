"""python pump_side.py send|receive ADDRESS [FIRST]: one end of a queue; a pair of sockets stands for its interface.

The sender gives its interface packets without end, numbered from FIRST or 0 on, as many as it takes, and drops others,
as interfaces do.
The receiver checks each for its content and its place in the order, and says the first number and each hundredth.
"""

from __future__ import annotations

import contextlib
import random
import select
import socket
import struct
import sys
from typing import Final

from idc.pump import Queue, places
from idc.pump.tap import DEPTH, QUOTAS, VNET_BYTES, Tap
from idc.transport.address import open_port
from idc.transport.shared import SharedPort

VNET: Final = bytes(VNET_BYTES)
BODY: Final = random.Random(3).randbytes(1 << 16)
LENGTHS: Final = (60, 1514, 9014, 65000)


def packet(number: int) -> bytes:
    """That everybody knows who knows its number."""
    start, length = number % 97, LENGTHS[number % len(LENGTHS)]
    return struct.pack("<Q", number) + BODY[start:start + length - 8]


def main() -> None:
    what, address, *first = sys.argv[1:]
    inside, outside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    inside.setblocking(False)
    inside.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
    port = open_port(address)
    assert isinstance(port, SharedPort)
    queue = Queue("queue-0", Tap(inside.fileno(), places(port.region, 1)[0]), depth=DEPTH, accepts=QUOTAS,
                  told=lambda: None)
    queue.start(port)
    poller = select.poll()
    poller.register(sys.stdin, select.POLLIN)  # closed by a test that has seen enough, or is over itself
    if what == "send":
        outside.setblocking(False)
        number = int(first[0]) if first else 0
        while not poller.poll(0):
            with contextlib.suppress(BlockingIOError):
                outside.send(VNET + packet(number))
            number += 1
    else:
        outside.settimeout(20)
        last, count = -1, 0
        while not poller.poll(0):
            got = outside.recv(1 << 17)[VNET_BYTES:]
            (number,) = struct.unpack_from("<Q", got)
            assert got == packet(number), f"packet {number} has other content"
            assert number > last, f"packet {number} after {last}"
            last = number
            if count % 100 == 0:
                sys.stdout.write(f"{number}\n")
                sys.stdout.flush()
            count += 1
    queue.stop()
    sys.stdout.write(f"late {queue.counters.late}\n")


if __name__ == "__main__":
    main()
