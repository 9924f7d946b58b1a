"""The registry as a process.

    python3 -m host.registry --server SOCKET --socket SOCKET --directory DIRECTORY [--nodes COUNT] [--bytes BYTES]
        [--watches COUNT] [--transactions COUNT] [--grace SECONDS] [--ready FD] [--lifeline FD]

Runs in the foreground and logs to standard error. With --lifeline it ends when that pipe does.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from host import serving
from host.registry.service import GRACE, Service
from host.registry.tree import Limits

#: Seconds that a thread keeps the interpreter: one that makes the file anew must not hold up answers for long.
_SWITCH = 0.0005


def main() -> None:
    """Command line: see the module's text."""
    limits = Limits()
    parser = argparse.ArgumentParser(prog="host.registry", description="a tree of keys for all domains")
    serving.add_options(parser)
    parser.add_argument("--socket", type=Path, required=True, metavar="SOCKET", help="where host processes connect")
    parser.add_argument("--directory", type=Path, required=True, metavar="DIRECTORY", help="what is kept on disk")
    parser.add_argument("--nodes", type=int, default=limits.nodes, metavar="COUNT", help="of one domain")
    parser.add_argument("--bytes", type=int, default=limits.bytes, metavar="BYTES", help="of names and values of one")
    parser.add_argument("--watches", type=int, default=limits.watches, metavar="COUNT", help="of one domain")
    parser.add_argument("--transactions", type=int, default=limits.transactions, metavar="COUNT", help="of one domain")
    parser.add_argument("--grace", type=float, default=GRACE, metavar="SECONDS",
                        help="for domains to come back before their ephemeral nodes vanish")
    args = parser.parse_args()
    numbers = {"--nodes": args.nodes, "--bytes": args.bytes, "--watches": args.watches,
               "--transactions": args.transactions, "--grace": args.grace}
    for option, number in numbers.items():
        if number <= 0:
            parser.error(f"{option} {number:g}: must be more than 0")
    sys.setswitchinterval(_SWITCH)
    serving.run("registry", args, lambda: Service(
        args.server, args.socket, args.directory, Limits(args.nodes, args.bytes, args.watches, args.transactions),
        args.grace))


if __name__ == "__main__":
    main()
