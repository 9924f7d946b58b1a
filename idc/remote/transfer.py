"""Bytes between a local and a remote buffer, by whichever route. No I/O.

Direct: copied here, a step at a time. Host copy: the broker copies. Owner copy, network: pieces in frames, several
requests outstanding. Depends on idc.buffers and this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from idc.buffers.memory import process_memory
from idc.endpoint.frames import Kind
from idc.endpoint.results import Completion, Result
from idc.errors import BackPressuredError, FileRangeError, MisuseError, RefusedError
from idc.remote import wire
from idc.remote.operation import Operation, refused
from idc.remote.reference import Access
from idc.remote.resolution import Refusal
from idc.remote.routes import Route

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc.buffers.local import LocalBuffer
    from idc.remote.buffer import RemoteBuffer

#: Bytes copied between two looks at what the peer says.
STEP: Final = 1 << 20
#: Requests of one transfer outstanding at a time: more would let it crowd out others.
WINDOW: Final = 4


class Transfer(Operation):
    """One `receive_from` or `send_to`.

    Args:
        buffer: remote.
        local: as many bytes as are moved.
        offset: within the remote buffer, bytes.
        writing: from here to there.
        tell: say to the owner afterwards that it is filled.
        done: called once.
    """

    def __init__(self, buffer: RemoteBuffer, local: LocalBuffer, offset: int, done: Callable[[Completion], None] | None,
                 *, writing: bool, tell: bool = False) -> None:
        super().__init__(buffer, done)
        self._local = local
        self._offset = offset
        self._writing = writing
        self._tell = tell
        self._at = 0
        self._rest: list[tuple[int, int]] = []  # what a peer has left of a piece
        self._asked = 0
        self._failure: Completion | None = None
        self._copying = False
        self._host = False

    def step(self) -> bool:
        """See Operation."""
        return self._copy() if self._copying else super().step()

    def go(self) -> None:
        """See Operation."""
        try:
            route = self.buffer.choose(self._local, writing=self._writing)
        except MisuseError as error:
            self.finish(refused(Refusal.FAILED, f"the local buffer: {error}"))
            return
        if isinstance(route, str):
            self.finish(refused(Refusal.FORCED, route))
            return
        self.buffer.route = route
        if route is Route.DIRECT:
            self.use()
            self._copying = True
            self.again()
        elif route is Route.HOST:
            self._ask_broker()
        else:
            self._ask_owner()

    def lose(self, lost: Completion) -> None:
        """See Operation. What a broker has begun goes on over its own connection, and completes when it has ended."""
        if not self._host:
            self.finish(lost)

    def _complete(self) -> None:
        """All bytes are moved."""
        if self._tell and self.buffer.lost:
            self.finish(Completion(Result.OUTCOME_UNKNOWN, reason="moved, but the owner was not told"))
        elif self._tell:
            self.buffer.tell(self._offset, self._local.length, self.finish)
        else:
            self.finish(Completion(Result.OK))

    # -- direct

    def _copy(self) -> bool:
        buffer, at = self.buffer, self._at
        if self.over:
            return False
        count = min(STEP, self._local.length - at)
        try:
            there = buffer.here(self._offset + at, count, Access.WRITE if self._writing else Access.READ)
            local = self._local.slice(at, count)
            pair = (local, there) if self._writing else (there, local)
            self.link.exports.registry.copy(*pair, buffer.counter)
        except RefusedError as error:
            self.finish(refused(error.code, str(error)))
            return False
        except (MisuseError, FileRangeError) as error:
            self.finish(refused(Refusal.FAILED, f"not copied here: {error}"))
            return False
        self._at += count
        if self._at < self._local.length:
            return True
        self._complete()
        return False

    # -- host copy

    def _ask_broker(self) -> None:
        """Register the local buffer for as long as the broker needs it: complete when it cannot touch it any more."""
        buffer, broker, local = self.buffer, self.link.resources.broker, self._local
        assert broker is not None
        try:
            own = self.link.exports.register(local, Access.READ if self._writing else Access.WRITE)
        except BackPressuredError as error:
            self.finish(Completion(Result.BACK_PRESSURED, reason=str(error)))
            return
        except MisuseError as error:
            self.finish(refused(Refusal.FAILED, f"the local buffer: {error}"))
            return
        mine = (own.reference(), 0)
        theirs = (buffer.data, self._offset)
        (source, source_offset), (target, target_offset) = (mine, theirs) if self._writing else (theirs, mine)
        self._host = True

        def copied(completion: Completion) -> None:
            own.unregister(lambda quiet: self._copied_by_host(completion, quiet))

        result = broker.copy(source, target, local.length, copied, source_offset=source_offset,
                             target_offset=target_offset)
        if result is not Result.OK:
            own.unregister(lambda _: self.finish(Completion(result, reason="the broker takes no request now")))

    def _copied_by_host(self, completion: Completion, quiet: Completion) -> None:
        self._host = False
        if quiet.result is not Result.OK:
            self.finish(refused(Refusal.HELD, f"the local buffer is {quiet.reason}"))
        elif completion.result is Result.OK:
            self.buffer.counter.copied += self._local.length
            self._complete()
        elif completion.error == Refusal.NO_ROUTE and self.buffer.forced is None and not self.buffer.lost:
            self.buffer.no_host = True
            self.go()
        else:
            self.finish(completion)

    # -- owner copy, network

    def _ask_owner(self) -> None:
        """Keep as many pieces under way as may be; complete when none is."""
        while self._asked < WINDOW and self._failure is None and (piece := self._next_piece()) is not None:
            self._ask_piece(*piece)
        if not self._asked:
            if self._failure is None:
                self._complete()
            else:
                self.finish(self._failure)

    def _next_piece(self) -> tuple[int, int] | None:
        if self._rest:
            return self._rest.pop()
        left = self._local.length - self._at
        if not left:
            return None
        head = wire.REQUEST_BYTES if self._writing else wire.MOVED_BYTES
        piece = self._at, min(left, max(self.link.room - head, 1))
        self._at += piece[1]
        return piece

    def _ask_piece(self, at: int, count: int) -> None:
        buffer, data = self.buffer, bytearray()
        kind, want = (Kind.PUSH, Access.WRITE) if self._writing else (Kind.PULL, Access.READ)
        if self._writing:
            data = bytearray(count)
            try:
                self.link.exports.registry.copy(self._local.slice(at, count), process_memory(data), buffer.counter)
            except (MisuseError, FileRangeError) as error:
                self._failure = refused(Refusal.FAILED, f"not read here: {error}")
                return
        self._asked += 1
        self.link.ask(kind, wire.request(buffer.data, want, 0, self._offset + at, count, data),
                      lambda completion: self._answered(kind, at, count, completion))

    def _answered(self, kind: Kind, at: int, count: int, completion: Completion) -> None:
        self._asked -= 1
        if completion.result is not Result.OK:
            self._failure = self._failure or completion
        elif not self.over:
            copies, moved, data = wire.parse_moved(kind, completion.status, count)
            self.buffer.counter.copied += copies * moved
            if kind == Kind.PULL:
                self._put(at, data)
            if moved < count:
                self._rest.append((at + moved, count - moved))
        if not self.over:
            self._ask_owner()

    def _put(self, at: int, data: memoryview) -> None:
        try:
            self.link.exports.registry.copy(process_memory(data), self._local.slice(at, data.nbytes),
                                            self.buffer.counter)
        except (MisuseError, FileRangeError) as error:
            self._failure = self._failure or refused(Refusal.FAILED, f"not written here: {error}")
