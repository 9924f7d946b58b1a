"""python endpoint_slow_back.py ADDRESS: answers backwards, a few at a time, and out of order; "end" ends it.

Parameters are THREAD:NUMBER. Checks that no more than its quota comes at a time, and each thread's in order.
"""

from __future__ import annotations

import sys
import time

from idc.endpoint import Client, Endpoint, IncomingMessage, IncomingTransaction, Quotas, Resources
from idc.transport.address import open_port

QUOTA = 4
#: Longest that it holds what came, waiting for more, seconds.
PATIENCE = 0.002


class Backwards(Client):
    """Holds some, then answers the newest first."""

    def __init__(self) -> None:
        self.held: list[IncomingTransaction] = []
        self.most = 0
        self.messages = 0
        self.last: dict[bytes, int] = {}
        self.ended = False
        self.since = 0.0

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        if transaction.parameters == b"end":
            self.ended = True
            transaction.complete(b"%d %d %d" % (self.most, self.messages, sum(self.last.values())))
            return
        if transaction.parameters == b"cut":
            endpoint.disconnect("as asked")
            while self.held:
                self.held.pop().complete()
            transaction.complete()
            return
        if transaction.parameters == b"never":
            return
        thread, _, number = transaction.parameters.partition(b":")
        assert int(number) > self.last.get(thread, -1), "out of order"
        self.last[thread] = int(number)
        self.since = self.since if self.held else time.monotonic()
        self.held.append(transaction)
        self.most = max(self.most, len(self.held))
        if len(self.held) >= QUOTA:
            self.release()

    def message(self, endpoint: Endpoint, message: IncomingMessage) -> None:
        self.messages += 1
        message.complete()

    def release(self) -> None:
        while self.held:
            transaction = self.held.pop()
            transaction.complete(transaction.parameters[::-1])


def serve(address: str) -> None:
    client = Backwards()
    endpoint = Endpoint(open_port(address), client, Resources(Quotas(requests=QUOTA, messages=2)))
    while not client.ended:
        endpoint.pump(PATIENCE)
        if client.held and time.monotonic() > client.since + PATIENCE:
            client.release()
    endpoint.notify()
    while endpoint.state.value == "connected":
        endpoint.pump(0.1)
    endpoint.abandon()


if __name__ == "__main__":
    serve(sys.argv[1])
