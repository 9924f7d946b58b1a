"""python endpoint_hostile.py SOCKET scribble|ring|knock [SECONDS]: an honest back end, then not; says "now" between.

It scribbles or rings for so many seconds, says "over", and is honest again. One that knocks never opens its side.
"""

from __future__ import annotations

import random
import sys
import time
from typing import TYPE_CHECKING

from host.ivshmem.client import join
from idc.endpoint import Client, Endpoint, IncomingTransaction, Resources
from idc.transport.shared import SharedPort

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc.region import Region

HONEST = 50
SECONDS = 3.0


class Echo(Client):
    """Answers, and counts."""

    count = 0

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        self.count += 1
        transaction.complete(transaction.parameters)


def storm(region: Region, pump: Callable[[], object], seconds: float) -> None:
    """Ring every vector as fast as it goes."""
    bells, until = [region.bell(0, vector) for vector in range(region.header.vectors)], time.monotonic() + seconds
    while time.monotonic() < until:
        pump()
        for bell in bells:
            for _ in range(200):
                bell.ring()


def say(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


def main() -> None:
    path, what, *more = sys.argv[1:]
    seconds = float(more[0]) if more else SECONDS
    region, client = join(path), Echo()
    if what == "knock":
        say("now")
        storm(region, lambda: None, seconds)
    endpoint = Endpoint(SharedPort(region, "service", release=lambda: None), client, Resources())
    while client.count < HONEST and what != "knock":
        endpoint.pump(1.0)
    if what == "ring":
        say("now")
        storm(region, endpoint.pump, seconds)
    elif what == "scribble":
        say("now")
        chance, until, size = random.Random(7), time.monotonic() + seconds, len(region.memory)
        while time.monotonic() < until:
            at = chance.randrange(size)
            data = chance.randbytes(min(chance.choice((1, 8, 4096)), size - at))
            region.memory[at:at + len(data)] = data
    say("over")
    while True:
        endpoint.pump(1.0)


if __name__ == "__main__":
    main()
