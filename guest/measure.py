"""`python3 -m guest.measure --region NAME`: a VM's end of a measurement; see `idc.measure.worker`.

May import `idc` and `guest`.
"""

from __future__ import annotations

import argparse
import json
import sys

from guest.ivshmem import open_region
from guest.vfio import VfioError
from idc.errors import IdcError
from idc.measure.worker import serve


def main() -> None:
    """Open the region, answer commands until standard input ends."""
    parser = argparse.ArgumentParser(prog="guest.measure", description=__doc__)
    parser.add_argument("--region", required=True)
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds to wait for the device")
    options = parser.parse_args()
    try:
        with open_region(options.region, options.timeout) as region:
            serve(region, sys.stdin, sys.stdout)
    except (IdcError, VfioError, OSError) as error:
        sys.stdout.write(json.dumps({"error": str(error)}) + "\n")
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
