"""What an endpoint asks of a transport. A port finds the peer and connects; a carrier is one connection.

Everything here returns at once but `wait`. A transport is the only thing that knows how bytes travel: endpoints, and
the clients above them, are the same over all of them. Depends on nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from idc._core import Pointer
    from idc.observed import Trips
    from idc.region import Region
    from idc.trace.hook import EndpointTrace

    #: All of a frame; or its first 8 bytes and the rest, apart, where that is long and a carrier need not join the two.
    Frame = bytes | tuple[bytes, bytes]


class Masking(NamedTuple):
    """A doorbell that is masked while the peer rings it without end, and then looked at by time.

    Attributes:
        times: how often it was masked.
        now: whether it is, at this moment.
    """

    times: int
    now: bool


#: Of a transport in which nobody can ring.
NO_MASKING: Final = Masking(0, False)


class Rings(Protocol):
    """Something that counts."""

    @property
    def doorbells(self) -> int:
        """How often the peer was rung so far."""


class _Silent:
    doorbells = 0


#: Of a transport without doorbells.
SILENT: Final = _Silent()


class Carrier(Protocol):
    """One connection: whole frames, in order, at most once, until it is lost; then never again.

    Attributes:
        capacity: frames of each direction that it holds for certain, whatever the peer does.
        frame_bytes: longest frame.
        near: both ends are on one machine.
        flows: what names the submissions of this end, and those of the peer, in a trace: at the peer the same two
            the other way round, and others on every other connection.
        flushes: whether `take` wakes the peer for what was posted, before it waits.
        trips: where an end notes, for observers, how long its transactions take; None where nobody could look.
        line: a `struct idc_line` (idc/endpoint/transact.h), by which the core handles the usual transactions; None
            where it cannot.
    """

    capacity: int
    frame_bytes: int
    near: bool
    flows: tuple[int, int]
    flushes: bool

    @property
    def line(self) -> Pointer | None:
        """See above."""

    @property
    def posted(self) -> bool:
        """See `exchange`."""

    @property
    def trips(self) -> Trips | None:
        """See above."""

    @property
    def rings(self) -> Rings:
        """Has how often the peer was rung so far; lives no longer than the carrier."""

    def post(self, frame: bytes, body: bytes = b"") -> None:
        """Take a frame, without waking the peer. Raises DisconnectedError, and MisuseError for one that is too long.

        Args:
            frame: all of it, or its beginning.
            body: the rest of it, where it is long: a carrier need not copy it to join the two.
        """

    def flush(self) -> None:
        """Wake the peer for what was posted, if it sleeps. Raises DisconnectedError."""

    def send(self, frame: bytes, body: bytes = b"") -> None:
        """`post` and `flush` in one. What breaks after the first is left to the next call to say."""

    def take(self, timeout: float) -> Sequence[Frame]:
        """Frames that are there; waits up to `timeout` seconds for the first (0: not at all).

        What the peer had sent is delivered before the DisconnectedError that says it is over.
        """

    def traced(self, trace: EndpointTrace | None) -> bool:
        """From now on note the moments of frames there, None: no more. Whether it does, or leaves it to who uses it."""

    def exchange(self, frame: bytes, body: bytes, timeout: float) -> bytes | Sequence[Frame]:
        """`send`, then `take` of at most one frame, in as few steps as can be: for who waits for an answer.

        A carrier that knows the answer when it sees it may return the body of one without an error, as bytes. Nothing
        comes where it does not come in time, or what comes is not for this call: then `take` has more to say, also of
        a connection that is over. Raises as `post`; `posted` then says whether the frame went, as after an
        interruption it may have, and what came in its place is lost.
        """

    def arm(self) -> bool:
        """Have `fileno` of the port become readable at the next frame; False if frames are there already."""

    def close(self) -> None:
        """End it: what was posted is delivered, then the peer learns of the end. Idempotent."""


class Port(Protocol):
    """One end of a place where two endpoints can meet, for as long as the endpoint lives.

    Attributes:
        regions: those that this end maps, closed with it: what buffers can be allocated from that the peer reaches.
    """

    @property
    def regions(self) -> Sequence[Region]:
        """See above."""

    @property
    def masking(self) -> Masking:
        """What was done about a peer that rings without end."""

    @property
    def patience(self) -> float | None:
        """Longest sleep on `fileno` while connected, seconds, before `wait(0)` is due; None: only a wake-up counts."""

    def look(self) -> bool:
        """Whether the peer is there, at this moment. Makes progress towards a connection; never waits."""

    def connection(self) -> Carrier | None:
        """The carrier of a new connection, once both sides are there. At most one at a time."""

    def wait(self, timeout: float) -> None:
        """Wait until `look` or `connection` may have something new to say, up to `timeout` seconds."""

    def fileno(self) -> int:
        """Readable when there is something new: for a selector. See also `Carrier.arm`."""

    def close(self) -> None:
        """Let go of everything. Idempotent."""
