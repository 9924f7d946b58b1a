"""Links to the registry: one endpoint for each domain, by its control region, and for each host process, by a socket.

Who asks follows from the link alone. Depends on host.broker, host.registry, host.ivshmem.client and idc.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from idc.endpoint import Client, Completion, Endpoint, IncomingTransaction, Resources, Result
from idc.errors import IdcError, MisuseError
from idc.registry import frames

if TYPE_CHECKING:
    from collections.abc import Callable

    from host.registry.desk import Desk, Seat
    from idc.transport.base import Port

#: Doorbells in a row behind which there was nothing, before a link is not listened to for DEAF seconds.
IDLE_RINGS: Final = 64
DEAF: Final = 0.01

log = logging.getLogger("host.registry")


class SeatLink(Client):
    """One link; its domain has a seat at the desk while it is connected.

    Args:
        port: where the domain is met; closed with this object.
        desk: where its requests go.
        who: the domain, or `idc.registry.frames.HOST`.

    Attributes:
        endpoint: to be driven.
        deaf_until: until then its doorbell is not listened to, and it is looked at now and then.
        deafened: how often that was so.
    """

    def __init__(self, port: Port, desk: Desk, who: str) -> None:
        self.who = who
        self.deaf_until = 0.0
        self.deafened = 0
        self._idle_rings = 0
        self._desk = desk
        self._seat: Seat | None = None
        accepts = frames.DOMAIN_ACCEPTS
        self.endpoint = Endpoint(port, self, Resources(frames.REGISTRY_ACCEPTS, requests=0, messages=accepts.messages),
                                 who)

    def close(self) -> None:
        """End it."""
        try:
            self.endpoint.abandon()
        except MisuseError:
            log.exception("domain %s: its region stays mapped", self.who)
        self._leave()

    def pump(self) -> bool:
        """Take what came, without waiting. Whether anything did."""
        busy = self.endpoint.pump(0.0)
        if busy:
            self._idle_rings = 0
        return busy

    def rung(self, now: float) -> None:
        """Its doorbell woke the registry. Nobody mediates those: who rings for nothing is not heard for a while."""
        self._idle_rings += 1
        if self._idle_rings > IDLE_RINGS:
            self._idle_rings = 0
            self.deafened += 1
            self.deaf_until = now + DEAF

    # -- what the endpoint tells

    def connect(self, endpoint: Endpoint) -> None:
        """Give it a seat."""
        self._leave()
        self._seat = self._desk.arrive(self.who, self)

    def disconnect(self, endpoint: Endpoint, done: Callable[[], None]) -> None:
        """What it had open is given up."""
        log.info("domain %s: %s", self.who, endpoint.reason)
        self._leave()
        done()

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        """A request."""
        assert self._seat is not None

        def answer(error: int, status: bytes) -> None:
            room = endpoint.peer_quotas.status_bytes
            if len(status) > room:
                error, status = frames.Fault.REFUSED, frames.reason(f"the answer of {len(status)} bytes is longer than "
                                                                    f"the {room} that this domain accepts")[:room]
            transaction.complete(status, error)

        self._desk.request(self._seat, transaction.parameters, answer)

    # -- what the desk wants

    def event(self, body: bytes, done: Callable[[], None]) -> bool:
        """See `host.registry.desk.Outside`."""

        def completed(_: Completion) -> None:
            done()

        try:
            return self.endpoint.submit_message(body, completed) is Result.OK
        except IdcError as error:  # it accepts shorter messages than a domain of ours does
            log.info("domain %s gets no events: %s", self.who, error)
            return False

    def _leave(self) -> None:
        if self._seat is not None:
            self._desk.leave(self._seat)
            self._seat = None
