"""A channel: two rings and two event channels between two members, and the handshake that opens it.

Each side draws an epoch, resets the words that it alone writes, then acknowledges the other's epoch; both
acknowledged is connected. Either side may come first, die at any point and come again: nothing of an earlier
connection is delivered. Words and memory orders are in docs/protocol.md.
"""

from __future__ import annotations

import enum
import secrets
import time
from typing import TYPE_CHECKING, ClassVar, Generic, Self, TypeVar

from idc import layout
from idc.bell import Waker
from idc.errors import ClosedError, NotConnectedError, TimedOutError
from idc.faults import Point, passing
from idc.flows import flow_seed
from idc.observed import Trips
from idc.region import wait_event
from idc.ring import ByteReceiver, ByteSender, MessageReceiver, MessageSender, fence, load_u64, store_u64

if TYPE_CHECKING:
    from idc.layout import ChannelEntry
    from idc.region import Region

SenderT = TypeVar("SenderT", MessageSender, ByteSender)
ReceiverT = TypeVar("ReceiverT", MessageReceiver, ByteReceiver)

#: Longest time between two looks at the other side during the handshake, seconds. A doorbell normally comes first;
#: one rung before this side's vectors were armed is lost (QEMU drops it), and this look replaces it.
RECHECK = 0.05
#: A doorbell this much behind the words it is for was under way, not lost. Seconds.
IN_FLIGHT = 0.02


class SideState(enum.IntEnum):
    """The state word of a side."""

    ABSENT = 0
    OPEN = 1
    CLOSED = 2


class Handshake:
    """One side of the attach handshake: no waiting in here, `step` looks once and says whether it is done.

    Args:
        region: mapped by this member.
        entry: the channel, from the region's header.

    Attributes:
        epoch: of this side, random and never 0.
        peer_epoch: of the other side, once connected.
        peer_word: the other member's live word (incarnation and presence) it connected under.
    """

    def __init__(self, region: Region, entry: ChannelEntry) -> None:
        self.is_a = region.member == entry.member_a
        peer = entry.member_b if self.is_a else entry.member_a
        self._memory = region.memory
        self._mine = entry.offset + (layout.SIDE_A if self.is_a else layout.SIDE_B)
        self._theirs = entry.offset + (layout.SIDE_B if self.is_a else layout.SIDE_A)
        self._presence = region.header.members[peer].word_offset
        self.epoch = secrets.randbits(63) + 1
        self.peer_epoch = 0
        self.peer_word = 0

    def begin(self) -> None:
        """End whatever connection there was: the other side sees a new epoch. Reset the rings after this.

        The acknowledgement goes first, so that whoever reads the new epoch never pairs it with an old one.
        """
        store_u64(self._memory, self._mine + layout.SIDE_ACK, 0)
        store_u64(self._memory, self._mine + layout.SIDE_STATE, SideState.ABSENT)
        passing(Point.CLEARED)
        store_u64(self._memory, self._mine + layout.SIDE_EPOCH, self.epoch)
        passing(Point.EPOCH)

    def open(self) -> None:
        """Announce that the rings are reset and everything is in place."""
        passing(Point.RESET)
        store_u64(self._memory, self._mine + layout.SIDE_STATE, SideState.OPEN)
        passing(Point.OPENED)

    def step(self) -> tuple[bool, bool]:
        """Look at the other side once: (connected, something of ours changed so that it should be rung)."""
        word = load_u64(self._memory, self._presence)
        _, present = layout.split_member_word(word)
        epoch = load_u64(self._memory, self._theirs + layout.SIDE_EPOCH)
        if not present or epoch == 0:
            return False, False
        changed = epoch != self.peer_epoch or word != self.peer_word
        if changed:
            self.peer_epoch = epoch
            self.peer_word = word
            store_u64(self._memory, self._mine + layout.SIDE_ACK, epoch)
            passing(Point.ACKED)
        # read after the epoch: a side that begins anew clears its acknowledgement before it changes its epoch
        acknowledged = load_u64(self._memory, self._theirs + layout.SIDE_ACK) == self.epoch
        opened = load_u64(self._memory, self._theirs + layout.SIDE_STATE) == SideState.OPEN
        # and still the same: else the acknowledgement read above belongs to a later epoch than the one we noted
        same = load_u64(self._memory, self._theirs + layout.SIDE_EPOCH) == self.peer_epoch
        return acknowledged and opened and same, changed

    def close(self, reason: int) -> None:
        """Say that this side is done; what was sent before is still delivered."""
        store_u64(self._memory, self._mine + layout.SIDE_STATE, reason << 32 | SideState.CLOSED)
        passing(Point.CLOSED)

    @property
    def peer_open(self) -> bool:
        """Whether the other side's state says open."""
        return load_u64(self._memory, self._theirs + layout.SIDE_STATE) == SideState.OPEN

    @property
    def intact(self) -> bool:
        """Whether this side's own words are what it stored: a peer can write over them, and then waits for another."""
        return (load_u64(self._memory, self._mine + layout.SIDE_EPOCH) == self.epoch
                and load_u64(self._memory, self._mine + layout.SIDE_ACK) == self.peer_epoch
                and load_u64(self._memory, self._mine + layout.SIDE_STATE) == SideState.OPEN)

    @property
    def peer_stays(self) -> bool:
        """Whether the other side is what this one was connected to, and acknowledges it."""
        return all(load_u64(self._memory, offset) == value for offset, value in self.watches())

    def watches(self) -> list[tuple[int, int]]:
        """(offset, value) of the words whose change ends the connection: the peer's epoch, state and presence."""
        return [
            (self._theirs + layout.SIDE_EPOCH, self.peer_epoch),
            (self._theirs + layout.SIDE_STATE, SideState.OPEN),
            (self._presence, self.peer_word),
        ]


