"""The header page of a region and the fixed offsets of everything behind it: pure pack, unpack and checks.

May import the standard library only. Both sides use it: the host writes the page, guests and host processes
parse it. All words are little-endian and naturally aligned; all offsets are bytes.

Header page (page 0 of the region, 4096 bytes, written by the host)
-------------------------------------------------------------------
Stable part: never changes its place, whatever the layout version says.

    +0     8s    magic b"IDCREGN1"
    +8     u32   layout version (1)
    +12    u32   bytes of the header page (4096)
    +16    16s   region uuid, as in uuid.UUID.bytes
    +32    64s   region name: ASCII, padded with NUL
    +96    u64   region size, a power of two
    +104   u16   oldest protocol version spoken in the channels
    +106   u16   newest protocol version
    +108   u32   0
    +112   u64   session: drawn at random when the region is made
    +120   u32   error code, 0 = none; written after the two fields below      (live)
    +124   u32   error by: member id, 0xffffffff = the host                    (live)
    +128   128s  error text: UTF-8, padded with NUL                            (live)

Tables of layout version 1:

    +256   u32   members (1..16)
    +260   u32   channels (0..24)
    +264   u32   parts (0..16)
    +268   u32   vectors of each rw member (1..256)
    +512   16 x 64   members
           +0   u64  live word: low half presence (0 gone, 1 present), high half incarnation
           +8   u16  id, equal to the entry's index, and the ivshmem peer id of an rw member
           +10  u16  rights: 1 ro, 2 rw
           +16  40s  name
    +1536  24 x 64   channels
           +0   32s  name
           +32  u16  kind: 1 message, 2 byte
           +34  u16  member id of side A
           +36  u16  member id of side B
           +38  u16  first vector: "data for me"; the next one is "space for me"
           +40  u64  offset of the channel block
           +48  u64  bytes of one ring's data (both directions have the same)
           +56  u32  bytes of a slot; 0 in a byte channel
    +3072  16 x 32   parts, from which their owners allocate
           +0   u32  owner: member id
           +8   u64  offset
           +16  u64  length

What is not listed is 0 and is ignored by readers.

Channel (at the offset in its entry, page-aligned)
--------------------------------------------------

    +0     channel block, 4096 bytes: the SIDE_*, RING_* and index words below
    +4096  data of the ring from A to B
    then   data of the ring from B to A, at the next page boundary

In an rw region every member can write all of this at any time. So `parse_header` works on a private copy,
checks all of it, and its result is used from then on; only the live words are looked at again.
"""

from __future__ import annotations

import enum
import itertools
import re
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from uuid import UUID, uuid4

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

PAGE: Final = 4096
HEADER_BYTES: Final = PAGE
MAGIC: Final = b"IDCREGN1"
LAYOUT_VERSION: Final = 1
PROTOCOL_MIN: Final = 1
PROTOCOL_MAX: Final = 1

MAX_MEMBERS: Final = 16
MAX_CHANNELS: Final = 24
MAX_PARTS: Final = 16
MAX_VECTORS: Final = 256  # QEMU's device masks a doorbell's vector to 8 bits (its specification says 16)
MAX_REGION: Final = 1 << 40

# Live words in the header page.
SESSION: Final = 112
ERROR_CODE: Final = 120
ERROR_BY: Final = 124
ERROR_TEXT: Final = 128
ERROR_TEXT_BYTES: Final = 128
ERROR_BY_HOST: Final = 0xFFFF_FFFF
MEMBERS_AT: Final = 512
MEMBER_BYTES: Final = 64

HOST_VECTOR: Final = 0  # "look at the header page"

# Words in a channel block. Each side writes its own words alone; a side's words start at SIDE_A or SIDE_B.
BLOCK_BYTES: Final = PAGE
SIDE_A: Final = 0
SIDE_B: Final = 128
SIDE_EPOCH: Final = 0  # u64
SIDE_ACK: Final = 8  # u64
SIDE_STATE: Final = 16  # u32
SIDE_REASON: Final = 20  # u32
SIDE_HEARTBEAT: Final = 24  # u64

# Words of one ring, which start at RING_AB or RING_BA. Producer's and consumer's are 128 bytes apart:
# processors fetch cache lines in pairs.
RING_AB: Final = 256
RING_BA: Final = 512
RING_CONTROL_BYTES: Final = 256
RING_TAIL: Final = 0  # u64, producer
RING_SPACE_EVENT: Final = 64  # u64, producer; a line of its own, looked at while the index moves
RING_HEAD: Final = 128  # u64, consumer
RING_DATA_EVENT: Final = 192  # u64, consumer

