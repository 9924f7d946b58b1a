"""python endpoint_hostile.py SOCKET scribble|ring: an honest back end for a while, then not; says "now" between."""

from __future__ import annotations

import random
import sys
import time

from host.ivshmem.client import join
from idc.endpoint import Client, Endpoint, IncomingTransaction, Resources
from idc.transport.shared import SharedPort

HONEST = 50
SECONDS = 3.0


class Echo(Client):
    """Answers, and counts."""

    count = 0

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        self.count += 1
        transaction.complete(transaction.parameters)


def main() -> None:
    path, what = sys.argv[1:]
    region, client = join(path), Echo()
    endpoint = Endpoint(SharedPort(region, "service", release=lambda: None), client, Resources())
    while client.count < HONEST:
        endpoint.pump(1.0)
    sys.stdout.write("now\n")
    sys.stdout.flush()
    chance, until = random.Random(7), time.monotonic() + SECONDS
    if what == "ring":
        bells = [region.bell(0, vector) for vector in range(region.header.vectors)]
        while time.monotonic() < until:
            endpoint.pump(0.0)
            for bell in bells:
                for _ in range(200):
                    bell.ring()
        return
    size = len(region.memory)
    while time.monotonic() < until:
        at = chance.randrange(size)
        data = chance.randbytes(min(chance.choice((1, 8, 4096)), size - at))
        region.memory[at:at + len(data)] = data


if __name__ == "__main__":
    main()
