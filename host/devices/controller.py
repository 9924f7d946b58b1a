"""Attaches devices and detaches them. All that it must remember is in the registry, so that it can be killed.

    attach   check ─▶ record ─▶ region: a spare link of the two domains, or made and plugged ─▶ keys of both ends
    detach   "close" in both ends' keys ─▶ both closed ─▶ keys removed ─▶ region unplugged and dropped ─▶ record removed

Whatever fails on the way is undone, in reverse. It authorises and plugs; that the ends find each other is their own
business (`idc.device.states`). Depends on host.devices, idc.device and idc.registry.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from host.devices import records
from host.devices.records import Link, Record
from host.errors import HostError
from host.region import RegionSpec
from idc.device import find, keys
from idc.device import options as options_of
from idc.device.classes import CHANNEL
from idc.device.keys import Name
from idc.device.states import Role, State, Step, hopeless, parse
from idc.errors import ConflictError, DeniedError, NoSuchKeyError
from idc.layout import Rights
from idc.registry import Permissions, Permit
from idc.registry.frames import home

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from host.devices.plugger import Plugger
    from idc.device import DeviceClass
    from idc.errors import IdcError
    from idc.registry import Event, Registry, Transaction
    from idc.registry.operations import Operations

#: Seconds that the ends have to meet, and to close.
PATIENCE: Final = 30.0
#: Seconds for which an end closes for the same reason again and again before waiting for it is given up: what passes by
#: itself, a file that another still holds or a region that is not plugged yet, has passed by then.
HOPELESS: Final = 2.0
#: Seconds that the ends have to close of a device that was not attached in the end.
CLOSING: Final = 5.0
#: Whose a link is that could not be unplugged from both domains.
LEFT: Final = "left"
_NUMBER: Final = re.compile(r"[0-9]{1,4}")

log = logging.getLogger("host.devices")


class DeviceError(HostError):
    """A device cannot be attached or detached; the text says what is wrong and what to do. Nothing is half done."""


@dataclass(frozen=True)
class Seen:
    """A device as `testbed devices` shows it.

    Attributes:
        name: of it.
        record: the host's.
        front, back: steps of the two ends, the newest first; none of an end whose domain says nothing.
    """

    name: Name
    record: Record
    front: tuple[Step, ...]
    back: tuple[Step, ...]

    @property
    def states(self) -> tuple[State, State]:
        """Of front end and back end."""
        return _state(self.front), _state(self.back)


class Controller:
    """See the module's text.

    Args:
        registry: a link as the host; the caller's.
        plugger: plugs regions.
        classes: finds a device class by name; raises MisuseError.
    """

    def __init__(self, registry: Registry, plugger: Plugger,
                 classes: Callable[[str], type[DeviceClass]] = find) -> None:
        self._registry = registry
        self._plugger = plugger
        self._classes = functools.cache(classes)  # to look through what is installed takes longer than to attach
        records.prepare(registry)

    # -- what can be asked

    def attach(self, kind: str, front: str, back: str, options: Mapping[str, object] | None = None, *,
               texts: Mapping[str, str] | None = None, number: str = "", wait: float | None = PATIENCE) -> Seen:
        """Attach a device to two domains that may be running.

        Args:
            kind: name of a device class.
            front, back: domains.
            options: by name.
            texts: the same as text, from a command line.
            number: tells it from other devices of the class with that front end; by default the first that is free.
            wait: seconds that the ends have to meet, else it is detached again; None returns at once, and they meet
                whenever drivers run at both.

        Raises:
            MisuseError: there is no such class, or it has no such options.
            DeviceError: no such domain, it is attached already, the ends have not met in time, or one of them closes
                for the same reason again and again, such as an image that is missing.
            HostError, TestbedError: the region cannot be made or plugged.
            RegistryError, TimedOutError: of the registry.
        """
        class_, values = self.check(kind, front, back, options, texts)
        name, record = self._reserve(class_, front, back, number, values)
        with contextlib.ExitStack() as undo:
            undo.callback(self._remove, name.record)
            if record.link:  # a spare one: the keys are written already
                undo.callback(self._give_up_link, record.link)
            else:
                region = self._plug(class_, front, back, values, name.record)
                undo.callback(self._give_up_link, region)
                record = Record(back, record.options, region, record.id)
                self._registry.transact(functools.partial(_write_keys, name, record), together=True)
            seen = None
            if wait is not None:
                undo.callback(self._close, name, record, "the ends have not met in time", CLOSING, force=True)
                seen = self._await_met(name, record, wait)
            undo.pop_all()
        return seen or self.see(name)

    def check(self, kind: str, front: str, back: str, options: Mapping[str, object] | None = None,
              texts: Mapping[str, str] | None = None) -> tuple[type[DeviceClass], dict[str, options_of.Value]]:
        """The class, and all options. Raises MisuseError, DeviceError as `attach`; nothing is changed."""
        class_ = self._classes(kind)
        what = f"device class {kind}"
        parsed = options_of.parse(class_.options, texts or {}, what)
        values = options_of.fill(class_.options, options or {}, what)
        self._check_domains(front, back)
        values |= {name: parsed[name] for name in texts or {}}
        class_.plan(front, back, values)
        return class_, values

    def detach(self, name: Name, *, wait: float = PATIENCE, keep_link: bool = False,
               force: bool = False) -> tuple[str, ...]:
        """Undo all that `attach` did.

        Args:
            name: of the device.
            wait: seconds that the ends have to close; an end that says nothing counts as closed.
            keep_link: the region stays plugged, as a spare link of the same two domains. Both ends must have said that
                they are closed: one that has not said anything yet may still open it, and meet the next device's.
            force: go on after `wait` though an end has not closed, and though its VM does not let go of the region.

        Returns:
            The domains that did not let go of the region, which only `force` leaves: each keeps a mapping that leads to
            nobody, and a port, until it lets go after all or ends.

        Raises:
            DeviceError: there is none, or an end does not close: it can be called again. Or both options at once.
            HostError, TestbedError: a VM does not let go of the region: it can be called again.
        """
        record = records.device(self._registry, name)
        if record is None:
            raise DeviceError(f"there is no device {name}{self._known()}")
        if force and keep_link:
            raise DeviceError("a link that an end may still use cannot be kept for the next device")
        late = self._close(name, record, "detached", wait, force=force, told=keep_link)
        if late:
            raise DeviceError(f"device {name}: the {late} does not close within {wait:g} s; is its domain stuck? "
                              "Detach again, by force, or end the domain")
        kept: tuple[str, ...] = ()
        if record.link:
            if keep_link:
                self._mark_link(record.link, "")
            else:
                kept = self._drop_link(record.link, force=force)
        self._remove(name.record)
        return kept

    def spare(self, kind: str, front: str, back: str) -> str:
        """Plug a link for devices of that class, with default options, between those two domains only: its region.
        """
        class_ = self._classes(kind)
        self._check_domains(front, back)
        region = self._plug(class_, front, back, options_of.fill(class_.options, {}, f"device class {kind}"), "")
        self._keep_mapped(region, Link(front, back, ""))
        return region

    def drop_spares(self) -> int:
        """Unplug all links that no device uses; how many there were. Raises as `detach`."""
        spares = [region for region, link in records.links(self._registry) if link.device in ("", LEFT)]
        for region in spares:
            self._drop_link(region)
        return len(spares)

    def recover(self) -> None:
        """Undo what a controller had begun that was killed. Not while another one is at work. Raises as `detach`."""
        attached = set()
        for name, record in list(records.devices(self._registry)):
            if any(self._registry.exists(f"{name.path(role, record.back)}/id") for role in Role):
                attached.add(name.record)
            else:
                self._remove(name.record)
        for region, link in list(records.links(self._registry)):
            if link.device and link.device not in attached:
                self._drop_link(region)

    def devices(self) -> list[Seen]:
        """All that are attached."""
        return [self.see(name) for name, _ in list(records.devices(self._registry))]

    def see(self, name: Name) -> Seen:
        """One. Raises DeviceError if it is not attached."""
        record = records.device(self._registry, name)
        if record is None:
            raise DeviceError(f"there is no device {name}{self._known()}")
        return Seen(name, record, self._steps(name, record, Role.FRONT), self._steps(name, record, Role.BACK))

    def find(self, kind: str, front: str, back: str = "") -> Name:
        """The only device of that class with that front end, and back end if it is given. Raises DeviceError."""
        found = [name for name, record in records.devices(self._registry)
                 if (name.kind, name.front) == (kind, front) and back in ("", record.back)]
        if len(found) == 1:
            return found[0]
        if found:
            numbers = ", ".join(name.number for name in found)
            raise DeviceError(f"{front} has {len(found)} {kind} devices: say which by its number ({numbers})")
        raise DeviceError(f"{front} has no {kind} device" + (f" with {back}" if back else "") + self._known())

    # -- within

    def _known(self) -> str:
        names = ", ".join(str(name) for name, _ in records.devices(self._registry))
        return f" (there are: {names or 'none'})"

    def _check_domains(self, front: str, back: str) -> None:
        known = self._plugger.domains()
        for end, domain in (("frontend", front), ("backend", back)):
            if domain not in known:
                raise DeviceError(f"{end} {domain!r} is no domain with a control region (there are: "
                                  f"{', '.join(sorted(known)) or 'none'})")
        if front == back:
            raise DeviceError(f"frontend and backend are both {front!r}: a device is between two domains")

    def _reserve(self, class_: type[DeviceClass], front: str, back: str, number: str,
                 values: dict[str, options_of.Value]) -> tuple[Name, Record]:
        """Write the record, which nobody else can write after that. If there is a spare link for the device it is
        taken, and all is written at once, so that no crash loses it. Raises DeviceError if there is such a device.
        """
        if number and not _NUMBER.fullmatch(number):
            raise DeviceError(f"{number!r} is no number of a device: up to four digits")
        layout, id_ = _layout(class_, front, back, values), secrets.token_hex(8)
        while True:
            try:
                with self._registry.transaction(together=True) as transaction:
                    name = self._name(transaction, class_.name, front, back, number)
                    wanted = front, back, layout, ""
                    spare = next((region for region, link in records.links(transaction)
                                  if (link.front, link.back, link.layout, link.device) == wanted), "")
                    record = Record(back, values, spare, id_)
                    if spare:
                        records.write_link(transaction, spare, Link(front, back, layout, name.record))
                        _write_keys(name, record, transaction)
                    else:
                        transaction.write(name.record, record.pack())
                return name, record
            except ConflictError:
                continue

    def _name(self, registry: Operations, kind: str, front: str, back: str, number: str) -> Name:
        taken = {name.number: record for name, record in records.devices(registry)
                 if (name.kind, name.front) == (kind, front)}
        for there, record in taken.items():
            if there == number or (not number and record.back == back):
                raise DeviceError(f"a {kind} device of {front} with {record.back} is attached already, number {there}"
                                  + ("" if number else "; give another number for one more"))
        return Name(kind, front, number or next(str(n) for n in range(10000) if str(n) not in taken))

    def _plug(self, class_: type[DeviceClass], front: str, back: str, options: dict[str, options_of.Value],
              device: str) -> str:
        region = f"dev-{class_.name}-{secrets.token_hex(4)}"
        channels, size = class_.plan(front, back, options)
        spec = RegionSpec(region, size, {front: Rights.RW, back: Rights.RW}, channels)
        records.write_link(self._registry, region, Link(front, back, _layout(class_, front, back, options), device))
        try:
            self._plugger.plug(spec)
        except BaseException:
            self._remove(f"{records.LINKS}/{region}")
            raise
        return region

    def _give_up_link(self, region: str) -> None:
        try:
            self._drop_link(region)
        except Exception:
            # What is on its way says more. No device gets this link; `drop_spares` tries again.
            log.exception("region %s stays plugged", region)
            self._mark_link(region, LEFT)

    def _mark_link(self, region: str, device: str) -> None:
        for name, link in list(records.links(self._registry)):
            if name == region:
                records.write_link(self._registry, region, Link(link.front, link.back, link.layout, device))
                if not device:
                    self._keep_mapped(region, link)

    def _keep_mapped(self, region: str, link: Link) -> None:
        """Tell both domains that a link stays plugged."""
        for domain in (link.front, link.back):
            path = f"{keys.links(domain)}/{region}"
            if self._registry.exists(home(domain)) and not self._registry.exists(path):  # else they would all look anew
                self._registry.write(path, b"")

    def _drop_link(self, region: str, *, force: bool = False) -> tuple[str, ...]:
        for name, link in list(records.links(self._registry)):
            if name == region:
                for domain in (link.front, link.back):
                    self._remove(f"{keys.links(domain)}/{region}")  # first: a VM lets go of what nobody has mapped
        kept = self._plugger.unplug(region, force=force)
        self._remove(f"{records.LINKS}/{region}")
        return kept

    def _close(self, name: Name, record: Record, why: str, wait: float, *, force: bool = False,
               told: bool = False) -> str:  # fmt: skip
        """Have both ends close, and remove their keys. Which end has not closed in time; empty if both have, or if that
        makes no difference. With `told` an end has closed only when it has said so.
        """
        paths = {role: name.path(role, record.back) for role in Role}
        for path in paths.values():
            with contextlib.suppress(NoSuchKeyError):
                if self._registry.exists(f"{path}/id"):
                    self._registry.write(f"{path}/close", why)
        ends = (Role.FRONT, Role.BACK)

        def late(seen: Seen) -> list[str]:
            return [f"{role.value} end ({state.value if steps else 'has said nothing'})" for role, state, steps
                    in zip(ends, seen.states, (seen.front, seen.back), strict=True)
                    if state is not State.CLOSED or (told and not steps)]

        closed, seen = self._await(name, record, wait, lambda seen: not late(seen))
        if not closed and not force:
            return " and the ".join(late(seen))
        for path in paths.values():
            self._remove(path)
        return ""

    def _await_met(self, name: Name, record: Record, wait: float) -> Seen:
        given_up: list[Seen] = []

        def settled(seen: Seen) -> bool:
            if any(hopeless(steps, HOPELESS) for steps in (seen.front, seen.back)):
                given_up.append(seen)
            return bool(given_up) or seen.states == (State.CONNECTED, State.CONNECTED)

        met, seen = self._await(name, record, wait, settled)
        if met and not given_up:
            return seen
        parts = []
        for role, domain, steps in ((Role.FRONT, name.front, seen.front), (Role.BACK, record.back, seen.back)):
            said = f"{steps[0].state.value}: {steps[0].why}" if steps else "nothing: do drivers run there?"
            parts.append(f"the {role.value} end in {domain} says {said}")
        after = "several tries" if given_up else f"{wait:g} s"
        raise DeviceError(f"device {name} is not connected after {after}, and detached again; {'; '.join(parts)}")

    def _await(self, name: Name, record: Record, wait: float, there: Callable[[Seen], bool]) -> tuple[bool, Seen]:
        """Until that is so, and what is the case then; False if it is not in time."""
        deadline = time.monotonic() + wait
        watched = {role: f"{name.path(role, record.back)}/state" for role in Role}
        events: dict[Role, Event] = {}
        steps: dict[Role, tuple[Step, ...]] = {}
        refused: list[IdcError] = []
        with contextlib.ExitStack() as held:
            for role, path in watched.items():
                watch = self._registry.watch(path, functools.partial(events.__setitem__, role), nodes=True,
                                             refused=refused.append)
                held.callback(watch.close)
            while True:
                left = deadline - time.monotonic()
                if refused:
                    raise refused[0]
                if left <= 0:  # a registry that says nothing does not mean that the ends say nothing
                    steps |= {role: self._steps(name, record, role) for role in Role if role not in steps}
                while events:
                    role, event = events.popitem()  # first: what changes while it is read is read again
                    if event.nodes is None or event.path != watched[role]:  # of what a domain made below it, say
                        steps[role] = self._steps(name, record, role)
                    else:
                        steps[role] = tuple(parse(event.nodes.get("", b"")))
                seen = Seen(name, record, *(steps.get(role, ()) for role in (Role.FRONT, Role.BACK)))
                if len(steps) == len(Role) and there(seen):
                    return True, seen
                if left <= 0:
                    return False, seen
                self._registry.pump(min(left, 0.5))

    def _steps(self, name: Name, record: Record, role: Role) -> tuple[Step, ...]:
        try:
            value = self._registry.get(f"{name.path(role, record.back)}/state")
        except (DeniedError, NoSuchKeyError):
            value = None
        return tuple(parse(value)) if value else ()

    def _remove(self, path: str) -> None:
        with contextlib.suppress(NoSuchKeyError):
            self._registry.rm(path)


def _write_keys(name: Name, record: Record, t: Transaction) -> None:
    """In one transaction: an end sees either nothing or everything."""
    for path in (name.path(role, record.back) for role in Role):
        t.clear(path)  # of a device that ended badly
    for role in Role:
        path = name.path(role, record.back)
        domain, peer = (name.front, record.back) if role is Role.FRONT else (record.back, name.front)
        t.mkdir(path)
        t.set_permissions(path, Permissions(domain, Permit.NOTHING, ((peer, Permit.READ),)))
        t.write(f"{path}/{'backend' if role is Role.FRONT else 'frontend'}", peer)
        t.write(f"{path}/link", f"{record.link}/{CHANNEL}")
        for option, value in record.options.items():
            t.write(f"{path}/options/{option}", options_of.text(value))
        t.write(f"{path}/id", record.id)
    t.write(name.record, record.pack())


def _state(steps: tuple[Step, ...]) -> State:
    return steps[0].state if steps else State.CLOSED


def _layout(class_: type[DeviceClass], front: str, back: str, options: dict[str, options_of.Value]) -> str:
    channels, size = class_.plan(front, back, options)
    return ",".join([str(size), *(f"{c.name}:{c.kind.name}:{c.a}:{c.b}:{c.ring_bytes}:{c.slot_size}"
                                                   for c in channels)])