# Records for observers, in the channel block, of the ends of the two rings and of the two sides. No peer reads them.
RECORD_AB: Final = 1024  # the producer's; the consumer's follows
RECORD_BA: Final = 1280
RECORD_A: Final = 1536
RECORD_B: Final = 1792
RING_RECORD_BYTES: Final = 128
SIDE_RECORD_BYTES: Final = 256
#: u64 words of a ring's record, in this order: those of struct idc_counters.
RING_RECORD: Final = ("doorbells", "suppressed", "sleeps", "wakeups", "spurious", "late", "masked", "full", "spins_won",
                      "messages", "bytes")
#: u64 words of a side's record; then TRIP_BUCKETS more.
SIDE_RECORD: Final = ("samples", "total_ns", "dropped")
TRIP_BUCKETS: Final = 24
#: The first of these buckets holds what took less than 2 to the power of this, ns; each further one twice that.
FIRST_TRIP_BIT: Final = 9

SLOT_HEADER_BYTES: Final = 8
MIN_SLOT: Final = 64
MIN_BYTE_RING: Final = PAGE

_STABLE = struct.Struct("<8sII16s64sQHHIQII128s")
_COUNTS = struct.Struct("<IIII")
_COUNTS_AT = 256
_MEMBER = struct.Struct("<IIHHI40s")  # the live word is read as its two halves: presence, incarnation
_CHANNEL = struct.Struct("<32sHHHHQQII")
_CHANNELS_AT = 1536
_CHANNEL_BYTES = 64
_PART = struct.Struct("<IIQQ8x")
_PARTS_AT = 3072
_PART_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MEMBER_NAME_BYTES, _CHANNEL_NAME_BYTES, _REGION_NAME_BYTES = 40, 32, 64

assert _STABLE.size == _COUNTS_AT
assert MEMBERS_AT + MAX_MEMBERS * MEMBER_BYTES == _CHANNELS_AT
assert _CHANNELS_AT + MAX_CHANNELS * _CHANNEL_BYTES == _PARTS_AT
assert _PARTS_AT + MAX_PARTS * _PART_BYTES <= HEADER_BYTES


class LayoutError(ValueError):
    """A plan that cannot be laid out, or a header page not to be trusted; the text says which field."""


class Rights(enum.IntEnum):
    """What a member may do with the whole region; the hypervisor enforces it."""

    RO = 1
    RW = 2


class Kind(enum.IntEnum):
    """What a channel's rings carry."""

    MESSAGE = 1
    BYTE = 2


@dataclass(frozen=True, slots=True)
class Member:
    """One domain that maps the region. `id` is its index in the table and, if rw, its ivshmem peer id."""

    id: int
    name: str
    rights: Rights
    incarnation: int = 0
    present: bool = False

    @property
    def word_offset(self) -> int:
        """Offset of the member's live u64 in the region; see `member_word`."""
        return MEMBERS_AT + MEMBER_BYTES * self.id


@dataclass(frozen=True, slots=True)
class ChannelSpec:
    """What is asked of `RegionHeader.plan`: a channel between members `a` and `b` (names).

    A message ring has `ring_bytes // slot_size` slots, a power of two; `slot_size` is a multiple of 64 and
    includes the slot's 8-byte header. A byte ring has `slot_size` 0 and `ring_bytes` a power of two.
    """

    name: str
    kind: Kind
    a: str
    b: str
    ring_bytes: int
    slot_size: int = 0


@dataclass(frozen=True, slots=True)
class ChannelEntry:
    """One channel of the directory; members are ids, sizes and offsets bytes. See the module's table."""

    name: str
    kind: Kind
    member_a: int
    member_b: int
    first_vector: int
    offset: int
    ring_bytes: int
    slot_size: int

    @property
    def slots(self) -> int:
        """Slots of one message ring; 0 for a byte channel."""
        return self.ring_bytes // self.slot_size if self.slot_size else 0

    @property
    def data_ab(self) -> int:
        """Offset in the region of the data from A to B."""
        return self.offset + BLOCK_BYTES

    @property
    def data_ba(self) -> int:
        """Offset in the region of the data from B to A."""
        return self.data_ab + _page_up(self.ring_bytes)

    @property
    def length(self) -> int:
        """Bytes that block and both rings take, whole pages."""
        return BLOCK_BYTES + 2 * _page_up(self.ring_bytes)

    @property
    def data_vector(self) -> int:
        """The vector that is rung at a side when there is data for it."""
        return self.first_vector

    @property
    def space_vector(self) -> int:
        """The vector that is rung at a side when there is space for what it has to send."""
        return self.first_vector + 1


