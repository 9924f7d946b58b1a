"""What a region holds, in words: header page, members, channels, rings, what comes next in them. For people and bug
reports.

Pure: bytes in, dataclasses out. May depend on `idc.layout` and `idc.blocks`. Whatever the bytes are, it does not fail:
what is inconsistent is listed under `problems`. A live region changes while it is read, so one look may show a ring
between two words of the same step; look twice before believing a problem of a ring whose sides are both open.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from idc import blocks, layout
from idc.blocks import MASK, STATES, SideWords
from idc.layout import ChannelEntry, Kind, LayoutError, RegionHeader, Rights

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterator

    Memory: TypeAlias = bytes | bytearray | memoryview | mmap.mmap

#: How many of the next messages of a ring are shown, and how many bytes of each, or of a byte ring.
NEXT_MESSAGES = 4
NEXT_BYTES = 32
_KINDS = {Kind.MESSAGE: "message", Kind.BYTE: "byte"}


@dataclass(frozen=True)
class Side(SideWords):
    """One side of a channel, with its heartbeat."""

    heartbeat: int


@dataclass(frozen=True)
class Descriptor:
    """What the consumer will take next: its index, its length in bytes, its first NEXT_BYTES as hexadecimal digits."""

    index: int
    length: int
    start: str


@dataclass(frozen=True)
class Ring:
    """One direction. Indexes count messages, or bytes.

    Attributes:
        direction: "front -> back".
        tail: where the producer is; in a message ring as of its last notification.
        head: where the consumer is.
        space_event: the producer wants a doorbell when `head` reaches this.
        data_event: the consumer wants a doorbell when `tail` reaches this.
        filled: messages, or bytes, that are there to be taken.
        capacity: of them in all.
        next: what the consumer takes next.
    """

    direction: str
    tail: int
    head: int
    space_event: int
    data_event: int
    filled: int
    capacity: int
    next: tuple[Descriptor, ...]


@dataclass(frozen=True)
class ChannelDump:
    """A channel: `connected` if both sides are open and each has acknowledged the other's epoch."""

    name: str
    kind: str
    offset: int
    connected: bool
    sides: tuple[Side, Side]
    rings: tuple[Ring, Ring]


@dataclass(frozen=True)
class RegionDump:
    """All of it. `header` is None where the page is none; `problems` are sentences, empty if all is well."""

    size: int
    header: RegionHeader | None
    channels: tuple[ChannelDump, ...] = ()
    problems: tuple[str, ...] = field(default=())


def decode(memory: Memory) -> RegionDump:
    """Decode a region, live or from a file. Never raises, whatever the bytes are."""
    size = len(memory)
    problems: list[str] = []
    try:
        header = layout.parse_header(memory[: layout.HEADER_BYTES], None)
    except LayoutError as error:
        return RegionDump(size, None, problems=(f"header page: {error}",))
    if header.size != size:
        problems.append(f"the header page says {header.size} bytes, here are {size}")
    if header.error_code:
        by = "the host" if header.error_by == layout.ERROR_BY_HOST else _member(header, header.error_by)
        problems.append(f"error {header.error_code} by {by}: {header.error_text or 'no text'}")
    channels = []
    for entry in header.channels:
        if entry.offset + entry.length > size:
            problems.append(f"channel {entry.name}: lies beyond the end of what is here")
        else:
            channels.append(_channel(memory, header, entry, problems))
    return RegionDump(size, header, tuple(channels), tuple(problems))


def _u64(memory: Memory, offset: int) -> int:
    return int.from_bytes(memory[offset : offset + 8], "little")


def _member(header: RegionHeader, number: int) -> str:
    return header.members[number].name if number < len(header.members) else f"member {number}, which there is not"


def _channel(memory: Memory, header: RegionHeader, entry: ChannelEntry, problems: list[str]) -> ChannelDump:
    found: list[str] = []
    a, b = header.members[entry.member_a], header.members[entry.member_b]
    sides = (_side(memory, entry.offset + layout.SIDE_A, a.name, found),
             _side(memory, entry.offset + layout.SIDE_B, b.name, found))
    both_ways = ((sides[0], sides[1], a.present), (sides[1], sides[0], b.present))
    for mine, theirs, present in both_ways:
        if mine.state == "open" and not mine.epoch:
            found.append(f"{mine.member} is open without an epoch")
        if mine.ack and theirs.epoch and mine.ack != theirs.epoch:
            found.append(f"{mine.member} acknowledged epoch {mine.ack:#x} of {theirs.member}, which is at "
                         f"{theirs.epoch:#x}: it has not noticed the restart")
        if mine.state == "open" and not present:
            found.append(f"{mine.member} is open, but the host says that it is gone")
    connected = blocks.connected(sides)
    rings = tuple(
        _ring(memory, entry, f"{first.member} -> {second.member}", entry.offset + control, data, connected, found)
        for first, second, control, data in (
            (sides[0], sides[1], layout.RING_AB, entry.data_ab), (sides[1], sides[0], layout.RING_BA, entry.data_ba)))
    problems += [f"channel {entry.name}: {text}" for text in found]
    return ChannelDump(entry.name, _KINDS[entry.kind], entry.offset, connected, sides, (rings[0], rings[1]))


def _side(memory: Memory, at: int, name: str, found: list[str]) -> Side:
    side = Side(*blocks.side_words(lambda offset: _u64(memory, offset), at, name),
                _u64(memory, at + layout.SIDE_HEARTBEAT))
    if side.state not in STATES.values():
        found.append(f"{name} has the unknown state {side.state}")
    return side


