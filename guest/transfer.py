"""`python3 -m guest.transfer send|receive`: one end of a file transfer, in the machine that runs it.

Speaks JSON lines on standard output: {"phase", "done", "size"} while it works, then {"outcome": {...}} or
{"error": "..."} with exit code 1. May import `idc` and `guest`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import socket
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from guest.ivshmem import open_region
from guest.vfio import VfioError
from idc.channel import ByteChannel, MessageChannel
from idc.conduit import ChannelConduit, SocketConduit
from idc.errors import IdcError, NotConnectedError, TimedOutError
from idc.transfer import Outcome, receive, send

if TYPE_CHECKING:
    from collections.abc import Iterator

    from idc.transfer import Conduit

#: Names of the two channels of a region that carry a transfer.
NOTES, BULK = "notes", "bulk"
#: Seconds between two progress lines.
PROGRESS_EVERY = 0.1


def say(**fields: object) -> None:
    """Write one JSON line to standard output."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


class ProgressLines:
    """Turns progress calls, of which there are thousands a second, into a few lines a second."""

    def __init__(self) -> None:
        self._next = 0.0
        self._phase = ""

    def __call__(self, phase: str, done: int, size: int) -> None:
        """Report; the first and the last call of a phase always make a line."""
        now = time.monotonic()
        if phase != self._phase or done == size or now >= self._next:
            self._phase, self._next = phase, now + PROGRESS_EVERY
            say(phase=phase, done=done, size=size)


@contextmanager
def region_conduit(region_name: str, timeout: float) -> Iterator[Conduit]:
    """The conduit over the two channels of a region; both ends may come in any order within `timeout` seconds."""
    with (open_region(region_name, timeout) as region,
          MessageChannel.attach(region, NOTES, timeout=timeout) as notes,
          ByteChannel.attach(region, BULK, timeout=timeout) as bulk):
        yield ChannelConduit(notes, bulk)


@contextmanager
def tcp_conduit(role: str, address: str, port: int, timeout: float) -> Iterator[Conduit]:
    """The conduit over TCP: the receiver listens on `address`, the sender connects to it."""
    if role == "receive":
        with socket.create_server((address, port)) as server:
            server.settimeout(timeout)
            say(phase="listening", done=0, size=0)
            try:
                connection, _ = server.accept()
            except TimeoutError as error:
                raise TimedOutError(f"nobody connected to {address}:{port} within {timeout:g} s") from error
    else:
        try:
            connection = socket.create_connection((address, port), timeout)
        except OSError as error:
            raise NotConnectedError(f"cannot connect to {address}:{port}: {error.strerror or error}") from error
    with connection:
        yield SocketConduit(connection)


def endpoint(text: str) -> tuple[str, int]:
    """Argument of --tcp."""
    address, _, port = text.rpartition(":")
    if not address or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not ADDRESS:PORT")
    return address, int(port)


def run(conduit: Conduit, options: argparse.Namespace) -> Outcome:
    """Play one role to its end."""
    if options.role == "send":
        return send(conduit, options.path, ProgressLines(), stall=options.stall, size=options.size)
    return receive(conduit, options.path, ProgressLines(), stall=options.stall, wait=options.wait)


def main() -> None:
    """Run one end of a transfer."""
    parser = argparse.ArgumentParser(prog="guest.transfer", description=__doc__)
    parser.add_argument("role", choices=["send", "receive"])
    parser.add_argument("path", type=Path, help="file to send, or where to put what arrives (file or directory)")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--region", help="name of the shared region")
    way.add_argument("--tcp", type=endpoint, metavar="ADDRESS:PORT", help="the receiver's address")
    parser.add_argument("--size", type=int, help="bytes to send; needed for a block device")
    parser.add_argument("--stall", type=float, default=30.0, help="seconds without progress before giving up")
    parser.add_argument("--wait", type=float, default=30.0, help="seconds to wait for the offer")
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds to wait for device and peer")
    options = parser.parse_args()
    try:
        if options.region:
            opened = region_conduit(options.region, options.timeout)
        else:
            address, port = options.tcp
            opened = tcp_conduit(options.role, address, port, options.timeout)
        with opened as conduit:
            outcome = run(conduit, options)
    except (IdcError, VfioError, OSError) as error:
        say(error=f"{error}")
        raise SystemExit(1) from error
    say(outcome=dataclasses.asdict(outcome))


if __name__ == "__main__":
    main()