@dataclass(frozen=True, slots=True)
class Part:
    """Pages of the region from which `owner` (member id) alone allocates. An agreement, not enforced."""

    owner: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class RegionHeader:
    """All of a header page, checked. Made by `plan` (host) or `parse_header` (everyone)."""

    name: str
    size: int
    vectors: int
    members: tuple[Member, ...]
    channels: tuple[ChannelEntry, ...] = ()
    parts: tuple[Part, ...] = ()
    uuid: UUID = field(default_factory=uuid4)
    session: int = 0
    protocol_min: int = PROTOCOL_MIN
    protocol_max: int = PROTOCOL_MAX
    error_code: int = 0
    error_by: int = 0
    error_text: str = ""

    @classmethod
    def plan(
        cls,
        name: str,
        size: int,
        members: Mapping[str, Rights],
        channels: Sequence[ChannelSpec] = (),
        *,
        parts: Mapping[str, int] | None = None,
        vectors: int | None = None,
        session: int = 0,
        region_uuid: UUID | None = None,
    ) -> RegionHeader:
        """Lay the channels out from the first page on, and behind them the parts.

        Args:
            name, size, members, channels: see the module's tables; member ids follow the order of `members`.
            parts: bytes by rw member, whole pages, laid out in this order; who is not named gets none. None splits
                what the channels leave evenly between the rw members.
            vectors: of each rw member; by default one for the host and two for each channel.
            session: see there.
            region_uuid: by default a random one.

        Raises:
            LayoutError: it does not fit or breaks a rule.
        """
        table = tuple(Member(i, member, Rights(rights)) for i, (member, rights) in enumerate(members.items()))
        ids = {member.name: member.id for member in table}
        entries: list[ChannelEntry] = []
        at = HEADER_BYTES
        for index, spec in enumerate(channels):
            for side in (spec.a, spec.b):
                if side not in ids:
                    raise LayoutError(f"channel {spec.name!r} names {side!r}, which is no member of region {name!r}")
            entry = ChannelEntry(
                spec.name,
                Kind(spec.kind),
                ids[spec.a],
                ids[spec.b],
                1 + 2 * index,
                at,
                spec.ring_bytes,
                spec.slot_size,
            )
            entries.append(entry)
            at += entry.length
        header = cls(
            name=name,
            size=size,
            vectors=1 + 2 * len(entries) if vectors is None else vectors,
            members=table,
            channels=tuple(entries),
            parts=tuple(_share(table, at, size) if parts is None else _place(name, table, at, size, parts)),
            uuid=region_uuid or uuid4(),
            session=session,
        )
        _check(header)
        return header

    def member(self, name: str) -> Member:
        """The member of that name; raises LayoutError if there is none."""
        for member in self.members:
            if member.name == name:
                return member
        known = ", ".join(m.name for m in self.members)
        raise LayoutError(f"region {self.name!r} has no member {name!r} (it has: {known})")

    def parts_of(self, member: int) -> tuple[Part, ...]:
        """The parts that a member (id) owns, in the order of the table."""
        return tuple(part for part in self.parts if part.owner == member)

    def channel(self, name: str) -> ChannelEntry:
        """The channel of that name; raises LayoutError if there is none."""
        for channel in self.channels:
            if channel.name == name:
                return channel
        known = ", ".join(c.name for c in self.channels) or "none"
        raise LayoutError(f"region {self.name!r} has no channel {name!r} (it has: {known})")


def _share(members: Sequence[Member], at: int, size: int) -> Iterator[Part]:
    """Split what is left of the region evenly between its rw members."""
    writers = [member.id for member in members if member.rights is Rights.RW]
    share = max(size - at, 0) // (len(writers) or 1) // PAGE * PAGE
    if share:
        yield from (Part(owner, at + n * share, share) for n, owner in enumerate(writers))


