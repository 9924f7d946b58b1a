"""A caller whose usual transactions are the core's, over shared memory, and a peer that is played by hand."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

from support import LocalRegion

from idc.endpoint import Client, Endpoint, Resources
from idc.endpoint.blocking import Caller
from idc.endpoint.frames import Kind, Quotas, encode, hello, parse
from idc.layout import ChannelSpec
from idc.layout import Kind as ChannelKind
from idc.transport.shared import SharedPort

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from idc.endpoint import IncomingMessage, IncomingTransaction
    from idc.transport.shared import SharedCarrier

CHANNELS = (ChannelSpec("calls", ChannelKind.MESSAGE, "front", "back", 128 * 512, 512),)


class Hooked(Client):
    """Does what it is told with each transaction; by default echoes."""

    def __init__(self) -> None:
        self.kept: list[IncomingTransaction] = []
        self.bodies: list[bytes] = []
        self.does: Callable[[Endpoint, IncomingTransaction], object] = lambda _, item: item.complete(item.parameters)
        self.done: list[Callable[[], None]] = []

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        self.does(endpoint, transaction)

    def keep(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        del endpoint
        self.kept.append(transaction)

    def message(self, endpoint: Endpoint, message: IncomingMessage) -> None:
        self.bodies.append(message.body)
        message.complete()


@contextlib.contextmanager
def quick(resources: Resources | None = None, accepts: Quotas | None = None
          ) -> Iterator[tuple[Caller, Hooked, SharedCarrier]]:
    """A caller whose next transaction, of either side, is the core's; and a peer that is played by hand.

    Args:
        resources: the caller's, or default ones.
        accepts: what the peer does; by default the usual.
    """
    region, client = LocalRegion(CHANNELS), Hooked()
    try:
        with region.join(0) as front, region.join(1) as back:
            mine, theirs = (SharedPort(mapped, "calls", spin=0.0, release=lambda: None) for mapped in (front, back))
            made, peer = Caller(mine, resources or Resources(), client), None
            for _ in range(50):
                made.endpoint.pump(0.0)
                theirs.look()
                peer = peer or theirs.connection()
            assert peer is not None
            peer.post(hello(accepts or Quotas()))
            made.connect(10)
            assert len(peer.take(0.0)) == 1  # its HELLO
            made.endpoint.pump(0.0)
            armed(made)
            try:
                yield made, client, peer
            finally:
                made.close()
                theirs.close()
    finally:
        region.close()


def armed(made: Caller) -> None:
    """Both are left to the core."""
    assert made.endpoint._line is not None
    assert made._slots.line is not None


def next_tag(made: Caller) -> int:
    """Of the transaction that the core sends next."""
    assert made._slots.line is not None
    return int(made._slots.line.tag) + 0x10000


def play(peer: SharedCarrier, delays: dict[bytes, float], count: int) -> threading.Thread:
    """A peer that answers each request after so many seconds."""
    def run() -> None:
        due: list[tuple[float, int, bytes]] = []
        left, end = count, time.monotonic() + 30
        while left and time.monotonic() < end:
            for frame in peer.take(0.005):
                _, _, tag, body = parse(frame)
                due.append((time.monotonic() + delays[body], tag, body))
            for item in [item for item in due if item[0] <= time.monotonic()]:
                due.remove(item)
                peer.send(encode(Kind.REPLY, item[1], item[2] + b"!"))
                left -= 1

    thread = threading.Thread(target=run)
    thread.start()
    return thread
