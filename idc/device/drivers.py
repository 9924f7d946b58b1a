"""All drivers of a domain: kept in step with what the host writes into the domain's home, their states published there.

    host writes keys ──▶ watch ──▶ ends made, closed      the other end's state ──▶ watch ──▶ the end looks
                                   each end's state ──▶ its key, ephemeral, read by the other end and the host

One thread; a domain has one link to the registry, so all its drivers are in the process that has it. While the
registry is away the devices go on, and what has changed is published when it is back. Depends on idc.device,
idc.registry.
"""

from __future__ import annotations

import functools
import logging
import select
import time
from typing import TYPE_CHECKING, Final

from idc.device import keys
from idc.device.classes import CHANNEL, find
from idc.device.driver import SOCKETS
from idc.device.end import End, Told
from idc.device.states import Role, pack, parse
from idc.endpoint import Completion, Result, State
from idc.errors import DeniedError, IdcError, NoSuchKeyError, OutcomeUnknownError, QuotaError, TimedOutError
from idc.registry.client import result_of
from idc.registry.frames import Op, Request
from idc.transport.address import open_port

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from idc.device.classes import DeviceClass
    from idc.registry import Event, Registry, Watch
    from idc.transport.base import Port

#: Longest sleep, seconds; nothing depends on it but how soon a lost registry is looked for.
NAP: Final = 0.5
#: Pause before the registry is asked again that did not answer, seconds.
AGAIN: Final = 0.2
#: Seconds that the ends have to close when the drivers are unloaded.
UNLOAD: Final = 5.0

log = logging.getLogger("idc.device")


