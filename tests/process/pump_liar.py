"""python pump_liar.py SEED ROUNDS: an honest queue and a peer that describes packets at random, in one process.

Runs with a core built with AddressSanitizer, and `support` on its path. Whatever the peer says, the honest end either
hands that packet to its interface, from within the peer's part, or ends that connection with a reason.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import sys
import time
from typing import TYPE_CHECKING

from support import LocalRegion

from idc.device.classes import queue_channel
from idc.endpoint import Client, Endpoint, Resources, State, pauses
from idc.layout import ChannelSpec, Kind
from idc.pump import Queue, places
from idc.pump.tap import DEPTH, INLINE_BYTES, QUOTAS, VNET_BYTES, Tap
from idc.transport.shared import SharedPort

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT = 30.0


def until(liar: Endpoint, what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not what():
        assert time.monotonic() < deadline, liar.reason
        liar.pump(0.001)


def lie(choose: random.Random, theirs: tuple[int, int]) -> bytes:
    """A request that is right, but for as much as chance would have it; now and then bytes of any kind."""
    if choose.random() < 0.05:
        return choose.randbytes(choose.randrange(QUOTAS.parameter_bytes + 1))

    def pick(right: int, *wrong: int) -> int:
        return choose.choice(wrong) if choose.random() < 0.1 else right

    start, size = theirs
    right = choose.choice([16, 60, 1514, 65553])
    length = pick(right, 0, 13, 65554, choose.randrange(1 << 32))
    place = pick(choose.choice([start, start + size - right]), start - 1, start + size - right + 1, start + size, 0,
                 choose.randrange(1 << 64), (1 << 64) - right, (1 << 64) - 1)
    more = b""
    if right <= INLINE_BYTES and choose.random() < 0.5:
        more, place = choose.randbytes(pick(right, 1, INLINE_BYTES)), pick(0, start)
    gso = pick(choose.choice([0, 0, 1, 4, 0x81]), 2, 3, 5, 0x80, 255)
    vnet = struct.pack("<BBHHHH", pick(1 if gso else choose.choice([0, 1, 2]), 4, 255), gso, pick(0, 13, 14, 65535),
                       pick(1448 if gso else 0, 0, 1, 65535), pick(14, 13, 65535),
                       pick(0, right % 65536, 65535))
    return struct.pack("<QIH", place, length, choose.choice([0, 1, 0xFFFF])) + vnet + more


def main() -> None:
    seed, rounds = int(sys.argv[1]), int(sys.argv[2])
    choose = random.Random(seed)
    pauses.LONGEST_PAUSE = pauses.FIRST_PAUSE  # there is no end of lies here
    region = LocalRegion([ChannelSpec(queue_channel(0), Kind.MESSAGE, "front", "back", 256 * 256, 256)])
    honest, peer = region.join(0), region.join(1)
    inside, outside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    inside.setblocking(False)
    outside.setblocking(False)
    tap = Tap(inside.fileno(), places(honest, 1)[0])
    queue = Queue("queue-0", tap, depth=DEPTH, accepts=QUOTAS, told=lambda: None)
    queue.start(SharedPort(honest, queue_channel(0), release=lambda: None))
    liar = Endpoint(SharedPort(peer, queue_channel(0), release=lambda: None), Client(),
                    Resources(QUOTAS, requests=8, messages=0))
    part = next(part for part in region.header.parts if part.owner == 1)
    taken = refused = 0
    for _ in range(rounds):
        until(liar, lambda: liar.state is State.CONNECTED)
        before, cycles = tap.packets.received + tap.packets.refused, liar.connections
        liar.submit_transaction(lie(choose, (part.offset, part.length)))
        deadline = time.monotonic() + LIMIT
        while (tap.packets.received + tap.packets.refused == before and liar.state is State.CONNECTED
               and liar.connections == cycles):
            assert time.monotonic() < deadline
            liar.pump(0.001)
        if tap.packets.received + tap.packets.refused != before:
            taken += 1
            while True:
                try:
                    assert len(outside.recv(1 << 17)) >= VNET_BYTES
                except BlockingIOError:
                    break
        else:
            refused += 1
            assert "queue-0: a packet with" in liar.reason, liar.reason
    assert queue.error is None
    liar.abandon()
    queue.stop()
    for end in (inside, outside):
        end.close()
    peer.close()
    honest.close()
    region.close()
    sys.stdout.write(f"taken {taken} refused {refused}\n")
    sys.stdout.flush()
    os._exit(0)  # what the interpreter does on its way out is not what is looked at


if __name__ == "__main__":
    main()
