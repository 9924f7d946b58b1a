"""The broker as a process.

    python3 -m host.broker --server SOCKET --control SOCKET [--patience SECONDS] [--piece BYTES] [--regions COUNT]
        [--ready FD] [--lifeline FD]

Runs in the foreground and logs to standard error. It answers {"op": "status"} at its control socket, framed as
host.wire says. With --lifeline it ends when that pipe does.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path

from host import wire
from host.broker.records import Limits
from host.broker.service import Service
from host.errors import HostError


def _stop(*_: object) -> None:
    raise SystemExit(0)


def main() -> None:
    """Command line: see the module's text."""
    limits = Limits()
    parser = argparse.ArgumentParser(prog="host.broker", description="copies between regions, for their members")
    parser.add_argument("--server", type=Path, required=True, metavar="SOCKET", help="control of the region server")
    parser.add_argument("--control", type=Path, required=True, metavar="SOCKET", help="where it answers about itself")
    parser.add_argument("--patience", type=float, default=limits.patience, metavar="SECONDS",
                        help="time for an owner to answer")
    parser.add_argument("--piece", type=int, default=limits.piece, metavar="BYTES", help="copied at a time")
    parser.add_argument("--regions", type=int, default=64, metavar="COUNT", help="regions mapped at a time")
    parser.add_argument("--ready", type=int, metavar="FD", help="write a newline here once requests are served")
    parser.add_argument("--lifeline", type=int, metavar="FD", help="end when this pipe does")
    args = parser.parse_args()
    if args.piece < 1 or args.patience <= 0:
        parser.error(f"--piece {args.piece}, --patience {args.patience:g}: must be more than 0")
    logging.basicConfig(level=logging.INFO, format="broker: %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, _stop)
    wire.raise_descriptor_limit()
    try:
        service = Service(args.server, args.control, Limits(args.piece, args.patience), args.regions)
    except HostError as error:
        sys.exit(f"broker: {error}")
    try:
        service.start()
        if args.ready is not None:
            os.write(args.ready, b"\n")
            os.close(args.ready)
        service.run(args.lifeline)
    except HostError as error:
        sys.exit(f"broker: {error}")
    finally:
        service.close()


if __name__ == "__main__":
    main()
