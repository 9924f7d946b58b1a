"""A command on a terminal of its own: what is on its screen, keys into it."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING, Self

import pexpect
import pyte

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

LIMIT = 60.0


class Screen:
    """A context manager; the command does not outlive it.

    Attributes:
        all: everything that the command wrote.
    """

    def __init__(self, *words: str, env: Mapping[str, str], size: tuple[int, int] = (30, 140)) -> None:
        self._screen = pyte.Screen(size[1], size[0])
        self._stream = pyte.ByteStream(self._screen)
        self.all = b""
        variables = {**os.environ, **env, "TERM": "xterm-256color"}
        for name in ("COLUMNS", "LINES"):  # the terminal's own size counts
            variables.pop(name, None)
        self.child: pexpect.spawn[bytes] = pexpect.spawn(
            sys.executable, ["-P", "-m", "testbed.cli", *words], dimensions=size, env=variables, timeout=LIMIT)

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self._screen.display]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def resize(self, rows: int, columns: int) -> None:
        self._screen.resize(rows, columns)
        self.child.setwinsize(rows, columns)

    def press(self, keys: str) -> None:
        self.child.send(keys)

    def until(self, what: Callable[[str], bool] | str, limit: float = LIMIT) -> str:
        """Wait until the screen shows that; returns it."""
        deadline = time.monotonic() + limit
        while not ((what in self.text) if isinstance(what, str) else what(self.text)):
            assert time.monotonic() < deadline, f"not in time; the screen:\n{self.text}"
            assert self._read(), f"it ended; the screen:\n{self.text}"
        return self.text

    def line(self, start: str) -> list[str]:
        """Words of the line that begins so."""
        return next((line.split() for line in self.lines if line.strip().startswith(start)), [])

    def shows(self, *words: str) -> None:
        """Wait for a line that begins with these words. A screen comes in pieces, of which a line may be two."""
        self.until(lambda _: self.line(words[0])[:len(words)] == list(words))

    def _read(self) -> bool:
        """A little of the output; False at its end."""
        try:
            data = self.child.read_nonblocking(1 << 16, 0.2)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.all += data
        self._stream.feed(data)
        return True

    def end(self) -> int:
        """Wait for its end; its exit code."""
        deadline = time.monotonic() + LIMIT
        while self._read():
            assert time.monotonic() < deadline, self.text
        self.child.wait()
        assert self.child.exitstatus is not None
        return int(self.child.exitstatus)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(pexpect.ExceptionPexpect):
            self.child.close(force=True)
