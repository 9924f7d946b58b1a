"""What the user of an endpoint brings, or sees: a client, resources, its status. Depends on idc.endpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from idc.endpoint.frames import ASK_BYTES, HEADER_BYTES, Quotas
from idc.endpoint.session import IncomingMessage, IncomingTransaction, Slots
from idc.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc.endpoint.endpoint import Endpoint
    from idc.endpoint.lifecycle import State
    from idc.endpoint.party import Sharing
    from idc.transport.base import Carrier


class Client:
    """What an endpoint tells whoever uses it; override what you need. Every call comes from within `Endpoint.pump`
    or a call of the client's own."""

    def appear(self, endpoint: Endpoint) -> None:
        """The peer is there."""

    def connect(self, endpoint: Endpoint) -> None:
        """Connected: submit."""

    def disconnect(self, endpoint: Endpoint, done: Callable[[], None]) -> None:
        """The connection is over and all that was outstanding has completed. Call `done` when ready for another."""
        done()

    def disappear(self, endpoint: Endpoint) -> None:
        """The peer is gone."""

    def message(self, endpoint: Endpoint, message: IncomingMessage) -> None:
        """A message came; complete it, now or later."""
        message.complete()

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        """A transaction came; complete it, now or later."""
        transaction.fail("this endpoint handles no transactions")


class Resources:
    """All that an endpoint will ever need, set aside beforehand. Serves one endpoint at a time, many in turn.

    Args:
        accepts: what the peer may do: see Quotas.
        requests: own transactions outstanding at a time.
        messages: own messages outstanding at a time.
        remote: what remote buffers need, an `idc.remote.Remote`; without it the endpoint has none.
    """

    def __init__(self, accepts: Quotas | None = None, *, requests: int = 16, messages: int = 16,
                 remote: Sharing | None = None) -> None:
        self.accepts = accepts or Quotas()
        self.remote = remote
        self.requests = Slots(requests)
        self.messages = Slots(messages)
        self.user: Endpoint | None = None

    @property
    def frames(self) -> int:
        """Most frames that can be under way in one direction: own submissions, answers, HELLO and BYE."""
        asks = self.remote.asks.count + self.remote.serves if self.remote is not None else 0
        return self.requests.count + self.messages.count + self.accepts.requests + self.accepts.messages + asks + 2

    def check(self, carrier: Carrier, accepts: Quotas) -> None:
        """Raise ProtocolError if the carrier has no room for what these need, and for what the peer may do."""
        if carrier.capacity < (needed := self.frames):
            raise ProtocolError(f"the carrier holds {carrier.capacity} frames each way, the quotas need {needed}")
        needed = HEADER_BYTES + max(accepts.body_bytes, ASK_BYTES if self.remote is not None else 0)
        if carrier.frame_bytes < needed:
            raise ProtocolError(f"the carrier's frames hold {carrier.frame_bytes} bytes, the quotas need {needed}")


class Status(NamedTuple):
    """How an endpoint is, at one moment.

    Attributes:
        state: see `idc.endpoint.lifecycle`.
        reason: why the last connection ended, in words.
        connections: how many there were so far.
        outstanding: own submissions that the peer has not completed. As many as the quotas allow, and for long: it is
            slow, or stopped.
        held: received ones that this side has not completed.
        masked: how often its doorbell was masked, because the peer rang without end.
        masked_now: whether it is, at this moment: what comes is found by a timer.
    """

    state: State
    reason: str
    connections: int
    outstanding: int
    held: int
    masked: int
    masked_now: bool
