"""What an owner answers to RESOLVE, and why a request about a remote buffer can be refused. Depends on nothing.

The table of reasons is in docs/remote-buffers.md.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from uuid import UUID

    from idc.remote.reference import Access


class Refusal(enum.IntEnum):
    """Why not: the `error` of a Completion whose result is ERROR, and of an ANSWER frame."""

    MALFORMED = 1
    """The bytes are no reference."""
    FORGED = 2
    """The code at the reference's end is wrong: made up, changed, or widened."""
    STALE = 3
    """Of a registration, or of an incarnation of the owner, that is over."""
    RIGHTS = 4
    """The reference does not allow it."""
    RANGE = 5
    """Bytes outside what the reference names."""
    NO_ROUTE = 6
    """Who was asked is not the owner, and does not forward to it."""
    BUSY = 7
    """Pages are handed over to one holder while another has them; or a table is full. Try again later."""
    FAILED = 8
    """The owner's memory, or its callback, failed."""
    WITHDRAWN = 9
    """The owner revoked it while it was held here."""
    FORCED = 10
    """The route or strategy that is forced cannot do it."""
    NOT_SERVED = 11
    """The peer takes no requests about remote buffers: it was given no resources for them."""
    HELD = 12
    """Unregister: a peer holds the buffer still."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The buffer is pages of a region: who maps it may reach them until told otherwise.

    Attributes:
        lease: names it between the owner and this holder, until released or revoked.
        region: uuid, which counts.
        name: of the region, for messages.
        offset: of the first byte in the region, bytes.
        length: bytes.
        access: what is allowed.
        hops: domains that the answer came through, 0 from the owner itself.
    """

    lease: int
    region: UUID
    name: str
    offset: int
    length: int
    access: Access
    hops: int = 0


@dataclass(frozen=True, slots=True)
class OwnerCopy:
    """There is no lease to be had: ask the owner for the bytes, or the peer that forwards.

    Attributes:
        reason: why, in words.
        region: uuid, if the buffer is pages of one all the same: who maps it reaches them, whatever was agreed.
        hops: as in Lease.
    """

    reason: str
    region: UUID | None = None
    hops: int = 0


@dataclass(frozen=True, slots=True)
class Refused:
    """No. Attributes: which refusal, and in words."""

    refusal: Refusal
    reason: str


#: What RESOLVE is answered with.
Resolution: TypeAlias = Lease | OwnerCopy | Refused
