"""QEMU's ivshmem client-server protocol, version 0, as pure state: no I/O, no file descriptor is touched.

May depend on the standard library and host.errors. Reference: QEMU, docs/specs/ivshmem-spec.txt. The server
sends 8-byte little-endian signed numbers, each with at most one descriptor; a client sends nothing, ever.

    0                      protocol version
    ID                     the client's own id, 0 to 65535
    -1  + descriptor       the shared memory
    ID  + descriptor       one more vector of peer ID (of the client itself, if the id is its own), in order
    ID                     peer ID disconnected

Nothing in it says that the initial messages are over: see `host.ivshmem.client` for what is made of that.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from host.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

VERSION: Final = 0
MEMORY: Final = -1
MAX_ID: Final = 0xFFFF
MAX_VECTORS: Final = 2048  # MSI-X has no more
MESSAGE_BYTES: Final = 8

_NUMBER = struct.Struct("<q")

#: What stands for a descriptor: an int at the client, a counted reference at the server.
D = TypeVar("D")


@dataclass(frozen=True, slots=True)
class Message(Generic[D]):
    """One message of the server: a number and perhaps a descriptor."""

    number: int
    descriptor: D | None = None

    def encode(self) -> bytes:
        """The 8 bytes; the descriptor goes with them as SCM_RIGHTS."""
        return _NUMBER.pack(self.number)


def vectors_of(peer: int, descriptors: Iterable[D]) -> Iterator[Message[D]]:
    """What tells a client a peer's (or its own) vectors, in order."""
    return (Message(peer, descriptor) for descriptor in descriptors)


def greeting(own: int, memory: D, own_vectors: Sequence[D], others: Mapping[int, Sequence[D]]) -> list[Message[D]]:
    """All initial messages for a new client: version, id, memory, the others' vectors, its own at the end."""
    messages: list[Message[D]] = [Message(VERSION), Message(own), Message(MEMORY, memory)]
    for peer, descriptors in others.items():
        messages += vectors_of(peer, descriptors)
    messages += vectors_of(own, own_vectors)
    return messages


def left(peer: int) -> Message[D]:
    """What tells a client that a peer disconnected. Never to be sent twice, nor for an id that comes back.

    QEMU's device frees the peer's vectors on it and never allocates them again: both corrupt its heap.
    """
    return Message(peer)


class State(enum.Enum):
    """What a client expects next."""

    VERSION = enum.auto()
    ID = enum.auto()
    MEMORY = enum.auto()
    PEERS = enum.auto()


@dataclass(frozen=True, slots=True)
class Joined:
    """Event: `vector` number `vector` of `peer` is descriptor `descriptor`."""

    peer: int
    vector: int
    descriptor: int


@dataclass(frozen=True, slots=True)
class Left:
    """Event: `peer` disconnected; `descriptors` were its vectors and are the caller's to close."""

    peer: int
    descriptors: tuple[int, ...]


@dataclass(slots=True)
class Client:
    """A client's view of the protocol. Feed it what came; look at its attributes, which only grow valid.

    Attributes:
        own: own id, None until told.
        memory: descriptor of the shared memory, None until told.
        vectors: descriptors of each peer's vectors, in order; own ones under the own id.
    """

    own: int | None = None
    memory: int | None = None
    vectors: dict[int, list[int]] = field(default_factory=dict)
    state: State = State.VERSION
    _buffer: bytes = b""
    _pending: list[int] = field(default_factory=list)

    @property
    def wanted(self) -> int:
        """How many bytes to read at most: to the end of the message, so that its descriptor stays with it."""
        return MESSAGE_BYTES - len(self._buffer)

    def feed(self, data: bytes, descriptors: Sequence[int] = ()) -> Joined | Left | None:
        """Take at most `wanted` bytes and the descriptors that came with them; return what it means to peers.

        Raises ProtocolError; then this object is of no more use but for `take_all`.
        """
        if len(data) > self.wanted:
            raise ProtocolError(f"{len(data)} bytes fed where {self.wanted} complete a message")
        self._buffer += data
        self._pending += descriptors
        if len(self._pending) > 1:
            raise ProtocolError(f"{len(self._pending)} descriptors came with one message")
        if len(self._buffer) < MESSAGE_BYTES:
            return None
        (number,) = _NUMBER.unpack(self._buffer)
        self._buffer = b""
        event = self._message(number, self._pending[0] if self._pending else None)
        self._pending.clear()  # only now: a message that is refused leaves its descriptor with us
        return event

    def take_all(self) -> list[int]:
        """Forget, and return for closing, every descriptor that was fed and not handed out by `Left`."""
        taken = [] if self.memory is None else [self.memory]
        taken += [descriptor for group in self.vectors.values() for descriptor in group] + self._pending
        self.memory = None
        self.vectors.clear()
        self._pending.clear()
        return taken

    def _message(self, number: int, descriptor: int | None) -> Joined | Left | None:
        if self.state is State.PEERS:
            return self._peer(number, descriptor)
        if (descriptor is not None) != (self.state is State.MEMORY):
            came = "came with a" if descriptor is not None else "came without its"
            raise ProtocolError(f"{self.state.name.lower()} ({number}) {came} descriptor")
        if self.state is State.VERSION:
            if number != VERSION:
                raise ProtocolError(f"server speaks protocol version {number} instead of {VERSION}")
            self.state = State.ID
        elif self.state is State.ID:
            if not 0 <= number <= MAX_ID:
                raise ProtocolError(f"server gives id {number}: must be 0 to {MAX_ID}")
            self.own, self.state = number, State.MEMORY
        else:
            if number != MEMORY:
                raise ProtocolError(f"server sends {number} where the shared memory ({MEMORY}) belongs")
            self.memory, self.state = descriptor, State.PEERS
        return None

    def _peer(self, number: int, descriptor: int | None) -> Joined | Left:
        if not 0 <= number <= MAX_ID:
            raise ProtocolError(f"server names peer {number}: must be 0 to {MAX_ID}")
        if descriptor is None:
            if number == self.own or number not in self.vectors:
                raise ProtocolError(f"server says that peer {number} left, which was never there")
            return Left(number, tuple(self.vectors.pop(number)))
        known = self.vectors.setdefault(number, [])
        if len(known) >= MAX_VECTORS:
            raise ProtocolError(f"server gives peer {number} more than {MAX_VECTORS} vectors")
        known.append(descriptor)
        return Joined(number, len(known) - 1, descriptor)
