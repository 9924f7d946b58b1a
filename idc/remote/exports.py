"""The owner's side: registrations, who holds leases on them, and what is forwarded for others. No I/O.

All of it is set aside when the table is made, so that no later call fails for want of memory. One table serves all
endpoints and control links of a domain, in one thread. Rules: docs/remote-buffers.md.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol
from uuid import UUID, uuid4

from idc.buffers.local import CopyCounter, check_range
from idc.buffers.memory import process_memory
from idc.buffers.registry import standard_registry
from idc.endpoint.results import Completion, Result
from idc.errors import BackPressuredError, FileRangeError, MisuseError, RefusedError
from idc.remote.reference import EVERY_ACCESS, SECRET_BYTES, Access, Reference, genuine, mint, parse
from idc.remote.regions import Regions
from idc.remote.resolution import Lease, OwnerCopy, Refusal, Refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc.buffers.local import LocalBuffer
    from idc.buffers.registry import Registry
    from idc.endpoint.session import Done
    from idc.remote.link import Link
    from idc.remote.resolution import Resolution

#: Seconds that `unregister` waits for holders, unless told otherwise.
PATIENCE: Final = 5.0

log = logging.getLogger("idc.remote")


class Holder(Protocol):
    """Someone with leases, as the owner sees it: the peer of an endpoint, a broker behind a control link.

    Attributes:
        name: for messages; what the mediator or the configuration says, never the peer itself.
    """

    name: str

    def revoke(self, lease: int) -> None:
        """Ask for a lease back. It is over once someone calls `Exports.release` or `drop_holder`, even from within."""


class LeaseSource(Protocol):
    """What a lease is on."""

    def given_back(self, held: Held) -> None:
        """That lease is over."""


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A lease that someone has.

    Attributes:
        lease: its number.
        holder: who has it.
        source: what it is on.
        taken: whether the pages are handed over with it.
    """

    lease: int
    holder: Holder
    source: LeaseSource
    taken: bool = False


@dataclass(slots=True)
class _Slot:
    index: int
    generation: int = 0
    user: Registration | None = None


@dataclass(slots=True, eq=False)
class Registration:
    """A buffer that others may reach. Made by `Exports.register` or `Endpoint.register`.

    Attributes:
        buffer: of whatever type.
        access: most that a reference to it can allow.
        live: whether references to it work.
    """

    buffer: LocalBuffer
    access: Access
    _exports: Exports
    _slot: _Slot
    _generation: int
    _filled: Callable[[int, int], None] | None
    _returned: Callable[[], None] | None
    _direct: bool
    _belongs: object
    live: bool = True
    _secret: bytes = field(default_factory=lambda: secrets.token_bytes(SECRET_BYTES))
    _held: dict[int, Held] = field(default_factory=dict)
    _ended: bool = False
    _waiting: bool = False
    _done: Done | None = None
    _deadline: float | None = None

    @property
    def holders(self) -> list[str]:
        """Who has a lease on it now."""
        return sorted({held.holder.name for held in self._held.values()})

    @property
    def handed(self) -> bool:
        """Whether its pages are handed over: not for the owner to use until they come back. An agreement (soft)."""
        return any(held.taken for held in self._held.values())

    def reference(self, offset: int = 0, length: int | None = None, access: Access | None = None) -> bytes:
        """Bytes by which whoever gets them can reach this range; send them in any message.

        Args:
            offset: of the first byte, within the buffer.
            length: bytes; by default all the rest.
            access: at most that of the registration, which is the default.

        Raises:
            MisuseError: unregistered, a range outside the buffer, or more access than the registration has.
        """
        if not self.live:
            raise MisuseError("the buffer was unregistered: there are no references to it any more")
        length = self.buffer.length - offset if length is None else length
        check_range("the registered buffer", self.buffer.length, offset, length)
        access = self.access if access is None else access
        if not access or access & ~self.access:
            raise MisuseError(f"access to {access} in a reference to a registration with access to {self.access}")
        inside = self.buffer.slice(offset, length).offset_in_page
        return mint(Reference(self._exports.domain, self._exports.incarnation, self._slot.index, self._generation,
                              access, offset, length, inside), self._secret)

    def unregister(self, done: Done | None = None, timeout: float | None = PATIENCE) -> None:
        """No reference works from now on; `done` is told when nobody can be using the buffer any more (quiescence).

        Args:
            done: called once, maybe from within: OK, or ERROR with Refusal.HELD and the names of the peers that hold
                it still. Then it stays registered to them, slot and pages, until they let go; call this again to
                wait again.
            timeout: seconds until that error; None waits for ever.

        Raises:
            MisuseError: it was unregistered before, and nobody failed to let go.
        """
        self._exports.end(self, done, timeout)

    def given_back(self, held: Held) -> None:
        """See LeaseSource."""
        self._held.pop(held.lease, None)
        if held.taken and self._returned is not None:
            try:
                self._returned()
            except Exception:  # the owner's own, and there is nobody to tell
                log.exception("what is called when pages come back failed")
        self._exports.settle(self)


