"""Another domain's pages used in place: shared with private copy on write, or handed over; copied where they cannot be.

Depends on idc.buffers and this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from idc.buffers.cow import CowView
from idc.buffers.memory import process_memory_like
from idc.buffers.registry import Strategy
from idc.endpoint.frames import Kind
from idc.endpoint.results import Completion, Result
from idc.errors import ProtocolError
from idc.remote import wire
from idc.remote.operation import Operation, refused
from idc.remote.reference import Access
from idc.remote.resolution import Lease, Refusal
from idc.remote.routes import Route
from idc.remote.transfer import Transfer

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from idc.buffers.local import LocalBuffer
    from idc.endpoint.session import IncomingAsk
    from idc.remote.buffer import RemoteBuffer

    #: Told how it ended, and with OK what was got.
    Got: TypeAlias = Callable[[Completion, "Borrowed | None"], None]


class Borrowed:
    """A local buffer with a remote buffer's bytes.

    Attributes:
        buffer: to read and to write.
        strategy: how it was got. COPY: its own memory. MAP: the owner's pages, with private copies of those that are
            written. HANDOVER: the owner's pages, for this side alone.
        lost: the connection is over, so the owner has taken pages back: what is not a private copy may be anything.
    """

    def __init__(self, remote: RemoteBuffer, buffer: LocalBuffer, strategy: Strategy, lease: int | None = None) -> None:
        self.buffer = buffer
        self.strategy = strategy
        self._remote = remote
        self._lease = lease
        self._ask: IncomingAsk | None = None
        self._released = False

    @property
    def lost(self) -> bool:
        """See above."""
        return self._remote.lost and self.strategy is not Strategy.COPY

    def release(self) -> None:
        """Give pages back: do not use the buffer any more. Idempotent."""
        if self._released:
            return
        self._released = True
        link = self._remote.link
        if self.strategy is Strategy.MAP:
            self._remote.unuse()
        elif self._lease is not None and not self._remote.lost:
            if self._ask is None:
                link.give_back(self._lease)
            else:
                link.let_go(self._lease)
                self._ask.answer()
                link.notify()
        if self._lease is not None:
            self._remote.pending -= 1
            self._remote.settle()

    def withdraw(self, ask: IncomingAsk) -> None:
        """See `idc.remote.operation.LeaseUser`: the owner waits until `release`."""
        if self._ask is not None:
            raise ProtocolError(f"lease {self._lease} was revoked twice")
        self._ask = ask
        self._remote.tell_revoked()


class _Borrow(Operation):
    """What share and move have in common: the way by a copy."""

    def __init__(self, buffer: RemoteBuffer, done: Got) -> None:
        super().__init__(buffer, self._ended)
        self._got = done
        self._result: Borrowed | None = None

    def _ended(self, completion: Completion) -> None:
        self._got(completion, self._result if completion.result is Result.OK else None)

    def have(self, borrowed: Borrowed) -> None:
        """Complete with that."""
        self._result = borrowed
        self.finish(Completion(Result.OK))

    def copy(self, forced: Strategy, against: str) -> None:
        """Copy all of it, unless another strategy is forced."""
        if self.link.resources.strategy is forced:
            self.finish(refused(Refusal.FORCED, f"{forced.value} is forced, but {against}"))
            return
        target = process_memory_like(self.buffer)

        def copied(completion: Completion) -> None:
            self._result = Borrowed(self.buffer, target, Strategy.COPY)
            self.finish(completion)

        Transfer(self.buffer, target, 0, copied, writing=False).begin_part()


class Share(_Borrow):
    """See `RemoteBuffer.share`."""

    def go(self) -> None:
        """See Operation."""
        buffer = self.buffer
        mapped = buffer.mapped
        if self.link.resources.strategy is Strategy.COPY or mapped is None or buffer.forced not in (None, Route.DIRECT):
            self.copy(Strategy.MAP, "the buffer's pages are not mapped here")
            return
        buffer.use()  # until it is released
        buffer.route = Route.DIRECT
        buffer.counter.mapped += buffer.length
        self.have(Borrowed(buffer, CowView(mapped, buffer.counter).buffer(), Strategy.MAP))


class Take(_Borrow):
    """See `RemoteBuffer.move`."""

    def step(self) -> bool:
        """See Operation."""
        buffer = self.buffer
        against = ""
        if self.link.resources.strategy is Strategy.COPY:
            against = "copy is forced"
        elif Access.TAKE not in buffer.reference.access:
            against = "the reference does not allow to take the pages over"
        elif buffer.own:
            against = "the buffer is this domain's own"
        elif buffer.forced not in (None, Route.DIRECT):
            against = "a route is forced on which no pages change hands"
        if against:
            self.copy(Strategy.HANDOVER, against)
        elif buffer.users:
            self.finish(refused(Refusal.BUSY, "transfers, or pages shared from it, use the buffer still"))
        else:
            buffer.drop_lease()  # goes first, so that the owner sees nobody else
            body = wire.request(buffer.data, buffer.reference.access)
            self.link.ask(Kind.RESOLVE, body, self._answered)
        return False

    def _answered(self, completion: Completion) -> None:
        if completion.result is not Result.OK:
            if completion.error == Refusal.RIGHTS:
                self.copy(Strategy.HANDOVER, completion.reason)
            else:
                self.finish(completion)
            return
        answer = wire.parse_resolution(completion.status)
        if not isinstance(answer, Lease):
            self.copy(Strategy.HANDOVER, answer.reason)
            return
        self.buffer.answer_fits(answer, self.buffer.reference.access)
        mapped = self.link.exports.regions.reach(answer)
        if mapped is None or self.over:
            self.link.give_back(answer.lease)
            if not self.over:
                self.copy(Strategy.HANDOVER, "the buffer's region is not mapped here")
            return
        borrowed = Borrowed(self.buffer, mapped, Strategy.HANDOVER, answer.lease)
        self.link.hold(answer.lease, borrowed)
        self.buffer.pending += 1  # until it is released
        self.buffer.route = Route.DIRECT
        self.buffer.counter.handed += self.buffer.length
        self.have(borrowed)
