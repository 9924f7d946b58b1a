"""This process's own terminal: raw, and its size. Standard library only."""

from __future__ import annotations

import contextlib
import os
import sys
import termios
import tty
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

#: What leaves another terminal: Ctrl-], as telnet has it.
ESCAPE: Final = b"\x1d"


@contextlib.contextmanager
def raw_terminal() -> Iterator[None]:
    """Standard input unbuffered and unechoed while it lasts, if it is a terminal."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(0)
    try:
        tty.setraw(0)
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def write_all(data: bytes) -> None:
    """To standard output, all of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(1, view):]
