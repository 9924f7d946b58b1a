"""Streams of events on their way from the programs of a domain to another one: what a trace device's front end keeps.

    Inlet ─▶ Program ─▶ pieces of whole events ─▶ WRITE ─▶ answered: forgotten
                                          outcome unknown: sent again after OPEN has said what is written

No I/O but the ring's. Depends on idc.trace.
"""

from __future__ import annotations

import secrets
from collections import deque
from typing import TYPE_CHECKING, Final

from idc.endpoint import Completion, Result
from idc.errors import ProtocolError
from idc.trace import events, relay
from idc.trace.local import Inlet, Over
from idc.trace.relay import Ask, Fault, Op

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc.endpoint.session import Done

    Submit = Callable[[bytes, Done], Result]

#: Pieces of a stream that are not answered.
UNDER_WAY: Final = 4


class Stream:
    """One stream.

    Attributes:
        number: what the other side knows it by.
        over: nothing more is put into it, and why; empty while it goes on.
        done: the other side has all of it, or has refused the rest.
        refused: why it has; empty if it has not.
    """

    def __init__(self) -> None:
        self.number = secrets.randbits(63) + 1
        self.over = ""
        self.done = False
        self.refused = ""
        self._length = 0
        self._pieces: deque[tuple[int, bytes]] = deque()
        self._sent = 0
        self._opened = False
        self._asking = False

    @property
    def held(self) -> int:
        """Bytes that the other side has not said to have."""
        return sum(len(piece) for _, piece in self._pieces)

    def put(self, run: bytes) -> None:
        """Whole events."""
        self._pieces.append((self._length, run))
        self._length += len(run)

    def fill(self) -> bool:
        """Take in more, if there is any. Whether there was."""
        return False

    def parted(self) -> None:
        """The connection is lost: what was under way may be written, or not."""
        self._sent, self._opened, self._asking = 0, False, False

    def refuse(self, why: str, over: Over) -> None:
        """The rest of it goes nowhere."""
        del over
        self.refused, self.done = why, True
        self._pieces.clear()

    def send(self, submit: Submit) -> bool:
        """Submit what is due, as far as it is taken. Whether anything was."""
        if self.done:
            return False
        if not self._opened:
            return not self._asking and self._ask(submit, Ask(Op.OPEN, self.number), self._open)
        busy = False
        while self._sent < min(len(self._pieces), UNDER_WAY):
            at, piece = self._pieces[self._sent]
            if submit(Ask(Op.WRITE, self.number, at, piece).pack(), self._answered) is not Result.OK:
                return busy
            self._sent += 1
            busy = True
        if self.over and not self._pieces and not self._asking:
            return self._ask(submit, Ask(Op.CLOSE, self.number, data=self.over.encode()), self._closed) or busy
        return busy

    def close(self) -> None:
        """Let go of everything. Idempotent."""

    def _ask(self, submit: Submit, ask: Ask, done: Callable[[Completion], None]) -> bool:
        if submit(ask.pack(), done) is not Result.OK:
            return False
        self._asking = True
        return True

    def _open(self, completion: Completion) -> None:
        if self._failed(completion):
            return
        self._asking = False
        try:
            written = relay.written(completion.status)
        except ProtocolError as error:
            self.refuse(str(error), Over.NO_ROOM)
            return
        while self._pieces and self._pieces[0][0] + len(self._pieces[0][1]) <= written:
            self._pieces.popleft()
        self._opened = True

    def _answered(self, completion: Completion) -> None:
        if not self._failed(completion) and self._pieces:
            self._pieces.popleft()  # they are answered in order
            self._sent -= 1

    def _closed(self, completion: Completion) -> None:
        if not self._failed(completion):
            self.done = True

    def _failed(self, completion: Completion) -> bool:
        """Whether there is no answer, or a refusal."""
        if self.done or completion.result is Result.OUTCOME_UNKNOWN:
            return True
        if completion.result is Result.OK and not completion.error:
            return False
        text = completion.status.decode("utf-8", "replace") or completion.reason
        broke = completion.error == Fault.BROKE_RULES
        self.refuse(text, Over.BROKE_RULES if broke else Over.NO_ROOM)
        return True


class Program(Stream):
    """What one program logs.

    Args:
        inlet: its ring; closed with this object.
    """

    def __init__(self, inlet: Inlet) -> None:
        super().__init__()
        self.inlet = inlet
        self._rest = b""

    def fill(self) -> bool:
        """See `Stream`. Takes no more than can be under way: the ring holds the rest; the program waits, or drops."""
        busy = False
        gone = not self.over and self.inlet.left  # before the last look: what it wrote before it left is there
        while len(self._pieces) < UNDER_WAY and not self.done:
            if not self._take():
                if gone:
                    self.over = "the program closed it, or ended"
                break
            busy = True
        return busy

    def end(self, why: str) -> None:
        """The device is detached: what the program logged so far is passed on, and nothing that comes after that."""
        self.inlet.end(Over.DETACHED)
        while not self.done and self._take():
            pass
        self.over = self.over or why

    def _take(self) -> bool:
        """One piece out of the ring. Whether there was anything."""
        got = self.inlet.take(relay.PIECE - len(self._rest))
        run = self._rest + got
        try:
            end, _ = events.whole(run)
        except ProtocolError as error:
            self.refuse(f"the program broke the rules: {error}", Over.BROKE_RULES)
            return True
        self._rest = run[end:]
        if end:
            self.put(run[:end])
        return bool(got)

    def refuse(self, why: str, over: Over) -> None:
        """See `Stream`. The program learns of it."""
        super().refuse(why, over)
        self.inlet.end(over)

    def close(self) -> None:
        """See `Stream`."""
        self.inlet.close()
