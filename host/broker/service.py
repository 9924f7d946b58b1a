"""The broker's loop: control links, the region server's notices, requests about its state, copies in between.

Nothing in here is worth keeping: after kill -9 the next broker joins the control regions again and knows all that this
one knew but leases, which it asks for anew. Depends on host.broker, host.wire and idc.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import time
from typing import TYPE_CHECKING, Any, Final

from host import wire
from host.broker.checks import Denied, Domain, Span
from host.broker.custody import Custody
from host.broker.desk import Desk
from host.broker.links import Link
from host.controls import Links
from host.errors import HostError, ServerError
from host.serving import Serving
from idc.buffers.memory import copy_memory
from idc.errors import MisuseError
from idc.remote.resolution import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from host.broker.records import Limits
    from idc.remote.reference import Access
    from idc.remote.resolution import Resolution

#: Seconds of copying before the links are looked at again.
SLICE: Final = 0.001
#: Seconds that one who asks for the state has for his request.
STATUS_TIMEOUT: Final = 1.0

log = logging.getLogger("host.broker")


class Service(Serving[Link]):
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
        super().__init__(server, Links(lambda known, name: Link(known, name, self.desk, self._incarnation), log), log)
        self.desk = Desk(self, limits)
        self.custody = Custody(self.directory.open, most_regions)
        self._control = control
        self._listener = wire.listen(control, socket.SOCK_SEQPACKET)
        self._callers: dict[int, socket.socket] = {}

    def close(self) -> None:
        """Leave everything."""
        self._control.unlink(missing_ok=True)
        self._listener.close()
        for sock in self._callers.values():
            sock.close()
        super().close()
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

    def _changed(self) -> None:
        self.desk.regions_changed({uuid: known.header for uuid, known in self.directory.regions.items()})
        self.custody.keep_only(set(self.directory.regions))

    def _work(self, now: float) -> bool:
        self.desk.tick(now)
        return self._copy()

    def _copy(self) -> bool:
        """Pieces, for a while. Whether there were any."""
        end = time.monotonic() + SLICE
        worked = False
        while self.desk.work():
            worked = True
            if time.monotonic() >= end:
                break
        return worked

    def _dues(self) -> list[float | None]:
        return [self.desk.next_tick()]

    def _files(self) -> list[int]:
        return [self._listener.fileno(), *self._callers]

    def _ready(self, ready: Sequence[int]) -> None:
        for fd in ready:
            if fd in self._callers:
                self._answer(self._callers[fd])
        if self._listener.fileno() in ready:
            self._accept()

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
