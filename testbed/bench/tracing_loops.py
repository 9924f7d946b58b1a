"""The loops that testbed.bench.tracing measures. Each variant has a copy of its own, and so of everything that Python
specialises for the classes it has seen."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from idc.endpoint.blocking import Caller
from idc.endpoint.endpoint import Client, Endpoint, Resources

if TYPE_CHECKING:
    from idc.endpoint.session import IncomingTransaction
    from idc.trace import Tracer
    from idc.transport.base import Port


class Echo(Client):
    """Answers with what it was asked, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        """See there."""
        del endpoint
        self.count += 1
        transaction.complete(transaction.parameters)


class Near:
    """Asks."""

    def __init__(self, port: Port, tracer: Tracer | None) -> None:
        self.caller = Caller(port, Resources())
        if tracer is not None:
            self.caller.endpoint.trace = tracer.endpoint("echo")
        self.caller.connect(20)

    def block(self, count: int, body: bytes) -> list[int]:
        """So many round trips; ns of each."""
        transact, now = self.caller.transact, time.perf_counter_ns
        samples = []
        before = now()
        for _ in range(count):
            transact(body)
            after = now()
            samples.append(after - before)
            before = after
        return samples


class Far:
    """Answers."""

    def __init__(self, port: Port, tracer: Tracer | None) -> None:
        self.client = Echo()
        self.endpoint = Endpoint(port, self.client, Resources())
        if tracer is not None:
            self.endpoint.trace = tracer.endpoint("echo")
        while self.endpoint.state.value != "connected":
            self.endpoint.pump(0.1)

    def block(self, count: int) -> None:
        """Answer so many, and send the last answer."""
        client, pump = self.client, self.endpoint.pump
        until = client.count + count
        while client.count < until:
            pump(1.0)
        self.endpoint.notify()
