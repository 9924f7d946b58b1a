"""Remote buffers on one endpoint: what this side asks, and what it answers. No I/O but through the session.

Requests of this side wait in a queue for a slot; each has a transfer, a lease or a request of the peer's behind it, so
the queue is bounded by those. Requests of the peer are answered at once, but for those that are forwarded and a REVOKE
of what is in use here. Depends on idc.endpoint.session, idc.buffers and this package.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING

from idc.endpoint.callbacks import call_each
from idc.endpoint.frames import ASK_BYTES, Kind
from idc.endpoint.results import Completion, Result
from idc.errors import (
    BackPressuredError,
    DisconnectedError,
    NotConnectedError,
    ProtocolError,
    RefusedError,
)
from idc.remote import wire
from idc.remote.buffer import RemoteBuffer
from idc.remote.forward import Forwarder
from idc.remote.operation import refused
from idc.remote.resolution import Refusal, Refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc.buffers.local import LocalBuffer
    from idc.endpoint.session import Done, IncomingAsk, Session
    from idc.remote.operation import LeaseUser, Operation
    from idc.remote.reference import Access
    from idc.remote.registration import Registration
    from idc.remote.resources import Remote
    from idc.remote.routes import Route
    from idc.remote.wire import Request


class Link:
    """See `idc.endpoint.party.Party`. To the owner's table it is a Holder: the peer.

    Args:
        resources: what it may use.
        name: of the peer, for messages.
        notify: wakes the peer for what was posted.
    """

    def __init__(self, resources: Remote, name: str, notify: Callable[[], None]) -> None:
        self.name = name
        self.resources = resources
        self.exports = resources.exports
        self.notify = notify
        self.near = True
        self.forwarder = Forwarder(self)
        self.operations: set[Operation] = set()
        self.runnable: deque[Operation] = deque()
        self._session: Session | None = None
        self._queue: deque[tuple[Kind, bytes, Done]] = deque()
        self._buffers: set[RemoteBuffer] = set()
        self._leases: dict[int, LeaseUser] = {}

    # -- the endpoint's calls

    def begin(self, session: Session, *, near: bool) -> None:
        """See Party."""
        self._session, self.near = session, near

    def serve(self, ask: IncomingAsk) -> None:
        """See Party."""
        if self.room < ASK_BYTES:
            raise ProtocolError(f"a {ask.kind.name} by a peer that takes no such requests itself")
        if ask.kind == Kind.RELEASE:
            lease = wire.parse_lease_id(ask.kind, ask.body)
            held = self.exports.held(lease)
            if held is None or held.holder is not self:
                raise ProtocolError(f"a RELEASE by {self.name}, which has no lease {lease}")
            ask.answer()  # first: an owner that is told of its quiet buffer may raise
            self.exports.release(self, lease)
        elif ask.kind == Kind.REVOKE:
            self._revoked(ask, wire.parse_lease_id(ask.kind, ask.body))
        else:
            request = wire.parse_request(ask.kind, ask.body)
            try:
                if self.exports.read_reference(request.reference).owner != self.exports.domain:
                    self.forwarder.serve(ask, request)
                else:
                    self._serve_own(ask, request)
            except RefusedError as error:
                ask.refuse(error.code, str(error))

    def work(self) -> bool:
        """See Party. One step of one operation at a time, so that frames are looked at in between."""
        ticked = self.exports.tick()
        if not self.runnable:
            return ticked
        operation = self.runnable.popleft()
        if operation.step():
            self.runnable.append(operation)
        self.notify()
        return True

    @property
    def busy(self) -> bool:
        """See Party."""
        return bool(self.runnable)

    @property
    def patience(self) -> float | None:
        """See Party."""
        return self.exports.patience

    def end(self, reason: str) -> None:
        """See Party. All of it is done, also if something that is told of it raises."""
        self._session = None
        lost = Completion(Result.OUTCOME_UNKNOWN, reason=reason)
        queue, self._queue = self._queue, deque()
        self.runnable.clear()
        self._leases.clear()
        call_each([
            *(partial(done, lost) for _, _, done in queue),
            *(partial(operation.lose, lost) for operation in self.operations),
            *(buffer.lose for buffer in self._buffers),
            self.forwarder.end,
            partial(self.exports.drop_holder, self),
            partial(self.exports.drop_owner, self),
        ])

    def register(self, buffer: LocalBuffer, access: Access, *, filled: Callable[[int, int], None] | None,
                 returned: Callable[[], None] | None, direct: bool, outlives: bool) -> Registration:
        """See Party."""
        if not self.connected and not outlives:
            raise NotConnectedError("a registration belongs to a connection, and there is none: wait for it, or say "
                                    "outlives=True")
        return self.exports.register(buffer, access, filled=filled, returned=returned, direct=direct,
                                     belongs=None if outlives else self)

    def remote(self, reference: bytes, *, route: Route | None, revoked: Callable[[], None] | None) -> RemoteBuffer:
        """See Party."""
        if not self.connected:
            raise NotConnectedError("a remote buffer is reached through a connection, and there is none")
        if len(self._buffers) >= self.resources.buffers:
            raise BackPressuredError(f"{self.resources.buffers} remote buffers are open: close one, then try again")
        buffer = RemoteBuffer(self, reference, route or self.resources.route, revoked)
        self._buffers.add(buffer)
        return buffer

    # -- what this side asks

    @property
    def room(self) -> int:
        """Most bytes of a request or an answer that both sides, and so the carrier, take; 0 if the peer takes none."""
        session = self._session
        if session is None or not session.peer.asks:
            return 0
        return min(session.peer.ask_bytes, session.accepts.ask_bytes)

    @property
    def under_way(self) -> int:
        """Operations that have a slot."""
        return sum(not operation.part for operation in self.operations)

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""
        return self._session is not None and not self._session.over

    def ask(self, kind: Kind, body: bytes, done: Done) -> None:
        """Ask the peer's library, now or when a slot is free; `done` is called once, maybe from within."""
        if not self.connected:
            done(Completion(Result.NOT_CONNECTED, reason="there is no connection"))
        elif not self.room:
            done(refused(Refusal.NOT_SERVED, "the peer was given no resources for requests about remote buffers"))
        else:
            self._queue.append((kind, body, done))
            self._submit()

    def _submit(self) -> None:
        while self._queue and self._session is not None and self.connected:
            kind, body, done = self._queue[0]

            def answered(completion: Completion, done: Done = done) -> None:
                try:
                    done(completion)
                finally:
                    self._submit()

            try:
                if self._session.submit_ask(kind, body, answered) is not Result.OK:
                    return
            except DisconnectedError:
                return  # the endpoint notices by itself, and `end` completes the queue
            self._queue.popleft()

    def forget(self, buffer: RemoteBuffer) -> None:
        """It is closed: its place is free."""
        self._buffers.discard(buffer)

    def knows(self, lease: int) -> bool:
        """Whether the peer has given a lease of that number."""
        return lease in self._leases or self.forwarder.holds(lease)

    def hold(self, lease: int, user: LeaseUser) -> None:
        """Note whose lease it is. Raises ProtocolError if the number is in use."""
        if self.knows(lease):
            raise ProtocolError(f"lease {lease} was given twice")
        self._leases[lease] = user

    def let_go(self, lease: int) -> None:
        """A lease is over for this side."""
        self._leases.pop(lease, None)

    def give_back(self, lease: int) -> None:
        """Release a lease that the owner has not asked for."""
        self.let_go(lease)
        self.ask(Kind.RELEASE, wire.lease_id(lease), _granted)
        self.notify()

    # -- what it answers

    def _serve_own(self, ask: IncomingAsk, request: Request) -> None:
        if ask.kind == Kind.RESOLVE:
            answer = self.exports.resolve(request.reference, request.want, self)
            if isinstance(answer, Refused):
                raise RefusedError(answer.refusal, answer.reason)
            ask.answer(wire.resolution(answer))
        elif ask.kind == Kind.PULL:
            self.exports.check(request.reference, request.want, request.offset, request.length)
            length = min(request.length, self.room - wire.MOVED_BYTES)
            ask.answer(wire.moved(1, length, self.exports.read(request.reference, request.offset, length)))
        elif ask.kind == Kind.PUSH:
            self.exports.write(request.reference, request.offset, request.data)
            ask.answer(wire.moved(1, request.length))
        else:
            self.exports.fill(request.reference, request.offset, request.length)
            ask.answer()

    def _revoked(self, ask: IncomingAsk, lease: int) -> None:
        user = self._leases.get(lease)
        if user is not None:
            user.withdraw(ask)
        elif not self.forwarder.revoked(ask, lease):
            # Released meanwhile. A RELEASE that waits for a slot must not come after this answer, which ends the lease.
            unsent = Kind.RELEASE, wire.lease_id(lease)
            self._queue = deque(waiting for waiting in self._queue if waiting[:2] != unsent)
            ask.answer()

    def revoke(self, lease: int) -> None:
        """See `idc.remote.registration.Holder`."""

        def answered(completion: Completion) -> None:
            _granted(completion)
            held = self.exports.held(lease)
            if completion.result is Result.OK and held is not None and held.holder is self:
                self.exports.release(self, lease)

        self.ask(Kind.REVOKE, wire.lease_id(lease), answered)
        self.notify()


def _granted(completion: Completion) -> None:
    """RELEASE and REVOKE cannot be refused."""
    if completion.result is Result.ERROR:
        raise ProtocolError(f"a lease that is over was refused: {completion.reason}")
