"""A registered buffer, and who holds leases on it: what an owner has in its hand. No I/O. Depends on this package."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from idc.buffers.local import check_range
from idc.endpoint.party import PATIENCE
from idc.errors import MisuseError
from idc.remote.reference import SECRET_BYTES, Access, Reference, mint

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc.buffers.local import LocalBuffer
    from idc.endpoint.session import Done
    from idc.remote.exports import Exports

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
class Slot:
    """A place in the table. The generation is raised whenever a registration in it ends."""

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
        leases: what others hold, by number. The rest is the table's own business.
    """

    buffer: LocalBuffer
    access: Access
    exports: Exports
    slot: Slot
    generation: int
    filled: Callable[[int, int], None] | None
    returned: Callable[[], None] | None
    direct: bool
    belongs: object
    live: bool = True
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(SECRET_BYTES), repr=False)
    leases: dict[int, Held] = field(default_factory=dict)
    taker: Held | None = None
    ended: bool = False
    waiting: bool = False
    done: Done | None = None
    deadline: float | None = None

    @property
    def holders(self) -> list[str]:
        """Who has a lease on it now."""
        return sorted({held.holder.name for held in self.leases.values()})

    @property
    def handed(self) -> bool:
        """Whether its pages are handed over: not for the owner to use until they come back. An agreement (soft)."""
        return self.taker is not None

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
        return mint(Reference(self.exports.domain, self.exports.incarnation, self.slot.index, self.generation,
                              access, offset, length, inside), self.secret)

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
        self.exports.end(self, done, timeout)

    def given_back(self, held: Held) -> None:
        """See LeaseSource."""
        self.leases.pop(held.lease, None)
        if held is self.taker:
            self.taker = None
        if held.taken and self.returned is not None:
            try:
                self.returned()
            except Exception:  # the owner's own, and there is nobody to tell
                log.exception("what is called when pages come back failed")
        self.exports.settle(self)