class Exports:
    """What a domain lets others reach.

    Args:
        count: registrations at a time.
        leases: leases that others hold at a time, those forwarded included.
        forwards: references of others that are forwarded at a time.
        regions: those that this domain maps; without them each buffer goes by owner copy.
        registry: copies, and counts; a standard one by default.
        domain: who this is; drawn at random by default.
        incarnation: of the domain; drawn at random by default, so that references of an earlier one are stale.
        clock: seconds.

    Attributes:
        counter: what was copied here on behalf of holders.
    """

    def __init__(self, count: int = 16, leases: int = 64, forwards: int = 16, *, regions: Regions | None = None,
                 registry: Registry | None = None, domain: UUID | None = None, incarnation: int | None = None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        if min(count, leases, forwards) < 0:
            raise MisuseError(f"{count} registrations, {leases} leases, {forwards} forwards: must be 0 or more")
        self.domain = uuid4() if domain is None else domain
        self.incarnation = secrets.randbits(63) if incarnation is None else incarnation
        self.regions = Regions() if regions is None else regions
        self.registry = standard_registry() if registry is None else registry
        self.counter = CopyCounter()
        self.count = count
        self._clock = clock
        self._slots = [_Slot(index) for index in range(count)]
        self._free = deque(self._slots)
        self._leases: dict[int, Held] = {}
        self._most_leases = leases
        self._next_lease = 1
        self._forwards: dict[bytes, list[Link]] = {}
        self._most_forwards = forwards

    # -- for the owner

    def register(self, buffer: LocalBuffer, access: Access = Access.READ, *,
                 filled: Callable[[int, int], None] | None = None, returned: Callable[[], None] | None = None,
                 direct: bool = True, belongs: object = None) -> Registration:
        """Let others reach a buffer, by references that the registration mints. Pages of a pool are retained.

        Args:
            buffer: of any type, whole or sliced.
            access: most that a reference can allow.
            filled: told (offset, length) within the buffer when a holder says that it has filled that.
            returned: told when pages that were handed over are back.
            direct: False gives no leases: the bytes go by owner copy only.
            belongs: what the registration dies with, see `drop_owner`; None outlives every connection.

        Raises:
            BackPressuredError: the table is full; unregister something, then try again.
            MisuseError: the buffer was released, or the access is none.
        """
        if not access or access & ~EVERY_ACCESS:
            raise MisuseError(f"access {int(access)} of a registration: READ, WRITE, TAKE, or several")
        if not self._free:
            raise BackPressuredError(f"all {self.count} registrations are in use: unregister one, then try again")
        buffer.type.retain(buffer.base)
        slot = self._free.popleft()
        slot.user = Registration(buffer, access, self, slot, slot.generation, filled, returned, direct, belongs)
        return slot.user

    @property
    def registered(self) -> int:
        """Slots in use, those of unregistered buffers that someone holds included."""
        return self.count - len(self._free)

    @property
    def leases(self) -> int:
        """Leases that others hold."""
        return len(self._leases)

    def end(self, registration: Registration, done: Done | None, timeout: float | None) -> None:
        """See Registration.unregister."""
        if registration._ended:
            raise MisuseError("the buffer was unregistered before")
        if registration._waiting:
            raise MisuseError("the buffer is being unregistered already")
        first = registration.live
        self._wind_down(registration, done, None if timeout is None else self._clock() + timeout, ask=first)

    def tick(self) -> None:
        """Tell those whose time to unregister is over."""
        now = self._clock()
        for slot in self._slots:
            user = slot.user
            if user is not None and user._deadline is not None and user._deadline <= now:
                done, user._done, user._deadline, user._waiting = user._done, None, None, False
                if done is not None:
                    done(Completion(Result.ERROR, Refusal.HELD,
                                    reason=f"held by {', '.join(user.holders)}, which did not let go in time"))

    @property
    def patience(self) -> float | None:
        """Seconds until `tick` is due; None if it is not."""
        due = [slot.user._deadline for slot in self._slots if slot.user is not None and slot.user._deadline is not None]
        return max(0.0, min(due) - self._clock()) if due else None

    def drop_owner(self, owner: object) -> None:
        """What belonged to it is unregistered, as its connection is over."""
        for slot in self._slots:
            user = slot.user
            if user is not None and user._belongs is owner and user.live:
                self._wind_down(user, None, None, ask=True)

    # -- for holders

    def resolve(self, data: bytes, want: Access, holder: Holder) -> Resolution:
        """What RESOLVE is answered with. A Lease counts as held from now on, until `release` or `drop_holder`."""
        try:
            registration, reference = self.check(data, want, 0, 0)
        except RefusedError as error:
            return Refused(Refusal(error.code), str(error))
        place = self.regions.place(registration.buffer)
        if place is None:
            return _unless_taken(want, f"it is {registration.buffer.type.name}, which no peer reaches")
        if not registration._direct:
            return _unless_taken(want, "its owner gives no leases on it")
        if want & Access.TAKE and registration._held:
            return Refused(Refusal.BUSY, f"held by {', '.join(registration.holders)}: it cannot be handed over as well")
        held = self.lend(registration, holder, taken=bool(want & Access.TAKE))
        if held is None:
            return _unless_taken(want, "its owner has no lease left")
        registration._held[held.lease] = held
        region, at = place
        return Lease(held.lease, region.header.uuid, region.header.name, at + reference.offset, reference.length, want)

    def read(self, data: bytes, offset: int, length: int) -> bytearray:
        """Bytes of a registered buffer, copied once. Raises RefusedError."""
        registration, reference = self.check(data, Access.READ, offset, length)
        taken = bytearray(length)
        try:
            self.registry.copy(registration.buffer.slice(reference.offset + offset, length), process_memory(taken),
                               self.counter)
        except (MisuseError, FileRangeError) as error:
            raise RefusedError(Refusal.FAILED, f"the owner could not read it: {error}") from error
        return taken

    def write(self, data: bytes, offset: int, content: memoryview) -> None:
        """Write to a registered buffer, copied once. Raises RefusedError."""
        registration, reference = self.check(data, Access.WRITE, offset, content.nbytes)
        try:
            self.registry.copy(process_memory(content),
                               registration.buffer.slice(reference.offset + offset, content.nbytes), self.counter)
        except (MisuseError, FileRangeError) as error:
            raise RefusedError(Refusal.FAILED, f"the owner could not write it: {error}") from error

    def fill(self, data: bytes, offset: int, length: int) -> None:
        """Tell the owner that a holder has filled that. Raises RefusedError, also for what its callback raises."""
        registration, reference = self.check(data, Access.WRITE, offset, length)
        if registration._filled is None:
            return
        try:
            registration._filled(reference.offset + offset, length)
        except Exception as error:  # whatever the callback raises is the holder's to know, as a handler's is
            log.exception("what is called when a buffer has been filled failed")
            raise RefusedError(Refusal.FAILED, f"{type(error).__name__}: {error}") from error

    def release(self, holder: Holder, lease: int) -> None:
        """A lease is over. Raises MisuseError if that holder has none of that number."""
        held = self._leases.get(lease)
        if held is None or held.holder is not holder:
            raise MisuseError(f"{holder.name} has no lease {lease}")
        del self._leases[lease]
        held.source.given_back(held)

    def drop_holder(self, holder: Holder) -> None:
        """All its leases are over, as its connection is."""
        for lease, held in tuple(self._leases.items()):
            if held.holder is holder and self._leases.pop(lease, None) is not None:
                held.source.given_back(held)

    def check(self, data: bytes, want: Access, offset: int, length: int) -> tuple[Registration, Reference]:
        """The live registration that a reference names, if it allows that much of that range.

        Raises:
            RefusedError: it does not; the code is one of Refusal.
        """
        reference = self.read_reference(data)
        if reference.owner != self.domain:
            raise RefusedError(Refusal.NO_ROUTE, "the reference is to another domain's buffer")
        if reference.incarnation != self.incarnation:
            raise RefusedError(Refusal.STALE, "the reference is of a former incarnation of its owner")
        if reference.slot >= self.count:
            raise RefusedError(Refusal.FORGED, f"the owner has no registration {reference.slot}")
        slot = self._slots[reference.slot]
        registration = slot.user
        if registration is None or slot.generation != reference.generation or not registration.live:
            raise RefusedError(Refusal.STALE, "the buffer was unregistered")
        if not genuine(data, registration._secret):
            raise RefusedError(Refusal.FORGED, "the owner has not minted this reference")
        if not want or want & ~reference.access:
            raise RefusedError(Refusal.RIGHTS, f"the reference allows to {reference.access}, not to {want}")
        if offset < 0 or length < 0 or offset + length > reference.length:
            raise RefusedError(Refusal.RANGE, f"{length} bytes at {offset}: the reference names {reference.length}")
        taker = next((held for held in registration._held.values() if held.taken), None)
        if taker is not None:
            raise RefusedError(Refusal.BUSY, f"its pages are handed over to {taker.holder.name}")
        return registration, reference

    @staticmethod
    def read_reference(data: bytes) -> Reference:
        """What a reference says. Raises RefusedError if it is none."""
        try:
            return parse(data)
        except MisuseError as error:
            raise RefusedError(Refusal.MALFORMED, str(error)) from error

    # -- for who forwards

    def lend(self, source: LeaseSource, holder: Holder, *, taken: bool) -> Held | None:
        """Note a lease on whatever it is; None if there is none left."""
        if len(self._leases) >= self._most_leases:
            return None
        held = Held(self._next_lease, holder, source, taken)
        self._next_lease += 1
        self._leases[held.lease] = held
        return held

    def held(self, lease: int) -> Held | None:
        """Who has a lease; None if nobody."""
        return self._leases.get(lease)

    def forward(self, data: bytes, upstream: Link) -> None:
        """Requests for that reference go to where it came from. Raises BackPressuredError if there are too many."""
        ways = self._forwards.get(data)
        if ways is None:
            if len(self._forwards) >= self._most_forwards:
                raise BackPressuredError(f"{self._most_forwards} references are forwarded already: close one of those "
                                         "remote buffers, then try again")
            ways = self._forwards[data] = []
        ways.append(upstream)

    def unforward(self, data: bytes, upstream: Link) -> None:
        """Undo one `forward`."""
        ways = self._forwards.get(data, [])
        if upstream in ways:
            ways.remove(upstream)
        if not ways:
            self._forwards.pop(data, None)

    def way(self, data: bytes) -> Link | None:
        """Where requests for that reference go; None if it is not forwarded."""
        ways = self._forwards.get(data)
        return ways[0] if ways else None

    @property
    def forwarded(self) -> int:
        """References that are forwarded."""
        return len(self._forwards)

    # -- quiescence

    def _wind_down(self, registration: Registration, done: Done | None, deadline: float | None, *, ask: bool) -> None:
        if registration.live:
            registration.live = False
            registration._slot.generation = registration._slot.generation + 1 & 0xFFFF_FFFF
        registration._done, registration._waiting = done, True
        registration._deadline = deadline
        if ask:
            for held in tuple(registration._held.values()):
                held.holder.revoke(held.lease)
        self.settle(registration)

    def settle(self, registration: Registration) -> None:
        """Complete an unregistering that nobody holds up any more."""
        if registration.live or registration._held or registration._ended:
            return
        registration._ended = True
        registration._slot.user = None
        self._free.append(registration._slot)
        registration.buffer.type.release(registration.buffer.base)
        done, registration._done, registration._deadline = registration._done, None, None
        if done is not None:
            done(Completion(Result.OK))


def _unless_taken(want: Access, reason: str) -> Resolution:
    return Refused(Refusal.RIGHTS, f"cannot be handed over: {reason}") if want & Access.TAKE else OwnerCopy(reason)