def _ring(memory: Memory, entry: ChannelEntry, direction: str, control: int, data: int, connected: bool,
          found: list[str]) -> Ring:
    tail, space_event = _u64(memory, control + layout.RING_TAIL), _u64(memory, control + layout.RING_SPACE_EVENT)
    head, data_event = _u64(memory, control + layout.RING_HEAD), _u64(memory, control + layout.RING_DATA_EVENT)
    upcoming: tuple[Descriptor, ...]
    if entry.kind is Kind.BYTE:
        capacity = entry.ring_bytes
        filled = tail - head & MASK
        if filled > capacity:
            if connected:
                found.append(f"{direction}: tail {tail} and head {head} are {filled} apart, in a ring of {capacity}")
            filled, upcoming = 0, ()
        else:
            upcoming = tuple(_next_bytes(memory, data, capacity, head, filled))
    else:
        capacity = entry.slots
        filled, upcoming = _messages(memory, entry, data, head, direction, connected, found)
        if connected and blocks.filled(tail, head, capacity) is None:
            found.append(f"{direction}: tail {tail} and head {head} are more than {capacity} apart")
    return Ring(direction, tail, head, space_event, data_event, filled, capacity, upcoming)


def _next_bytes(memory: Memory, data: int, capacity: int, head: int, filled: int) -> Iterator[Descriptor]:
    if filled:
        shown = min(filled, NEXT_BYTES)
        at = head % capacity
        first = min(shown, capacity - at)
        piece = bytes(memory[data + at : data + at + first]) + bytes(memory[data : data + shown - first])
        yield Descriptor(head, filled, piece.hex())


def _messages(memory: Memory, entry: ChannelEntry, data: int, head: int, direction: str, connected: bool,
              found: list[str]) -> tuple[int, tuple[Descriptor, ...]]:
    """Follow the slots from the consumer's position, as it will: (how many hold a message, the first of them)."""
    shown: list[Descriptor] = []
    for count in itertools.count():
        index = head + count & MASK
        at = data + index % entry.slots * entry.slot_size
        seq, length = struct.unpack("<II", memory[at : at + layout.SLOT_HEADER_BYTES])
        # what the lap before left there, or 0 in the first
        before = index - entry.slots + 1 & 0xFFFF_FFFF if index >= entry.slots else 0
        if count == entry.slots or seq != index + 1 & 0xFFFF_FFFF:
            if count < entry.slots and seq != before and connected:
                found.append(f"{direction}: slot of message {index} has sequence number {seq}, neither {before} (not "
                             f"yet) nor {index + 1 & 0xFFFF_FFFF} (there)")
            return count, tuple(shown)
        if length > entry.slot_size - layout.SLOT_HEADER_BYTES:
            found.append(f"{direction}: message {index} claims {length} bytes, a slot holds "
                         f"{entry.slot_size - layout.SLOT_HEADER_BYTES}")
        if count < NEXT_MESSAGES:
            start = at + layout.SLOT_HEADER_BYTES
            piece = bytes(memory[start : start + min(length, NEXT_BYTES, entry.slot_size - layout.SLOT_HEADER_BYTES)])
            shown.append(Descriptor(index, length, piece.hex()))
    raise AssertionError  # count() does not end


def lines(dump: RegionDump) -> Iterator[str]:
    """The dump for people, a line at a time; problems last, each marked with "!"."""
    if dump.header is None:
        yield f"{dump.size} bytes, no region that can be read"
    else:
        yield from _header_lines(dump.header)
        for channel in dump.channels:
            yield from _channel_lines(channel)
    for problem in dump.problems:
        yield f"! {problem}"
    if not dump.problems:
        yield "no inconsistency found"


def _header_lines(header: RegionHeader) -> Iterator[str]:
    yield (f"region {header.name}: {header.size} bytes, {header.vectors} vectors, uuid {header.uuid}, session "
           f"{header.session:#018x}, protocol {header.protocol_min} to {header.protocol_max}")
    for member in header.members:
        where = "" if member.rights is Rights.RO else f", {'present' if member.present else 'gone'}, incarnation " \
                                                      f"{member.incarnation}"
        yield f"  member {member.id} {member.name}: {member.rights.name.lower()}{where}"
    for part in header.parts:
        yield f"  part of {header.members[part.owner].name}: {part.length} bytes at {part.offset:#x}"


def _channel_lines(channel: ChannelDump) -> Iterator[str]:
    yield (f"channel {channel.name}: {channel.kind}, at {channel.offset:#x}, "
           f"{'connected' if channel.connected else 'not connected'}")
    for side in channel.sides:
        reason = f", reason {side.reason}" if side.reason else ""
        yield f"  {side.member}: {side.state}{reason}, epoch {side.epoch:#x}, acknowledges {side.ack:#x}"
    unit = "bytes" if channel.kind == "byte" else "messages"
    for ring in channel.rings:
        yield (f"  {ring.direction}: {ring.filled} of {ring.capacity} {unit}; tail {ring.tail}, head {ring.head}; "
               f"rings at tail {ring.data_event}, head {ring.space_event}")
        for descriptor in ring.next:
            at = f"message {descriptor.index}" if channel.kind == "message" else f"from {descriptor.index}"
            yield f"    {at}, {descriptor.length} bytes: {descriptor.start}"
