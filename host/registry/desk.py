"""Requests of all domains, one of each in turn, and what becomes of them: the registry's logic with no I/O.

    request ──▶ the seat's queue ──▶ read: answered from what is on disk
                                 └─▶ change: done on the newest state ──▶ batch ──▶ disk ──▶ answered, watchers told

There are two states: `head` has every change that was taken, `durable` those that are on disk; only the latter is ever
shown. A domain's own requests are done in order: what it asks after a change waits until that is on disk. Others wait
for nobody's disk. Depends on host.registry and idc.registry.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from host.registry import tree
from host.registry.transactions import MUTATIONS, Open, answer, apply
from host.registry.tree import Edit, Limits, Refused, State
from host.registry.watches import Watch, Watches
from idc.registry import frames
from idc.registry.frames import HOST, Fault, FrameError, Op, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from host.registry.tree import Change, Effect

    #: Answer of a request: error code (0 for none) and status.
    Answer = Callable[[int, bytes], object]

log = logging.getLogger("host.registry")

#: Of the registry's time, what a domain may use in the long run, and seconds that it may use at once. Who asks one
#: thing after the other stays below that; who floods waits, and others find the registry idle.
SHARE: Final = 0.2
BURST: Final = 0.05
#: Operations that show what is there, and so wait for the domain's own changes.
_SHOW: Final = frozenset({Op.READ, Op.LIST, Op.TREE, Op.ACCESS, Op.BEGIN, Op.WATCH, Op.HELLO})


class Outside(Protocol):
    """What a seat needs of its link."""

    @property
    def room(self) -> int:
        """Longest event that the domain takes, bytes."""

    def event(self, body: bytes, done: Callable[[], None]) -> bool:
        """Send an event; False if the link takes no more now. `done`: it was taken, or the link is lost."""


@dataclass(slots=True, eq=False)
class Seat:
    """One link: who is at the other end, and what it has open here."""

    who: str
    outside: Outside
    session: bytes = b""
    queue: deque[tuple[Request, Answer]] = field(default_factory=deque)
    watches: dict[int, Watch] = field(default_factory=dict)
    waiting: deque[Watch] = field(default_factory=deque)
    transactions: dict[int, Open] = field(default_factory=dict)
    last: int = 0
    unsynced: int = 0
    gone: bool = False
    credit: float = BURST
    credited: float = 0.0

    def may(self, now: float) -> bool:
        """Whether it has not used up its share. The host has all there is."""
        self.credit = min(BURST, self.credit + SHARE * (now - self.credited))
        self.credited = now
        return self.credit >= 0 or self.who == HOST


@dataclass(slots=True)
class _Pending:
    """An edit that is not on disk yet."""

    effects: Sequence[Effect]
    changes: Sequence[Change]
    domains: dict[str, bytes] | None
    seat: Seat | None
    answer: Answer


@dataclass(slots=True)
class Batch:
    """What is to be written at once.

    Attributes:
        effects: of each edit.
        domains: with them, if they have changed.
        state: that it leads to.
    """

    effects: list[Sequence[Effect]]
    domains: dict[str, bytes] | None
    state: State
    pending: list[_Pending]


class Desk:
    """All of it.

    Args:
        state: as it is on disk.
        limits: of each domain.
        clock: seconds; what a domain uses of the registry is measured by it.

    Attributes:
        durable: what is on disk, and so what is shown.
    """

    def __init__(self, state: State, limits: Limits | None = None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.limits = limits or Limits()
        self.durable = state
        self._head = state
        self._serial = 1
        self._commits = 0
        self._seats: list[Seat] = []
        self._watches = Watches()
        self._open: deque[Open] = deque()
        self._pending: list[_Pending] = []
        self._writing = False
        self._ephemeral = _ephemeral(state)
        self._orphans = set(self._ephemeral)

    @property
    def seats(self) -> Sequence[Seat]:
        """The links there are."""
        return self._seats

    # -- who comes and goes

    def admit(self, domain: str, uuid: bytes) -> None:
        """There is a domain, known by the uuid of its control region: it has a home from now on."""
        if self._head.domains.get(domain) != uuid:
            self._by_host(lambda edit: edit.admit(domain, uuid))

    def dismiss(self, domain: str) -> None:
        """The domain is no more, and neither is anything that it owned."""
        if domain in self._head.domains:
            self._by_host(lambda edit: edit.dismiss(domain))

    @property
    def known(self) -> set[str]:
        """Names of the domains that were admitted."""
        return set(self._head.domains)

    def arrive(self, who: str, outside: Outside) -> Seat:
        """A link is connected."""
        seat = Seat(who, outside, last=secrets.randbits(30))
        self._seats.append(seat)
        if tree.look(self.durable.root, frames.home(who)) is None and who in self._head.domains:
            self._pending.append(_Pending((), (), None, seat, _nobody))  # it waits for its home to be on disk
            seat.unsynced += 1
        return seat

    def leave(self, seat: Seat) -> None:
        """Its connection is over: its watches, transactions and ephemeral nodes go. Idempotent."""
        if seat.gone:
            return
        seat.gone = True
        self._seats.remove(seat)
        for watch in seat.watches.values():
            self._watches.remove(watch)
        for number in tuple(seat.transactions):
            self._end(seat, number)
        while seat.queue:
            seat.queue.popleft()[1](Fault.FAILED, b"")  # to nobody: but its link waits for all to be answered
        seat.watches.clear()
        if not any((other.who, other.session) == (seat.who, seat.session) for other in self._seats):
            self._vanish({(seat.who, seat.session)})

    @property
    def orphans(self) -> bool:
        """Whether there are ephemeral nodes of those who are not here."""
        return bool(self._orphans)

    def remove_orphans(self) -> None:
        """Remove the ephemeral nodes of those who have not come back since the registry started."""
        here = {(seat.who, seat.session) for seat in self._seats}
        self._vanish(self._orphans - here)
        self._orphans.clear()

    # -- requests

    def request(self, seat: Seat, body: bytes, answered: Answer) -> None:
        """Take a request as it came. It is answered once, now or later, also if the seat leaves before."""
        try:
            seat.queue.append((frames.parse(body), answered))
        except FrameError as error:
            answered(Fault.MALFORMED, frames.reason(str(error)))

    def work(self) -> bool:
        """One request of each domain that has one that need not wait. Whether there was any."""
        busy = False
        now = self._clock()
        for seat in tuple(self._seats):
            if _ready(seat) and seat.may(now):
                request, answered = seat.queue.popleft()
                busy = True
                try:
                    status = self._do(seat, request, answered)
                except Refused as refused:
                    answered(refused.fault, frames.reason(str(refused)))
                except Exception:
                    # A mistake of ours, of which others must not feel anything. States are made whole or not at all.
                    log.exception("a request of %s: %s", seat.who, request)
                    answered(Fault.FAILED, frames.reason("the registry failed, see its log"))
                else:
                    if status is not None:
                        answered(0, status)
                began, now = now, self._clock()
                seat.credit -= now - began
        return busy

    def next_turn(self) -> float | None:
        """When, by the clock, the first of those that have used up their share has its turn; None if nobody waits."""
        waiting = [seat.credited - seat.credit / SHARE for seat in self._seats if _ready(seat) and seat.credit < 0]
        return min(waiting, default=None)

    def _do(self, seat: Seat, request: Request, answered: Answer) -> bytes | None:
        """The status; None if it is answered once it is on disk."""
        op = request.op
        if op is Op.COMMIT:
            transaction = self._transaction(seat, request)
            self._end(seat, request.transaction)
            edit = transaction.commit(self._head, self._next_serial())
            if not edit.effects:
                return b""
            self._take(edit, seat, answered)
            return None
        if op is Op.ABORT:
            self._transaction(seat, request)
            self._end(seat, request.transaction)
            return b""
        if request.transaction:
            if op not in MUTATIONS and op not in (Op.READ, Op.LIST, Op.TREE, Op.ACCESS):
                raise Refused(Fault.MALFORMED, f"{op.name} is no operation of a transaction")
            return self._transaction(seat, request).step(request)
        if op in MUTATIONS:
            edit = self._edit(seat)
            apply(edit, request)
            if not edit.effects:
                return b""
            self._take(edit, seat, answered)
            return None
        if op is Op.BEGIN:
            return self._begin(seat)
        if op is Op.WATCH:
            return self._watch(seat, request)
        if op is Op.UNWATCH:
            return self._unwatch(seat, request)
        if op is Op.HELLO:
            return self._hello(seat, request.rest)
        return answer(self.durable, seat.who, request)

    def _hello(self, seat: Seat, session: bytes) -> bytes:
        if seat.session not in (b"", session):
            raise Refused(Fault.REFUSED, "this link has another session already")
        seat.session = session
        kept = (seat.who, session) in self._ephemeral
        if seat.who != HOST:  # it has one link, so whatever had it before is no more
            self._vanish({key for key in self._ephemeral if key[0] == seat.who and key[1] != session})
        self._orphans.discard((seat.who, session))
        return frames.pack_hello(seat.who, kept=kept)

    def _begin(self, seat: Seat) -> bytes:
        if len(seat.transactions) >= self.limits.transactions and seat.who != HOST:
            raise Refused(Fault.QUOTA, f"{seat.who} has {len(seat.transactions)} transactions open, the quota")
        seat.last = seat.last + 1 & 0xFFFFFFFF or 1
        opened = Open(self.durable, seat.who, seat.session, self.limits, self._commits)
        seat.transactions[seat.last] = opened
        self._open.append(opened)
        return frames.pack_number(seat.last)

    def _transaction(self, seat: Seat, request: Request) -> Open:
        try:
            return seat.transactions[request.transaction]
        except KeyError:
            raise Refused(Fault.CONFLICT, "there is no such transaction any more: repeat it") from None

    def _end(self, seat: Seat, number: int) -> None:
        opened = seat.transactions.pop(number)
        if not opened.expired:
            self._open.remove(opened)

    def _watch(self, seat: Seat, request: Request) -> bytes:
        if (known := seat.watches.get(request.number)) is not None:
            if known.path != request.path:
                raise Refused(Fault.REFUSED, f"watch {request.number} is of another path")
            return b""
        if len(seat.watches) >= self.limits.watches and seat.who != HOST:
            raise Refused(Fault.QUOTA, f"{seat.who} has {len(seat.watches)} watches, the quota")
        watch = Watch(seat.who, request.number, request.path, request.path, seat.waiting,
                      seat if request.others else None, nodes=request.nodes)
        seat.watches[request.number] = watch
        self._watches.add(watch)
        watch.enqueue()
        return b""

    def _unwatch(self, seat: Seat, request: Request) -> bytes:
        watch = seat.watches.pop(request.number, None)
        if watch is None:
            raise Refused(Fault.NOT_FOUND, f"there is no watch {request.number}")
        self._watches.remove(watch)
        watch.pending = ""
        return b""

    # -- changes

    def _next_serial(self) -> int:
        """Never one of before, also if what was done by it did not come to be."""
        self._serial += 1
        return self._serial

    def _edit(self, seat: Seat) -> Edit:
        return Edit(self._head, seat.who, seat.session, self._next_serial(), self.limits)

    def _by_host(self, change: Callable[[Edit], None]) -> None:
        edit = Edit(self._head, HOST, b"", self._next_serial(), self.limits)
        change(edit)
        self._take(edit, None, _nobody)

    def _take(self, edit: Edit, seat: Seat | None, answered: Answer) -> None:
        """The edit is part of the newest state, and is to be written."""
        domains = dict(edit.state.domains) if edit.state.domains is not self._head.domains else None
        self._head = edit.state
        self._commits += 1
        while self._open and self._open[0].began < self._commits - self.limits.history:
            self._open.popleft().expire()
        for path, before, after in edit.changes:
            if before is not None and before.session:
                self._forget(before, path)
            if after is not None and after.session:
                self._ephemeral.setdefault((after.payer, after.session), set()).add(path)
        self._pending.append(_Pending(edit.effects, edit.changes, domains, seat, answered))
        if seat is not None:
            seat.unsynced += 1

    def _forget(self, node: tree.Node, path: str) -> None:
        key = node.payer, node.session
        paths = self._ephemeral[key]
        paths.discard(path)
        if not paths:
            del self._ephemeral[key]

    def _vanish(self, keys: set[tuple[str, bytes]]) -> None:
        paths = [path for key in keys for path in self._ephemeral.get(key, ())]

        def remove(edit: Edit) -> None:
            for path in paths:
                if tree.look(edit.state.root, path) is not None:
                    edit.rm(path)

        if paths:
            self._by_host(remove)

    def batch(self) -> Batch | None:
        """What is to be written next; None while the last one is being written, or if there is nothing."""
        if self._writing or not self._pending:
            return None
        pending, self._pending = self._pending, []
        self._writing = True
        domains = next((one.domains for one in reversed(pending) if one.domains is not None), None)
        return Batch([one.effects for one in pending], domains, self._head, pending)

    def written(self, batch: Batch) -> None:
        """It is on disk: those who wait for it are answered, and watchers told."""
        self._writing = False
        self.durable = batch.state
        for one in batch.pending:
            if one.seat is not None:
                one.seat.unsynced -= 1
            one.answer(0, b"")
            self._watches.note(one.changes, one.seat)

    def failed(self, batch: Batch, error: str) -> None:
        """It could not be written: nothing of it, nor of what came after it, has happened."""
        self._writing = False
        lost = [*batch.pending, *self._pending]
        self._pending = []
        self._head = self.durable
        self._ephemeral = _ephemeral(self.durable)
        self._orphans = self._ephemeral.keys() - {(seat.who, seat.session) for seat in self._seats}
        for one in lost:
            if one.seat is not None:
                one.seat.unsynced -= 1
            one.answer(Fault.FAILED, frames.reason(f"the registry cannot write: {error}"))

    # -- events

    def tell(self) -> bool:
        """Send the events that wait, as far as their links take them. Whether there were any."""
        busy = False
        for seat in tuple(self._seats):
            while seat.waiting and self._tell(seat, seat.waiting[0]):
                seat.waiting.popleft().queued = False
                busy = True
        return busy

    def _tell(self, seat: Seat, watch: Watch) -> bool:
        if not watch.pending or watch.told:
            return True
        path, changes = watch.pending, watch.changes

        def done() -> None:
            watch.told = False
            if not seat.gone:
                watch.enqueue()

        body = frames.pack_event(watch.number, changes, path)
        if watch.nodes and seat.may(self._clock()):  # who has used up its share can still ask
            body = self._with_nodes(seat, watch.number, changes, path) or body
        if not seat.outside.event(body, done):
            return False
        watch.take()
        return True

    def _with_nodes(self, seat: Seat, number: int, changes: int, path: str) -> bytes:
        """The event with what is there, as the domain may read it; empty if that is too long."""
        began = self._clock()
        try:
            nodes = answer(self.durable, seat.who, Request(Op.TREE, path))
        except Refused:
            nodes = b""
        seat.credit -= self._clock() - began
        body = frames.pack_event(number, changes, path, nodes)
        return body if nodes[:1] != b"\1" and len(body) <= seat.outside.room else b""


def _ready(seat: Seat) -> bool:
    """Whether it has a request that waits for nothing but its turn."""
    return bool(seat.queue) and not (seat.unsynced and _shows(seat.queue[0][0]))


def _shows(request: Request) -> bool:
    return request.op in _SHOW and not request.transaction


def _nobody(_error: int, _status: bytes) -> None:
    """Nobody asked."""


def _ephemeral(state: State) -> dict[tuple[str, bytes], set[str]]:
    found: dict[tuple[str, bytes], set[str]] = {}
    for path, node in tree.walk(state.root, "/"):
        if node.session:
            found.setdefault((node.payer, node.session), set()).add(path)
    return found
