"""The broker as a process.

    python3 -m host.broker --server SOCKET --control SOCKET [--patience SECONDS] [--piece BYTES] [--regions COUNT]
        [--ready FD] [--lifeline FD]

Runs in the foreground and logs to standard error. It answers {"op": "status"} at its control socket, framed as
host.wire says. With --lifeline it ends when that pipe does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from host import serving
from host.broker.records import Limits
from host.broker.service import Service


def main() -> None:
    """Command line: see the module's text."""
    limits = Limits()
    parser = argparse.ArgumentParser(prog="host.broker", description="copies between regions, for their members")
    serving.add_options(parser)
    parser.add_argument("--control", type=Path, required=True, metavar="SOCKET", help="where it answers about itself")
    parser.add_argument("--patience", type=float, default=limits.patience, metavar="SECONDS",
                        help="time for an owner to answer")
    parser.add_argument("--piece", type=int, default=limits.piece, metavar="BYTES", help="copied at a time")
    parser.add_argument("--regions", type=int, default=64, metavar="COUNT", help="regions mapped at a time")
    args = parser.parse_args()
    if args.piece < 1 or args.patience <= 0:
        parser.error(f"--piece {args.piece}, --patience {args.patience:g}: must be more than 0")
    serving.run("broker", args, lambda: Service(args.server, args.control, Limits(args.piece, args.patience),
                                                args.regions))


if __name__ == "__main__":
    main()