class Drivers:
    """The drivers of the domain whose link to the registry this is.

    Args:
        registry: the link; the caller's, who closes it after `unload`.
        address: makes an address of this domain of REGION/CHANNEL.
        sockets: directory for the sockets of front ends.
        classes: finds a device class by name; raises MisuseError.

    Attributes:
        ends: by the path of their keys.
    """

    def __init__(self, registry: Registry, address: Callable[[str], str], sockets: Path = SOCKETS,
                 classes: Callable[[str], type[DeviceClass]] = find) -> None:
        self.ends: dict[str, End] = {}
        self._registry = registry
        self._address = address
        self._sockets = sockets
        self._classes = functools.cache(classes)  # to look for it takes longer than all the rest
        self._scan: set[Role] = set()
        self._changed: dict[str, tuple[Role, Mapping[str, bytes] | None]] = {}
        self._unwatched: set[str] = set()
        self._scan_after = 0.0
        self._look: set[str] = set()
        self._watches: dict[str, Watch] = {}
        self._stale: set[str] = set()
        self._sent: set[str] = set()
        self._domain = registry.domain
        self._held: dict[str, Port] = {}
        self._links = False
        for role in keys.roles():
            self._watch_all(role)
        registry.watch(keys.links(self._domain), lambda _: self._links_changed())

    def _watch_all(self, role: Role) -> None:
        base = keys.below(self._domain, role)
        self._registry.watch(base, lambda event: self._ends_changed(role, base, event), others=True, nodes=True)

    def _ends_changed(self, role: Role, base: str, event: Event) -> None:
        """Something at or below that path: what is to be read again, unless the event says all of an end."""
        parts = event.path.removeprefix(base).split("/")[1:]
        depth = keys.depth(role)
        if len(parts) < depth:
            self._scan.add(role)
        else:
            self._changed["/".join((base, *parts[:depth]))] = role, event.nodes if len(parts) == depth else None

    def _links_changed(self) -> None:
        self._links = True

    def work(self) -> bool:
        """Do all that is due, without waiting. Whether there was anything."""
        busy = self._registry.pump(0.0)
        busy |= self._learn()
        now = _now()
        for path, end in tuple(self.ends.items()):
            busy |= end.work(now)
            if end.over and path in self._stale:
                self._forget(path)
                busy = True
        return self._publish(now[1]) or busy

    def wait(self, timeout: float, *more: int) -> None:
        """Sleep until there is something to do, one of the descriptors is readable, or `timeout` seconds are over."""
        endpoints = [self._registry.endpoint]
        fds = list(more)
        for end in self.ends.values():
            if end.driver is not None:
                endpoints += end.driver.endpoints()
                fds += end.driver.fds()
        naps, poller = [timeout, NAP], select.poll()
        for endpoint in endpoints:
            if endpoint.state is State.DESTROYED:
                continue
            if not endpoint.arm():
                return
            if (patience := endpoint.patience) is not None:
                naps.append(patience)
            fds.append(endpoint.fileno())
        clock = time.monotonic()
        naps += [max(0.0, due - clock) for end in self.ends.values() if (due := end.due) is not None]
        naps += [max(0.0, end.passing - clock) for path, end in self.ends.items()
                 if end.dirty and end.passing and path not in self._sent]
        if self._unread:
            naps.append(max(0.0, self._scan_after - clock))
        for fd in fds:
            poller.register(fd, select.POLLIN)
        poller.poll(min(naps) * 1000)

    def unload(self, why: str = "unloaded") -> None:
        """Close all ends in order, as far as that can be done within UNLOAD seconds, and say so in their states."""
        deadline = time.monotonic() + UNLOAD
        for end in self.ends.values():
            end.unwant(why, gone=False)
        while time.monotonic() < deadline:
            now, busy = _now(), False
            for end in self.ends.values():
                busy |= end.work(now)
            self._registry.pump(0.0 if busy else 0.005)
            self._publish(now[1])
            if all(end.over and not end.dirty for end in self.ends.values()) and not self._sent:
                break
        for end in self.ends.values():
            end.kill()
        while self._held:
            self._held.popitem()[1].close()

    # -- what the host and the other ends say

    @property
    def _unread(self) -> bool:
        return bool(self._scan or self._changed or self._unwatched or self._links or self._curious())

    def _curious(self) -> str:
        """An end that has to know now what the other end says; empty if there is none."""
        return next((path for path in self._look if self.ends[path].curious), "")

    def _learn(self) -> bool:
        """Read what was changed. Whether anything was read."""
        if not self._unread or time.monotonic() < self._scan_after:
            return False
        if self._registry.endpoint.state is not State.CONNECTED:
            return False  # each watch begins anew with the next connection
        try:
            while self._scan:
                role = next(iter(self._scan))
                self._scan.discard(role)  # first: what changes while it is read is read again
                # What events brought before is older than what is read now, and may be of devices that are gone.
                self._changed = {path: what for path, what in self._changed.items() if what[0] is not role}
                try:
                    self._read_all(role)
                except BaseException:
                    self._scan.add(role)
                    raise
            while self._changed:
                path, (role, nodes) = self._changed.popitem()
                try:
                    self._read_end(path, role, self._tree(path) if nodes is None else nodes)
                except BaseException:
                    self._changed.setdefault(path, (role, None))
                    raise
            while self._unwatched:
                self._watch_peer(self._unwatched.pop())
            while path := self._curious():
                self._look.discard(path)  # first, as above
                try:
                    self._read_peer(path)
                except BaseException:
                    self._look.add(path)
                    raise
            if self._links:
                self._hold_links()
        except (TimedOutError, OutcomeUnknownError, QuotaError) as error:
            log.warning("the registry: %s", error)
            self._scan_after = time.monotonic() + AGAIN
        return True

    def _read_all(self, role: Role) -> None:
        base, depth = keys.below(self._domain, role), keys.depth(role)
        found: dict[str, dict[str, bytes]] = {path: {} for path, end in self.ends.items() if end.role is role}
        for below, value in self._tree(base).items():
            parts = below.split("/")
            if len(parts) > depth:
                found.setdefault("/".join((base, *parts[:depth])), {})["/".join(parts[depth:])] = value
        for path, nodes in found.items():
            self._read_end(path, role, nodes)

    def _tree(self, path: str) -> dict[str, bytes]:
        try:
            return self._registry.tree(path)
        except NoSuchKeyError:
            return {}

    def _read_end(self, path: str, role: Role, nodes: Mapping[str, bytes]) -> None:
        """What the host says of one end: make it, have it closed, or nothing is new."""
        id_, close, end = nodes.get("id"), nodes.get("close"), self.ends.get(path)
        if id_ is None:  # not attached, or not any more
            if end is not None:
                self._stale.add(path)
                end.unwant("detached")
        elif end is None:
            told = self._told(role, id_, nodes)
            if told is not None and close is None:
                parts = tuple(path.removeprefix(keys.below(self._domain, role)).split("/")[1:])
                self.ends[path] = End(keys.name_of(role, self._domain, parts), role, self._domain, told,
                                      self._classes, self._sockets, _now())
        elif end.told.id != id_:
            self._stale.add(path)
            end.unwant("attached anew")
        elif close is not None:
            end.unwant(close.decode("utf-8", "replace") or "detached")

    def _hold_links(self) -> None:
        """Map the links that stay plugged, so that the next device need not wait for that, and let go of others."""
        base = keys.links(self._domain)
        self._links = False  # first: what changes while it is read is read again
        try:
            wanted = self._tree(base).keys() - {""}
        except BaseException:
            self._links = True
            raise
        for region in self._held.keys() - wanted:
            self._held.pop(region).close()
        for region in wanted - self._held.keys():
            try:
                self._held[region] = open_port(self._address(f"{region}/{CHANNEL}"))
            except (OSError, IdcError) as error:  # the device that needs it says so too, and tries again
                log.warning("link %s: %s", region, error)

    def _told(self, role: Role, id_: bytes, nodes: Mapping[str, bytes]) -> Told | None:
        """None if it was removed as it was read, page by page."""
        peer, link = nodes.get("backend" if role is Role.FRONT else "frontend"), nodes.get("link")
        if peer is None or link is None:
            return None
        texts = {below.removeprefix("options/"): value.decode("utf-8", "replace") for below, value in nodes.items()
                 if below.startswith("options/")}
        return Told(id_, peer.decode("ascii", "replace"), self._address(link.decode("ascii", "replace")), texts)

    def _watch_peer(self, path: str) -> None:
        """The first event says that there is something to read."""

        def refused(error: IdcError) -> None:
            log.warning("the registry: %s", error)
            self._scan_after = time.monotonic() + AGAIN
            self._watches.pop(path, None)
            self._unwatched.add(path)

        def changed() -> None:
            if (end := self.ends.get(path)) is not None:
                end.peer(None)  # until it is read, which may be never
                self._look.add(path)

        end = self.ends.get(path)
        if end is not None:
            self._watches[path] = self._registry.watch(self._peer_path(end), lambda _: changed(), refused=refused)

    def _peer_path(self, end: End) -> str:
        return f"{end.name.path(end.role.other, end.told.peer)}/state"

    def _read_peer(self, path: str) -> None:
        end = self.ends.get(path)
        if end is None:
            return
        try:
            value = self._registry.get(self._peer_path(end))
        except DeniedError:  # the host has removed that end, or not made it yet
            value = None
        steps = parse(value) if value is not None else []
        end.peer(steps[0].state if steps else None)

    # -- what this domain says

    def _forget(self, path: str) -> None:
        """An end that is over, and whose keys the host has removed, or written anew."""
        if (watch := self._watches.pop(path, None)) is not None:
            watch.close()
        self._registry.forget(path)
        self._stale.discard(path)
        self._look.discard(path)
        self._unwatched.discard(path)
        self._changed[path] = self.ends.pop(path).role, None  # it may be there anew

    def _publish(self, now: float) -> bool:
        """Write what has changed. One write of an end is under way at a time, so that the last one stands."""
        busy = False
        for path, end in self.ends.items():
            if not end.dirty or path in self._sent or path in self._stale or end.passing > now:
                continue

            def done(completion: Completion, path: str = path, end: End = end) -> None:
                self._sent.discard(path)
                try:
                    result_of(completion)
                except OutcomeUnknownError:
                    end.dirty = True
                except IdcError as error:
                    log.warning("%s: its state is not published: %s", path, error)

            request = Request(Op.WRITE, f"{path}/state", rest=pack(end.machine.steps), ephemeral=True)
            if self._registry.submit(request, done) is not Result.OK:
                break
            end.dirty = False
            self._sent.add(path)
            busy = True
            if end.curious and path not in self._watches:
                self._watch_peer(path)
        return busy


def _now() -> tuple[float, float]:
    return time.time(), time.monotonic()
