"""What the broker checks before it touches a byte. Pure: what is known comes in, `Denied` or what is allowed comes out.

    request     asker's own claim: are these two references that the asker may name together, and does the range fit
    admit       owner's answer: does the owner have what it says it has
    apart       both answers together

What the broker knows by itself (which link a request came by, regions, their members and parts, incarnations) is in
`Domain` and `RegionHeader`, whose origin is the region server. Everything else is a claim of some domain. A claim that
passes here can expose or spoil only pages of the one who made it. Depends on idc.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from idc.errors import MisuseError
from idc.layout import Rights
from idc.remote.reference import Access, Reference, parse
from idc.remote.resolution import Lease, OwnerCopy, Refusal, Refused, Resolution

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from idc.layout import RegionHeader
    from idc.remote.controlframes import CopyRequest

Key: TypeAlias = tuple[bytes, Access]

#: Longest copy that one request can ask for, bytes.
MOST: Final = 1 << 32


class Denied(Exception):
    """Not allowed; `refusal` and the text go to the asker."""

    def __init__(self, refusal: Refusal, reason: str) -> None:
        super().__init__(reason)
        self.refusal = refusal


@dataclass(frozen=True, slots=True)
class Domain:
    """A domain as the host knows it: by its control link.

    Attributes:
        uuid: of the control region, so nobody chooses it.
        name: the member name that it has in every region.
        incarnation: how often it has attached to its control region.
    """

    uuid: UUID
    name: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Claim:
    """One of a request's two references: who is said to own it, and what is wanted of it.

    Attributes:
        raw: the bytes, which only the owner can check.
        reference: what they say.
        owner: as the host knows it.
        access: READ or WRITE.
        offset: from the reference's first byte.
        length: bytes.
    """

    raw: bytes
    reference: Reference
    owner: Domain
    access: Access
    offset: int
    length: int

    @property
    def key(self) -> Key:
        """What one lease serves: this reference, for this access."""
        return self.raw, self.access


class Span(NamedTuple):
    """Bytes of a region, checked."""

    region: UUID
    start: int
    length: int


def request(asker: Domain, asked: CopyRequest, domains: Mapping[UUID, Domain]) -> tuple[Claim, Claim]:
    """The claims behind a request: (source, target). Raises Denied.

    Args:
        asker: whose control link it came by.
        asked: the request.
        domains: those that are connected, by uuid.
    """
    source = _claim("source", asked.source, Access.READ, asked.source_offset, asked.length, domains)
    target = _claim("target", asked.target, Access.WRITE, asked.target_offset, asked.length, domains)
    if asker.uuid not in (source.owner.uuid, target.owner.uuid):
        raise Denied(Refusal.RIGHTS, f"neither the source (of {source.owner.name}) nor the target (of "
                     f"{target.owner.name}) is the asker's own")
    return source, target


def _claim(which: str, raw: bytes, access: Access, offset: int, length: int, domains: Mapping[UUID, Domain]) -> Claim:
    try:
        reference = parse(raw)
    except MisuseError as error:
        raise Denied(Refusal.MALFORMED, f"{which}: {error}") from error
    owner = domains.get(reference.owner)
    if owner is None:
        raise Denied(Refusal.NO_ROUTE, f"{which}: its owner has no control link here, or is not connected")
    if reference.incarnation != owner.incarnation:
        raise Denied(Refusal.STALE, f"{which}: of incarnation {reference.incarnation} of {owner.name}, which is in its "
                     f"incarnation {owner.incarnation}")
    if access not in reference.access:
        raise Denied(Refusal.RIGHTS, f"{which}: the reference does not allow to {access.name}")
    if length > MOST:
        raise Denied(Refusal.RANGE, f"{length} bytes in one copy, at most {MOST} are possible")
    if offset + length > reference.length:
        raise Denied(Refusal.RANGE, f"{which}: {length} bytes at {offset} are not within the {reference.length} of "
                     "the reference")
    return Claim(raw, reference, owner, access, offset, length)


def admit(owner: Domain, reference: Reference, access: Access, answer: Resolution,
          regions: Mapping[UUID, RegionHeader]) -> Lease:
    """An owner's answer, if it can be true. Raises Denied.

    Args:
        owner: whose control link the answer came by.
        reference: what it was asked about; its owner is that domain.
        access: what was asked for.
        answer: what it said.
        regions: those that exist, by uuid.
    """
    if isinstance(answer, Refused):
        raise Denied(answer.refusal, f"{owner.name} refuses: {answer.reason}")
    if isinstance(answer, OwnerCopy):
        raise Denied(Refusal.NO_ROUTE, f"{owner.name} gives no lease: ask it for the bytes")
    region = regions.get(answer.region)
    if region is None:
        raise Denied(Refusal.FAILED, f"{owner.name} names region {answer.region}, which does not exist")
    member = next((m for m in region.members if m.name == owner.name), None)
    if member is None or member.rights is not Rights.RW:
        raise Denied(Refusal.FAILED, f"{owner.name} names region {region.name}, of which it is no rw member")
    if access not in answer.access:
        raise Denied(Refusal.RIGHTS, f"{owner.name} gives a lease that does not allow to {access.name}")
    if answer.length != reference.length:
        raise Denied(Refusal.FAILED, f"{owner.name} gives {answer.length} bytes for a reference to {reference.length}")
    if not any(part.offset <= answer.offset and answer.offset + answer.length <= part.offset + part.length
               for part in region.parts_of(member.id)):
        raise Denied(Refusal.FAILED, f"{owner.name} names {answer.length} bytes at {answer.offset} of region "
                     f"{region.name}, which are not in its part")
    return answer


def span(claim: Claim, lease: Lease) -> Span:
    """The bytes that are meant. Raises Denied, though `request` and `admit` leave it nothing to deny."""
    if claim.offset + claim.length > lease.length:
        raise Denied(Refusal.RANGE, f"{claim.length} bytes at {claim.offset} of a lease of {lease.length}")
    return Span(lease.region, lease.offset + claim.offset, claim.length)


def apart(source: Span, target: Span) -> None:
    """Raise Denied if the two have bytes in common."""
    if source.region == target.region and max(source.start, target.start) < min(source.start + source.length,
                                                                                 target.start + target.length):
        raise Denied(Refusal.RANGE, "source and target have bytes in common")
