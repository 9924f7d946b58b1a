"""Control links: one endpoint for each domain, and what comes by it handed to the desk under that domain's name.

Depends on host.broker, host.controls and idc.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from host import controls
from host.broker import CHANNEL, MEMBER
from host.broker.checks import Domain
from idc.endpoint import Completion, Endpoint, IncomingTransaction, Resources, Result
from idc.errors import IdcError
from idc.remote import controlframes as frames
from idc.remote.controlframes import Op
from idc.remote.resolution import Refusal, Refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from host.broker.desk import Desk
    from host.broker.directory import Known
    from idc.remote.reference import Access
    from idc.remote.resolution import Resolution

#: Leases that wait to be given back to a domain that takes no messages; what is beyond that is its own loss.
RELEASES: Final = 4096

log = logging.getLogger("host.broker")


class Link(controls.Link):
    """One domain's control link.

    Args:
        known: its control region.
        name: of the domain.
        desk: where its requests go.
        incarnation: asks how often the domain has attached to that region.

    Raises:
        HostError, IdcError, LayoutError, OSError: the region cannot be joined now.
    """

    def __init__(self, known: Known, name: str, desk: Desk, incarnation: Callable[[Domain], int]) -> None:
        self.domain = Domain(known.header.uuid, name, 0)
        self._releases: deque[int] = deque(maxlen=RELEASES)
        self._desk = desk
        self._incarnation = incarnation
        accepts = frames.DOMAIN_ACCEPTS
        resources = Resources(frames.BROKER_ACCEPTS, requests=accepts.requests, messages=accepts.messages)
        super().__init__(controls.open_link(known, MEMBER, CHANNEL), name, resources, log)

    def left(self) -> None:
        """See `host.controls.Link`."""
        self._desk.leave(self.domain.uuid)
        self._releases.clear()

    # -- what the endpoint tells

    def connect(self, endpoint: Endpoint) -> None:
        """Find out which incarnation this is, and tell it."""
        incarnation = self._incarnation(self.domain)
        self.domain = Domain(self.domain.uuid, self.domain.name, incarnation)
        self._desk.arrive(self.domain, time.monotonic())
        endpoint.submit_message(frames.identity(frames.Identity(self.domain.uuid, incarnation, self.domain.name)))

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        """COPY or REVOKE."""
        body = transaction.parameters
        op = frames.op_of(body)
        if op == Op.COPY:

            def answer(error: int, status: bytes) -> None:
                transaction.complete(status[:endpoint.peer_quotas.status_bytes], error)

            self._desk.copy(self.domain.uuid, body, answer, time.monotonic())
        elif op == Op.REVOKE:
            try:
                lease = frames.parse_lease(body)
            except frames.ControlError as error:
                transaction.complete(frames.reason(str(error)), Refusal.MALFORMED)
                return

            def done() -> None:
                transaction.complete()

            self._desk.revoke(self.domain.uuid, lease, done)
        else:
            transaction.complete(frames.reason(f"no request of kind {op}"), Refusal.MALFORMED)

    # -- what the desk wants

    def ask(self, reference: bytes, access: Access, answered: Callable[[Resolution | None], None]) -> bool:
        """See `host.broker.desk.Outside`."""

        def completed(completion: Completion) -> None:
            if completion.result is Result.OUTCOME_UNKNOWN:
                answered(None)
            elif completion.result is Result.OK:
                try:
                    answered(frames.parse_answer(completion.error, completion.status))
                except frames.ControlError as error:
                    answered(Refused(Refusal.FAILED, str(error)))
            else:
                answered(Refused(Refusal.FAILED, completion.reason))

        try:
            return self.endpoint.submit_transaction(frames.resolve(reference, access), completed) is Result.OK
        except IdcError as error:  # it accepts shorter parameters than a domain of ours does
            answered(Refused(Refusal.FAILED, str(error)))
            return True

    def release(self, lease: int) -> None:
        """See there. Sent when there is room."""
        self._releases.append(lease)
        self._send_releases()

    def _send_releases(self) -> None:
        while self._releases:
            body = frames.release(self._releases[0])
            try:
                if self.endpoint.submit_message(body, lambda _: self._send_releases()) is not Result.OK:
                    return
            except IdcError as error:  # it accepts shorter messages than a domain of ours does
                log.debug("domain %s: %s", self.domain.name, error)
            self._releases.popleft()
