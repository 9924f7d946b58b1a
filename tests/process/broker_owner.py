"""python broker_owner.py NAME CONTROL_SOCKET REGION_SOCKET BYTES: a domain that registers one buffer, prints its
reference in hexadecimal, and serves until it is killed."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from broker_support import Exports, Party

from host.broker import CHANNEL
from host.ivshmem.client import join
from idc.remote.control import Control
from idc.transport.address import open_port


def main() -> None:
    name, control, region, length = sys.argv[1:]
    with ExitStack() as held:
        mapped = held.enter_context(join(region))
        link = Control(open_port(f"member:{control}/{CHANNEL}"))
        link.identify(20)
        exports = Exports(link)
        link.serve(exports)
        party = Party(name, link, exports, {"it": mapped})
        _, reference = party.allocate("it", bytes(range(256)) * (int(length) // 256))
        sys.stdout.write(reference.hex() + "\n")
        sys.stdout.flush()
        while True:
            link.endpoint.pump(1.0)


if __name__ == "__main__":
    main()