def _place(region: str, members: Sequence[Member], at: int, size: int, parts: Mapping[str, int]) -> Iterator[Part]:
    """The parts as they were asked for. Raises LayoutError."""
    writers = {member.name: member.id for member in members if member.rights is Rights.RW}
    for name, length in parts.items():
        if name not in writers:
            raise LayoutError(f"part for {name!r}, which is no rw member of region {region!r} (rw members: "
                              f"{', '.join(writers) or 'none'})")
        if length <= 0 or length % PAGE:
            raise LayoutError(f"part for {name!r} of {length} bytes: must be whole pages of {PAGE}")
        if at + length > size:
            raise LayoutError(f"part for {name!r} of {length} bytes: {max(size - at, 0)} are left of {size}")
        yield Part(writers[name], at, length)
        at += length


def member_word(incarnation: int, *, present: bool) -> int:
    """The live u64 of a member: presence in the low half, incarnation (modulo 2**32) in the high half."""
    return (incarnation & 0xFFFF_FFFF) << 32 | int(present)


def split_member_word(word: int) -> tuple[int, bool]:
    """(incarnation, present) of a live word. Any presence other than 1 counts as gone."""
    return word >> 32, word & 0xFFFF_FFFF == 1


def pack_header(header: RegionHeader) -> bytes:
    """The 4096 bytes of the page. Raises LayoutError if the header breaks a rule `parse_header` checks."""
    _check(header)
    page = bytearray(HEADER_BYTES)
    _STABLE.pack_into(
        page, 0, MAGIC, LAYOUT_VERSION, HEADER_BYTES, header.uuid.bytes, header.name.encode("ascii"),
        header.size, header.protocol_min, header.protocol_max, 0, header.session, header.error_code,
        header.error_by, error_text(header.error_text),
    )  # fmt: skip
    counts = (len(header.members), len(header.channels), len(header.parts), header.vectors)
    _COUNTS.pack_into(page, _COUNTS_AT, *counts)
    for m in header.members:
        fields = (int(m.present), m.incarnation, m.id, m.rights, 0, m.name.encode("ascii"))
        _MEMBER.pack_into(page, m.word_offset, *fields)
    for i, c in enumerate(header.channels):
        _CHANNEL.pack_into(
            page, _CHANNELS_AT + i * _CHANNEL_BYTES, c.name.encode("ascii"), c.kind, c.member_a, c.member_b,
            c.first_vector, c.offset, c.ring_bytes, c.slot_size, 0,
        )  # fmt: skip
    for i, p in enumerate(header.parts):
        _PART.pack_into(page, _PARTS_AT + i * _PART_BYTES, p.owner, 0, p.offset, p.length)
    return bytes(page)


def parse_header(data: bytes | bytearray | memoryview, region_size: int | None = None) -> RegionHeader:
    """Copy the first 4096 bytes of `data`, check everything in the copy, return it.

    `region_size` is what the reader can map (BAR or memfd size); the header may not claim another. Raises
    LayoutError and nothing else, whatever the bytes are.
    """
    page = bytes(data[:HEADER_BYTES])
    if len(page) != HEADER_BYTES:
        raise LayoutError(f"header page has {len(page)} bytes instead of {HEADER_BYTES}")
    (magic, version, length, raw_uuid, raw_name, size, protocol_min, protocol_max, _, session, error_code,
     error_by, raw_error) = _STABLE.unpack_from(page, 0)  # fmt: skip
    if magic != MAGIC:
        raise LayoutError(f"no region here: magic is {magic!r} instead of {MAGIC!r}")
    if version != LAYOUT_VERSION:
        raise LayoutError(f"layout version {version} is not known here (only {LAYOUT_VERSION})")
    if length != HEADER_BYTES:
        raise LayoutError(f"header says it has {length} bytes instead of {HEADER_BYTES}")
    if region_size is not None and size != region_size:
        raise LayoutError(f"header says the region has {size} bytes, but {region_size} are mapped")
    n_members, n_channels, n_parts, vectors = _COUNTS.unpack_from(page, _COUNTS_AT)
    # Before the tables are walked, so that no count leads outside the page.
    for what, count, limit in (
        ("members", n_members, MAX_MEMBERS),
        ("channels", n_channels, MAX_CHANNELS),
        ("parts", n_parts, MAX_PARTS),
    ):
        if count > limit:
            raise LayoutError(f"{count} {what}, at most {limit} are possible")
    header = RegionHeader(
        name=_text(raw_name, "region name"),
        size=size,
        vectors=vectors,
        members=tuple(_parse_members(page, n_members)),
        channels=tuple(_parse_channels(page, n_channels)),
        parts=tuple(_parse_parts(page, n_parts)),
        uuid=UUID(bytes=raw_uuid),
        session=session,
        protocol_min=protocol_min,
        protocol_max=protocol_max,
        error_code=error_code,
        error_by=error_by,
        # For people only, and written while others read: decoded as well as may be, never a reason to fail.
        error_text=raw_error.split(b"\0", 1)[0].decode("utf-8", "replace"),
    )
    _check(header)
    return header


