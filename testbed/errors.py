"""What can go wrong in the testbed, named by what failed. Pure; depends on nothing.

TestbedError                      a sentence, and a hint what to try
+-- SpecError                     what was asked for makes no sense, or does not fit together
+-- AccelUnavailable              the accelerator that was asked for cannot work here
+-- RunError                      the run directory or its keeper
+-- NetworkError                  the network between the VMs could not be made
+-- TemplateError                 a template for clones could not be built, or does not fit
+-- VmError                       one VM: its name, last console lines, the log's path
    +-- BootFailed                no READY from the agent, for whatever reason
    +-- QemuFailed                QEMU ended by itself, or refused its arguments; quotes its stderr
    +-- QmpFailed                 QEMU refused a command, or did not answer it in time
    +-- GuestPanicked             the kernel panicked
    +-- GuestOops                 the kernel said Oops or BUG, and went on
    +-- GuestHung                 QEMU runs, the agent does not answer
    +-- VmStopped                 the VM was shut down or killed on purpose while something waited for it
    +-- AgentLost                 the agent ended or started again while a call was open
    +-- CommandFailed             a command's exit code was not the wanted one
    +-- FileFailed                a file could not be pushed or pulled
    +-- TimedOut                  a wait was longer than its limit; the VM may be well
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

CONSOLE_LINES = 40
"""How many of the last console lines a VmError carries."""


class TestbedError(Exception):
    """Root of the tree. `hint` says what to try; it may be empty."""

    __test__ = False  # pytest collects classes by their name

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class SpecError(TestbedError):
    """A specification that cannot be carried out."""


class AccelUnavailable(TestbedError):
    """The accelerator that was asked for by name cannot work here; the message gives the reason."""


class RunError(TestbedError):
    """The run directory could not be made, or something of the run could not be ended."""


class NetworkError(TestbedError):
    """The network between the VMs could not be made."""


class TemplateError(TestbedError):
    """A template for clones could not be built, found or used; nothing half-made is left."""


class VmError(TestbedError):
    """Something about one VM.

    `console` holds the last lines of its serial console (CONSOLE_LINES at most), `log` the path of all of it.
    """

    def __init__(
        self, message: str, *, vm: str = "?", console: Sequence[str] = (), log: Path | None = None, hint: str = ""
    ) -> None:
        super().__init__(message, hint=hint)
        self.vm = vm
        self.console = tuple(console)
        self.log = log

    def __str__(self) -> str:
        parts = [f"VM {self.vm}: {self.message}"]
        if self.console:
            parts.append(f"last {len(self.console)} lines of the console:")
            parts.extend(f"  | {line}" for line in self.console)
        else:
            parts.append("the console is empty")
        if self.log is not None:
            parts.append(f"log: {self.log}")
        if self.hint:
            parts.append(f"hint: {self.hint}")
        return "\n".join(parts)


class BootFailed(VmError):
    """The agent never said READY. A panic, or QEMU's end, that explains it is the `__cause__`."""


class QemuFailed(VmError):
    """QEMU ended though nobody asked it to. `exit_code` as in subprocess; `stderr` is all it said."""

    exit_code: int = 0
    stderr: str = ""


class QmpFailed(VmError):
    """A QMP command was refused (`error_class` is QEMU's, such as GenericError) or not answered (it is empty)."""

    error_class: str = ""


class GuestPanicked(VmError):
    """The guest's kernel panicked; the console has its reasons."""


class GuestOops(VmError):
    """The guest's kernel reported Oops or BUG. It still runs, but nothing it says can be trusted."""


class GuestHung(VmError):
    """QEMU runs and the agent does not answer a ping."""


class VmStopped(VmError):
    """The VM was shut down, or killed, on purpose while something still waited for it."""


class AgentLost(VmError):
    """The agent ended, or was started again, while a call was open. Whether the call took effect is not known."""


class CommandFailed(VmError):
    """A command ended with another exit code than the one that was wanted."""

    exit_code: int = 0
    stdout: bytes = b""
    stderr: bytes = b""


class FileFailed(VmError):
    """A file could not be pushed or pulled; nothing is left under its final name. `errno` is the operating system's."""

    errno: int = 0


class TimedOut(VmError):
    """A wait was longer than its limit."""


def nearest(name: str, known: Iterable[str], *, every: bool = False) -> str:
    """A clause "; did you mean 'x'?", or, if nothing is near and `every` is set, the list of what there is."""
    names = list(known)
    close = difflib.get_close_matches(name, names, 1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f" (there are: {', '.join(names) or 'none'})" if every else ""
