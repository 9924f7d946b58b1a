"""A buffer of another domain, as the holder of a reference sees it. Made by `Endpoint.remote`.

Belongs to the connection that it was made in, in one thread. Depends on idc.buffers and this package.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Self

from idc.buffers.local import CopyCounter, check_range
from idc.endpoint.callbacks import call_each
from idc.endpoint.frames import Kind
from idc.endpoint.results import Completion, Result
from idc.errors import MisuseError, ProtocolError, RefusedError
from idc.remote import wire
from idc.remote.borrow import Share, Take
from idc.remote.operation import Operation, Resolve, refused
from idc.remote.reference import Access, parse
from idc.remote.regions import writable
from idc.remote.resolution import Lease, OwnerCopy, Refusal
from idc.remote.routes import Route, Way, Worth, choose, worth
from idc.remote.transfer import Transfer

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc.buffers.local import LocalBuffer
    from idc.endpoint.session import Done, IncomingAsk
    from idc.region import Region
    from idc.remote.borrow import Got
    from idc.remote.link import Link

log = logging.getLogger("idc.remote")


class RemoteBuffer:
    """Another domain's buffer.

    Every operation takes one of the endpoint's slots for them, and says OK, BACK_PRESSURED (none is free), CLOSED (this
    object is closed, or its connection is over) or NOT_CONNECTED; nothing was begun unless OK. `done` is called once
    with its Completion, from within `pump`: OK, ERROR with a `Refusal` in `error` and the reason, BACK_PRESSURED (a
    broker was), or OUTCOME_UNKNOWN when the connection was lost. After anything but OK the target is undefined.

    Attributes:
        data: the reference's bytes. Sent on, they work where a route holds between the owner and whoever gets them.
        reference: what they say. Nothing of it is true before the owner has said so.
        length: bytes. `offset_in_page`: of the first one. So `PagePool.allocate_like` takes this object.
        route: of the latest transfer, or what was found when it was resolved; None before that.
        counter: copies of each byte on the way, whoever made them, but for those of a carrier.
        forced: the route, if it is.
    """

    def __init__(self, link: Link, data: bytes, forced: Route | None, revoked: Callable[[], None] | None) -> None:
        self.reference = parse(data)
        self.link = link
        self.forced = forced
        self.route: Route | None = None
        self.counter = CopyCounter()
        self.closed = False
        self.withdrawn = False
        self.no_host = False
        self.lost = False
        self.pending = 0
        self.length = self.reference.length
        self.offset_in_page = self.reference.offset_in_page
        self.data = bytes(data)
        self._revoked = revoked
        self._own = self.reference.owner == link.exports.domain
        self._answer: Lease | OwnerCopy | None = None
        self._lease: int | None = None
        self._mapped: LocalBuffer | None = None
        self._asked = False
        self._waiting: list[Callable[[Completion | None], None]] = []
        self._users = 0
        self._ask: IncomingAsk | None = None
        self._forwards = 0
        self._want = self.reference.access & (Access.READ | Access.WRITE)

    def __len__(self) -> int:
        return self.length

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the client's calls

    def receive_from(self, into: LocalBuffer, done: Done | None = None, *, offset: int = 0) -> Result:
        """Get bytes from the remote buffer.

        Args:
            into: where to; its length is how many. Pages at the same offset in their page stay fit to be shared on.
            done: see above.
            offset: of the first byte in the remote buffer.

        Raises:
            MisuseError: a range outside the remote buffer, or the reference does not allow to read.
        """
        self._check(Access.READ, offset, into.length)
        return Transfer(self, into, offset, done, writing=False).begin()

    def send_to(self, source: LocalBuffer, done: Done | None = None, *, offset: int = 0,
                filled: bool = False) -> Result:
        """Put bytes into the remote buffer.

        Args:
            source: all of it.
            done: see above.
            offset: of the first byte in the remote buffer.
            filled: tell the owner afterwards, as `filled` does.

        Raises:
            MisuseError: a range outside the remote buffer, or the reference does not allow to write.
        """
        self._check(Access.WRITE, offset, source.length)
        return Transfer(self, source, offset, done, writing=True, tell=filled).begin()

    def filled(self, offset: int = 0, length: int | None = None, done: Done | None = None) -> Result:
        """Tell the owner that a range is filled; ERROR with Refusal.FAILED is what its callback raised.

        Raises MisuseError as `send_to` does.
        """
        length = self.length - offset if length is None else length
        self._check(Access.WRITE, offset, length)
        return _Tell(self, offset, length, done).begin()

    def resolve(self, done: Done | None = None) -> Result:
        """Find out beforehand how the buffer is reached; the first transfer does it by itself."""
        return Resolve(self, done).begin()

    def share(self, done: Got) -> Result:
        """Get all of it as a local buffer that can be written while the owner's stays as it is.

        By map with private copy on write where the bytes are mapped here, else copied. The lease is kept until
        `Borrowed.release`. Strategy.MAP and Strategy.COPY can be forced.

        Raises:
            MisuseError: the reference does not allow to read.
        """
        self._check(Access.READ, 0, self.length)
        return Share(self, done).begin()

    def move(self, done: Got) -> Result:
        """Get all of it for this side alone: the owner's pages are handed over until `Borrowed.release`, else copied.

        Handed over are the owner's pages, in its part of the region: it is told when they come back and leaves them
        alone until then (soft). Strategy.HANDOVER and Strategy.COPY can be forced.

        Raises:
            MisuseError: the reference does not allow to read.
        """
        self._check(Access.READ, 0, self.length)
        return Take(self, done).begin()

    def forward(self) -> bytes:
        """The reference, to send on; until `close`, requests for it that come to this domain are passed on.

        Raises:
            BackPressuredError: too many are forwarded.
            MisuseError: closed.
        """
        if self.closed:
            raise MisuseError("this remote buffer is closed")
        if not self._own:
            self.link.exports.forward(self.data, self.link)
            self._forwards += 1
        return self.data

    @property
    def refusal(self) -> Worth | None:
        """What it is worth that the owner refuses this domain the bytes: soft if it maps their region; None before it
        is resolved. It is the same on every route.
        """
        return self.refusal_of(self.reference.access)

    def refusal_of(self, access: Access) -> Worth | None:
        """The same for some access: writes of a read-only member are refused by the hypervisor."""
        if self._own:
            return Worth.SOFT
        if self.route is None:
            return None
        return worth(mapped=self._region is not None, writing=access == Access.WRITE, writable=self._writable)

    def close(self) -> None:
        """Give the lease back, when what uses it has completed. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._stop_forwarding()
        self.settle()

    # -- for operations

    def when_resolved(self, then: Callable[[Completion | None], None]) -> None:
        """Call back with None once it is known how to reach the bytes, or with why it is not."""
        if self._own or self._answer is not None:
            then(None)
            return
        self._waiting.append(then)
        if not self._asked:
            self._asked = True
            if self._want:
                self.link.ask(Kind.RESOLVE, wire.request(self.data, self._want), self._resolved)
            else:
                self._resolved(refused(Refusal.RIGHTS, "the reference allows neither to read nor to write"))

    def choose(self, local: LocalBuffer | None, *, writing: bool) -> Route | str:
        """Which route a transfer takes, or why it cannot take the forced one; without `local` the best there can be."""
        resources = self.link.resources
        placed = local is None or self.link.exports.regions.place(local) is not None
        way = Way(answer=self._answer, own=self._own, mapped=self._mapped is not None, writing=writing,
                  writable=self._writable, broker=resources.broker is not None and not self.no_host, placed=placed,
                  near=self.link.near)
        return choose(way, self.forced)

    def here(self, offset: int, length: int, access: Access) -> LocalBuffer:
        """The bytes themselves, on the direct route. Raises RefusedError if it is an own buffer that is no more."""
        if self._mapped is not None:
            return self._mapped.slice(offset, length)
        registration, reference = self.link.exports.check(self.data, access, offset, length)
        return registration.buffer.slice(reference.offset + offset, length)

    @property
    def mapped(self) -> LocalBuffer | None:
        """The leased bytes as they are mapped here."""
        return self._mapped

    @property
    def own(self) -> bool:
        """Whether this very domain registered it."""
        return self._own

    def tell(self, offset: int, length: int, done: Done) -> None:
        """FILLED."""
        if self._own:
            try:
                self.link.exports.fill(self.data, offset, length)
            except RefusedError as error:
                done(refused(error.code, str(error)))
            else:
                done(Completion(Result.OK))
            return
        self.link.ask(Kind.FILLED, wire.request(self.data, Access.WRITE, 0, offset, length), done)

    def use(self) -> None:
        """Someone uses the lease."""
        self._users += 1

    def unuse(self) -> None:
        """No more."""
        self._users -= 1
        self.settle()

    @property
    def users(self) -> int:
        """What uses the lease."""
        return self._users

    def drop_lease(self) -> None:
        """Give the lease back, unused, and forget how the buffer was reached; an answer under way still counts."""
        lease, self._lease = self._lease, None
        self._answer, self._mapped = None, None
        if lease is not None:
            self.link.give_back(lease)

    def answer_fits(self, lease: Lease, want: Access) -> None:
        """Raise ProtocolError for a lease on something else than was asked for."""
        if lease.length != self.length or lease.access != want:
            raise ProtocolError(f"a lease of {lease.length} bytes to {lease.access}, asked for {self.length} to {want}")

    # -- for the link

    def withdraw(self, ask: IncomingAsk) -> None:
        """See `idc.remote.operation.LeaseUser`."""
        if self._ask is not None:
            raise ProtocolError(f"lease {self._lease} was revoked twice")
        self.withdrawn, self._ask = True, ask
        self.settle()
        self.tell_revoked()

    def tell_revoked(self) -> None:
        """Tell the client that the owner wants its pages back; what it raises is its own business."""
        if self._revoked is not None:
            try:
                self._revoked()
            except Exception:
                log.exception("what is called when a remote buffer is revoked failed")

    def lose(self) -> None:
        """The connection is over."""
        self.closed = self.lost = True
        self._lease, self._ask = None, None
        self._stop_forwarding()
        self.link.forget(self)

    def settle(self, *, unused: bool = False) -> None:
        """Let the lease go if nobody uses it and it is wanted back, or of no use; free the place of a closed one."""
        ended = self.closed and not self.pending
        if self._users:
            return
        ask, self._ask = self._ask, None
        if self._lease is not None and (ask is not None or ended or unused):
            lease, self._lease, self._mapped = self._lease, None, None
            if ask is None:
                self.link.give_back(lease)
            else:
                self.link.let_go(lease)
                ask.answer()
                self.link.notify()
        if ended:
            self.link.forget(self)

    # -- within

    @property
    def _writable(self) -> bool:
        return self._region is None or writable(self._region)

    @property
    def _region(self) -> Region | None:
        """The buffer's, if it is mapped here."""
        if self._answer is None or self._answer.region is None:
            return None
        return self.link.exports.regions.get(self._answer.region)

    def _check(self, access: Access, offset: int, length: int) -> None:
        check_range("the remote buffer", self.length, offset, length)
        if not access & self.reference.access:
            raise MisuseError(f"the reference allows to {self.reference.access}, not to {access}")

    def _resolved(self, completion: Completion) -> None:
        self._asked = False
        if completion.result is Result.OK:
            self._take_answer(wire.parse_resolution(completion.status))  # raises: the end completes what waits
        waiting, self._waiting = self._waiting, []
        failure = None if completion.result is Result.OK else completion
        call_each(partial(then, failure) for then in waiting)

    def _take_answer(self, answer: Lease | OwnerCopy) -> None:
        if isinstance(answer, Lease):
            self.answer_fits(answer, self._want)
            self.link.hold(answer.lease, self)
            self._lease = answer.lease
            self._mapped = self.link.exports.regions.reach(answer) if self.forced in (None, Route.DIRECT) else None
        self._answer = answer
        if self._mapped is None:
            self.settle(unused=True)
        route = self.choose(None, writing=not self.reference.access & Access.READ)
        self.route = None if isinstance(route, str) else route

    def _stop_forwarding(self) -> None:
        for _ in range(self._forwards):
            self.link.exports.unforward(self.data, self.link)
        self._forwards = 0


class _Tell(Operation):
    """FILLED by itself."""

    def __init__(self, buffer: RemoteBuffer, offset: int, length: int, done: Done | None) -> None:
        super().__init__(buffer, done)
        self._range = offset, length

    def step(self) -> bool:
        """See Operation: nothing has to be resolved."""
        self.buffer.tell(*self._range, self.finish)
        return False
