"""Control links: one endpoint for each domain, and what comes by it handed to the desk under that domain's name.

A control region has two rw members, a domain and the broker, and one channel between them; `host.broker` says how it is
called. Who a domain is follows from that region alone. Depends on host.broker, host.ivshmem.client and idc.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from host.broker import CHANNEL, MEMBER, PREFIX
from host.broker.checks import Domain
from host.errors import HostError
from host.ivshmem.client import join
from idc.endpoint import Client, Completion, Endpoint, IncomingTransaction, Resources, Result
from idc.errors import IdcError, MisuseError
from idc.layout import LayoutError, Rights
from idc.remote import controlframes as frames
from idc.remote.controlframes import Op
from idc.remote.resolution import Refusal, Refused
from idc.transport.shared import SharedPort

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from uuid import UUID

    from host.broker.desk import Desk
    from host.broker.directory import Known
    from idc.layout import RegionHeader
    from idc.remote.reference import Access
    from idc.remote.resolution import Resolution

#: Seconds until a control region is joined again that could not be joined, or whose link failed.
RETRY: Final = 1.0
#: Leases that wait to be given back to a domain that takes no messages; what is beyond that is its own loss.
RELEASES: Final = 4096
#: Seconds between two lines about why one link ended.
LOG_EVERY: Final = 1.0
#: Seconds for the greeting of the region server.
JOIN_TIMEOUT: Final = 1.0

log = logging.getLogger("host.broker")


def domain_of(header: RegionHeader) -> str | None:
    """The name of the domain whose control region this is; None if it is none."""
    name = header.name.removeprefix(PREFIX)
    members = {member.name: member.rights for member in header.members}
    if header.name == name or members != {name: Rights.RW, MEMBER: Rights.RW}:
        return None
    return name if any(channel.name == CHANNEL for channel in header.channels) else None


class Link(Client):
    """One domain's control link.

    Args:
        header: of its control region.
        name: of the domain.
        socket: where the broker's member connects.
        desk: where its requests go.
        incarnation: asks how often the domain has attached to that region.

    Raises:
        HostError, IdcError, LayoutError: the region cannot be joined now.
    """

    def __init__(self, header: RegionHeader, name: str, socket: Path, desk: Desk,
                 incarnation: Callable[[Domain], int]) -> None:
        self.domain = Domain(header.uuid, name, 0)
        self._log_after = 0.0
        self._releases: deque[int] = deque(maxlen=RELEASES)
        self._desk = desk
        self._incarnation = incarnation
        region = join(socket, timeout=JOIN_TIMEOUT, header=header)
        try:
            port = SharedPort(region, CHANNEL)
        except BaseException:
            region.close()
            raise
        accepts = frames.DOMAIN_ACCEPTS
        resources = Resources(frames.BROKER_ACCEPTS, requests=accepts.requests, messages=accepts.messages)
        self.endpoint = Endpoint(port, self, resources)

    def close(self) -> None:
        """End it."""
        try:
            self.endpoint.abandon()
        except MisuseError:
            log.exception("domain %s: its control region stays mapped", self.domain.name)
        self._desk.leave(self.domain.uuid)

    # -- what the endpoint tells

    def connect(self, endpoint: Endpoint) -> None:
        """Find out which incarnation this is, and tell it."""
        incarnation = self._incarnation(self.domain)
        self.domain = Domain(self.domain.uuid, self.domain.name, incarnation)
        self._desk.arrive(self.domain, time.monotonic())
        endpoint.submit_message(frames.identity(frames.Identity(self.domain.uuid, incarnation, self.domain.name)))

    def disconnect(self, endpoint: Endpoint, done: Callable[[], None]) -> None:
        """Whatever it asked for or owned is given up."""
        now = time.monotonic()
        if now >= self._log_after:  # a domain that connects and disconnects without end must not fill the disk
            self._log_after = now + LOG_EVERY
            log.info("domain %s: %s", self.domain.name, endpoint.reason)
        self._desk.leave(self.domain.uuid)
        self._releases.clear()
        done()

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


class Links:
    """All control links there are, kept in step with the directory.

    Args:
        desk, incarnation: as of a link.
    """

    def __init__(self, desk: Desk, incarnation: Callable[[Domain], int]) -> None:
        self.by_domain: dict[UUID, Link] = {}
        self._desk = desk
        self._incarnation = incarnation
        self._not_before: dict[UUID, float] = {}

    def sync(self, regions: Mapping[UUID, Known], now: float) -> float | None:
        """Join what is new, leave what was dropped. When to call again though nothing changed; None: not at all."""
        wanted = {uuid: (known, name) for uuid, known in regions.items()
                  if (name := domain_of(known.header)) is not None}
        for uuid in self.by_domain.keys() - wanted.keys():
            self.by_domain.pop(uuid).close()
        self._not_before = {uuid: at for uuid, at in self._not_before.items() if uuid in wanted}
        for uuid, (known, name) in wanted.items():
            if uuid in self.by_domain or now < self._not_before.get(uuid, now):
                continue
            try:
                self.by_domain[uuid] = Link(known.header, name, known.sockets[MEMBER], self._desk,
                                            self._incarnation)
                self._not_before.pop(uuid, None)
            except (HostError, IdcError, LayoutError, OSError) as error:
                if uuid not in self._not_before:
                    log.warning("domain %s: its control region cannot be joined now: %s", name, error)
                self._not_before[uuid] = now + RETRY
        return min(self._not_before.values(), default=None)

    def pump(self, now: float) -> bool:
        """Do what is due at every link. Whether anything was."""
        busy = False
        for uuid, link in tuple(self.by_domain.items()):
            try:
                busy |= link.endpoint.pump(0.0)
            except Exception:
                # Whatever one domain made go wrong, the others must not feel it.
                log.exception("domain %s: its control link failed", link.domain.name)
                self._drop(uuid, now)
                busy = True
        return busy

    def _drop(self, uuid: UUID, now: float) -> None:
        self.by_domain.pop(uuid).close()
        self._not_before[uuid] = now + RETRY
