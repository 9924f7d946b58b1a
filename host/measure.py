"""`python3 -m host.measure SOCKET`: a host process' end of a measurement; see `idc.measure.worker`.

SOCKET is where the region's server waits for this member. May import `idc` and `host`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from host.errors import HostError
from host.ivshmem.client import join
from idc.errors import IdcError
from idc.layout import LayoutError
from idc.measure.worker import serve


def main() -> None:
    """Join the region, answer commands until standard input ends."""
    parser = argparse.ArgumentParser(prog="host.measure", description=__doc__)
    parser.add_argument("socket")
    parser.add_argument("--cpu", type=int, help="stay on this CPU")
    options = parser.parse_args()
    try:
        if options.cpu is not None:
            os.sched_setaffinity(0, {options.cpu})
        with join(options.socket) as region:
            serve(region, sys.stdin, sys.stdout)
    except (IdcError, HostError, LayoutError, OSError) as error:
        sys.stdout.write(json.dumps({"error": str(error)}) + "\n")
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
