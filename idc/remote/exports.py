"""The owner's side: registrations, who holds leases on them, and what is forwarded for others. No I/O.

All of it is set aside when the table is made, so that no later call fails for want of memory. One table serves all
endpoints and control links of a domain, in one thread. Rules: docs/remote-buffers.md.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING
from uuid import uuid4

from idc.buffers.local import CopyCounter
from idc.buffers.memory import process_memory
from idc.buffers.registry import standard_registry
from idc.endpoint.callbacks import call_each
from idc.endpoint.results import Completion, Result
from idc.errors import BackPressuredError, FileRangeError, MisuseError, RefusedError
from idc.remote.reference import EVERY_ACCESS, Access, genuine, parse
from idc.remote.regions import Regions
from idc.remote.registration import Held, Registration, Slot
from idc.remote.resolution import Lease, OwnerCopy, Refusal, Refused

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from idc.buffers.local import LocalBuffer
    from idc.buffers.registry import Registry
    from idc.endpoint.session import Done
    from idc.remote.link import Link
    from idc.remote.reference import Reference
    from idc.remote.registration import Holder, LeaseSource
    from idc.remote.resolution import Resolution

log = logging.getLogger("idc.remote")


class Exports:
    """What a domain lets others reach.

    Args:
        count: registrations at a time.
        leases: that one holder has at a time, those that are forwarded to it included; so none takes another's.
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
        self._slots = [Slot(index) for index in range(count)]
        self._free = deque(self._slots)
        self._leases: dict[int, Held] = {}
        self._counts: dict[Holder, int] = {}
        self._timed: set[Registration] = set()
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
        if registration.ended:
            raise MisuseError("the buffer was unregistered before")
        if registration.waiting:
            raise MisuseError("the buffer is being unregistered already")
        first = registration.live
        self._wind_down(registration, done, None if timeout is None else self._clock() + timeout, ask=first)

    def tick(self) -> bool:
        """Tell those whose time to unregister is over; whether there were any."""
        if not self._timed:
            return False
        now = self._clock()
        late = [user for user in self._timed if user.deadline is not None and user.deadline <= now]
        call_each(partial(self._give_up, user) for user in late)
        return bool(late)

    def _give_up(self, user: Registration) -> None:
        self._timed.discard(user)
        done, user.done, user.deadline, user.waiting = user.done, None, None, False
        if done is not None:
            done(Completion(Result.ERROR, Refusal.HELD,
                            reason=f"held by {', '.join(user.holders)}, which did not let go in time"))

    @property
    def patience(self) -> float | None:
        """Seconds until `tick` is due; None if it is not."""
        if not self._timed:
            return None
        return max(0.0, min(user.deadline for user in self._timed if user.deadline is not None) - self._clock())

    def drop_owner(self, owner: object) -> None:
        """What belonged to it is unregistered, as its connection is over; `unregister` waits for who holds it still."""
        users = [slot.user for slot in self._slots if slot.user is not None]
        call_each(partial(self._orphan, user) for user in users if user.belongs is owner and user.live)

    def _orphan(self, user: Registration) -> None:
        self._wind_down(user, None, None, ask=True)
        user.waiting = False

    # -- for holders

    def resolve(self, data: bytes, want: Access, holder: Holder) -> Resolution:
        """What RESOLVE is answered with. A Lease counts as held from now on, until `release` or `drop_holder`."""
        try:
            registration, reference = self.check(data, want, 0, 0)
            place = self.regions.place(registration.buffer)
        except RefusedError as error:
            return Refused(Refusal(error.code), str(error))
        except MisuseError as error:
            return Refused(Refusal.FAILED, f"the owner cannot reach it: {error}")
        if place is None:
            return _copied(want, f"it is {registration.buffer.type.name}, of no region that the owner knows")
        region, at = place
        if not registration.direct:
            return _copied(want, "its owner gives no leases on it", region.header.uuid)
        taken = Access.TAKE in want
        if taken and registration.leases:
            return Refused(Refusal.BUSY, f"held by {', '.join(registration.holders)}: it cannot be handed over as well")
        held = self.lend(registration, holder, taken=taken)
        if held is None:
            return _copied(want, "its owner has no lease left for this holder", region.header.uuid)
        registration.leases[held.lease] = held
        registration.taker = held if taken else None
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
        if registration.filled is None:
            return
        try:
            registration.filled(reference.offset + offset, length)
        except Exception as error:  # whatever the callback raises is the holder's to know, as a handler's is
            log.exception("what is called when a buffer has been filled failed")
            raise RefusedError(Refusal.FAILED, f"{type(error).__name__}: {error}") from error

    def release(self, holder: Holder, lease: int) -> None:
        """A lease is over. Raises MisuseError if that holder has none of that number."""
        held = self._leases.get(lease)
        if held is None or held.holder is not holder:
            raise MisuseError(f"{holder.name} has no lease {lease}")
        self._over(held)

    def drop_holder(self, holder: Holder) -> None:
        """All its leases are over, as its connection is."""
        call_each(partial(self._over, held) for held in tuple(self._leases.values()) if held.holder is holder)

    def _over(self, held: Held) -> None:
        if self._leases.pop(held.lease, None) is None:
            return  # by what another one's end led to
        self._counts[held.holder] -= 1
        if not self._counts[held.holder]:
            del self._counts[held.holder]
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
        if not genuine(data, registration.secret):
            raise RefusedError(Refusal.FORGED, "the owner has not minted this reference")
        if not want or want & ~reference.access:
            raise RefusedError(Refusal.RIGHTS, f"the reference allows to {reference.access}, not to {want}")
        if offset < 0 or length < 0 or offset + length > reference.length:
            raise RefusedError(Refusal.RANGE, f"{length} bytes at {offset}: the reference names {reference.length}")
        if registration.taker is not None:
            raise RefusedError(Refusal.BUSY, f"its pages are handed over to {registration.taker.holder.name}")
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
        """Note a lease on whatever it is; None if that holder has as many as it may."""
        if self._counts.get(holder, 0) >= self._most_leases:
            return None
        self._counts[holder] = self._counts.get(holder, 0) + 1
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
            registration.slot.generation = registration.slot.generation + 1 & 0xFFFF_FFFF
        registration.done, registration.waiting = done, True
        registration.deadline = deadline
        if deadline is not None:
            self._timed.add(registration)
        if ask:
            for held in tuple(registration.leases.values()):
                held.holder.revoke(held.lease)
        self.settle(registration)

    def settle(self, registration: Registration) -> None:
        """Complete an unregistering that nobody holds up any more."""
        if registration.live or registration.leases or registration.ended:
            return
        registration.ended = True
        self._timed.discard(registration)
        registration.slot.user = None
        self._free.append(registration.slot)
        registration.buffer.type.release(registration.buffer.base)
        done, registration.done, registration.deadline = registration.done, None, None
        if done is not None:
            done(Completion(Result.OK))


def _copied(want: Access, reason: str, region: UUID | None = None) -> Resolution:
    """By owner copy; but pages that cannot be leased cannot be handed over."""
    if Access.TAKE in want:
        return Refused(Refusal.RIGHTS, f"cannot be handed over: {reason}")
    return OwnerCopy(reason, region)
