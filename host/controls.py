"""Control links: how broker and registry, members of each control region, keep a link to each domain.

Who a domain is follows from the region alone, as the region server describes it. Depends on host.control_region,
host.broker.directory, host.ivshmem.client and idc.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from host.control_region import domain_of
from host.errors import HostError
from host.ivshmem.client import join
from idc.endpoint import Client, Endpoint
from idc.errors import IdcError, MisuseError
from idc.layout import LayoutError
from idc.transport.shared import SharedPort

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Iterator, Mapping
    from uuid import UUID

    from host.broker.directory import Known
    from idc.endpoint import Resources
    from idc.transport.base import Port

#: Seconds until a control region is joined again that could not be joined, or whose link failed.
RETRY: Final = 1.0
#: Seconds between two lines about why one link ended.
LOG_EVERY: Final = 1.0
#: Seconds for the greeting of the region server.
JOIN_TIMEOUT: Final = 1.0


def open_link(known: Known, member: str, channel: str) -> SharedPort:
    """Join a control region. Raises HostError, IdcError, LayoutError, OSError if that cannot be done now."""
    region = join(known.sockets[member], timeout=JOIN_TIMEOUT, header=known.header)
    try:
        return SharedPort(region, channel)
    except BaseException:
        region.close()
        raise


class Link(Client):
    """One domain's link; what is done with it is its subclass's business.

    Args:
        port: where the domain is met; closed with this object.
        who: its name, for the log.
        resources: of the endpoint.
        log: where to say why it ended.

    Attributes:
        endpoint: to be driven.
    """

    def __init__(self, port: Port, who: str, resources: Resources, log: logging.Logger) -> None:
        self.who = who
        self._log_after = 0.0
        self._log = log
        self.endpoint = Endpoint(port, self, resources, who)

    def close(self) -> None:
        """End it."""
        try:
            self.endpoint.abandon()
        except MisuseError:
            self._log.exception("domain %s: its control region stays mapped", self.who)
        self.left()

    def left(self) -> None:
        """The domain is not connected any more: whatever it asked for or owned is given up. May be told twice."""
        raise NotImplementedError

    def pump(self) -> bool:
        """Do what is due, without waiting. Whether anything was."""
        return self.endpoint.pump(0.0)

    def disconnect(self, endpoint: Endpoint, done: Callable[[], None]) -> None:
        """See `Client`."""
        now = time.monotonic()
        if now >= self._log_after:  # a domain that connects and disconnects without end must not fill the disk
            self._log_after = now + LOG_EVERY
            self._log.info("domain %s: %s", self.who, endpoint.reason)
        self.left()
        done()


L = TypeVar("L", bound=Link)


class Links(Generic[L]):
    """All control links of one server, kept in step with the directory.

    Args:
        make: a link for a control region of the domain of that name; raises as `open_link`.
        log: of the server.

    Attributes:
        by_domain: by the uuid of the control region.
    """

    def __init__(self, make: Callable[[Known, str], L], log: logging.Logger) -> None:
        self.by_domain: dict[UUID, L] = {}
        self._make = make
        self._log = log
        self._not_before: dict[UUID, float] = {}

    def sync(self, regions: Mapping[UUID, Known], now: float) -> float | None:
        """Join what is new, leave what was dropped. When to call again though nothing changed; None: not at all."""
        wanted = {known.header.uuid: (known, name) for name, known in control_regions(regions)}
        for uuid in self.by_domain.keys() - wanted.keys():
            self.by_domain.pop(uuid).close()
        self._not_before = {uuid: at for uuid, at in self._not_before.items() if uuid in wanted}
        for uuid, (known, name) in wanted.items():
            if uuid in self.by_domain or now < self._not_before.get(uuid, now):
                continue
            try:
                self.by_domain[uuid] = self._make(known, name)
                self._not_before.pop(uuid, None)
            except (HostError, IdcError, LayoutError, OSError) as error:
                if uuid not in self._not_before:
                    self._log.warning("domain %s: its control region cannot be joined now: %s", name, error)
                self._not_before[uuid] = now + RETRY
        return min(self._not_before.values(), default=None)

    def pump(self, now: float) -> bool:
        """Do what is due at every link. Whether anything was."""
        busy = False
        for uuid, link in tuple(self.by_domain.items()):
            try:
                busy |= link.pump()
            except Exception:
                # Whatever one domain made go wrong, the others must not feel it.
                self._log.exception("domain %s: its control link failed", link.who)
                self.drop(uuid, now)
                busy = True
        return busy

    def drop(self, uuid: UUID, now: float) -> None:
        """End a link that failed; it is made again after a while."""
        self.by_domain.pop(uuid).close()
        self._not_before[uuid] = now + RETRY


def control_regions(regions: Mapping[UUID, Known]) -> Iterator[tuple[str, Known]]:
    """(domain, region) of those that are control regions."""
    for known in regions.values():
        if (name := domain_of(known.header)) is not None:
            yield name, known
