"""What is under way on a remote buffer: one of a link's slots from the call to its completion. No I/O.

An operation begins, and completes, from within `Endpoint.pump`, a step at a time. Depends on this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from idc.endpoint.results import Completion, Result
from idc.remote.resolution import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc.endpoint.session import IncomingAsk
    from idc.remote.buffer import RemoteBuffer


class LeaseUser(Protocol):
    """Whoever a lease is for, at the holder."""

    def withdraw(self, ask: IncomingAsk) -> None:
        """The owner wants it back: answer once it is not used any more. Raises ProtocolError if asked before."""


def refused(refusal: int, reason: str) -> Completion:
    """How an operation ends that somebody refuses."""
    return Completion(Result.ERROR, refusal, reason=reason)


class Operation:
    """Something on a remote buffer that completes later.

    Args:
        buffer: remote.
        done: called once with how it ended.

    Attributes:
        over: it has completed.
        part: of another operation, whose slot serves both.
    """

    def __init__(self, buffer: RemoteBuffer, done: Callable[[Completion], None] | None) -> None:
        self.buffer = buffer
        self.link = buffer.link
        self.over = False
        self.part = False
        self._done = done
        self._using = False

    def begin(self) -> Result:
        """Take a slot: OK, or why not."""
        link = self.link
        if self.buffer.closed:
            return Result.CLOSED
        if not link.connected:
            return Result.NOT_CONNECTED
        if link.under_way >= link.resources.operations:
            return Result.BACK_PRESSURED
        self._enter()
        link.runnable.append(self)
        return Result.OK

    def begin_part(self) -> None:
        """Begin as part of another operation, which has the slot."""
        self.part = True
        self._enter()
        self.again()

    def _enter(self) -> None:
        self.link.operations.add(self)
        self.buffer.pending += 1

    def step(self) -> bool:
        """Do a piece; whether there is more to do at once. The first one resolves the buffer, if it is not."""
        self.buffer.when_resolved(self.resolved)
        return False

    def resolved(self, failure: Completion | None) -> None:
        """The buffer is resolved, or cannot be."""
        if self.over:
            return
        if failure is None and self.buffer.withdrawn:
            failure = refused(Refusal.WITHDRAWN, "the owner has revoked the buffer")
        if failure is None:
            self.go()
        else:
            self.finish(failure)

    def go(self) -> None:
        """What this operation is for."""
        raise NotImplementedError

    def again(self) -> None:
        """Step once more, from within `pump`."""
        self.link.runnable.append(self)

    def use(self) -> None:
        """The buffer's lease is used until this completes."""
        self._using = True
        self.buffer.use()

    def finish(self, completion: Completion) -> None:
        """Complete, once."""
        if self.over:
            return
        self.over = True
        self.link.operations.discard(self)
        self.buffer.pending -= 1
        if self._using:
            self.buffer.unuse()
        else:
            self.buffer.settle()
        done, self._done = self._done, None
        if done is not None:
            done(completion)

    def lose(self, lost: Completion) -> None:
        """The connection is over."""
        self.finish(lost)


class Resolve(Operation):
    """Only find out how the buffer can be reached."""

    def go(self) -> None:
        """See Operation."""
        self.finish(Completion(Result.OK))
