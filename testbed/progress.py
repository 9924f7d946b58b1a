"""What a person sees while something takes its time: one line for each step, bars for bytes. On standard error.

Depends on rich alone. Without a terminal there are plain lines and no bars.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from testbed.transfer import Progress as TransferProgress

_PHASES = {"push": "into the VM", "checksum": "checksum before", "transfer": "transfer", "verify": "checksum after",
           "save": "out of the VM"}


class Steps:
    """Shows steps.

    Args:
        console: where; by default standard error.
        quiet: show nothing but what failed.
    """

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._quiet = quiet

    def say(self, text: str) -> None:
        """One line."""
        if not self._quiet:
            # as it is: a name may hold [brackets], and a line that is cut in pieces cannot be searched for
            self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def wait(self, title: str) -> Iterator[None]:
        """Something of which nobody knows how long it takes."""
        if self._quiet:
            yield
        elif self.console.is_terminal:
            with self.console.status(Text(title)):
                yield
        else:
            self.say(f"{title} ...")
            yield

    @contextmanager
    def bar(self, title: str, size: int) -> Iterator[Callable[[int], None]]:
        """Bytes of a known size; call what you get with the bytes done so far."""
        with self._progress() as progress:
            task = progress.add_task(title, total=size)
            yield lambda done: progress.update(task, completed=done)
            progress.update(task, completed=size)

    @contextmanager
    def transfer(self, title: str) -> Iterator[TransferProgress]:
        """The phases of a transfer, each on the same line in its turn."""
        with self._progress() as progress:
            task = progress.add_task(title, total=None)

            def update(side: str, phase: str, done: int, size: int) -> None:
                # while bytes move both sides report; the receiver's count is the one that matters
                if phase == "transfer" and side == "source":
                    return
                progress.update(task, description=f"{title}: {_PHASES.get(phase, phase)}", completed=done, total=size)

            yield update

    def _progress(self) -> Progress:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        return Progress(*columns, console=self.console, transient=True,
                        disable=self._quiet or not self.console.is_terminal)
