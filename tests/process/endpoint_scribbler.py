"""python endpoint_scribbler.py SEED SOCKET/CHANNEL SOCKET/CHANNEL: an honest back end, which then writes what it likes.

Reads commands, one a line: "honest" (serve), "scribble HOW" (answers "now" with the monotonic clock), "stop" (puts the
header page back, which is the host's to write, and answers "stopped"). The first channel carries messages, the second
bytes.
"""

from __future__ import annotations

import contextlib
import random
import select
import sys
import time
from typing import TYPE_CHECKING

from host.ivshmem.client import join
from idc import layout
from idc.channel import ByteChannel
from idc.endpoint import Client, Endpoint, IncomingTransaction, Quotas, Resources
from idc.errors import IdcError
from idc.transport.shared import SharedPort

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc.region import Region

QUOTAS = Quotas(requests=4, messages=4, parameter_bytes=1024, status_bytes=1024)


class Echo(Client):
    """Answers."""

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        transaction.complete(transaction.parameters)


class Honest:
    """One incarnation of both channels: an endpoint that answers, a byte channel that echoes."""

    def __init__(self, notes: Region, notes_name: str, bulk: Region, bulk_name: str) -> None:
        port = SharedPort(notes, notes_name, release=lambda: None)
        self.endpoint = Endpoint(port, Echo(), Resources(QUOTAS, requests=4, messages=4))
        self._again: Callable[[], ByteChannel] = lambda: ByteChannel.begin(bulk, bulk_name)
        self._bulk = self._again()
        self._connected = False

    def turn(self) -> None:
        self.endpoint.pump(0.0005)
        try:
            if not self._connected:
                self._connected = self._bulk.advance()
            elif self._bulk.receiver.available():
                self._bulk.sender.try_write(self._bulk.receiver.read(1 << 16, timeout=0))
        except IdcError:
            self._bulk.close()
            self._bulk, self._connected = self._again(), False

    def close(self) -> None:
        self._bulk.close()
        self.endpoint.abandon()

    def forge(self, region: Region, chance: random.Random) -> None:
        """Honest sequence numbers, any length: passes every check but that of the length."""
        carrier = self.endpoint._carrier
        if carrier is None:
            return
        entry = carrier.channel.entry  # type: ignore[attr-defined]
        position = carrier.channel.sender._ring.pos  # type: ignore[attr-defined]
        for n in range(8):
            at = entry.data_ba + (position + n) % entry.slots * entry.slot_size
            length = chance.choice((chance.getrandbits(chance.randrange(33)), entry.slot_size + chance.getrandbits(17)))
            word = length << 32 | position + n + 1 & 0xFFFF_FFFF
            region.memory[at:at + 8] = word.to_bytes(8, "little")


def anywhere(region: Region, chance: random.Random, first: int, last: int) -> None:
    """Random bytes, or a random small number, at a random place."""
    size = min(chance.choice((1, 8, 64, 4096)), last - first)
    at = chance.randrange(first, last - size + 1)
    if size == 8:
        at &= ~7
        data = chance.getrandbits(chance.randrange(65)).to_bytes(8, "little")
    else:
        data = chance.randbytes(size)
    region.memory[at:at + size] = data


def scribble(how: str, region: Region, honest: Honest, chance: random.Random) -> None:
    """One write of that kind."""
    header, size = region.header, len(region.memory)
    if how == "forge" and header.channels[0].slots:
        honest.forge(region, chance)
    elif how == "header":
        anywhere(region, chance, 0, layout.HEADER_BYTES)
    elif how == "blocks":
        block = chance.choice(header.channels).offset
        anywhere(region, chance, block, block + layout.BLOCK_BYTES)
    elif how == "rings":
        entry = chance.choice(header.channels)
        anywhere(region, chance, entry.data_ab, min(entry.offset + entry.length, size))
    elif how == "parts":
        for part in header.parts:
            anywhere(region, chance, part.offset, part.offset + part.length)
    else:
        anywhere(region, chance, 0, size)


def main() -> None:
    seed, *places = sys.argv[1:]
    joined: dict[str, Region] = {}
    ends: list[tuple[Region, str]] = []
    for place in places:
        path, _, name = place.rpartition("/")
        if path not in joined:
            joined[path] = join(path)
        ends.append((joined[path], name))
    regions, saved = list(joined.values()), list[bytes]()
    chance = random.Random(int(seed))
    (notes, notes_name), (bulk, bulk_name) = ends
    honest, how = Honest(notes, notes_name, bulk, bulk_name), ""
    poller = select.poll()
    poller.register(0, select.POLLIN)
    while True:
        if poller.poll(0):
            command, _, how = sys.stdin.readline().strip().partition(" ")
            if command == "scribble":
                saved = [region.memory[:layout.HEADER_BYTES] for region in regions]
                sys.stdout.write(f"now {time.monotonic()}\n")
            elif command == "stop":
                for region, page in zip(regions, saved, strict=True):
                    region.memory[:len(page)] = page
                with contextlib.suppress(IdcError):
                    honest.close()
                honest = Honest(notes, notes_name, bulk, bulk_name)
                sys.stdout.write("stopped\n")
            elif not command:
                return
            sys.stdout.flush()
        if not how:
            honest.turn()
            continue
        for _ in range(16):
            scribble(how, chance.choice(regions), honest, chance)


if __name__ == "__main__":
    main()
