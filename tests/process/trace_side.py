"""python trace_side.py ROLE ...: one domain of the tests of tracing, in a process or VM of its own.

    front SERVICE TRACE LOSSLESS COUNT PAYLOAD [OFFSET]     logs COUNT numbered events and 1 transaction for each 10
    back SERVICE DOMAIN DIRECTORY [OFFSET]                  answers, and logs its own events to a file

Each prints one line of JSON at its end. OFFSET is added to its monotonic clock, ns.
"""

from __future__ import annotations

import json
import signal
import sys
from typing import TYPE_CHECKING

from idc.endpoint import Client, Endpoint, IncomingTransaction, Resources
from idc.endpoint.blocking import Caller
from idc.trace import file_tracer, open_tracer
from idc.transport.address import open_port

if TYPE_CHECKING:
    from types import FrameType


class Echo(Client):
    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        transaction.complete(transaction.parameters)


def front(service: str, trace: str, lossless: str, count: str, payload: str, offset: str = "0") -> None:
    shift = int(offset)
    with (open_tracer(trace, lossless=lossless == "lossless", timeout=60, shift=shift) as tracer,
          Caller(open_port(service)) as caller):
        caller.endpoint.trace = tracer.endpoint("echo")
        caller.connect(60)
        refused = 0
        for number in range(int(count)):
            refused += not tracer.instant("number", number.to_bytes(4, "little") + bytes(int(payload)))
            if number % 10 == 0:
                assert caller.transact(b"%d" % number, timeout=60) == b"%d" % number
    sys.stdout.write(json.dumps({"refused": refused, "sequence": tracer.sequence, "dropped": tracer.dropped}) + "\n")


def back(service: str, domain: str, directory: str, offset: str = "0") -> None:
    ended, shift = False, int(offset)

    def end(_number: int, _frame: FrameType | None) -> None:
        nonlocal ended
        ended = True

    signal.signal(signal.SIGTERM, end)
    with file_tracer(domain, directory, shift=shift) as tracer:
        endpoint = Endpoint(open_port(service), Echo(), Resources())
        endpoint.trace = tracer.endpoint("echo")
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while not ended:
            endpoint.pump(0.1)
        endpoint.destroy()
    sys.stdout.write(json.dumps({"sequence": tracer.sequence, "dropped": tracer.dropped}) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "front":
        front(*sys.argv[2:])
    else:
        back(*sys.argv[2:])