def error_text(text: str) -> bytes:
    """`text` as the error field holds it: UTF-8, cut at a character so that it fits in 128 bytes."""
    return text.encode("utf-8", "replace")[:ERROR_TEXT_BYTES].decode("utf-8", "ignore").encode()


def _parse_members(page: bytes, count: int) -> Iterator[Member]:
    for i in range(count):
        presence, incarnation, number, rights, _, name = _MEMBER.unpack_from(page, MEMBERS_AT + i * MEMBER_BYTES)
        if rights not in (Rights.RO, Rights.RW):
            raise LayoutError(f"member {i} has unknown rights {rights}")
        yield Member(number, _text(name, f"name of member {i}"), Rights(rights), incarnation, presence == 1)


def _parse_channels(page: bytes, count: int) -> Iterator[ChannelEntry]:
    for i in range(count):
        name, kind, a, b, vector, offset, ring, slot, _ = _CHANNEL.unpack_from(page, _CHANNELS_AT + i * _CHANNEL_BYTES)
        if kind not in (Kind.MESSAGE, Kind.BYTE):
            raise LayoutError(f"channel {i} is of unknown kind {kind}")
        yield ChannelEntry(_text(name, f"name of channel {i}"), Kind(kind), a, b, vector, offset, ring, slot)


def _parse_parts(page: bytes, count: int) -> Iterator[Part]:
    for i in range(count):
        owner, _, offset, length = _PART.unpack_from(page, _PARTS_AT + i * _PART_BYTES)
        yield Part(owner, offset, length)


def _text(raw: bytes, what: str) -> str:
    name, _, rest = raw.partition(b"\0")
    if rest.strip(b"\0") or not name.isascii():
        raise LayoutError(f"{what} is not ASCII padded with NUL: {raw!r}")
    return name.decode("ascii")


