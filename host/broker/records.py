"""What the desk keeps: limits, counts, and the state of requests, leases and domains. Depends on host.broker.checks."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from host.broker.checks import Claim, Domain, Key, Span
    from idc.remote.resolution import Lease

    #: Answer of a request: error code (0 for none) and status.
    Answer = Callable[[int, bytes], object]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one domain may use of the broker.

    Attributes:
        piece: bytes that are copied before the next asker has its turn: some tenths of a millisecond.
        patience: seconds that an owner has to answer RESOLVE.
        leases: of one owner, kept for reuse; fewer than an owner gives one holder by default.
        refusals: of an asker's references by their owners: so many at once, and so many more each second.
    """

    piece: int = 1 << 20
    patience: float = 5.0
    leases: int = 32
    refusals: float = 64.0


@dataclass(slots=True)
class Counts:
    """Of one domain since the broker started, as an asker (the first four) and as an owner.

    Attributes:
        requests: COPY received.
        refused: of them, answered with a refusal.
        pieces: copies made, each at most `Limits.piece` long.
        copied: bytes copied, each once.
        asked: RESOLVE sent to it.
        timeouts: of them, not answered in time.
    """

    requests: int = 0
    refused: int = 0
    pieces: int = 0
    copied: int = 0
    asked: int = 0
    timeouts: int = 0


@dataclass(slots=True)
class Meter:
    """What is known of a domain from one connection to the next: to connect again must gain it nothing.

    Attributes:
        counts: see there.
        tokens: refusals that it has left, see `Limits.refusals`.
        refilled: when that was worked out.
    """

    counts: Counts
    tokens: float
    refilled: float


@dataclass(slots=True)
class Held:
    """A lease and how many jobs rely on it."""

    lease: Lease
    users: int = 0


@dataclass(slots=True)
class Side:
    """One of a job's two references."""

    claim: Claim
    held: Held | None = None
    span: Span | None = None


@dataclass(slots=True, eq=False)
class Job:
    """One COPY."""

    asker: Seat
    source: Side
    target: Side
    answer: Answer
    deadline: float
    done: int = 0
    over: bool = False

    @property
    def sides(self) -> tuple[Side, Side]:
        """Both."""
        return self.source, self.target


@dataclass(slots=True, eq=False)
class Question:
    """A RESOLVE that is to be sent, or was and has no answer yet, and who waits for it."""

    claim: Claim
    waiting: list[tuple[Job, Side]] = field(default_factory=list)
    sent: bool = False


@dataclass(slots=True, eq=False)
class Seat:
    """A connected domain: as an asker its queue, as an owner its leases."""

    domain: Domain
    meter: Meter
    queue: deque[Job] = field(default_factory=deque)
    jobs: set[Job] = field(default_factory=set)
    leases: OrderedDict[Key, Held] = field(default_factory=OrderedDict)
    questions: dict[Key, Question] = field(default_factory=dict)
    unsent: deque[Question] = field(default_factory=deque)
    revoking: list[tuple[list[Held], Callable[[], None]]] = field(default_factory=list)
