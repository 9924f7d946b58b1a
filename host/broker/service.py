"""The broker's loop: control links, the region server's notices, requests about its state, copies in between.

Nothing in here is worth keeping: after kill -9 the next broker joins the control regions again and knows all that this
one knew but leases, which it asks for anew. Depends on host.broker, host.wire and idc.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import select
import socket
import time
from typing import TYPE_CHECKING, Any, Final

from host import wire
from host.broker.checks import Denied, Domain, Span
from host.broker.custody import Custody
from host.broker.desk import Desk
from host.broker.directory import Directory
from host.broker.links import Link
from host.controls import Links
from host.errors import HostError, ServerError
from idc.buffers.memory import copy_memory
from idc.errors import MisuseError
from idc.remote.resolution import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from host.broker.records import Limits
    from idc.remote.reference import Access
    from idc.remote.resolution import Resolution

#: Seconds of copying before the links are looked at again.
SLICE: Final = 0.001
#: Longest sleep, seconds; nothing depends on it.
NAP: Final = 1.0
#: Seconds for the region server to answer at the start.
START_TIMEOUT: Final = 5.0
#: Seconds until a region server that is away is looked for again.
SEARCH: Final = 0.2
#: Seconds that one who asks for the state has for his request.
STATUS_TIMEOUT: Final = 1.0

log = logging.getLogger("host.broker")


class Service:
    """All of the broker in one thread.

    Args:
        server: control socket of the region server.
        control: where requests about the state are answered: {"op": "status"}.
        limits: of each domain.
        most_regions: whose memory is mapped at a time.

    Raises:
        SocketPathError: `control` cannot be bound.
    """

    def __init__(self, server: Path, control: Path, limits: Limits | None = None, most_regions: int = 64) -> None:
        self.desk = Desk(self, limits)
        self.directory = Directory(server)
        self.custody = Custody(self.directory.open, most_regions)
        self.links = Links(lambda known, name: Link(known, name, self.desk, self._incarnation), log)
        self._control = control
        self._listener = wire.listen(control, socket.SOCK_SEQPACKET)
        self._callers: dict[int, socket.socket] = {}
        self._search_at = 0.0
        self._sync_at: float | None = 0.0

    def start(self) -> None:
        """Find the region server and join the control regions that there are. Raises ServerError."""
        self.directory.connect()
        poller = select.poll()
        poller.register(self.directory.fileno(), select.POLLIN)
        if not poller.poll(START_TIMEOUT * 1000):
            raise ServerError(f"the region server does not answer within {START_TIMEOUT:g} s")
        self._catch_up()
        self._sync_at = self.links.sync(self.directory.regions, time.monotonic())

    def run(self, lifeline: int | None) -> None:
        """Until the lifeline ends, or an exception."""
        while True:
            now = time.monotonic()
            self._follow(now)
            busy = self.links.pump(now)
            self.desk.tick(now)
            busy = self._copy() or busy
            if self._wait(lifeline, 0.0 if busy else self._nap()):
                return

    def close(self) -> None:
        """Leave everything."""
        self._control.unlink(missing_ok=True)
        self._listener.close()
        for sock in self._callers.values():
            sock.close()
        self.links.sync({}, 0.0)
        self.directory.close()
        self.custody.keep_only(set())

    def status(self) -> dict[str, Any]:
        """What is going on: plain data."""
        return {
            "domains": {domain.name: {"uuid": str(domain.uuid), "incarnation": domain.incarnation,
                                      "writes": self._written_by(domain.name)}
                        for domain in self.desk.domains.values()},
            "counts": {name: dataclasses.asdict(counts) for name, counts in self.desk.counts.items()},
            "jobs": self.desk.jobs, "leases": self.desk.leases,
            "mapped": len(self.custody), "mapped_most": self.custody.most, "opened": self.custody.opened,
            "masked": {link.domain.name: link.endpoint.status.masked for link in self.links.by_domain.values()},
        }

    def _written_by(self, name: str) -> list[str]:
        """Names of the regions of which a domain is an rw member, so that copies may concern them."""
        return [known.header.name for known in self.directory.regions.values() if name in known.sockets]

    # -- what the desk needs

    def ask(self, owner: Domain, reference: bytes, access: Access,
            answered: Callable[[Resolution | None], None]) -> bool:
        """See `host.broker.desk.Outside`."""
        link = self.links.by_domain.get(owner.uuid)
        return link is not None and link.ask(reference, access, answered)

    def release(self, owner: Domain, lease: int) -> None:
        """See there."""
        link = self.links.by_domain.get(owner.uuid)
        if link is not None:
            link.release(lease)

    def copy(self, source: Span, target: Span) -> None:
        """See there."""
        try:
            copy_memory(self.custody.memory(source.region), source.start, self.custody.memory(target.region),
                        target.start, source.length)
        except (HostError, MisuseError) as error:
            raise Denied(Refusal.FAILED, f"the broker cannot copy: {error}") from error

    # -- within

    def _incarnation(self, domain: Domain) -> int:
        try:
            self._catch_up()
        except ServerError as error:
            log.warning("domain %s: what was known last has to do: %s", domain.name, error)
        known = self.directory.regions.get(domain.uuid)
        return self.directory.incarnations[known.header.name].get(domain.name, 0) if known is not None else 0

    def _catch_up(self) -> None:
        """Learn what has changed, if anything has. Raises ServerError."""
        if not self.directory.notice():
            return
        try:
            self.directory.refresh()
        except ServerError:
            self.directory.close()  # the notice is used up: the next connection begins with one
            raise
        self.desk.regions_changed({uuid: known.header for uuid, known in self.directory.regions.items()})
        self.custody.keep_only(set(self.directory.regions))
        self._sync_at = 0.0

    def _follow(self, now: float) -> None:
        """Keep up with the region server, and join and leave control regions."""
        try:
            if self.directory.fileno() < 0 and now >= self._search_at:
                self._search_at = now + SEARCH
                self.directory.connect()
            self._catch_up()
        except ServerError as error:
            log.info("%s", error)
            self.directory.close()
        if self._sync_at is not None and now >= self._sync_at:
            self._sync_at = self.links.sync(self.directory.regions, now)

    def _copy(self) -> bool:
        """Pieces, for a while. Whether there were any."""
        end = time.monotonic() + SLICE
        worked = False
        while self.desk.work():
            worked = True
            if time.monotonic() >= end:
                break
        return worked

    def _nap(self) -> float:
        """Seconds to sleep at most; 0 if a link has something to do."""
        naps = [NAP]
        for link in self.links.by_domain.values():
            if not link.endpoint.arm():
                return 0.0
            naps.append(NAP if link.endpoint.patience is None else link.endpoint.patience)
        now = time.monotonic()
        search = self._search_at if self.directory.fileno() < 0 else None
        dues = [self.desk.next_tick(), self._sync_at, search]
        naps += [max(0.0, due - now) for due in dues if due is not None]
        return min(naps)

    def _wait(self, lifeline: int | None, nap: float) -> bool:
        """Sleep until something is to be done; answer who asks for the state. Whether the lifeline ended."""
        poller = select.poll()
        fds = [self._listener.fileno(), *self._callers]
        fds += [fd for fd in (lifeline, self.directory.fileno()) if fd is not None and fd >= 0]
        if nap:
            fds += [link.endpoint.fileno() for link in self.links.by_domain.values()]
        for fd in fds:
            poller.register(fd, select.POLLIN)
        ready = [fd for fd, _ in poller.poll(nap * 1000)]
        for fd in ready:
            if fd in self._callers:
                self._answer(self._callers[fd])
        if self._listener.fileno() in ready:
            self._accept()
        return lifeline in ready

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            sock, _ = self._listener.accept()
            if not wire.same_user(sock):
                sock.close()
                return
            sock.settimeout(STATUS_TIMEOUT)
            self._callers[sock.fileno()] = sock

    def _answer(self, sock: socket.socket) -> None:
        try:
            request = wire.receive_message(sock)
            if request is not None:
                wire.close_all(request[1])
                known = request[0].get("op") == "status"
                wire.send_message(sock, {"ok": True, **self.status()} if known else
                                  {"ok": False, "error": f"no request {request[0].get('op')!r}"})
                return
        except (OSError, HostError) as error:
            log.info("a caller went away: %s", error)
        del self._callers[sock.fileno()]
        sock.close()