def _page_up(n: int) -> int:
    return -(-n // PAGE) * PAGE


def _power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def _check_name(what: str, name: str, limit: int) -> None:
    if not _NAME.fullmatch(name) or len(name) > limit:
        raise LayoutError(f"{what} {name!r} is not 1 to {limit} of A-Z a-z 0-9 . _ - (first a letter or digit)")


def _check(h: RegionHeader) -> None:
    """Every rule of the page, for plans and for pages alike. Raises LayoutError at the first one broken."""
    _check_name("region name", h.name, _REGION_NAME_BYTES)
    if not _power_of_two(h.size) or not HEADER_BYTES < h.size <= MAX_REGION:
        raise LayoutError(
            f"region {h.name!r} has {h.size} bytes: must be a power of two (QEMU maps it as a PCI BAR), "
            f"above {HEADER_BYTES} and at most {MAX_REGION}"
        )
    if not 1 <= h.protocol_min <= h.protocol_max <= 0xFFFF:
        raise LayoutError(f"protocol versions {h.protocol_min} to {h.protocol_max} are no range")
    for what, value, bits in (
        ("session", h.session, 64),
        ("error code", h.error_code, 32),
        ("error by", h.error_by, 32),
    ):
        if not 0 <= value < 1 << bits:
            raise LayoutError(f"{what} {value} does not fit in {bits} bits")
    if not 1 <= h.vectors <= MAX_VECTORS:
        raise LayoutError(f"{h.vectors} vectors: must be 1 to {MAX_VECTORS}")
    _check_members(h)
    extents = [("header page", 0, HEADER_BYTES)]
    _check_channels(h, extents)
    _check_parts(h, extents)
    # Largest numbers are 64 bits each, and Python's do not wrap: sums are safe to compare.
    extents.sort(key=lambda e: e[1])
    for (before, start, length), (after, next_start, _) in itertools.pairwise(extents):
        if start + length > next_start:
            raise LayoutError(f"{before} and {after} overlap")
    for what, start, length in extents:
        if start + length > h.size:
            raise LayoutError(f"{what} ends at {start + length}, beyond the region's {h.size} bytes")


def _check_members(h: RegionHeader) -> None:
    if not 1 <= len(h.members) <= MAX_MEMBERS:
        raise LayoutError(f"{len(h.members)} members: must be 1 to {MAX_MEMBERS}")
    for i, member in enumerate(h.members):
        if member.id != i:
            raise LayoutError(f"member at index {i} has id {member.id}")
        if not 0 <= member.incarnation < 1 << 32:
            raise LayoutError(f"incarnation {member.incarnation} of member {member.name!r} does not fit in 32 bits")
        _check_name("member name", member.name, _MEMBER_NAME_BYTES)
    if len({member.name for member in h.members}) != len(h.members):
        raise LayoutError("two members have the same name")


def _check_channels(h: RegionHeader, extents: list[tuple[str, int, int]]) -> None:
    if len(h.channels) > MAX_CHANNELS:
        raise LayoutError(f"{len(h.channels)} channels, at most {MAX_CHANNELS} are possible")
    if len({channel.name for channel in h.channels}) != len(h.channels):
        raise LayoutError("two channels have the same name")
    used: set[tuple[int, int]] = set()
    for c in h.channels:
        _check_name("channel name", c.name, _CHANNEL_NAME_BYTES)
        if c.member_a == c.member_b:
            raise LayoutError(f"channel {c.name!r} has the same member on both sides")
        for side in (c.member_a, c.member_b):
            if not 0 <= side < len(h.members) or h.members[side].rights is not Rights.RW:
                raise LayoutError(f"channel {c.name!r}: member {side} is not an rw member of the region")
            for vector in (c.data_vector, c.space_vector):
                if not HOST_VECTOR < vector < h.vectors:
                    raise LayoutError(f"channel {c.name!r} uses vector {vector}: must be 1 to {h.vectors - 1}")
                if (side, vector) in used:
                    raise LayoutError(f"channel {c.name!r} shares vector {vector} of member {side} with another")
                used.add((side, vector))
        _check_ring(c)
        if c.offset % PAGE:
            raise LayoutError(f"channel {c.name!r} starts at {c.offset}, which is no page boundary")
        extents.append((f"channel {c.name!r}", c.offset, c.length))


def _check_ring(c: ChannelEntry) -> None:
    if not 0 < c.ring_bytes <= MAX_REGION:
        raise LayoutError(f"channel {c.name!r} has rings of {c.ring_bytes} bytes")
    if c.kind is Kind.BYTE:
        if c.slot_size:
            raise LayoutError(f"byte channel {c.name!r} has slots of {c.slot_size} bytes instead of 0")
        if not _power_of_two(c.ring_bytes) or c.ring_bytes < MIN_BYTE_RING:
            raise LayoutError(
                f"byte channel {c.name!r} has rings of {c.ring_bytes} bytes: "
                f"must be a power of two from {MIN_BYTE_RING}"
            )
        return
    if c.slot_size < MIN_SLOT or c.slot_size % MIN_SLOT:
        raise LayoutError(f"channel {c.name!r} has slots of {c.slot_size} bytes: must be a multiple of {MIN_SLOT}")
    if c.ring_bytes % c.slot_size or not _power_of_two(c.slots) or c.slots < 2:
        raise LayoutError(
            f"channel {c.name!r}: {c.ring_bytes} bytes are not a power of two (from 2) of slots of {c.slot_size}"
        )


def _check_parts(h: RegionHeader, extents: list[tuple[str, int, int]]) -> None:
    if len(h.parts) > MAX_PARTS:
        raise LayoutError(f"{len(h.parts)} parts, at most {MAX_PARTS} are possible")
    for p in h.parts:
        if not 0 <= p.owner < len(h.members) or h.members[p.owner].rights is not Rights.RW:
            raise LayoutError(f"part at {p.offset}: owner {p.owner} is not an rw member of the region")
        if p.offset % PAGE or p.length % PAGE or not p.length:
            raise LayoutError(f"part of member {p.owner}, {p.length} bytes at {p.offset}, is not whole pages")
        extents.append((f"part of member {p.owner} at {p.offset}", p.offset, p.length))
