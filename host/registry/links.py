"""Links to the registry: one endpoint for each domain, by its control region, and for each host process, by a socket.

Who asks follows from the link alone. Depends on host.controls, host.registry and idc.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from host import controls
from idc.endpoint import Completion, Endpoint, IncomingTransaction, Resources, Result, State
from idc.errors import IdcError
from idc.registry import frames

if TYPE_CHECKING:
    from collections.abc import Callable

    from host.registry.desk import Desk, Seat
    from idc.transport.base import Port

log = logging.getLogger("host.registry")


class SeatLink(controls.Link):
    """One link; its domain has a seat at the desk while it is connected.

    Args:
        port: where the domain is met; closed with this object.
        desk: where its requests go.
        who: the domain, or `idc.registry.frames.HOST`.
    """

    def __init__(self, port: Port, desk: Desk, who: str) -> None:
        self._desk = desk
        self._seat: Seat | None = None
        self._open: set[IncomingTransaction] = set()
        messages = frames.DOMAIN_ACCEPTS.messages
        super().__init__(port, who, Resources(frames.REGISTRY_ACCEPTS, requests=0, messages=messages), log)

    def left(self) -> None:
        """See `host.controls.Link`."""
        if self._seat is not None:
            self._desk.leave(self._seat)
            self._seat = None
        # The desk answers no one who has left, and an endpoint takes no new connection while it holds a transaction.
        while self._open:
            self._open.pop().complete()

    @property
    def over(self) -> bool:
        """Whether, after `pump`, the peer is not there."""
        return self.endpoint.state is State.ABSENT

    # -- what the endpoint tells

    def connect(self, endpoint: Endpoint) -> None:
        """Give it a seat."""
        self.left()
        self._seat = self._desk.arrive(self.who, self)

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        """A request."""
        assert self._seat is not None

        room = endpoint.peer_quotas.status_bytes  # of this connection, whatever has become of it when it is answered

        def answer(error: int, status: bytes) -> None:
            if len(status) > room:
                error, status = frames.Fault.REFUSED, frames.reason(f"the answer of {len(status)} bytes is longer than "
                                                                    f"the {room} that this domain accepts")[:room]
            if transaction in self._open:
                self._open.remove(transaction)
                transaction.complete(status, error)

        self._open.add(transaction)
        self._desk.request(self._seat, transaction.parameters, answer)

    # -- what the desk wants

    @property
    def room(self) -> int:
        """See `host.registry.desk.Outside`."""
        return min(self.endpoint.peer_quotas.parameter_bytes, frames.DOMAIN_ACCEPTS.parameter_bytes)

    def event(self, body: bytes, done: Callable[[], None]) -> bool:
        """See `host.registry.desk.Outside`."""

        def completed(_: Completion) -> None:
            done()

        try:
            return self.endpoint.submit_message(body, completed) is Result.OK
        except IdcError as error:  # it accepts shorter messages than a domain of ours does
            log.info("domain %s gets no events: %s", self.who, error)
            return False
