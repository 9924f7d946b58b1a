"""python endpoint_nursery.py ADDRESS LOG: a back end that is born again whenever it is killed; prints each one's pid.

Forks, so that a birth takes milliseconds. A back end writes the number of a transaction to the log, then answers it.
"""

from __future__ import annotations

import os
import sys

from idc.endpoint import Client, Endpoint, IncomingTransaction, Quotas, Resources
from idc.transport.address import open_port


class Writer(Client):
    """Executes a transaction: one line in the log."""

    def __init__(self, log: int) -> None:
        self.log = log

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        os.write(self.log, transaction.parameters + b"\n")
        transaction.complete(transaction.parameters)


def live(address: str, log: int) -> None:
    resources = Resources(Quotas(requests=8, messages=8), requests=8, messages=8)
    endpoint = Endpoint(open_port(address), Writer(log), resources)
    while True:
        endpoint.pump(1.0)


def main() -> None:
    address, path = sys.argv[1:]
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    while True:
        if (pid := os.fork()) == 0:
            try:
                live(address, log)
            finally:
                os._exit(1)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            sys.exit("a back end ended by itself")


if __name__ == "__main__":
    main()
