"""A domain's side of its control link: asks its broker for copies, and answers the broker about its own exports.

    control = Control(open_port(os.environ[VARIABLE]))
    who = control.identify(timeout=10)
    exports = Exports(domain=who.domain, incarnation=who.incarnation, regions=Regions(link))
    control.serve(exports)

Its endpoint is driven like any other, in the thread of those that use the same exports; while nobody drives it, others
wait for what this domain owns, up to the broker's patience. Implements `idc.remote.broker.Broker`. Depends on
idc.endpoint and idc.remote.
"""

from __future__ import annotations

import logging
import struct
import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Protocol, Self

from idc.endpoint import Client, Completion, Endpoint, IncomingMessage, IncomingTransaction, Resources, Result, State
from idc.errors import MisuseError, TimedOutError
from idc.remote import controlframes as frames
from idc.remote.controlframes import CopyRequest, Identity, Op
from idc.remote.reference import Access, parse
from idc.remote.resolution import Lease, Refusal, Refused
from idc.transport.address import CONTROL_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc.remote.resolution import Resolution
    from idc.transport.base import Port

#: Where a domain finds the address of its control link.
VARIABLE: Final = CONTROL_VARIABLE
#: Slots for REVOKE, of the requests that a broker accepts; the rest are for COPY.
_REVOKES: Final = 8

log = logging.getLogger("idc.remote")


class Owner(Protocol):
    """What a control link needs of the exports; see `idc.remote.exports.Exports`."""

    def resolve(self, data: bytes, want: Access, holder: Control) -> Resolution:
        """The answer to RESOLVE."""

    def release(self, holder: Control, lease: int) -> None:
        """The holder has given a lease back. Raises MisuseError if it had none of that number."""

    def drop_holder(self, holder: Control) -> None:
        """The holder is gone, with all its leases."""


class Control(Client):
    """A control link.

    Args:
        port: where the broker is met.

    Attributes:
        name: of the broker as a holder of leases.
        endpoint: to be driven.
        identity: as the broker said last; None before that.
    """

    name = "the broker"

    def __init__(self, port: Port) -> None:
        self.identity: Identity | None = None
        self._owner: Owner | None = None
        self._revoking: deque[int] = deque()
        self._revokes = 0
        self._copies = 0
        resources = Resources(frames.DOMAIN_ACCEPTS, requests=frames.BROKER_ACCEPTS.requests, messages=0)
        self.endpoint = Endpoint(port, self, resources)

    def identify(self, timeout: float) -> Identity:
        """Who this domain is, once the broker has said so; drives the endpoint. Raises TimedOutError after seconds."""
        deadline = time.monotonic() + timeout
        while self.identity is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimedOutError(f"the broker did not say within {timeout:g} s who this domain is: does it run?")
            self.endpoint.pump(min(left, 1.0))
        return self.identity

    def serve(self, owner: Owner) -> None:
        """From now on answer the broker about these exports. Raises MisuseError if others are served already."""
        if self._owner is not None:
            raise MisuseError("this control link serves exports already")
        self._owner = owner

    def close(self) -> None:
        """Destroy the endpoint. Idempotent."""
        self.endpoint.abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- as a broker

    def copy(self, source: bytes, target: bytes, length: int, done: Callable[[Completion], None], *,
             source_offset: int = 0, target_offset: int = 0) -> Result:
        """See `idc.remote.broker.Broker`. Raises MisuseError for an offset or length that is no u64."""
        if self._copies >= frames.BROKER_ACCEPTS.requests - _REVOKES:
            return Result.BACK_PRESSURED
        asked = CopyRequest(source, target, source_offset, target_offset, length)
        lease: Lease | None = None
        try:
            request = frames.copy(asked)
            if (lease := self._own(source, Access.READ)) is not None:
                request = frames.copy(replace(asked, source_lease=lease))
            elif (lease := self._own(target, Access.WRITE)) is not None:
                request = frames.copy(replace(asked, target_lease=lease))
        except struct.error as error:
            raise MisuseError(f"{length} bytes from {source_offset} to {target_offset}: {error}") from error

        def completed(completion: Completion) -> None:
            self._copies -= 1
            if lease is not None:
                self._given_back(lease.lease)
            done(_copied(completion))

        result = self.endpoint.submit_transaction(request, completed)
        if result is Result.OK:
            self._copies += 1
        elif lease is not None:
            self._given_back(lease.lease)
        return result

    def _own(self, reference: bytes, want: Access) -> Lease | None:
        """A lease on a buffer of this domain's own, so that the broker need not ask for one; None if it has to."""
        who = self.identity
        if self._owner is None or who is None or self.endpoint.state is not State.CONNECTED:
            return None
        try:
            if parse(reference).owner != who.domain:
                return None
        except MisuseError:
            return None  # the broker will say what is wrong with it
        answer = self._owner.resolve(reference, want, self)
        return answer if isinstance(answer, Lease) else None

    # -- as a holder of leases

    def revoke(self, lease: int) -> None:
        """Ask the broker for a lease back; the exports are told when it has given it, or the link is lost."""
        self._revoking.append(lease)
        self._send_revokes()

    def _send_revokes(self) -> None:
        while self._revoking and self._revokes < _REVOKES:
            lease = self._revoking[0]

            def completed(completion: Completion, lease: int = lease) -> None:
                self._revokes -= 1
                if completion.result is not Result.OUTCOME_UNKNOWN:
                    self._given_back(lease)
                self._send_revokes()

            if self.endpoint.submit_transaction(frames.revoke(lease), completed) is not Result.OK:
                return  # no connection: `disconnect` drops all that the broker held
            self._revoking.popleft()
            self._revokes += 1

    def _given_back(self, lease: int) -> None:
        if self._owner is not None:
            try:
                self._owner.release(self, lease)
            except MisuseError as error:
                log.info("%s", error)  # it had given it back by itself, as the request was under way

    # -- what the endpoint tells

    def disconnect(self, endpoint: Endpoint, done: Callable[[], None]) -> None:
        """The broker has no leases any more."""
        self._revoking.clear()
        if self._owner is not None:
            self._owner.drop_holder(self)
        done()

    def message(self, endpoint: Endpoint, message: IncomingMessage) -> None:
        """IDENTITY or RELEASE."""
        try:
            op = frames.op_of(message.body)
            if op == Op.IDENTITY:
                self.identity = frames.parse_identity(message.body)
            elif op == Op.RELEASE:
                self._given_back(frames.parse_lease(message.body))
            else:
                log.warning("the broker sent a message of kind %d, which means nothing here", op)
        except frames.ControlError as error:
            log.warning("the broker sent %s", error)
        message.complete()

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        """RESOLVE."""
        try:
            reference, access = frames.parse_resolve(transaction.parameters)
        except frames.ControlError as error:
            transaction.complete(frames.reason(str(error)), Refusal.MALFORMED)
            return
        if self._owner is None:
            transaction.complete(frames.reason("this domain exports nothing yet"), Refusal.NOT_SERVED)
            return
        answer = self._owner.resolve(reference, access, self)
        if isinstance(answer, Refused):
            transaction.complete(frames.reason(answer.reason), answer.refusal)
        else:
            transaction.complete(frames.answer(answer))


def _copied(completion: Completion) -> Completion:
    """As `Broker` has it: a refusal is an error."""
    if completion.result is Result.OK and completion.error:
        reason = completion.status.decode(errors="replace")
        return Completion(Result.ERROR, completion.error, reason=f"the broker refuses: {reason}")
    return completion


