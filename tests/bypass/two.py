"""python two.py owner|asker [REFERENCE]: an owner of a buffer, and an asker that has it copied again and again.

The owner prints the reference in hexadecimal and serves until it is killed. The asker prints "ok" for each copy and
ends with the first refusal, which it prints. They share no region.
"""

from __future__ import annotations

import sys
import time

from idc.domain import Domain, Service
from idc.endpoint import Client, Completion, Result, State
from idc.endpoint.together import drive
from idc.remote import Access, Refusal

BYTES = 1 << 20


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    role = sys.argv[1]
    service = Service("upper" if role == "owner" else "lower")
    domain = Domain.here()
    exports = domain.share()
    domain.endpoint(service, Client(), domain.resources(service))
    buffer = domain.region(service).pool.allocate(BYTES)
    reference = exports.register(buffer, Access.READ if role == "owner" else Access.WRITE).reference()
    if role == "owner":
        say(reference.hex())
        domain.run()
    control = domain.control
    assert control is not None
    source = bytes.fromhex(sys.argv[2])
    while True:
        told: list[Completion] = []
        while control.endpoint.state is not State.CONNECTED:
            drive([control.endpoint])
        assert control.copy(source, reference, BYTES, told.append) is Result.OK
        while not told:
            drive([control.endpoint])
        if told[0].result is not Result.OK:
            say(f"{told[0].result.value} {Refusal(told[0].error).name}")
            return
        say("ok")
        time.sleep(0.02)


if __name__ == "__main__":
    main()
