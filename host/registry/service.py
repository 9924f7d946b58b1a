"""The registry's loop: links, the region server's notices, host processes that connect, the disk.

Everything but what `host.registry.store` keeps can be lost: after kill -9 the next registry joins the control regions
again, and each domain's side sets its watches again. Depends on host.broker.directory, host.controls, host.registry.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from typing import TYPE_CHECKING, Final

from host import wire
from host.controls import RETRY, Links, control_regions, open_link
from host.registry import CHANNEL, MEMBER
from host.registry.desk import Desk
from host.registry.links import SeatLink
from host.registry.store import Store, Writer
from host.serving import Serving
from idc.registry.frames import HOST
from idc.transport.unix import AcceptedPort

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from host.broker.directory import Known
    from host.registry.tree import Limits
    from idc.endpoint import Endpoint

#: Seconds in which a domain has to come back after the registry started, before its ephemeral nodes vanish.
GRACE: Final = 10.0
#: Requests of each domain that are done before links and disk are looked at again.
ROUNDS: Final = 16
#: Host processes that are connected at a time; more wait until one ends.
HOST_LINKS: Final = 64

log = logging.getLogger("host.registry")


class Service(Serving[SeatLink]):
    """All of the registry, in one thread and one that writes.

    Args:
        server: control socket of the region server.
        path: where host processes connect; who may is decided by the socket's permissions, 0600.
        directory: what is kept there.
        limits: of each domain.
        grace: see GRACE.

    Raises:
        StoreError: the directory cannot be used.
        SocketPathError: `path` cannot be bound.
    """

    def __init__(self, server: Path, path: Path, directory: Path, limits: Limits | None = None,
                 grace: float = GRACE) -> None:
        store = Store(directory)
        try:
            self._listener = wire.listen(path, socket.SOCK_STREAM)
        except BaseException:
            store.close()
            raise
        super().__init__(server, Links(self._join, log), log)
        self.desk = Desk(store.state, limits)
        self._path = path
        self._writer = Writer(store)
        self._host: list[SeatLink] = []
        self._grace = grace
        self._orphans_at = time.monotonic() + grace

    def close(self) -> None:
        """Leave everything; what is being written is finished."""
        self._path.unlink(missing_ok=True)
        self._listener.close()
        for link in self._host:
            link.close()
        super().close()
        self._writer.close()

    # -- within

    def _join(self, known: Known, name: str) -> SeatLink:
        return SeatLink(open_link(known, MEMBER, CHANNEL), self.desk, name)

    def _sync(self, now: float) -> None:
        """A home for each domain that has a control region, and a link to it; none for those that have none now."""
        there = {name: known.header.uuid.bytes for name, known in control_regions(self.directory.regions)}
        for name in self.desk.known - there.keys():
            self.desk.dismiss(name)
        for name, uuid in there.items():
            self.desk.admit(name, uuid)
        self._sync_at = self.links.sync(self.directory.regions, now)

    def _work(self, now: float) -> bool:
        if self.desk.orphans and now >= self._orphans_at:
            self._orphans_at = now + self._grace
            self.desk.remove_orphans()
        busy = self._pump_host()
        for _ in range(ROUNDS):
            if not self.desk.work():
                break
            busy = True
        busy |= self._write()
        return self.desk.tell() or busy

    def _pump_host(self) -> bool:
        busy = False
        for link in tuple(self._host):
            try:
                busy |= link.pump()
                over = link.over
            except Exception:
                log.exception("a host process: its link failed")
                over = True
            if over:
                self._host.remove(link)
                link.close()
                busy = True
        return busy

    def _write(self) -> bool:
        """Deal with what has been written, and begin with what is to be. Whether anything was over."""
        done = self._writer.take()
        if done is not None:
            batch, why = done
            if why:
                self.desk.failed(batch, why)
                self._sync_at = time.monotonic() + RETRY  # homes that were to be made
            else:
                self.desk.written(batch)
        batch_next = self.desk.batch()
        if batch_next is not None:
            self._writer.start(batch_next)
        return done is not None

    def _endpoints(self) -> list[Endpoint]:
        return [link.endpoint for link in (*self.links.by_domain.values(), *self._host)]

    def _dues(self) -> list[float | None]:
        return [self._orphans_at if self.desk.orphans else None, self.desk.next_turn()]

    def _files(self) -> list[int]:
        return [self._writer.fileno(), *([self._listener.fileno()] if len(self._host) < HOST_LINKS else [])]

    def _ready(self, ready: Sequence[int]) -> None:
        if self._listener.fileno() in ready:
            self._accept()

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            sock, _ = self._listener.accept()
            if not wire.same_user(sock):
                sock.close()
                return
            self._host.append(SeatLink(AcceptedPort(sock), self.desk, HOST))