class Channel(Generic[SenderT, ReceiverT]):
    """A connected channel. Thread rule: one thread at a time on the sender, one on the receiver.

    Attributes:
        sender: the outgoing ring.
        receiver: the incoming ring.
        trips: where this side notes, for observers, how long its transactions take.
        late: what the handshake found by looking again, though no doorbell came; should be 0.
    """

    kind: ClassVar[layout.Kind]
    sender: SenderT
    receiver: ReceiverT

    def __init__(self, region: Region, name: str) -> None:
        self.entry = _entry(region, name, self.kind)
        self._region = region
        self._handshake = Handshake(region, self.entry)
        self._peer = self.entry.member_b if self._handshake.is_a else self.entry.member_a
        self._bells = [region.bell(self._peer, vector)
                       for vector in (self.entry.data_vector, self.entry.space_vector)]
        self._closed = False
        self.late = 0
        # A new epoch before the reset: a peer of the connection before this one must not take the reset for corruption.
        self._handshake.begin()
        self._open_rings()
        self._show_observers()
        self.sender.reset()
        self.receiver.reset()

    @classmethod
    def attach(cls, region: Region, name: str, *, timeout: float | None = None) -> Self:
        """Open one end and wait until the other member has opened its own.

        Args:
            region: mapped by this member.
            name: of the channel in the region's directory.
            timeout: seconds; None waits for ever.

        Raises:
            NotConnectedError: the region has no such channel, it is of the other kind, or this is no member of it.
            TimedOutError: the other side did not come in time. The channel can be attached again.
        """
        channel = cls(region, name)
        try:
            channel._connect(timeout)
        except BaseException:
            channel.close()
            raise
        return channel

    def _open_rings(self) -> None:
        """Make `sender` and `receiver`."""
        raise NotImplementedError

    def _places(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(control, data) offsets of the outgoing and of the incoming ring."""
        ab = (self.entry.offset + layout.RING_AB, self.entry.data_ab)
        ba = (self.entry.offset + layout.RING_BA, self.entry.data_ba)
        return (ab, ba) if self._handshake.is_a else (ba, ab)

    def _show_observers(self) -> None:
        block, is_a = self.entry.offset, self._handshake.is_a
        out, back = (layout.RECORD_AB, layout.RECORD_BA) if is_a else (layout.RECORD_BA, layout.RECORD_AB)
        self.sender.observe(self._region.memory, block + out)
        self.receiver.observe(self._region.memory, block + back + layout.RING_RECORD_BYTES)
        self.trips = Trips(self._region.memory, block + (layout.RECORD_A if is_a else layout.RECORD_B))

    def show(self) -> None:
        """Bring the counters that observers see up to date: before this side's user sleeps elsewhere."""
        self.sender.show()
        self.receiver.show()

    @classmethod
    def entry_of(cls, region: Region, name: str) -> ChannelEntry:
        """The channel of that name, if it is of this kind and the region's member is an end of it.

        Raises:
            NotConnectedError: it is not.
        """
        return _entry(region, name, cls.kind)

    @classmethod
    def begin(cls, region: Region, name: str) -> Self:
        """Open one end without waiting: call `advance` until it says True, whenever the data vector is rung.

        Arguments and errors as `attach`.
        """
        channel = cls(region, name)
        channel._handshake.open()
        channel._ring_peer()
        return channel

    @property
    def peer_open(self) -> bool:
        """Whether the other side has opened its end: it wants to be connected, or is, or was killed while it was."""
        return self._handshake.peer_open

    @property
    def peer_stays(self) -> bool:
        """Whether the other side still holds the connection that this one had with it."""
        return self._handshake.peer_stays

    @property
    def intact(self) -> bool:
        """Before it is connected: whether this side can still become so. If not, close it and begin anew."""
        return self._handshake.intact

    @property
    def flows(self) -> tuple[int, int]:
        """64 bits for each direction, this side's first, that both sides derive from the connection's epochs."""
        mine, theirs = (word.to_bytes(8, "little") for word in (self._handshake.epoch, self._handshake.peer_epoch))
        return flow_seed(mine + theirs), flow_seed(theirs + mine)

    def advance(self) -> bool:
        """Look once whether the other side is there; True once connected."""
        return self._advance(rung=True)

    def _advance(self, *, rung: bool) -> bool:
        connected, changed = self._handshake.step()
        if changed or connected:
            self.late += not rung and not wait_event(self._region.events[self.entry.data_vector], IN_FLIGHT)
            self._ring_peer(1)  # it waits for that one: whoever slept for space was rung when this side opened
        if connected:
            for offset, value in self._handshake.watches():
                self.sender.watch(self._region.memory, offset, value)
                self.receiver.watch(self._region.memory, offset, value)
        return connected

    def _connect(self, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        self._handshake.open()
        self._ring_peer()
        waker, rung = Waker(self._region.events[self.entry.data_vector]), True
        while not self._advance(rung=rung):
            if deadline is not None and time.monotonic() > deadline:
                members = self._region.header.members
                raise TimedOutError(f"channel {self.entry.name!r} of region {self._region.header.name!r}: member "
                                    f"{members[self._peer].name!r} did not attach within {timeout:g} s")
            rung = waker.wait(RECHECK)

    def ring_peer(self) -> None:
        """Ring both vectors of the peer: for who sleeps until there is more than what was just written.

        Raises ClosedError.
        """
        if self._closed:
            raise ClosedError("this channel is closed")
        self._ring_peer()

    def _ring_peer(self, vectors: int = 2) -> None:
        # Orders our words before our last look at the peer's, as the rings do: no wake-up depends on RECHECK then.
        fence()
        for bell in self._bells[:vectors]:
            bell.ring()

    def close(self, reason: int = 0) -> None:
        """End the connection. The peer still receives what was sent before, then learns of the end. Idempotent.

        Args:
            reason: a number for the peer, 32 bits; 0 is a regular end.
        """
        if self._closed:
            return
        self._closed = True
        self._handshake.close(reason)
        self._ring_peer()
        self.sender.close()
        self.receiver.close()
        self.trips.close()
        for bell in self._bells:
            bell.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MessageChannel(Channel[MessageSender, MessageReceiver]):
    """A channel whose rings carry messages."""

    kind = layout.Kind.MESSAGE

    def _open_rings(self) -> None:
        (out_control, out_data), (in_control, in_data) = self._places()
        memory, entry, events = self._region.memory, self.entry, self._region.events
        data_bell, space_bell = self._bells
        self.sender = MessageSender(memory, out_control, out_data, entry.slots, entry.slot_size,
                                    bell=data_bell, wake_fd=events[entry.space_vector])
        self.receiver = MessageReceiver(memory, in_control, in_data, entry.slots, entry.slot_size,
                                        bell=space_bell, wake_fd=events[entry.data_vector])


class ByteChannel(Channel[ByteSender, ByteReceiver]):
    """A channel whose rings carry bytes."""

    kind = layout.Kind.BYTE

    def _open_rings(self) -> None:
        (out_control, out_data), (in_control, in_data) = self._places()
        memory, entry, events = self._region.memory, self.entry, self._region.events
        data_bell, space_bell = self._bells
        self.sender = ByteSender(memory, out_control, out_data, entry.ring_bytes,
                                 bell=data_bell, wake_fd=events[entry.space_vector])
        self.receiver = ByteReceiver(memory, in_control, in_data, entry.ring_bytes,
                                     bell=space_bell, wake_fd=events[entry.data_vector])


def _entry(region: Region, name: str, kind: layout.Kind) -> ChannelEntry:
    try:
        entry = region.header.channel(name)
    except layout.LayoutError as error:
        raise NotConnectedError(str(error)) from error
    if entry.kind is not kind:
        raise NotConnectedError(f"channel {name!r} is a {entry.kind.name.lower()} channel, "
                                f"not a {kind.name.lower()} channel")
    if region.member not in (entry.member_a, entry.member_b):
        raise NotConnectedError(f"member {region.member} has no end of channel {name!r}")
    return entry
