"""Two runs measured take by take in turn: whoever has the baton works, the other waits. Depends on nothing.

`testbed bench --against` runs both versions at the same time, and this keeps them from ever working at once. What they
do is cut into slots, the same for both: getting ready is one, each take is one. In the first slot one goes first, in
the second the other, and so on:

    one     slot 1            slot 2  slot 3                    slot 4 ...
    other           slot 1    slot 2            slot 3  slot 4
    (the order within a slot: one other | other one | one other | ...)

so that both takes of a slot are as near in time as can be, and neither version is always the first. If the two do not
have the same slots, because their benchmarks differ, they still take turns, and only are less near to each other. Who
ends, or dies, leaves the other one the rest.
"""

from __future__ import annotations

import socket
from typing import Final, Self

from testbed.errors import SpecError

FIRST: Final = "first"
SECOND: Final = "second"


class Baton:
    """One side of it.

    Args:
        link: a stream socket to the other side, which becomes this object's; None: nobody else measures.
        first: whether this one goes first in the first slot; else this waits until the other is through with it.
    """

    def __init__(self, link: socket.socket | None = None, *, first: bool = True) -> None:
        self._link = link
        self._first = first
        if not first:
            self._wait()

    @classmethod
    def told(cls, text: str) -> Self:
        """From what a command line says: FD,first or FD,second. Raises SpecError."""
        number, _, place = text.partition(",")
        try:
            if place not in (FIRST, SECOND):
                raise ValueError
            link = socket.socket(fileno=int(number))
        except (ValueError, OSError) as error:
            raise SpecError(f"--in-turn {text}: it is for --against alone, which passes a socket") from error
        link.set_inheritable(False)
        return cls(link, first=place == FIRST)

    @property
    def shared(self) -> bool:
        """Whether there is somebody else."""
        return self._link is not None

    def next(self) -> None:
        """This slot is over: returns when it is this one's turn in the next."""
        if self._link is None:
            return
        if self._first:
            try:
                self._link.sendall(b"+")
            except OSError:  # it ended
                self._alone()
                return
            self._wait()
        self._first = not self._first

    def _wait(self) -> None:
        assert self._link is not None
        try:
            there = self._link.recv(1)
        except ConnectionError:
            there = b""
        if not there:
            self._alone()

    def _alone(self) -> None:
        assert self._link is not None
        self._link.close()
        self._link = None


#: Of a run that nobody else measures beside.
ALONE: Final = Baton()
